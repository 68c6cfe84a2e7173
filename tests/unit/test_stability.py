"""The pure functions of the stability bench: what counts as kept, neighbours by shared codes, a replayed night's rows, the tables."""

from __future__ import annotations

import importlib
import math
import sys
from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from pipeline.context import ROOT

SIZES = (4, 4)
FIRST, SECOND = date(2026, 1, 1), date(2026, 1, 2)


@pytest.fixture
def bench(monkeypatch):
    """The modules as `python tests/bench/stability.py` sees them: (stability, measures, replay)."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    names = ("stability", "stability_measures", "stability_replay")
    yield tuple(importlib.import_module(name) for name in names)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def measures(bench):
    return bench[1]


@pytest.fixture
def replay(bench):
    return bench[2]


def release(codes, *, numbers=None, trained=None, popularity=None, weights=None, status=None, ids="abcdefgh"):
    """A release of items a, b, ...; the most popular one is the head."""
    count = len(codes)
    popularity = popularity or [float(count - at) for at in range(count)]
    return pa.table(
        {
            "item_id": pa.array(list(ids[:count])),
            "codes": pa.array(codes, pa.list_(pa.int32())),
            "weights": pa.array(weights or [[1.0] * len(row) for row in codes], pa.list_(pa.float32())),
            "disambiguator": pa.array(numbers or [0] * count, pa.int32()),
            "popularity": popularity,
            "popularity_stratum": ["head" if value == max(popularity) else "tail" for value in popularity],
            "status": status or ["live"] * count,
            "first_seen": pa.array([FIRST] * count, pa.date32()),
            "behavior_date": pa.array(trained or [FIRST] * count, pa.date32()),
        }
    )


def test_kept_sids_are_codes_and_number_and_first_rows_stand_apart(measures):
    old = release([[0, 0], [1, 4], [2, 2], [3, 3]], trained=[FIRST, None, FIRST, FIRST], popularity=[1.0, 2.0, 3.0, 4.0])
    new = release([[0, 1], [1, 3], [2, 2], [3, 3], [0, 0]], trained=[SECOND, SECOND, FIRST, SECOND, None], popularity=[1.0, 2.0, 3.0, 4.0, 1.0])
    items = measures.compared(old, new)
    assert items["same"].to_pylist() == [False, False, True, True]
    assert items["first_row"].to_pylist() == [False, True, False, False]
    assert items["retrained"].to_pylist() == [True, False, False, True]  # an item without a row so far has no other row
    found = measures.kept(items)
    assert found["items"] == 0.5
    assert found["mass"] == pytest.approx(7 / 10)
    assert found["head"] == 1.0
    assert found["apart_items"] == pytest.approx(2 / 3)
    assert found["retrained"] == 0.5
    assert (found["moved"], found["unmasked"]) == (1.0, 1.0)


def test_another_number_is_another_sid_and_retired_items_do_not_count(measures):
    old = release([[0, 0], [0, 0], [1, 1]], numbers=[0, 1, 0])
    new = release([[0, 0], [0, 0], [2, 2]], numbers=[0, 2, 0], status=["live", "live", "retired"])
    assert measures.compared(old, new)["same"].to_pylist() == [True, False]


def test_an_aged_release_has_its_own_codes_and_tonights_popularity(measures):
    old, tonight = release([[0, 0], [1, 1]]), release([[2, 2], [3, 3], [0, 1]], popularity=[1.0, 5.0, 2.0])
    made = measures.aged(old, tonight)
    assert made["codes"].to_pylist() == old["codes"].to_pylist()
    assert made["popularity"].to_pylist() == [1.0, 5.0]
    assert made["popularity_stratum"].to_pylist() == ["tail", "head"]


def test_a_share_of_nothing_is_nan(measures):
    found = measures.kept(measures.compared(release([[0, 0]], trained=[None]), release([[0, 0]], trained=[None])))
    assert math.isnan(found["retrained"])
    assert found["apart_items"] == 1.0


def test_collisions_are_of_described_items(measures):
    assert measures.collision_rate(release([[0, 0], [0, 0], [1, 1], [4, 4], [4, 4]]), SIZES) == pytest.approx(2 / 3)


def test_baskets_pair_items_of_a_session_both_ways_once(measures):
    events = pa.table({"session_id": ["s", "s", "s", "t", "t", "u"], "item_id": ["a", "b", "b", "b", "a", "c"]})
    pairs = measures.baskets(events)
    assert sorted(zip(pairs["item_id"].to_pylist(), pairs["item_id_b"].to_pylist(), strict=True)) == [("a", "b"), ("b", "a")]


def test_long_sessions_are_no_baskets(measures):
    count = measures.LONGEST_BASKET + 1
    assert measures.baskets(pa.table({"session_id": ["s"] * count, "item_id": [str(at) for at in range(count)]})).num_rows == 0


def test_nearest_is_the_plain_loop(measures):
    rng = np.random.default_rng(0)
    codes_NL, weights_NL, sizes_L = rng.integers(0, 5, (60, 3)), rng.random((60, 3)), np.full(3, 4)
    queries = rng.permutation(60)[:40]
    found = measures.nearest(codes_NL, weights_NL, sizes_L, queries)
    for query, row in zip(queries, found, strict=True):
        score = [
            -1.0 if item == query else sum(min(weights_NL[item, at], weights_NL[query, at]) for at in range(3) if codes_NL[item, at] == codes_NL[query, at] < 4)
            for item in range(60)
        ]
        assert sorted(row) == sorted(sorted(range(60), key=lambda item: -score[item])[:20])


def test_recall_counts_what_the_release_does_not_know_as_missed(measures):
    known = release([[0, 0], [0, 0], [1, 1]])
    pairs = pa.table({"item_id": ["a", "a", "b", "z", "a"], "item_id_b": ["b", "z", "a", "a", "w"]})
    shelf = pa.chunked_array([["a", "b", "c", "z"]])
    found = measures.recalls(known, SIZES, pairs, shelf)
    assert dict(zip(found["item_id"].to_pylist(), found["recall"].to_pylist(), strict=True)) == {"a": 0.5, "b": 1.0, "z": 0.0}  # w is on no shelf
    assert measures.mean_recall(found, pa.chunked_array([["b", "c"]])) == (1.0, 1)


def test_means_over_nights_leave_out_what_was_not_measured(measures):
    rows = [{"x": 1.0, "n": 1}, {"x": 4.0, "n": 2}, {"x": float("nan"), "n": 0}, {}]
    assert measures.over_nights(rows, "x") == 2.5
    assert measures.over_nights(rows, "x", "n") == 3.0
    assert math.isnan(measures.over_nights(rows, "y"))


def test_the_upper_bound_is_over_readers(measures):
    assert measures.upper_bound([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]]) == pytest.approx(0.2)
    assert measures.upper_bound([[0.0, 0.1, 0.2]]) == pytest.approx(0.1 + 4.302653 * 0.1 / math.sqrt(3))


def test_how_a_night_begins(replay):
    frozen = replay.Branch(tokenizer="t", policy="frozen", margin=0.1, due=frozenset([SECOND]))
    assert [frozen.start(FIRST, first=True), frozen.start(SECOND, first=False), frozen.start(date(2026, 1, 3), first=False)] == ["cold", "anchored", ""]
    content = replay.Branch(tokenizer="t", policy=replay.CONTENT_ONLY, margin=0.1, due=frozenset([SECOND]))
    assert content.start(SECOND, first=False) == ""
    assert [replay.Branch(tokenizer="t", policy=policy, margin=0.1).track for policy in replay.POLICIES] == ["frozen", "warm", "warm", "cold"]
    assert content.track == ""


def test_the_manifest_of_a_new_generation_holds_its_own_rows_else_masks(replay):
    kinds = [("behavior_date", pa.date32()), ("evidence_count", pa.int64()), ("evidence_bucket", pa.int32()), ("richness", pa.float32())]
    schema = pa.schema([("item_id", pa.string()), *kinds, ("strength", pa.float32()), ("status", pa.string())])
    shelf = pa.table([["a", "b"], [FIRST] * 2, [7, 7], [2, 2], [9.0] * 2, [9.0] * 2, ["live"] * 2], schema=schema)
    trained = pa.table({"item_id": ["b"], "evidence_count": [8], "evidence_bucket": pa.array([3], pa.int32()), "richness": [0.5], "strength": [0.25]})
    made = replay.manifest(shelf, trained, SECOND)
    assert made.schema == shelf.schema
    assert made.to_pylist() == [
        {"item_id": "a", **replay.MASKED, "status": "live"},
        {"item_id": "b", "behavior_date": SECOND, "evidence_count": 8, "evidence_bucket": 3, "richness": 0.5, "strength": 0.25, "status": "live"},
    ]


def test_released_rows_are_copied_unless_encoded_and_unmoved_items_keep_their_number(replay):
    features = release([[0, 0]] * 4).drop_columns(["codes", "weights", "disambiguator"])
    parent = release([[1, 1], [1, 1], [2, 2]], numbers=[1, 0, 0])
    encoded = release([[1, 1], [1, 1]], ids="cd").select(["item_id", "codes", "weights"])
    made = replay.release_rows(features, encoded, parent, carry=True, same_words=True)
    assert made["codes"].to_pylist() == [[1, 1]] * 4
    assert made["disambiguator"].to_pylist() == [1, 0, 2, 3]
    every = release([[1, 1], [1, 1], [1, 1], [0, 0]]).select(["item_id", "codes", "weights"])
    assert replay.release_rows(features, every, parent, carry=False, same_words=False)["disambiguator"].to_pylist() == [0, 1, 2, 0]


def test_a_replay_names_what_differs(replay):
    one = release([[0, 0], [1, 1]])
    assert replay.differs(one, one) == ""
    assert replay.differs(one, release([[0, 0], [1, 2]])) == "codes"
    assert replay.differs(one, release([[0, 0], [1, 1]], numbers=[0, 1])) == "disambiguator"
    assert replay.differs(one, release([[0, 0]])) == "item_id"
    assert replay.differs(one, release([[0, 0], [1, 1]], weights=[[1.0, 1.0], [1.0, 0.9]])) == "weights"
    assert replay.differs(one, release([[0, 0], [1, 1]], weights=[[1.0, 1.0], [1.0, 0.9999999]])) == ""


def test_the_tables_have_one_line_per_branch_with_all_cells(bench):
    stability, measures, _ = bench
    step = {key: 1.0 for key in measures.kept(measures.compared(release([[0, 0]]), release([[0, 0]])))}
    row = {"night": "n", "start": "", "file": True, "collision_rate": 0.1, "recall": 0.2, "reader_auc": 0.7, "reader_losses": [0.0, 0.1, 0.2]}
    row |= {f"{view}_{key}": value for view in ("night", "since_first") for key, value in step.items()}
    row |= {f"{name}_{when}": 0.3 for name in ("first", "moved") for when in ("before", "after")} | {"first_asked": 2, "moved_asked": 0}
    text = stability.tables([{**row, "branch": branch} for branch in ("a", "b") for _ in range(2)])
    first, second = text.split("\n\n")
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == ["| a", "| b"]
    assert {line.count("|") for line in first.splitlines()} == {len(stability.SID_TITLES) + 2}
    assert {line.count("|") for line in second.splitlines()} == {len(stability.QUALITY_TITLES) + 2}
