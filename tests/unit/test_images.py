"""Addresses of pictures come from catalogue files: each leads below the image folder or nowhere, and a bad one costs its item the picture and no more."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest

from jobs.ingest import ImageRefused, image_digest, read_image

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
ANSWERS = {"/pictures/a.jpg": 200, "/pictures/busy.jpg": 503, "/pictures/login.jpg": 401, "/pictures/private.jpg": 403, "/secret.jpg": 200}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.jpg").write_bytes(b"abc")
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a.jpg", "a b+c (1).jpg", "a::b.jpg"):
        (root / name).write_bytes(b"abc")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    return root


@pytest.fixture(scope="module")
def server() -> Iterator[HTTPServer]:
    """Answers as ANSWERS says, 404 otherwise, and notes what it was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(ANSWERS.get(self.path, 404))
            self.send_header("Content-Length", "3")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"abc")

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            """Silent."""

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("name", ["a.jpg", "a b+c (1).jpg", "a::b.jpg", "../pictures/a.jpg"])
def test_a_picture_of_the_folder_is_read(folder: Path, name: str) -> None:
    assert image_digest(str(folder), name, 3) == (ABC, None, None)
    assert image_digest(str(folder), name, 2)[1] == "image_too_large"


@pytest.mark.parametrize(
    "uri",
    ["../secret.jpg", "out.jpg", "/etc/hostname", "file:///etc/hostname", "simplecache::file:///etc/hostname", "local:///etc/hostname",
     "http://127.0.0.1:9/a.jpg", "HTTP://x", "abc://x", "gs://bucket/a", "s3://bucket/a"],
)  # fmt: skip
def test_an_address_outside_a_local_folder_is_refused_whatever_its_protocol(folder: Path, uri: str) -> None:
    assert image_digest(str(folder), uri, 10)[:2] == (None, "image_outside_root")


@pytest.mark.parametrize("uri", ["none.jpg", ".", "a.jpg/b.jpg", "x" * 300, "\u00e4" * 200, "x" * 5000, "a\0b", "loop.jpg"])
def test_a_name_that_no_file_can_have_is_a_missing_image(folder: Path, uri: str) -> None:
    assert image_digest(str(folder), uri, 10)[:2] == (None, "image_missing")


def test_without_an_image_folder_nothing_is_read(folder: Path) -> None:
    for uri in (str(folder / "a.jpg"), "README.md"):
        assert image_digest("", uri, 10)[1] == "image_outside_root"


def test_a_store_is_read_below_its_own_folder_only() -> None:
    for place in ("pictures/a.jpg", "secret.jpg"):
        with fsspec.open(f"memory://{place}", "wb") as stream:
            stream.write(b"abc")
    root = "memory://pictures"
    assert image_digest(root, "a.jpg", 3) == image_digest(root, "memory://pictures/a.jpg", 3) == image_digest(f"{root}/", "a.jpg", 3) == (ABC, None, None)
    assert image_digest(root, "b.jpg", 3)[1] == "image_missing"
    ways_out = ["memory://secret.jpg", "memory://pictures.jpg", "../secret.jpg", "%2e%2e/secret.jpg", "..%2fsecret.jpg", "..\\secret.jpg", ".\n./secret.jpg",
                "simplecache::file:///etc/hostname", "memory://pictures/x::file:///etc/hostname", "file:///etc/hostname", "a/../../secret.jpg"]  # fmt: skip
    assert {image_digest(root, uri, 3)[1] for uri in ways_out} == {"image_outside_root"}


def test_a_server_without_the_picture_is_told_from_one_that_is_down(server: HTTPServer) -> None:
    root = f"http://127.0.0.1:{server.server_port}/pictures"
    assert image_digest(root, "a.jpg", 3) == (ABC, None, None)
    assert image_digest(root, "none.jpg", 3)[1:] == ("image_missing", "the server answers 404")
    assert image_digest(root, "private.jpg", 3)[1:] == ("image_missing", "the server answers 403")
    assert image_digest(root, f"http://127.0.0.1:{server.server_port}/secret.jpg", 3)[1] == "image_outside_root"
    for outage in ("busy.jpg", "login.jpg"):
        with pytest.raises(OSError):
            read_image(root, outage, 3)
    with pytest.raises(OSError):
        read_image("http://127.0.0.1:9/pictures", "a.jpg", 3)


@pytest.mark.parametrize(("number", "expected"), [(errno.EACCES, ImageRefused), (errno.EIO, OSError)])
def test_a_file_that_may_not_be_read_is_a_missing_image_and_a_broken_disk_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def refused(path: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(expected, match=os.strerror(number)):
        read_image(str(folder), "a.jpg", 3)
