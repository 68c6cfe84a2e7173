"""A release's codes into one tensor: an Iceberg scan at a tag against the JSON index, .pt and Parquet files that published tokenizers write; and mapped."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench import Case
from torch import Tensor

from jobs.assign_sid import list_array
from pipeline import release_file

NUMBER, TITLE = 5, "release to torch"
COUNTS = {"quick": (10_000, 100_000), "normal": (10_000, 100_000, 1_000_000), "full": (10_000, 100_000, 1_000_000, 10_000_000)}
LEVELS, SIZE = 6, 100
JSON_MOST = 1_000_000
GATHERED = 65_536
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)  # a view of the scan's buffer, only read


def cases(scale: str) -> Iterator[Case]:
    for count in COUNTS[scale]:
        with tempfile.TemporaryDirectory() as folder:
            codes_NL = np.random.default_rng(0).integers(0, SIZE, (count, LEVELS)).astype(np.int32)
            ways = {"Iceberg": iceberg(Path(folder), codes_NL)} | files(Path(folder), codes_NL)
            yield reading(codes_NL, ways)
            yield mapping(Path(folder), codes_NL, {name: ways[name] for name in ("Iceberg", "tensor file")})


def reading(codes_NL: np.ndarray, ways: Mapping[str, Callable[[], Tensor]]) -> Case:
    """Warm reads; the first read of each way stands in the facts."""
    count, rows = len(codes_NL), torch.randperm(len(codes_NL))[:GATHERED]
    return Case(
        name=f"{count:,} rows of {LEVELS} codes",
        ours=ways["Iceberg"],
        peers={name: way for name, way in ways.items() if name != "Iceberg"},
        judged=("JSON index",),
        equal=differs,
        units=count,
        unit="rows",
        work=float(codes_NL.nbytes),
        limit="read",
        seconds=0.05 * max(1.0, count / 1_000_000),
        rounds=5 if count < JSON_MOST else 3,
        series="reading a release over rows",
        size=count,
        facts=lambda: {f"gather of {GATHERED} shuffled rows, ms": gather_time(torch.from_numpy(codes_NL), rows)},
    )


def mapping(folder: Path, codes_NL: np.ndarray, ways: Mapping[str, Callable[[], Tensor]]) -> Case:
    """Opening what `sid export` wrote: nothing is read before it is used."""
    names = pa.array(np.arange(len(codes_NL)).astype(str))
    rows = pa.table({"item_id": names, "codes": list_array(codes_NL), "weights": list_array(np.ones(codes_NL.shape, np.float32))})
    path = release_file.write(rows, {"tag": "release", "codebook_sizes": [SIZE] * LEVELS}, folder / "release.arrow")
    return Case(
        name=f"{len(codes_NL):,} rows of {LEVELS} codes, mapped",
        ours=lambda: release_file.read(path).codes_NL,
        peers=ways,
        equal=differs,
        units=len(codes_NL),
        unit="rows",
        seconds=0.001,
        series="mapping a release over rows",
        size=len(codes_NL),
    )


def differs(ours: Tensor, theirs: Tensor) -> str:
    return "" if torch.equal(ours.long(), theirs.long()) else "other codes"


def gather_time(codes_NL: Tensor, rows: Tensor) -> float:
    from bench import best

    return round(1000 * best(lambda: codes_NL[rows]), 3)


def iceberg(folder: Path, codes_NL: np.ndarray) -> Callable[[], Tensor]:
    """A tagged table as the nightly run leaves it; reading = load the table, plan, scan the codes."""
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("lake", uri=f"sqlite:///{folder / 'catalog.db'}", warehouse=f"file://{folder / 'warehouse'}")
    catalog.create_namespace("sid")
    data = pa.table({"item_id": pa.array(np.arange(len(codes_NL)).astype(str)), "codes": list_array(codes_NL)})
    table = catalog.create_table("sid.item_sid", schema=data.schema)
    table.append(data)
    snapshot = table.current_snapshot()
    assert snapshot is not None
    table.manage_snapshots().create_tag(snapshot.snapshot_id, "release").commit()

    def read() -> Tensor:
        """The codes at the tag."""
        scan = catalog.load_table("sid.item_sid").scan(selected_fields=("codes",)).use_ref("release")
        column = scan.to_arrow()["codes"].combine_chunks()
        return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1))

    return read


def files(folder: Path, codes_NL: np.ndarray) -> dict[str, Callable[[], Tensor]]:
    """The formats of others: one JSON object of token strings, one tensor file, Parquet columns."""
    torch.save(torch.from_numpy(codes_NL).long(), folder / "codes.pt")
    pq.write_table(pa.table({f"code_{level}": column.astype(np.int16) for level, column in enumerate(codes_NL.T)}), folder / "codes.parquet")
    number = re.compile(r"\d+")

    def parsed(text: dict[str, Any]) -> Tensor:
        """The numbers inside the token strings."""
        return torch.tensor([[int(number.search(token).group()) for token in tokens] for tokens in text.values()])  # type: ignore[union-attr]

    ways: dict[str, Callable[[], Tensor]] = {
        "tensor file": lambda: torch.load(folder / "codes.pt", weights_only=True),
        "Parquet columns": lambda: torch.from_numpy(np.stack([column.to_numpy() for column in pq.read_table(folder / "codes.parquet").columns], 1)),
    }
    if len(codes_NL) <= JSON_MOST:
        names = np.char.add(np.char.add(np.array([f"<{chr(97 + level)}_" for level in range(LEVELS)]), codes_NL.astype(str)), ">")
        (folder / "index.json").write_text(json.dumps(dict(zip(map(str, range(len(codes_NL))), names.tolist(), strict=True))), encoding="utf-8")
        ways["JSON index"] = lambda: parsed(json.loads((folder / "index.json").read_text(encoding="utf-8")))
    return ways
