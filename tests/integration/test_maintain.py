"""Housekeeping on real tables: what a dry run lists is what goes, bytes are compared on disk, live releases read as before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import maintain, pins, runner, views
from pipeline import config, lakehouse, tracking
from pipeline.context import Context, Home
from pipeline.errors import ContractError

pytestmark = pytest.mark.spark
TINY = config.load("tiny")
D0, D1, D2, D3, D4, D5 = (date(2026, 1, day) for day in (4, 5, 6, 7, 8, 9))
POPULARITY, FEATURE, TRAINED, CONTENT = "feature.item_popularity", "feature.item_feature", "feature.item_behavior_vector", "feature.item_content_vector"
TABLES = ["sid.release", "sid.item_sid", POPULARITY, FEATURE, TRAINED]
Parquet = Callable[[], dict[str, int]]


@pytest.fixture(autouse=True)
def _quietly(lake_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """No MLflow; only the tables that the test fills, because each one costs a listing of its folder."""
    monkeypatch.setattr(tracking, "flush", lambda home, staging: 0)
    monkeypatch.setattr(tracking, "record", lambda *args, **kwargs: None)
    monkeypatch.setattr(lakehouse, "table_names", lambda: TABLES)


def context(home: Home) -> Context:
    return Context(config=TINY, home=home, stage="maintain", logical_date=datetime.now(UTC).date(), run_id="maintain")


def listed(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    return {(row["what"], row["table"]): row["names"] for row in rows}


def manifest(trained: dict[date, date]) -> list[tuple[Any, ...]]:
    """One item's row of each night, whose behaviour row was trained on the night's value."""
    return [(day, "i00", 1, "c", "h", None, "enc", None, behavior, 8, 3, 0.5, 0.5, 1.0, "head", "live", D1, None) for day, behavior in trained.items()]


def features(shelf: Any, trained: dict[date, date]) -> None:
    """One item's rows of each night in three tables."""
    shelf.put(FEATURE, manifest(trained), list(trained))
    shelf.put(POPULARITY, [(day, "i00", 1.0, 0.5, 5, "head", 8, D1, 0, "s") for day in trained], list(trained))
    shelf.put(TRAINED, [(day, "i00", 1, [1.0, 2.0], 1.0, 8, 3) for day in (D1, D2, D3, D4)], [D1, D2, D3, D4])


def five_nights(shelf: Any) -> str:
    """Five releases in two generations, the fourth made twice; all but the last were published 100 days ago. Returns the pinned tag.

    A backfill is under way: the manifest of a night before all of them was just written, its release is not there yet.
    """
    for day, generation in ((D1, 1), (D2, 1), (D3, 2), (D4, 2)):
        shelf.release(day, generation=generation)
    shelf.rows[-1]["status"] = "superseded"
    shelf.release(D4, revision=2, generation=2)
    last = shelf.release(D5, generation=2)
    features(shelf, {D1: D1, D2: D1, D3: D3, D4: D4, D5: D2})
    shelf.save()
    shelf.age("sid.item_sid", 100, but=[row["snapshot_id"] for row in shelf.rows if row["tag"] == last])
    for table in (FEATURE, POPULARITY, TRAINED):
        shelf.age(table, 20)
    shelf.put(FEATURE, manifest({D0: D1}), [D0])
    return "d20260106"


def test_a_dry_run_lists_what_goes_and_the_run_frees_exactly_those_bytes(
    spark: Any, lake_home: Home, shelf: Any, parquet: Parquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lakehouse, "remove_orphans", lambda spark, table, dry_run: {})  # looked at below; a listing of every folder costs most of the time
    pinned = five_nights(shelf)
    pins.pin((lake_home, TINY), pinned, "ranking")
    live = ("d20260105", "d20260106", "d20260107", "d20260109")
    before = {tag: lakehouse.read_release(lake_home, TINY.lake, tag) for tag in live}
    files = parquet()

    rows = views.maintain(context(lake_home))
    assert parquet() == files
    names = listed(rows)
    assert names["tag", "sid.item_sid"] == ["d20260108", "d20260108_r2"]
    assert names["day", "sid.item_sid"] == names["day", FEATURE] == names["day", POPULARITY] == ["2026-01-08"]
    assert names["day", TRAINED] == ["2026-01-08"], "2026-01-06 serves the release of the 9th, the others live"
    promised = sum(row["frees_now"] for row in rows)
    assert promised > 0
    _looked_at_again(spark, lake_home, {row["tag"] for row in shelf.rows})

    done = runner.run_stage(context(lake_home))
    gone = {path: size for path, size in files.items() if path not in parquet()}
    assert sum(gone.values()) == promised == done["outputs"]["freed_bytes"]
    assert len(gone) == 1, "only the superseded revision's file: the days of dead releases are still shown by younger ones"
    assert set(parquet()) <= set(files)
    assert set(lakehouse.references(spark, "sid.item_sid")) == {"main", f"pin_{pinned}__ranking", *live}
    assert all(lakehouse.read_release(lake_home, TINY.lake, tag).equals(before[tag]) for tag in live)
    with pytest.raises(ContractError, match="has expired"):
        lakehouse.read_release(lake_home, TINY.lake, "d20260108")
    assert {row["tag"] for row in views.releases((lake_home, TINY)) if row["expired"]} == {"d20260108", "d20260108_r2"}

    _later(spark, lake_home, shelf, parquet, pinned)


def _looked_at_again(spark: Any, home: Home, known: set[str]) -> None:
    """Under the lock, a day that was written or got a release since the survey stays, and so does a tag that somebody needs by now."""
    older = datetime.now(UTC) - timedelta(days=14)

    def left(known: set[str], live: set[str]) -> list[date]:
        found = maintain.Survey(sweeps=(), folders={}, older=older, known=frozenset(known))
        releases = lakehouse.read_releases(home, TINY.lake).to_pylist()
        return maintain._still_dropped(context(home), maintain.Sweep(table=FEATURE, days=(D0, D2, D4)), releases, live, found)

    assert left(known, set()) == [D2, D4], "the day of the backfill was written after the survey"
    assert left(known - {"d20260108_r2"}, set()) == left(known, {"d20260108_r2"}) == [D2]

    doomed = maintain.Sweep(table="sid.item_sid", tags={"d20260108": lakehouse.references(spark, "sid.item_sid")["d20260108"]})
    pins.pin((home, TINY), "d20260108", "late")
    _, live = maintain._live_now(context(home), TINY.maintain)
    maintain._clean(spark, doomed, live, older)
    assert "d20260108" in live & lakehouse.references(spark, "sid.item_sid").keys(), "it was pinned after the survey"
    pins.pin((home, TINY), "d20260108", "late", release=True)


def test_vectors_stay_while_a_live_revision_that_main_replaced_refers_to_them(spark: Any, lake_home: Home, shelf: Any) -> None:
    shelf.put(TRAINED, [(D0, "i00", 1, [1.0, 2.0], 1.0, 8, 3)], [D0])
    shelf.put(FEATURE, manifest({D1: D0}), [D1], tag="d20260105")
    shelf.put(FEATURE, manifest({D1: D1}), [D1], tag="d20260105_r2")
    shelf.put(FEATURE, manifest({D1: D1}), [D1])
    for table in (TRAINED, FEATURE):
        shelf.age(table, 20)
    tags = ("d20260105", "d20260105_r2", "d20260105_r3")
    releases = [{"tag": tag, "logical_date": D1, "revision": number} for number, tag in enumerate(tags, 1)]
    histories = {table: lakehouse.history(lake_home, TINY.lake, table) for table in (TRAINED, FEATURE)}
    newest = set(tags[2:])
    assert maintain.retention(spark, context(lake_home), releases, newest, newest, histories) == {TRAINED: [D0]}
    assert maintain.retention(spark, context(lake_home), releases, newest, set(tags[1:]), histories) == {TRAINED: [D0]}
    assert maintain.retention(spark, context(lake_home), releases, newest, set(tags), histories) == {}, "a rollback to the first would need them"


def _later(spark: Any, home: Home, shelf: Any, parquet: Parquet, pinned: str) -> None:
    """Weeks later the days that were dropped become free, and what was unpinned goes."""
    assert {row["what"] for row in views.maintain(context(home))} == {"snapshot"}, "only what showed the days that went"
    pins.pin((home, TINY), pinned, "ranking", release=True)
    for table in (FEATURE, POPULARITY, TRAINED):
        shelf.age(table, 20)
    files, rows = parquet(), views.maintain(context(home))
    assert listed(rows)["tag", "sid.item_sid"] == [pinned]
    assert listed(rows)["day", FEATURE] == ["2026-01-04", "2026-01-06"], "nobody finished the backfill"
    assert ("day", TRAINED) not in listed(rows), "the release of the 9th refers to that day's vectors"
    runner.run_stage(context(home))
    gone = {path: size for path, size in files.items() if path not in parquet()}
    assert sum(gone.values()) == sum(row["frees_now"] for row in rows) > 0
    assert {Path(path).parent.name for path in gone} == {"logical_date=2026-01-08"}
    assert {Path(path).parts[-5] + "." + Path(path).parts[-4] for path in gone} == {FEATURE, POPULARITY, TRAINED}
    assert {str(row.logical_date) for row in spark.table(f"lake.{FEATURE}").collect()} == {"2026-01-05", "2026-01-07", "2026-01-09"}
    assert {str(row.logical_date) for row in spark.table(f"lake.{TRAINED}").collect()} == {"2026-01-05", "2026-01-06", "2026-01-07"}


def test_old_branches_orphans_and_small_files(spark: Any, lake_home: Home, shelf: Any, parquet: Parquet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lakehouse, "table_names", lambda: ["sid.item_sid", POPULARITY, CONTENT])
    shelf.put(CONTENT, [("enc", "text", f"h{number:02d}", [float(number)]) for number in range(60)], files=6)
    shelf.release(D1, items=60, files=6)
    shelf.save()
    digest = lakehouse.rows_digest(spark.table(f"lake.{CONTENT}"))
    for branch in ("audit_old", "audit_young"):
        lakehouse.cut_branch(spark, POPULARITY, branch)
        frame = spark.createDataFrame([(D1, branch, 1.0, 0.5, 5, "head", 8, D1, 0, "s")], spark.table(f"lake.{POPULARITY}").schema)
        lakehouse.replace(frame, POPULARITY, branch, dates=[D1], equal={}, properties={})
    shelf.age(POPULARITY, 20, but=[lakehouse.references(spark, POPULARITY)["audit_young"]])
    folder = lake_home.folder("lake") / "sid" / "item_sid" / "data"
    for name, days in (("old", 4), ("young", 1)):
        (folder / f"orphan_{name}.parquet").write_bytes(b"x" * 1000)
        os.utime(folder / f"orphan_{name}.parquet", (time.time() - days * 86_400,) * 2)
    stored = {path for path in parquet() if "/item_sid/" in path}
    assert len(stored) == 6 + 2

    files, rows = parquet(), views.maintain(context(lake_home))
    assert listed(rows)["audit branch", POPULARITY] == ["audit_old"]
    assert listed(rows)["orphan file", "sid.item_sid"] == ["orphan_old.parquet"]
    assert {row["table"]: row["count"] for row in rows if row["what"] == "small file"} == {CONTENT: 6}
    done = runner.run_stage(context(lake_home))
    left = parquet()
    assert sum(size for path, size in files.items() if path not in left) == sum(row["frees_now"] for row in rows) > 1000
    assert set(lakehouse.references(spark, POPULARITY)) == {"main", "audit_young"}
    assert {path for path in stored if path not in left} == {str(folder / "orphan_old.parquet")}, "no file of a release is rewritten"
    assert done["metrics"]["files_compacted"] == 6
    assert spark.table(f"lake.{CONTENT}.files").count() == 1
    assert lakehouse.rows_digest(spark.table(f"lake.{CONTENT}")) == digest
