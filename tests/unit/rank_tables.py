"""What both trainings on examples read beside them: the releases of a small lake, and the facts of the draw."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pyarrow as pa


def release_tables(sizes: Sequence[int]) -> dict[str, pa.Table]:
    """Two releases of one generation, by table."""
    releases = {"tag": ["d20260101", "d20260102"], "logical_date": [date(2026, 1, 1), date(2026, 1, 2)], "generation": [1, 1]}
    return {
        "sid.release": pa.table({**releases, "codebook_digest": ["abc", "abc"]}),
        "sid.generation": pa.table({"generation": [1], "codebook_sizes": pa.array([sizes], pa.list_(pa.int32()))}),
    }


def drawn(examples: pa.Table, **changes: object) -> dict[str, Any]:
    """What the stage rank_example says of its examples."""
    counts = {split: examples["split"].to_pylist().count(split) for split in ("train", "test")}
    facts = {"served_release": "d20260101", "evaluation_release": "d20260101", "example_release": "d20260101", "logical_date": "2026-01-01"}
    return {**facts, "train_until": "2026-01-01", "train_rows": counts["train"], "test_rows": counts["test"], "digest": "x", "note": "", **changes}
