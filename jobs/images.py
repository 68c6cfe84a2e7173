"""Pictures that a catalogue names: each lies below the image folder or nowhere, has a limit in bytes, and is told by the hash of its bytes.

Addresses come from catalogue files, so they are not trusted: none chooses a protocol or a server, and a server that sends a reader elsewhere is not followed
out of the folder. Not here: decoding (pipeline/encoders/image.py).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote, urljoin

import pyarrow as pa

MAX_URI = 1024
READERS = 8  # pictures of one task that are under way at a time: most of the time goes into waiting for a server
OUTSIDE = "the address lies outside the image folder"
ADDRESS_FAULTS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EACCES)  # of one file; other errors of the system are an outage
SERVER_FAULTS = (401, 407, 408, 429)  # answers between 400 and 499 that say nothing about the picture
WEB = ("http://", "https://")

ImageReason = Literal["image_missing", "image_outside_root", "image_too_large"]


def image_reader(root: str, limit: int) -> Callable[[Any], Iterator[pa.RecordBatch]]:
    """A mapInArrow function: image_uri -> sha256 of the bytes, or a reason and what was found."""

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """A batch of digests per batch of addresses."""
        with ThreadPoolExecutor(READERS) as readers:
            for batch in batches:
                uris = batch.column("image_uri").to_pylist()
                found = list(readers.map(lambda uri: image_digest(root, uri, limit), uris))  # one file each: nothing to vectorise
                columns = [pa.array(column, pa.string()) for column in (uris, *zip(*found, strict=True))] if found else [pa.array([], pa.string())] * 4
                yield pa.RecordBatch.from_arrays(columns, ["image_uri", "image_sha256", "image_reason", "image_detail"])

    return read


class ImageRefused(ValueError):
    """Raised for an image that its item goes on without.

    Args:
        reason: code of raw.rejected_row.
        detail: what was found.
    """

    def __init__(self, reason: ImageReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: ImageReason = reason
        self.detail = detail


def image_digest(root: str, uri: str, limit: int) -> tuple[str | None, str | None, str | None]:
    """(sha256, None, None) of the image's bytes, or (None, reason, detail)."""
    try:
        return hashlib.sha256(read_image(root, uri, limit)).hexdigest(), None, None
    except ImageRefused as refused:
        return None, refused.reason, refused.detail


def read_image(root: str, uri: str, limit: int) -> bytes:
    """Bytes of one image, at most `limit`.

    The address comes from a catalogue file: it leads below the folder that the profile names or nowhere, and never chooses a protocol or a server.

    Args:
        root: folder or fsspec URI; a relative `uri` is joined to it, a complete one must begin with it.
    Raises: ImageRefused for an address or an image that cannot be used. Other errors of a disk or a store propagate: an outage is no missing image.
    """
    if "\0" in uri or len(uri) > MAX_URI:
        raise ImageRefused("image_missing", "no such file")
    try:
        with _opened(root, uri) as stream:
            content = _whole(stream, limit)
    except OSError as error:
        if isinstance(error.__cause__, ImageRefused):
            raise error.__cause__ from None  # fsspec says "not found" of a picture that we refused on its way
        if not (detail := _address_fault(error, root)):
            raise
        raise ImageRefused("image_missing", detail) from error
    if len(content) > limit:
        raise ImageRefused("image_too_large", f"more than {limit} bytes")
    return content


def _whole(stream: BinaryIO, limit: int) -> bytes:
    """All bytes, or more than `limit` of them: one read of a server that does not say how much it sends returns what has arrived so far."""
    content = bytearray()
    while len(content) <= limit and (more := stream.read(limit + 1 - len(content))):
        content += more
    return bytes(content)


def _opened(root: str, uri: str) -> AbstractContextManager[Any]:
    """The stream of an image below the root."""
    if "://" in root:
        import fsspec

        options = {"client_kwargs": _client(root)} if root.startswith(WEB) else {}
        opened: AbstractContextManager[Any] = fsspec.open(_address_below(root, uri), "rb", **options)
        return opened
    folder = os.path.realpath(root)
    path = Path(os.path.realpath(Path(folder) / uri))  # not Path.resolve: it raises on a loop of links
    if not root or "://" in uri or not path.is_relative_to(folder):
        raise ImageRefused("image_outside_root", OUTSIDE)
    if not path.is_file():
        raise FileNotFoundError(uri)
    return path.open("rb")


def _address_below(root: str, uri: str) -> str:
    """The complete address of an image below a remote root; what a server or fsspec could take for a way out is refused."""
    folder = root.rstrip("/") + "/"
    rest = uri.removeprefix(folder)
    if re.search(r"::|://|[\x00-\x1f]", rest) or ".." in re.split(r"[/\\]", unquote(rest)):
        raise ImageRefused("image_outside_root", OUTSIDE)
    return folder + rest


@functools.cache
def _client(root: str) -> dict[str, Any]:
    """Settings of fsspec's web client: it follows a server's `Location` below the root alone."""
    import aiohttp

    async def stay(session: aiohttp.ClientSession, context: object, hop: aiohttp.TraceRequestRedirectParams) -> None:
        """Refuse a redirect out of the folder before it is followed."""
        target = hop.response.headers.get("Location") or hop.response.headers.get("URI") or ""
        _address_below(root, urljoin(str(hop.url), target))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(stay)
    return {"trace_configs": [trace]}


def _address_fault(error: OSError, root: str) -> str:
    """What is wrong with this one address, in words; empty when the disk, the store or the way to it is to blame."""
    cause = error.__cause__
    if root.startswith(WEB) and isinstance(cause, Exception) and not isinstance(cause, FileNotFoundError):
        status = int(getattr(cause, "status", 0))  # fsspec says "not found" whatever happened to the server
        if 400 <= status < 500 and status not in SERVER_FAULTS:
            return f"the server answers {status}"
        return "no address" if isinstance(cause, ValueError) else ""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return "no such file"
    return os.strerror(error.errno) if error.errno in ADDRESS_FAULTS else ""
