"""Which pairs gate_drift compares: chosen by hash, the same whether all pairs are looked at or those below a bound."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from pyspark.sql import functions as F

from jobs import gate_drift

pytestmark = pytest.mark.spark


def smallest(spark: Any, met: dict[str, list[str]], count: int) -> list[tuple[str, str, int]]:
    pairs = sorted({pair for items in met.values() for pair in combinations(sorted(items), 2)})
    keyed = spark.createDataFrame(pairs, "item_a string, item_b string").withColumn("key", F.xxhash64("item_a", "item_b")).collect()
    return sorted(map(tuple, keyed), key=lambda pair: (pair[2], *pair[:2]))[:count]


@pytest.mark.parametrize(("users", "items", "most"), [(300, 2000, 50), (300, 15, 100), (5, 30, 2000)], ids=["below a bound", "met again and again", "all"])
def test_the_pairs_with_the_smallest_hashes_are_compared(spark: Any, users: int, items: int, most: int) -> None:
    rng = np.random.default_rng(3)
    met = {f"u{user}": [f"i{item}" for item in rng.choice(items, 12, replace=False)] for user in range(users)}
    events = spark.createDataFrame([(user, item) for user, taken in met.items() for item in taken * 2], "user_id string, item_id string").repartition(3)
    found = gate_drift.cooccurring_pairs(events, max_pairs=most)
    assert [tuple(row) for row in found.collect()] == smallest(spark, met, most)


def test_a_busy_user_counts_with_few_items(spark: Any) -> None:
    events = spark.createDataFrame([("u", f"i{item}") for item in range(50)], "user_id string, item_id string")
    assert gate_drift.cooccurring_pairs(events, items_per_user=4).count() == 6
