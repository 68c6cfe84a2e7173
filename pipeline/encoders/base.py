"""What a content encoder is, how its vectors are named, and the fixed shapes that keep a vector independent of its batch.

Not here: torch, files of a data set, tables. The Spark driver imports this module (to name an encoder), so it stays light.
Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ContractError

Modality = Literal["text", "image"]
Precision = Literal["float32", "bfloat16"]
Vectors = NDArray[np.float32]
DIGEST_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Settings of one encoder; all of them may change a vector, so all of them stand in its id.

    Args:
        name: what a person calls it, e.g. `minilm`.
        batch: images per pass, or short texts per pass (see `rows_per_pass`).
        size: tokens read of a text, or pixels per side of an image.
        normalize: divide each vector by its L2 norm.
        precision: of the products of a text encoder; pictures keep float32 (bfloat16 leaves a cosine of .997).
    """

    name: str
    batch: int
    size: int
    normalize: bool
    precision: Precision = "float32"


class ContentEncoder(Protocol):
    """Maps texts or pictures to vectors; the same item gives the same bits whatever stands beside it."""

    encoder_id: str
    dim: int

    def __init__(self, folder: Path, options: EncoderOptions) -> None: ...

    @classmethod
    def identify(cls, folder: Path, options: EncoderOptions) -> str:
        """The encoder's id, read from the weights without loading them (no torch)."""
        ...

    def encode(self, batch: Any) -> Vectors:
        """Vectors (B, D) float32 of texts (sequence of str) or pictures (uint8 (B, size, size, 3))."""
        ...


def encoder_id(options: EncoderOptions, digest: str, *settings: str) -> str:
    """A stable name for everything that decides a vector: name, weights, settings; letters, digits, `.`, `_` and `-` only."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", options.name)
    length = "l2" if options.normalize else "raw"
    precision = [] if options.precision == "float32" else [options.precision]  # ids from before the setting stay
    return "-".join([name, digest[:DIGEST_LENGTH], *settings, f"s{options.size}", f"b{options.batch}", length, *precision])


def weights_digest(folder: Path, pattern: str, expected: str = "") -> str:
    """sha256 of the weights: of the one file, or of the digests of several in name order.

    Args:
        pattern: glob of the weight files in `folder`.
        expected: the only digest that is accepted; empty accepts any.
    Raises: ContractError when there is no such file or its digest is another.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise ContractError("the model has no weights that can be loaded", expected=f"{pattern} (never a pickle)", found="no such file", where=str(folder))
    digests = [_file_digest(path) for path in files]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if expected and digest != expected:
        raise ContractError("the weights are not the published ones", expected=f"sha256 {expected}", found=digest, where=str(files[0]))
    return digest


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


BUCKETS = (*range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 513, 64))
SHORT = 16  # tokens of the texts that `batch` is counted in


def length_buckets(max_tokens: int) -> tuple[int, ...]:
    """Padded lengths in use, ascending; the last one is `max_tokens`."""
    return (*(length for length in BUCKETS if length < max_tokens), max_tokens)


def rows_per_pass(length: int, batch: int) -> int:
    """Texts per pass of one bucket: about `batch` * 16 tokens whatever their length, so that every pass costs the same and short tails waste little."""
    return max(1, batch * SHORT // length)


def bucket_of(lengths: NDArray[np.int64], buckets: tuple[int, ...]) -> NDArray[np.int64]:
    """Index of the smallest bucket that holds each text, shape (B,); a text longer than the last one belongs there."""
    return np.minimum(np.searchsorted(np.asarray(buckets), lengths), len(buckets) - 1)


def padded(rows: Sequence[Any] | NDArray[Any], size: int) -> NDArray[Any]:
    """The rows followed by zero rows up to `size`, always a copy in C order: a short pass has the shape and layout of a full one."""
    block = np.asarray(rows)
    full = np.zeros((size, *block.shape[1:]), dtype=block.dtype)
    full[: len(block)] = block
    return full


def finished(vectors: Vectors, *, normalize: bool) -> Vectors:
    """The vectors as they are stored, (B, D) float32; with `normalize` divided by their L2 norm, a zero vector stays zero."""
    if not normalize:
        return np.ascontiguousarray(vectors, dtype=np.float32)
    wide = vectors.astype(np.float64)
    norm = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):  # an infinite vector becomes NaN here and is refused by `flaws`
        return (wide / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def flaws(vectors: Vectors) -> NDArray[np.str_]:
    """Why each vector must not be stored, shape (B,): `not finite`, `all zero`, or empty when it is sound."""
    finite = np.isfinite(vectors).all(axis=1)
    zero = (vectors == 0).all(axis=1)
    return np.where(~finite, "not finite", np.where(zero, "all zero", ""))
