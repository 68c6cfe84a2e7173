"""Ranking examples on real tables: which release is tested, histories, labels, negatives, and that nothing looks ahead."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from unittest.mock import patch

import numpy as np
import pytest

from jobs import rank_example
from jobs.inputs import Inputs
from pipeline import lakehouse, quality
from pipeline.config import Config, Lake, RankExample, UserSequence
from pipeline.context import Context
from pipeline.errors import ContractError, UpstreamMissing

pytestmark = pytest.mark.spark
D1, D2, D3, D4 = (date(2026, 1, day) for day in (1, 2, 3, 4))
EVENTS = "file_date date, user_id string, item_id string, event_ts timestamp, event_type string, value double, session_id string"
POPULARITY = (
    "logical_date date, item_id string, popularity double, percentile double, popularity_decile int, popularity_stratum string, "
    "evidence_count long, first_event_date date, days_since_first_event int, inputs_sha256 string"
)


def at(day: date, minute: int) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(minutes=minute)


def event(day: date, user: str, item: str, minute: int, value: float = 5.0, session: str | None = None, file_date: date | None = None):
    return (file_date or day, user, item, at(day, minute), "rating", value, session)


class Frames(Inputs):
    """Inputs over frames in memory: the job's rules need no table, and Iceberg is the lake's own test."""

    def frame(self, table: str):
        return self.snapshots[table]


def frames(spark, events, releases, popularity) -> Inputs:
    rows = [(tag, day, 1, 1, "digest", None, 1, "rows", "finger", status, False, None, 3, "test") for tag, day, status in releases]
    known = [(day, item, 1.0, 0.5, decile, stratum, count, None, None, None) for day, item, decile, stratum, count in popularity]
    tables = {
        "raw.interaction": spark.createDataFrame(events, EVENTS).repartition(2),
        "sid.release": spark.createDataFrame(rows, spark.table("lake.sid.release").schema),
        "feature.item_popularity": spark.createDataFrame(known, POPULARITY),
    }
    return Frames(home=None, lake=Lake(), snapshots=tables, spark=spark)


def stored(spark, read: Inputs) -> Inputs:
    """The same inputs from real tables."""
    for table, frame in read.snapshots.items():
        frame.writeTo(f"lake.{table}").append()
    return Inputs(home=None, lake=Lake(), snapshots=dict.fromkeys(read.snapshots), spark=spark)


def run(spark, read: Inputs, params: RankExample, release: str = "", order: str = "time", swept: tuple[str, ...] = ()):
    config = Config(rank_example=params, user_sequence=UserSequence(order=order))
    ctx = Context(config=config, home=None, stage="rank_example", logical_date=D4, run_id="r", params=(("release", release),))
    held = {row.tag: 1 for row in read.frame("sid.release").collect() if row.tag not in swept}
    with patch.object(lakehouse, "references", return_value=held):
        result = rank_example.run(read, params, ctx)
    frame = result.writes[0].frame
    lakehouse.check_columns(frame, spark, result.writes[0].table)
    rows = sorted(frame.collect(), key=lambda row: (row.split, row.user_id, row.event_ts, row.item_id))
    frame.unpersist()
    return result, rows


def audit(result, params: RankExample):
    write = result.writes[0]
    config = Config(rank_example=params)
    return quality.audit(write.frame, write.table, dates=write.dates, equal={}, known=write.metrics, config=config, branch="b", reason="test")


def test_value_labels_histories_and_strata_at_the_cutoff_from_real_tables(spark, lake_home):
    events = [
        event(D1, "u", "b", 1, 5.0),
        event(D1, "u", "a", 1, 3.0),  # same instant as b: neither is in the other's history
        event(D1, "u", "c", 2, 4.0),
        event(D1, "u", "d", 3, 1.0, file_date=D3),  # arrives after the cutoff: a test row, though its instant is early
        event(D3, "u", "new", 9, 5.0),
    ]
    read = frames(spark, events, [("d20260102", D2, "current")], [(D2, "a", 9, "head", 7), (D2, "b", 4, "torso", 2), (D1, "c", 9, "head", 99)])
    params = RankExample(min_test_rows=2, max_history=2)
    result, rows = run(spark, stored(spark, read), params)
    shown = [(row.split, row.item_id, row.label, row.history, row.popularity_stratum, row.popularity_decile, row.evidence_count) for row in rows]
    assert shown == [
        ("test", "d", 0, ["a", "c"], "tail", 0, 0),  # a and b share an instant: a hash says which came last
        ("test", "new", 1, ["c", "d"], "tail", 0, 0),
        ("train", "a", 0, [], "head", 9, 7),
        ("train", "b", 1, [], "torso", 4, 2),
        ("train", "c", 1, ["b", "a"], "tail", 0, 0),
    ]
    assert {row.release for row in rows} == {"d20260102"}
    assert {row.logical_date for row in rows} == {D2}
    assert result.outputs["evaluation_release"] == "d20260102"
    assert (result.outputs["train_rows"], result.outputs["test_rows"]) == (3, 2)
    assert not audit(result, params).failures()


def test_walks_back_to_a_release_with_enough_later_events_and_says_when_there_is_none(spark):
    events = [event(day, user, item, minute) for day in (D1, D2, D3) for user in "uv" for minute, item in enumerate("abc")]
    releases = [("d20260101", D1, "superseded"), ("d20260102", D2, "withdrawn"), ("d20260103", D3, "current")]
    read = frames(spark, events, releases, [(day, "a", 9, "head", 2) for day in (D1, D2, D3)])
    result, rows = run(spark, read, RankExample(min_test_rows=6))
    assert (result.outputs["served_release"], result.outputs["evaluation_release"]) == ("d20260103", "d20260101")
    assert {row.event_ts.date() for row in rows if row.split == "train"} == {D1}
    assert {row.event_ts.date() for row in rows if row.split == "test"} == {D2, D3}
    result, rows = run(spark, read, RankExample(min_test_rows=6), swept=("d20260101",))
    assert result.outputs["evaluation_release"] == "", "its codes are gone: there is nothing to test"
    result, rows = run(spark, read, RankExample(min_test_rows=13))
    assert result.outputs["evaluation_release"] == ""
    assert "no AUC" in str(result.outputs["note"])
    assert {row.split for row in rows} == {"train"}
    assert result.writes[0].dates == (D3,)
    with pytest.raises(ContractError, match="withdrawn"):
        run(spark, read, RankExample(), release="d20260102")
    with pytest.raises(UpstreamMissing, match="d20250101"):
        run(spark, read, RankExample(), release="d20250101")


def test_after_cutoff_trains_and_tests_on_periods_the_release_has_not_seen(spark):
    events = [event(day, "u", f"i{day.day}{minute}", minute) for day in (D1, D2, D3, D4) for minute in range(3)]
    read = frames(spark, events, [("d20260101", D1, "current")], [(D1, "i10", 9, "head", 1)])
    _, rows = run(spark, read, RankExample(train_on="after_cutoff", train_days=2, min_test_rows=3))
    assert {row.event_ts.date() for row in rows if row.split == "train"} == {D2, D3}
    assert {row.event_ts.date() for row in rows if row.split == "test"} == {D4}
    assert rows[-1].history == ["i10", "i11", "i12", "i20", "i21", "i22", "i30", "i31"]


def test_no_popularity_of_the_night_is_said(spark):
    read = frames(spark, [event(D1, "u", "a", 1)], [("d20260101", D1, "current")], [(D2, "a", 9, "head", 1)])
    with pytest.raises(UpstreamMissing, match="no popularity"):
        run(spark, read, RankExample())


# ---------------------------------------------------------------- next basket


def baskets(seed: int = 0) -> list:
    """Random baskets of 25 users over 4 days; one basket = one session = one instant."""
    draw = np.random.default_rng(seed)
    events = []
    for user in range(25):
        for number in range(draw.integers(1, 7)):
            day = D1 + timedelta(days=int(draw.integers(0, 4)))
            minute = int(draw.integers(0, 1440))
            items = draw.choice(40, size=draw.integers(1, 6), replace=False)
            events += [event(day, f"u{user}", f"i{item}", minute, 1.0, f"s{user}_{number}") for item in items]
    return events


STRATUM = {f"i{item}": "head" if item < 10 else "torso" if item < 20 else "tail" for item in range(40)}
BASKET = RankExample(label="next_basket", min_test_rows=1, negatives=3)


def basket_frames(spark, events) -> Inputs:
    popularity = [(D2, item, 5, stratum, 3) for item, stratum in STRATUM.items() if item != "i39"]  # i39 is new since: counts as tail
    return frames(spark, events, [("d20260102", D2, "current")], popularity)


@pytest.fixture(scope="module")
def drawn(spark):
    """Events, result and rows of one next-basket run that several tests look at."""
    events = baskets()
    result, rows = run(spark, basket_frames(spark, events), BASKET)
    return events, result, rows


def test_next_basket_against_a_slow_loop(drawn):
    events, result, rows = drawn
    assert not audit(result, BASKET).failures()
    bought = defaultdict(lambda: defaultdict(set))
    for _, user, item, moment, *_ in events:
        bought[user][moment].add(item)
    expected, past = set(), {}
    for user, by_moment in bought.items():
        seen: set[str] = set()
        for number, moment in enumerate(sorted(by_moment)):
            split = "train" if moment.date() <= D2 else "test"
            expected |= {(split, user, item, moment) for item in by_moment[moment] - seen if number}
            past[user, moment] = set(seen)
            seen |= by_moment[moment]
    found = {(row.split, row.user_id, row.item_id, row.event_ts.replace(tzinfo=UTC)) for row in rows if row.label == 1}
    assert found == expected
    assert {row.split for row in rows} == {"train", "test"}
    for row in rows:
        assert set(row.history) <= past[row.user_id, row.event_ts.replace(tzinfo=UTC)]
        assert row.history or row.label == 0


def test_negatives_come_from_the_own_stratum_seen_before_and_never_the_users_own(drawn):
    events, _, rows = drawn
    debut = {item: min(e[3] for e in events if e[2] == item).date() for item in {e[2] for e in events}}
    strata = defaultdict(lambda: defaultdict(int))
    for row in rows:
        strata[row.split, row.user_id, row.event_ts][STRATUM[row.item_id], row.label] += 1
        if row.label == 0:
            until = D2 if row.split == "train" else D4
            own = {e[2] for e in events if e[1] == row.user_id and e[0] <= until}
            assert row.item_id not in own
            assert debut[row.item_id] < row.event_ts.date()
    negatives = sum(row.label == 0 for row in rows)
    assert negatives > sum(row.label for row in rows)
    for counts in strata.values():
        for stratum in ("head", "torso", "tail"):
            assert counts[stratum, 0] <= BASKET.negatives * counts[stratum, 1]


def test_same_rows_whatever_the_order_of_files_and_lines(spark, drawn):
    events, first, _ = drawn
    shuffled = [events[index] for index in np.random.default_rng(5).permutation(len(events))]
    second, _ = run(spark, basket_frames(spark, shuffled), BASKET)
    assert first.outputs["digest"] == second.outputs["digest"]


@pytest.mark.parametrize("params", [BASKET, RankExample(min_test_rows=1)], ids=["next_basket", "value"])
def test_nothing_after_the_cutoff_reaches_a_training_row(spark, drawn, params):
    events = drawn[0]
    other = [event(D3, "u1", "i0", 5, 1.0, "z"), event(D1, "u2", "i3", 1, 1.0, "y", file_date=D3)]
    before = drawn[2] if params is BASKET else run(spark, basket_frames(spark, events), params)[1]
    _, after = run(spark, basket_frames(spark, [row for row in events if row[0] <= D2] + other), params)
    train = [row for row in before if row.split == "train"]
    assert train
    assert [row for row in after if row.split == "train"] == train
    assert [row for row in after if row.split == "test"] != [row for row in before if row.split == "test"]
