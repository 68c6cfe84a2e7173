"""One release as one file: Arrow, uncompressed, in item order, for readers that want to map it into memory instead of scanning the lake.

Mapped, it is open in well under a millisecond whatever its size, and the processes of one training share its pages. Any tool that reads Arrow IPC reads it.
Suffixes: N items, L positions.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ContractError, UpstreamMissing

if TYPE_CHECKING:
    from torch import Tensor

KEY = b"sidmill.release"
EXPECTED, AGAIN = "a file that `sid export` wrote", "sid export TAG --out FILE"
LISTS = {"codes": pa.int32(), "weights": pa.float32()}  # one value per position


@dataclass(frozen=True)
class ReleaseFile:
    """A release as mapped into memory: nothing is read before it is used.

    Args:
        facts: what its codes mean: tag, logical_date, generation, codebook_digest (what a checkpoint is checked against), slots, codebook_sizes.
        rows: every column of the release, N rows sorted by item_id; its lists have a fixed length.
        codes_NL: int32, K of its position = masked slot.
        weights_NL: float32 router weights.
    Writing into a tensor changes this process's copy of a page, never the file.
    """

    facts: Mapping[str, Any]
    rows: pa.Table
    codes_NL: Tensor
    weights_NL: Tensor


def write(rows: pa.Table, facts: Mapping[str, Any], path: Path) -> Path:
    """Write a release so that a reader sees the old file or the new one, never half of one.

    Args:
        rows: as `lakehouse.read_release` gives them.
        facts: see ReleaseFile; `codebook_sizes` has an entry per position.
    Raises: ContractError for a row that has not one code and one weight per position.
    """
    positions = len(facts["codebook_sizes"])
    arrays = {name: column.combine_chunks() for name, column in zip(rows.column_names, rows.columns, strict=True)}
    for name, kind in LISTS.items():
        values_NL = matrix(arrays[name], positions, f"{name} of release {facts['tag']}")
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values_NL.reshape(-1), kind), positions)
    batch = pa.record_batch(arrays).replace_schema_metadata({KEY: json.dumps(dict(facts), sort_keys=True, default=str)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.ipc.new_file(temporary, batch.schema) as file:
            file.write_batch(batch)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def matrix(lists: pa.Array | pa.ChunkedArray, width: int, what: str = "codes") -> np.ndarray:
    """A release's column of lists, one value per position, as a matrix (N, width).

    Args:
        what: the column, for the error.
    Raises: ContractError when a row has another length or lacks a value.
    """
    values, lengths = pc.list_flatten(lists), pc.unique(pc.list_value_length(lists)).to_pylist()
    if lengths not in ([width], []) or values.null_count:
        raise ContractError(
            f"{what} are no matrix: a row has another length than the number of positions, or lacks a value",
            expected=f"{width} positions for every item",
            found=f"lengths {', '.join(map(str, lengths))}; {values.null_count} values missing",
            where="sid.item_sid",
            next_command="sid releases",
        )
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)


def read(path: Path) -> ReleaseFile:
    """Map a release into memory.

    Raises: UpstreamMissing when there is no such file; ContractError for a file that is no release, or cut short.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        rows = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all()
        rows.validate()  # lengths against buffers; the values stay where they are
        facts = json.loads((rows.schema.metadata or {})[KEY])
        codes_NL, weights_NL = (_tensor(mapped, rows, name, kind) for name, kind in LISTS.items())
    except FileNotFoundError as error:
        raise UpstreamMissing("no such release file", expected=EXPECTED, found="nothing", where=str(path), next_command=AGAIN) from error
    except (ValueError, KeyError, AttributeError, pa.ArrowException, OSError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ContractError("this is no whole release file", expected=EXPECTED, found=found, where=str(path), next_command=AGAIN) from error
    return ReleaseFile(facts, rows, codes_NL, weights_NL)


def _tensor(mapped: mmap.mmap, rows: pa.Table, name: str, kind: pa.DataType) -> Tensor:
    """A column of lists as a tensor over the file's own pages."""
    import torch

    column = rows[name].chunk(0) if rows.num_rows else pa.nulls(0, rows.schema.field(name).type)
    width, dtype = column.type.list_size, {pa.int32(): torch.int32, pa.float32(): torch.float32}[kind]
    if column.type.value_type != kind:
        raise ValueError(f"{name} are {column.type.value_type}, not {kind}")
    if not rows.num_rows:
        return torch.empty((0, width), dtype=dtype)
    offset = column.values.buffers()[1].address - pa.py_buffer(mapped).address
    return torch.frombuffer(mapped, dtype=dtype, count=len(column) * width, offset=offset).view(-1, width)
