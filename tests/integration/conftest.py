"""Releases made by hand (rows of sid.item_sid under a tag, rows of sid.release, older snapshots; no model is trained), and stages that need no MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pipeline import lakehouse, tracking
from pipeline.context import Home

Row = dict[str, Any]


class Shelf:
    """Writes releases into the lake of a test."""

    def __init__(self, spark: Any, home: Home) -> None:
        self.spark, self.home = spark, home
        self.rows: list[Row] = []

    def put(self, table: str, rows: Sequence[tuple[Any, ...]], days: Sequence[date] = (), tag: str = "", files: int = 1) -> int:
        """Snapshot of main after the rows replaced their days, or were appended, in so many files a partition."""
        frame = self.spark.createDataFrame(rows, self.spark.table(f"lake.{table}").schema).repartition(files)
        lakehouse.cut_branch(self.spark, table, "fill")
        self.spark.conf.set("spark.sql.iceberg.distribution-mode", "none")  # else Spark would gather a partition's rows in one file
        try:
            self._write(table, frame, days)
        finally:
            self.spark.conf.unset("spark.sql.iceberg.distribution-mode")
        return lakehouse.publish(self.spark, table, "fill", tag)

    def _write(self, table: str, frame: Any, days: Sequence[date]) -> None:
        if days:
            lakehouse.replace(frame, table, "fill", dates=days, equal={}, properties={})
        else:
            lakehouse.append(frame, table, "fill", {})

    def release(self, day: date, *, revision: int = 1, generation: int = 1, items: int = 6, files: int = 1) -> str:
        """Tag of a new release; `save` writes its row."""
        tag = f"d{day:%Y%m%d}" + (f"_r{revision}" if revision > 1 else "")
        rows = [
            (day, f"i{row:02d}", [row, revision], [1.0, 1.0], 0, 1.0, "head", "live", False, day, None, False, generation) for row in range(items)
        ]  # revisions differ in their codes
        at = self.put("sid.item_sid", rows, [day], tag, files)
        parent = self.rows[-1]["tag"] if self.rows else None
        facts = {"tag": tag, "logical_date": day, "revision": revision, "generation": generation, "codebook_digest": f"c{generation}", "parent_tag": parent}
        facts |= {"snapshot_id": at, "rows_digest": tag, "input_fingerprint": tag, "status": "current", "refit_due": False, "drift": "{}"}
        self.rows.append({**facts, "items": items, "reason": "test"})
        return tag

    def save(self) -> None:
        """All rows so far become sid.release."""
        schema = self.spark.table("lake.sid.release").schema
        frame = self.spark.createDataFrame([tuple(row[name] for name in schema.names) for row in self.rows], schema).coalesce(1)
        lakehouse.cut_branch(self.spark, "sid.release", "fill")
        lakehouse.replace_all(frame, "sid.release", "fill", {})
        lakehouse.publish(self.spark, "sid.release", "fill")

    def status(self) -> Mapping[str, str]:
        """Tag -> status as sid.release says."""
        return {row.tag: row.status for row in self.spark.table("lake.sid.release").collect()}

    def age(self, table: str, days: int, but: Collection[int] = ()) -> None:
        """Set back when the table's snapshots were committed, as if the test had begun long ago."""
        folder = self.home.folder("lake") / table.replace(".", "/") / "metadata"
        path = max(folder.glob("v*.metadata.json"), key=lambda found: int(found.name[1:].split(".")[0]))
        document = json.loads(path.read_text(encoding="utf-8"))
        for entry in (*document["snapshots"], *document["snapshot-log"]):
            entry["timestamp-ms"] -= 0 if entry["snapshot-id"] in but else days * 86_400_000
        path.write_text(json.dumps(document), encoding="utf-8")
        path.with_name(f".{path.name}.crc").unlink(missing_ok=True)


@pytest.fixture
def shelf(spark: Any, lake_home: Home) -> Shelf:
    """An empty lake that releases can be put into by hand."""
    return Shelf(spark, lake_home)


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded and nothing sent."""
    monkeypatch.setattr(tracking, "flush", lambda home, staging: 0)
    monkeypatch.setattr(tracking, "record", lambda *args, **kwargs: None)


@pytest.fixture
def models_in_folders(without_mlflow: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same, and a model goes to a folder."""
    monkeypatch.setattr(tracking, "log_model", lambda ctx, bundle: str(tracking.save_bundle(tmp_path / f"{bundle.name}_{ctx.run_id}", bundle)))


@pytest.fixture
def parquet(lake_home: Home) -> Callable[[], dict[str, int]]:
    """What lies in the tables' folders: path -> bytes of every Parquet file, asked of the disk."""
    return lambda: {str(path): path.stat().st_size for path in lake_home.folder("lake").rglob("*.parquet")}
