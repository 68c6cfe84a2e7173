"""What must hold of popularity whatever the events: it adds up over splits, it never looks ahead, and Spark and NumPy agree."""

from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import popularity

DAY = date(2011, 3, 1)
NUM_ITEMS = 6
ROWS = st.lists(st.tuples(st.integers(0, NUM_ITEMS - 1), st.integers(0, 200), st.integers(1, 50)), max_size=40)


def counted(rows, window_days=90, half_life_days=14.0):
    item_E, age_E, events_E = np.array(rows, np.int64).reshape(-1, 3).T
    return popularity.decayed_count(item_E, age_E, events_E, NUM_ITEMS, window_days=window_days, half_life_days=half_life_days)


@given(rows=ROWS, cut=st.integers(0, 40))
def test_popularity_adds_up_over_any_split_of_the_events(rows, cut):
    assert (counted(rows[:cut]) + counted(rows[cut:])).tolist() == counted(rows).tolist()


@given(rows=ROWS, window=st.integers(1, 150), half_life=st.floats(0.5, 60))
def test_popularity_lies_between_nothing_and_the_evidence(rows, window, half_life):
    found_N = counted(rows, window, half_life)
    item_E, age_E, events_E = np.array(rows, np.int64).reshape(-1, 3).T
    evidence_N, _ = popularity.evidence(item_E, age_E, events_E, NUM_ITEMS)
    assert (found_N >= 0).all()
    assert (found_N <= evidence_N * (1 + 1e-12)).all()


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles_follow_the_order_and_average_one_half(values):
    found_N, value_N = popularity.percentile(values), np.array(values)
    assert ((found_N >= 0) & (found_N <= 1)).all()
    assert len(values) == 1 or abs(found_N.mean() - 0.5) < 1e-9
    order = np.argsort(value_N)
    assert (np.diff(found_N[order])[np.diff(value_N[order]) > 0] > 0).all()


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=60), head=st.floats(0.05, 0.5), tail=st.floats(0.05, 0.5))
def test_no_tail_item_is_more_popular_than_a_head_item(values, head, tail):
    value_N, ids_N = np.array(values), np.arange(len(values)).astype(str)
    found_N = popularity.strata(value_N, ids_N, head_share=head, tail_share=tail)
    rank_N = np.array([popularity.STRATA.index(stratum) for stratum in found_N])
    for better in range(3):
        for worse in range(better + 1, 3):
            low, high = value_N[rank_N == better], value_N[rank_N == worse]
            assert not low.size or not high.size or low.min() >= high.max()


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_the_order_of_items_in_memory_does_not_matter(values, seed):
    place = np.random.default_rng(seed).permutation(len(values))
    value_N, ids_N = np.array(values), np.arange(len(values)).astype(str)
    found_N = popularity.strata(value_N, ids_N, head_share=0.2, tail_share=0.5)
    again_N = popularity.strata(value_N[place], ids_N[place], head_share=0.2, tail_share=0.5)
    assert again_N.tolist() == found_N[place].tolist()


# ---------------------------------------------------------------- Spark


def in_spark(spark, rows, params):
    """Item -> (popularity, percentile, decile, stratum, evidence, days since first) by query.sql; rows are (item, file age, event age, events)."""
    from pipeline.context import SQL

    stats = [(DAY - timedelta(days=int(filed)), DAY - timedelta(days=int(age)), f"i{item}", int(events), "x") for item, filed, age, events in rows]
    schema = "logical_date date, event_date date, item_id string, events bigint, source_sha256 string"
    spark.createDataFrame(stats, schema).createOrReplaceTempView("item_day_stat")
    spark.createDataFrame([(f"i{item}",) for item in range(NUM_ITEMS)], "item_id string").createOrReplaceTempView("listed")
    spark.createDataFrame([], "item_id string, evidence_count bigint, first_event_date date").createOrReplaceTempView("before")
    given = {"logical_date": DAY, "added_up": date(1900, 1, 1), "inputs_sha256": "s", **params}
    for name in ("scored", "query"):
        frame = spark.sql((SQL / "feature" / "item_popularity" / f"{name}.sql").read_text(encoding="utf-8"), args=given)
        frame.createOrReplaceTempView("scored")
    found = frame.collect()
    return {
        row.item_id: (row.popularity, row.percentile, row.popularity_decile, row.popularity_stratum, row.evidence_count, row.days_since_first_event)
        for row in found
    }


PARAMS = {"window_days": 60, "half_life_days": 7.5, "head_share": 0.2, "tail_share": 0.5}


@pytest.mark.spark
def test_spark_and_numpy_agree(spark):
    rng = np.random.default_rng(7)
    item_E, age_E, events_E = rng.integers(0, NUM_ITEMS - 1, 200), rng.integers(0, 90, 200), rng.integers(1, 9, 200)
    late_E = rng.integers(0, 3, 200)
    found = in_spark(spark, zip(item_E, np.maximum(age_E - late_E, 0), age_E, events_E, strict=True), PARAMS)
    value_N = popularity.decayed_count(item_E, age_E, events_E, NUM_ITEMS, window_days=60, half_life_days=7.5)
    percentile_N = popularity.percentile(value_N)
    evidence_N, first_N = popularity.evidence(item_E, age_E, events_E, NUM_ITEMS)
    ids = [f"i{item}" for item in range(NUM_ITEMS)]
    stratum_N = popularity.strata(value_N, ids, head_share=0.2, tail_share=0.5)
    assert [found[name][0] for name in ids] == value_N.tolist()
    np.testing.assert_allclose([found[name][1] for name in ids], percentile_N, rtol=1e-9, atol=1e-9)
    assert [found[name][2] for name in ids] == popularity.decile(percentile_N).tolist()
    assert [found[name][3] for name in ids] == stratum_N.tolist()
    assert [found[name][4] for name in ids] == evidence_N.tolist()
    assert [-1 if found[name][5] is None else found[name][5] for name in ids] == first_N.tolist()


@pytest.mark.spark
@settings(max_examples=3, deadline=None)
@given(later=st.lists(st.tuples(st.integers(0, NUM_ITEMS - 1), st.integers(1, 30), st.integers(-30, 30), st.integers(1, 50)), min_size=1, max_size=10))
def test_events_that_arrive_after_the_cutoff_change_nothing(spark, later):
    rows = [(0, 0, 0, 3), (0, 5, 6, 1), (1, 2, 2, 8), (2, 70, 70, 2)]
    after = [(item, -filed, -filed + abs(age), events) for item, filed, age, events in later]  # some carry event days before the cutoff: late arrivals
    assert in_spark(spark, rows + after, PARAMS) == in_spark(spark, rows, PARAMS)
