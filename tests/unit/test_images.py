"""Addresses of pictures come from catalogue files: each leads below the image folder or nowhere, and a bad one costs its item the picture and no more."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from jobs.images import ImageRefused, image_digest, read_image

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
ANSWERS = {
    "/pictures/a.jpg": 200,
    "/pictures/busy.jpg": 503,
    "/pictures/login.jpg": 401,
    "/pictures/private.jpg": 403,
    "/secret.jpg": 200,
    "/pictures/parts.jpg": 200,
}
MOVED = {"/pictures/moved.jpg": "a.jpg", "/pictures/away.jpg": "/secret.jpg", "/pictures/abroad.jpg": "http://localhost:9/pictures/a.jpg"}
PIECES = [bytes([number]) * 50_000 for number in range(6)]
ASKED: list[str] = []


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
    """Answers as ANSWERS and MOVED say, 404 otherwise, and notes what it was asked for; `parts.jpg` comes piece by piece and without a length."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ASKED.append(self.path)
            pieces = PIECES if self.path.endswith("parts.jpg") else [b"abc"]
            self.send_response(302 if self.path in MOVED else ANSWERS.get(self.path, 404))
            if self.path in MOVED:
                self.send_header("Location", MOVED[self.path])
            if len(pieces) == 1:
                self.send_header("Content-Length", "3")
            self.end_headers()
            for piece in pieces if self.command == "GET" else []:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.01 * (len(pieces) > 1))

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            """Silent."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


def test_a_picture_of_unknown_length_is_read_to_its_end(server: HTTPServer) -> None:
    root, whole = f"http://127.0.0.1:{server.server_port}/pictures", b"".join(PIECES)
    assert image_digest(root, "parts.jpg", len(whole)) == (hashlib.sha256(whole).hexdigest(), None, None)
    assert image_digest(root, "parts.jpg", len(whole) - 1)[1] == "image_too_large"


def test_a_server_leads_a_reader_on_inside_the_folder_and_nowhere_else(server: HTTPServer) -> None:
    root = f"http://127.0.0.1:{server.server_port}/pictures"
    assert image_digest(root, "moved.jpg", 3) == (ABC, None, None)
    ASKED.clear()
    assert [image_digest(root, name, 3)[1] for name in ("away.jpg", "abroad.jpg")] == ["image_outside_root"] * 2
    assert "/secret.jpg" not in ASKED
    assert "/pictures/away.jpg" in ASKED


@pytest.mark.parametrize(("number", "expected"), [(errno.EACCES, ImageRefused), (errno.EIO, OSError)])
def test_a_file_that_may_not_be_read_is_a_missing_image_and_a_broken_disk_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def refused(path: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(expected, match=os.strerror(number)):
        read_image(str(folder), "a.jpg", 3)
