"""Group ids and disambiguators on small arrays, against plain Python."""

from __future__ import annotations

import time
from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from pipeline.tokenizers.collisions import disambiguate, group_ids, group_sizes, numbered

DAYS = np.array(["2026-01-02", "2026-01-01", "2026-01-01", "2026-01-03"], dtype="datetime64[D]")


def test_group_ids_are_lexicographic_ranks_of_the_rows():
    codes_NL = np.array([[2, 0], [1, 9], [2, 0], [1, 3]])
    assert group_ids(codes_NL).tolist() == [2, 1, 2, 0]
    assert group_sizes(codes_NL).tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(("high", "positions"), [(3, 2), (1000, 12), (2**61, 3)])
def test_group_ids_equal_numpy_unique_in_one_word_and_in_many(high, positions):
    rng = np.random.default_rng(7)
    codes_NL = rng.integers(0, high, size=(60, positions))[rng.integers(0, 60, 500)]
    assert group_ids(codes_NL).tolist() == np.unique(codes_NL, axis=0, return_inverse=True)[1].ravel().tolist()


def test_group_ids_of_nothing():
    assert group_ids(np.zeros((0, 3), dtype=np.int32)).shape == (0,)
    assert group_sizes(np.zeros((0, 3), dtype=np.int32)).shape == (0,)
    assert group_ids(np.zeros((3, 0), dtype=np.int32)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="matrix"):
        group_ids(np.zeros(3, dtype=np.int32))


def test_new_items_are_numbered_by_first_seen_then_item_id():
    codes_NL = np.zeros((4, 3), dtype=np.int32)
    assert disambiguate(codes_NL, DAYS, ["a", "c", "b", "d"], [-1] * 4).tolist() == [2, 1, 0, 3]


def test_existing_numbers_stay_and_new_ones_follow_the_largest_even_over_a_gap():
    codes_NL = np.array([[5], [5], [5], [6]])
    numbers = disambiguate(codes_NL, [date(2026, 1, 9), date(2026, 1, 1), date(2026, 1, 2), date(2026, 1, 1)], pa.array(["a", "b", "c", "d"]), [7, -1, -1, -1])
    assert numbers.tolist() == [7, 8, 9, 0]
    assert numbers.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id_N": ["a", "a"]}, "not unique"),
        ({"item_id_N": ["a", None]}, "nulls"),
        ({"first_seen_N": [date(2026, 1, 1), None]}, "nulls"),
        ({"existing_N": [0, 0]}, "share codes"),
        ({"existing_N": [0]}, "shape"),
    ],
)
def test_refused(change, message):
    good = {"codes_NL": np.zeros((2, 2), dtype=int), "first_seen_N": [date(2026, 1, 1)] * 2, "item_id_N": ["a", "b"], "existing_N": [-1, -1]}
    with pytest.raises(ValueError, match=message):
        disambiguate(**{**good, **change})


def test_half_a_million_rows_take_seconds_not_minutes():
    rng = np.random.default_rng(3)
    count = 500_000
    codes_NL = rng.integers(0, 30, size=(count, 4)).astype(np.int32)
    items = np.char.add("item", rng.permutation(count).astype(str))
    started = time.process_time()  # the machine may have other work
    numbers = disambiguate(codes_NL, np.full(count, 20, dtype=np.int32), items, np.full(count, -1))
    assert time.process_time() - started < 20
    assert len(np.unique(group_ids(codes_NL) * 1000 + numbers)) == count


def test_numbers_in_the_order_of_rows_are_those_of_items_without_any() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (200, 3))
    names = [f"{number:03d}" for number in range(200)]
    assert numbered(codes).tolist() == disambiguate(codes, np.zeros(200, np.int64), names, np.full(200, -1)).tolist()
    assert numbered(codes[:0]).tolist() == []
