"""Plans over arbitrary histories: no look-ahead, no tag twice, the same inputs the same plan."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jobs.plan_night import make_plan, parent_release, tag_name
from pipeline import config
from pipeline.context import Context, Home, Plan, PlannedFile

DAY = date(2026, 3, 2)
TINY = config.load("tiny")
COLD = config.load("tiny", ("plan_night.policy=cold",))
FILES = (PlannedFile(file_date=DAY, kind="events", path="x", sha256="a" * 64, bytes=1),)


@st.composite
def histories(draw: st.DrawFn, first: int = -4, last: int = 4) -> list[dict[str, Any]]:
    """Rows of sid.release over some days around DAY, revisions numbered from 1, in any order."""
    rows = []
    for offset in draw(st.lists(st.integers(first, last), unique=True, max_size=5)):
        day = DAY + timedelta(days=offset)
        for revision in range(1, draw(st.integers(1, 3)) + 1):
            rows.append(
                {
                    "tag": tag_name(day, revision),
                    "logical_date": day,
                    "revision": revision,
                    "generation": draw(st.integers(1, 3)),
                    "snapshot_id": draw(st.integers(1, 2**62)),
                    "rows_digest": draw(st.sampled_from("xyz")),
                    "input_fingerprint": draw(st.sampled_from("pq")),
                    "status": draw(st.sampled_from(["current", "superseded", "withdrawn"])),
                    "refit_due": draw(st.booleans()),
                    "drift": draw(st.sampled_from([None, "{}"])),
                }
            )
    return draw(st.permutations(rows))


generations = st.lists(st.integers(1, 6), unique=True, max_size=4).map(lambda numbers: [{"generation": n, "input_fingerprint": f"g{n}"} for n in numbers])


def plan_of(releases: list[dict[str, Any]], known: list[dict[str, Any]], loaded: config.Config = TINY) -> Plan:
    ctx = Context(config=loaded, home=Home(Path("unused")), stage="plan_night", logical_date=DAY, run_id="r")
    return make_plan(ctx, loaded.plan_night, FILES, (), releases, known, [row["tag"] for row in releases])


@given(histories(), generations)
def test_releases_of_later_days_change_nothing(releases: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    seen = [row for row in releases if row["logical_date"] <= DAY]
    assert plan_of(releases, known) == plan_of(seen, known)


@given(histories(last=0), generations, generations)
def test_vocabularies_fitted_elsewhere_change_at_most_a_new_number(
    releases: list[dict[str, Any]], known: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    both = list({row["generation"]: row for row in [*known, *more]}.values())
    one, two = plan_of(releases, known), plan_of(releases, both)
    assert one.model_copy(update={"generation": 0}) == two.model_copy(update={"generation": 0})
    if not one.new_generation:
        assert one.generation == two.generation


@given(histories(), generations, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(releases: list[dict[str, Any]], known: list[dict[str, Any]], random: Any) -> None:
    shuffled = random.sample(releases, len(releases))
    assert plan_of(shuffled, known) == plan_of(releases, known)


@given(histories(), generations, st.sampled_from([TINY, COLD]))
def test_a_new_tag_and_a_new_number_are_free(releases: list[dict[str, Any]], known: list[dict[str, Any]], loaded: config.Config) -> None:
    plan = plan_of(releases, known, loaded)
    assert plan.tag == tag_name(DAY, plan.revision)
    if not plan.reuse:
        assert plan.tag not in {row["tag"] for row in releases}
    if plan.new_generation:
        assert plan.generation not in {row["generation"] for row in known}
    else:
        assert plan.parent is not None
        assert plan.generation == plan.parent.generation


@given(histories())
def test_a_published_and_measured_night_is_reused_and_nothing_else(releases: list[dict[str, Any]]) -> None:
    plan = plan_of(releases, [])
    assert plan.reuse == "", "no history holds this fingerprint"
    published = {**_row_of(plan), "drift": "{}"}
    assert plan_of([*releases, published], []).reuse == plan.tag
    assert plan_of([*releases, published | {"drift": None}], []).reuse == ""


def _row_of(plan: Plan) -> dict[str, Any]:
    return {
        "tag": plan.tag, "logical_date": plan.logical_date, "revision": plan.revision, "generation": plan.generation, "snapshot_id": 1, "rows_digest": "n",
        "input_fingerprint": plan.input_fingerprint, "status": "current", "refit_due": False, "drift": None,
    }  # fmt: skip


@given(histories())
def test_the_parent_lies_strictly_before_and_nothing_current_lies_between(releases: list[dict[str, Any]]) -> None:
    parent = parent_release(releases, DAY)
    current = [row for row in releases if row["status"] == "current" and row["logical_date"] < DAY]
    if parent is None:
        assert current == []
    else:
        assert parent in current
        assert all((row["logical_date"], row["revision"]) <= (parent["logical_date"], parent["revision"]) for row in current)
