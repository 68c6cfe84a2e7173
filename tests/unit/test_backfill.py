"""Backfill plans: which nights, which stages, what changed, and which releases stand on a parent that is no longer current."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pytest

from jobs import backfill
from jobs.releases import release_rows, stale_tags
from pipeline import config
from pipeline.context import Home
from pipeline.errors import ConfigError
from pipeline.stages import group

D = date(2026, 3, 2)


def release(offset: int, revision: int = 1, *, parent: str | None, status: str = "current") -> dict[str, Any]:
    day = D + timedelta(days=offset)
    tag = f"d{day:%Y%m%d}" + (f"_r{revision}" if revision > 1 else "")
    return {"tag": tag, "logical_date": day, "revision": revision, "parent_tag": parent, "status": status}


CHAIN = [release(0, parent=None), release(1, parent="d20260302"), release(2, parent="d20260303"), release(3, parent="d20260304")]


def test_an_untouched_chain_is_not_stale():
    assert stale_tags(CHAIN) == set()


def test_a_new_revision_makes_all_later_releases_stale():
    repaired = [CHAIN[0], {**CHAIN[1], "status": "superseded"}, release(1, 2, parent="d20260302"), *CHAIN[2:]]
    assert stale_tags(repaired) == {"d20260304", "d20260305"}


def test_a_missed_night_that_is_filled_in_makes_the_later_ones_stale():
    assert stale_tags([CHAIN[0], CHAIN[1], release(3, parent="d20260303")]) == set()
    assert stale_tags([*CHAIN[:3], release(3, parent="d20260303")]) == {"d20260305"}


def test_withdrawn_releases_are_neither_stale_nor_parents():
    rolled_back = [CHAIN[0], {**CHAIN[1], "status": "withdrawn"}, release(2, 2, parent="d20260302")]
    assert stale_tags(rolled_back) == set()
    assert [row["parent_superseded"] for row in release_rows(pa.Table.from_pylist(rolled_back))] == [False, False, False]


def test_named_stages_come_in_the_order_of_the_refresh_after_the_plan():
    assert [stage.name for stage in backfill.chosen_stages("user_sequence, ingest")] == ["plan_night", "ingest", "user_sequence"]
    assert backfill.chosen_stages("") == group("refresh")
    with pytest.raises(ConfigError, match="no stage 'train_ranker'"):
        backfill.chosen_stages("train_ranker")


def test_a_cascade_needs_the_whole_refresh(tmp_path):
    with pytest.raises(ConfigError, match="cascade"):
        backfill.steps(Home(tmp_path), config.load("tiny"), [D], "ingest", cascade=True)


def test_without_a_lake_every_file_is_new(tmp_path):
    (step,) = backfill.steps(Home(tmp_path), config.load("tiny"), [D], "ingest", cascade=False)
    assert step.files[0].startswith(f"events {D}: not loaded -> ")
    assert step.partitions() == tuple(f"{table} {D}" for table in ("raw.interaction", "raw.item", "raw.rejected_row", "raw.source_file"))


def test_tables_without_a_date_are_named_alone_and_every_table_once():
    named = backfill.Step(night=D, why="requested", stages=group("refresh")).partitions()
    assert len(set(named)) == len(named)
    assert {name for name in named if " " not in name} == {
        "feature.content_encoder",
        "feature.item_content_vector",
        "sid.codebook",
        "sid.generation",
        "sid.release",
    }
    assert f"sid.item_sid {D}" in named


def test_the_identity_of_a_night_follows_the_reason_and_nothing_that_another_process_has_otherwise():
    """A rerun finds what a kill left by this name: it is the same at any time, in any process."""
    tiny = config.load("tiny")
    assert backfill.run_id(tiny, D, "late file") == "backfill__tiny__2026-03-02__19c1187f"
    others = {
        backfill.run_id(tiny, D, "another"),
        backfill.run_id(tiny, D + timedelta(days=1), "late file"),
        backfill.run_id(config.load("demo"), D, "late file"),
    }
    assert len(others | {backfill.run_id(tiny, D, "late file")}) == 4
