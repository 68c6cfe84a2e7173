"""What a job may read: tables at the snapshots the runner pinned, models by their MLflow address.

Jobs never open a table themselves, so a stage reads one state of the lake from its first row to its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import context, lakehouse, tracking
from pipeline.errors import UpstreamMissing

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession


def newest_observations(rows: pa.Table) -> pa.Table:
    """Per item of raw.item's rows the one of its latest file, without the date, by item_id: what that file no longer names is null, never an older file's.

    Args:
        rows: item_id, file_date and the columns wanted.
    """
    import pyarrow.compute as pc

    whole = pc.ScalarAggregateOptions(skip_nulls=False)
    wanted = [(name, "last", whole) for name in rows.column_names if name not in ("item_id", "file_date")]
    found = rows.sort_by("file_date").group_by("item_id", use_threads=False).aggregate(wanted).sort_by("item_id")
    return found.rename_columns([name.removesuffix("_last") for name in found.column_names])


@dataclass(frozen=True)
class Inputs:
    """The stage's view of the lake.

    Args:
        home: state folder and addresses.
        snapshots: table -> pinned snapshot id, None for a table without rows.
        spark: the session; None in python and torch stages.
    """

    home: context.Home
    lake: Any
    snapshots: Mapping[str, int | None]
    spark: SparkSession | None = None

    def frame(self, table: str, *, at: int | None = None) -> DataFrame:
        """A table at its pinned snapshot, or at the one that the plan names, as a Spark DataFrame."""
        assert self.spark is not None, "only Spark stages read DataFrames"
        pinned = self._pinned(table)
        return lakehouse.read_frame(self.spark, table, pinned if at is None else at)

    def query(self, table: str, views: Mapping[str, DataFrame], *, name: str = "query", **params: Any) -> DataFrame:
        """The SELECT of sql/<namespace>/<table>/<name>.sql over `views`, with named parameters (`:logical_date`)."""
        assert self.spark is not None, "only Spark stages run SQL"
        for view, frame in views.items():
            frame.createOrReplaceTempView(view)
        return self.spark.sql((context.SQL / table.replace(".", "/") / f"{name}.sql").read_text(encoding="utf-8"), args=params)

    def arrow(self, table: str, *, columns: tuple[str, ...] = ("*",), where: str = "", at: int | None = None, **among: Iterable[str]) -> pa.Table:
        """Rows of a table at its pinned snapshot through PyIceberg, no JVM.

        Args:
            columns: columns to read.
            where: PyIceberg row filter, e.g. "logical_date == '2026-11-20'".
            at: a snapshot that the plan names, instead of the pinned one.
            among: values that a column must have one of; other rows never come together in memory.
        """
        pinned = self._pinned(table)
        snapshot_id = pinned if at is None else at
        return lakehouse.read_arrow(self.home, self.lake, table, snapshot_id=snapshot_id, columns=columns, where=where, among=among or None)

    def release(self, tag: str) -> pa.Table:
        """Rows of one release (tag and its logical date), through PyIceberg."""
        return lakehouse.read_release(self.home, self.lake, tag)

    def model(self, uri: str) -> Path:
        """Local folder of a logged model: model.safetensors + config.json."""
        return tracking.download(self.home, uri)

    def _pinned(self, table: str) -> int | None:
        if table not in self.snapshots:
            raise UpstreamMissing(f"the stage did not declare {table} as an input", expected=", ".join(self.snapshots), found=table, where="pipeline/stages.py")
        return self.snapshots[table]
