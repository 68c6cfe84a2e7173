"""Backfills as a data engineer runs them: any order gives the same tables, a repaired day and its cascade give the releases of a clean run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
from homes import NOT_ROWS, UNDATED, Warm, digests, ended, sid, start
from pyarrow import csv

from pipeline import lakehouse
from pipeline.datasets.base import EVENT_COLUMNS
from pipeline.synthetic import World, write

pytestmark = pytest.mark.e2e
DAYS = [date(2026, 3, 2), date(2026, 3, 3), date(2026, 3, 4)]
LATER_NIGHTS = ("--date", str(DAYS[1]), "--through", str(DAYS[2]))
DATED = set(lakehouse.table_names()) - NOT_ROWS - UNDATED
WITHOUT_MEMORY = "ingest,item_popularity,user_sequence"
TABLES = ("raw.interaction", "raw.item", "raw.rejected_row", "raw.source_file", "feature.item_day_stat", "feature.item_popularity", "feature.user_sequence")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """One process for the commands of the file that need none of their own."""
    found = Warm(tmp_path_factory.mktemp("warm"))
    yield found
    found.close()


def shop(folder: Path) -> tuple[str, ...]:
    """A small shop as files of a user's own, and the settings that read it."""
    world = World(items=200, users=60, days=3, events_per_day=300, clusters=8, subclusters=3, styles=3, arrivals_per_day=0.015, distinct_images=24, seed=7)
    folder.mkdir()
    write(world, folder)
    sets = [
        "dataset=folder",
        f"path={folder}",
        f"image_root={folder}",
        "events_pattern=events/{date}.csv",
        "items_pattern=items/{date}.csv",
        f"start={DAYS[0]}",
    ]
    return (*(word for text in sets for word in ("--set", f"source.{text}")), "--set", "source.options={}", "--set", "plan_night.refit_when_due=false")


def correct(folder: Path, day: date) -> None:
    """A corrected file of a day: some of its events turn out to belong to other items."""
    path = folder / "events" / f"{day}.csv"
    table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=dict.fromkeys(EVENT_COLUMNS, pa.string())))
    third = len(table) // 3
    items = pa.concat_arrays([table["item_id"].combine_chunks()[:third][::-1], table["item_id"].combine_chunks()[third:]])
    csv.write_csv(table.set_column(table.column_names.index("item_id"), "item_id", items), path)


def backfill(first: date, last: date, *more: str) -> tuple[str, ...]:
    return ("backfill", "--start", str(first), "--end", str(last), "--reason", "for the test", *more)


def test_a_repaired_day_and_its_cascade_end_in_the_rows_of_a_clean_run(tmp_path: Path, warm: Warm) -> None:
    home, aside, files = tmp_path / "home", tmp_path / "aside", tmp_path / "files"
    source = shop(files)
    warm.sid(home, "run", "refresh", "--date", str(DAYS[0]), *source)
    first = digests(home, DAYS[0], DATED)
    shutil.copytree(home, aside, symlinks=True)  # the night that the clean run has in common with the one to be repaired; tables name their place

    warm.sid(home, "run", "refresh", *LATER_NIGHTS, *source)
    wrong = digests(home, DAYS[2])
    correct(files, DAYS[1])
    plan = json.loads(warm.sid(home, *backfill(DAYS[1], DAYS[1], "--cascade", "--dry-run", "--json", *source)))
    assert [(row["night"], row["why"], row["release"]) for row in plan] == [
        (str(DAYS[1]), "requested", "d20260303"), (str(DAYS[2]), "cascade", "d20260304"),
    ]  # fmt: skip
    assert plan[0]["changed_files"][0].startswith(f"events {DAYS[1]}: ")
    assert f"raw.interaction {DAYS[1]}" in plan[0]["partitions"]
    assert digests(home, DAYS[2]) == wrong, "a dry run changes nothing"

    warm.sid(home, *backfill(DAYS[1], DAYS[1], "--json", *source))
    between = _rows(warm.sid(home, "releases", "--json"))
    done = _rows(warm.sid(home, *backfill(DAYS[1], DAYS[1], "--cascade", "--json", *source)))
    after = _rows(warm.sid(home, "releases", "--json"))
    assert {row["tag"]: row["parent_superseded"] for row in between} == {"d20260302": False, "d20260303": False, "d20260303_r2": False, "d20260304": True}
    assert [(row["before"], row["after"], row["note"]) for row in done] == [("d20260303_r2", "d20260303_r2", "reused"), ("d20260304", "d20260304_r2", "")]
    assert not any(row["parent_superseded"] for row in after)
    assert digests(home, DAYS[0], DATED) == first, "the night before the repaired one is as it was"
    repaired = digests(home, DAYS[2])
    assert repaired != wrong

    shutil.rmtree(home)
    aside.rename(home)
    sid(home, "run", "refresh", *LATER_NIGHTS, *source)  # a process of its own: the warm one has files of the removed home open
    assert digests(home, DAYS[2]) == repaired


def _rows(told: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(told)
    return rows


def test_days_in_any_order_twice_or_at_once_give_the_same_tables(tmp_path: Path, warm: Warm) -> None:
    only = ("--stages", WITHOUT_MEMORY)
    ordered, reverse, at_once = tmp_path / "ordered", tmp_path / "reverse", tmp_path / "at_once"
    warm.sid(ordered, *backfill(DAYS[0], DAYS[2], *only))
    expected = digests(ordered, DAYS[2], TABLES)
    assert "empty" not in expected.values()

    for first, last in ((DAYS[2], DAYS[2]), (DAYS[0], DAYS[1])):  # the newest day first
        warm.sid(reverse, *backfill(first, last, *only))
    assert digests(reverse, DAYS[2], TABLES) == expected

    warm.sid(at_once, "run", "plan_night", "--date", str(DAYS[0]))  # the lake and the generated files exist; everything else is contested
    # both ranges hold the second day, so it is also run twice
    both = [start(at_once, *backfill(DAYS[0], DAYS[1], *only)), start(at_once, *backfill(DAYS[1], DAYS[2], *only))]
    for process in both:
        ended(process)
    assert digests(at_once, DAYS[2], TABLES) == expected
