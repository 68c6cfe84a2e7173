"""Which release can be restored, what changes then, and on which release the next night plans."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from jobs import pins, rollback
from jobs.plan_night import parent_release
from jobs.releases import newest_current
from pipeline.errors import ConfigError, ContractError


def row(day: int, revision: int = 1, status: str = "current") -> dict[str, Any]:
    tag = f"d202601{day:02d}" + (f"_r{revision}" if revision > 1 else "")
    facts = {"tag": tag, "logical_date": date(2026, 1, day), "revision": revision, "status": status, "generation": 1}
    return {**facts, "codebook_digest": "c", "rows_digest": tag}


ROWS = [row(1, status="superseded"), row(2), row(3, status="superseded"), row(3, 2), row(4), row(5, status="withdrawn"), row(1, 2)]  # as written, not ordered
TAGS = {found["tag"] for found in ROWS} | {"main"}


def after(tag: str, rows: list[dict[str, Any]] = ROWS) -> dict[str, str]:
    """Tag -> status after a rollback."""
    moves = rollback.changes(rows, rollback.restorable(rows, tag, TAGS))
    return {found["tag"]: found["status"] for found in rollback.restored(rows, moves)}


def test_newer_releases_are_withdrawn_and_a_backfilled_revision_of_an_earlier_day_survives() -> None:
    assert after("d20260102") == {
        "d20260101": "superseded", "d20260101_r2": "current", "d20260102": "current", "d20260103": "withdrawn", "d20260103_r2": "withdrawn",
        "d20260104": "withdrawn", "d20260105": "withdrawn",
    }  # fmt: skip


def test_an_earlier_revision_of_a_day_takes_the_place_of_a_later_one() -> None:
    found = after("d20260103")
    assert (found["d20260103"], found["d20260103_r2"], found["d20260104"]) == ("current", "withdrawn", "withdrawn")
    assert found["d20260102"] == "current"


@pytest.mark.parametrize("tag", ["d20260101", "d20260101_r2", "d20260102", "d20260103", "d20260103_r2", "d20260104"])
def test_whatever_is_restored_is_what_readers_get_and_what_the_next_night_builds_on(tag: str) -> None:
    moves = rollback.changes(ROWS, rollback.restorable(ROWS, tag, TAGS))
    rows = rollback.restored(ROWS, moves)
    newest, parent = newest_current(rows), parent_release(rows, date(2026, 1, 9))
    assert newest is not None
    assert parent is not None
    assert newest["tag"] == parent["tag"] == tag
    days = [found["logical_date"] for found in rows if found["status"] == "current"]
    assert len(days) == len(set(days)), "a day has one current revision at most"
    again = rollback.restorable(rows, tag, TAGS)
    assert rollback.changes(rows, again) == [], "a second rollback changes nothing"
    assert rollback.outputs(again, [])["is_current_newest"]


@pytest.mark.parametrize(("tag", "why"), [("d20260105", "withdrawn"), ("d20270101", "no such release"), ("", "no such release")])
def test_what_cannot_be_restored_is_refused_with_what_can(tag: str, why: str) -> None:
    with pytest.raises(ContractError) as caught:
        rollback.restorable(ROWS, tag, TAGS)
    assert why in caught.value.found
    assert caught.value.expected == "one of: d20260104, d20260103_r2, d20260103, d20260102, d20260101_r2, d20260101"
    assert not caught.value.retry


def test_a_release_whose_rows_are_gone_is_neither_restored_nor_offered() -> None:
    with pytest.raises(ContractError, match="d20260103") as caught:
        rollback.restorable(ROWS, "d20260103", TAGS - {"d20260103", "d20260101"})
    assert "expired" in caught.value.found
    assert caught.value.expected == "one of: d20260104, d20260103_r2, d20260102, d20260101_r2"
    with pytest.raises(ContractError, match="none"):
        rollback.restorable([], "d20260101", set())


# ---------------------------------------------------------------- pins


def test_a_pins_name_says_which_release_and_who() -> None:
    names = [pins.name_of("d20260101", "ranking"), pins.name_of("d20260101", "r2"), pins.name_of("d20260101_r2", "a__b"), "d20260101", "pin_x", "main"]
    assert pins.by_release(names) == {"d20260101": ["r2", "ranking"], "d20260101_r2": ["a__b"]}


@pytest.mark.parametrize("by", ["", "a b", "x;drop", "a@b.c", "a" * 41])
def test_a_pin_takes_plain_names_only(by: str) -> None:
    with pytest.raises(ConfigError, match="--by"):
        pins.name_of("d20260101", by)
