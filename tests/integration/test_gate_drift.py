"""What gate_drift looks at: pairs chosen by hash, the same whether all or those below a bound are looked at, met in the window; and whose popularity counts."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyspark.sql import functions as F

from jobs import gate_drift
from pipeline import config
from pipeline.context import Context, Home

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


# ---------------------------------------------------------------- what counts: the window's events, the live items' popularity

BASE, NIGHT = date(2026, 1, 5), date(2026, 1, 12)
MASS_TABLES = ("feature.item_feature", "feature.item_popularity")
ROW = {"logical_date": NIGHT, "generation": 1, "snapshot_id": 0}


def given(monkeypatch: pytest.MonkeyPatch, spark: Any, release: Any, **tables: Any) -> Any:
    """The stage's inputs: a release and tables by name, `_` for the dot."""
    monkeypatch.setattr(gate_drift, "release_frame", lambda inputs, row: release)
    return SimpleNamespace(spark=spark, frame=lambda name: tables[name.replace(".", "_")])


def test_mass_is_that_of_live_items_trained_later_or_met_at_least_twice_as_often(spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    later, before = NIGHT - timedelta(days=1), BASE - timedelta(days=1)
    items: list[tuple[str, str, date | None, int | None, int | None, bool]] = [  # name, status, trained on, evidence at the base and now, doubled
        ("less than twice", "live", BASE, 4, 7, False),
        ("just twice", "live", later, 4, 8, True),
        ("once since one", "live", before, 1, 1, False),
        ("twice since one", "live", None, 1, 2, True),
        ("new with one event", "live", later, None, 1, False),
        ("new with two events", "live", later, None, 2, True),
        ("one event since none", "live", BASE, 0, 1, False),
        ("two events since none", "live", BASE, 0, 2, True),
        ("never met", "live", None, None, None, False),
        ("met no more", "live", later, 9, None, False),
        ("retired", "retired", later, 1, 50, True),
    ]
    mass = {name: float(2**place) for place, (name, *_) in enumerate(items)}
    release = spark.createDataFrame([(name, status, mass[name]) for name, status, *_ in items], "item_id string, status string, popularity double")
    features = [(NIGHT, name, trained) for name, _, trained, *_ in items if trained]
    features += [(day, name, later) for name, *_ in items for day in (BASE, NIGHT + timedelta(days=1))]  # of other days
    evidence = [(day, name, count) for name, _, _, *counts, _ in items for day, count in zip((BASE, NIGHT), counts, strict=True) if count is not None]
    evidence += [(later, name, 99) for name, *_ in items] + [(before, name, 1) for name, *_ in items]
    inputs = given(
        monkeypatch,
        spark,
        release,
        feature_item_feature=spark.createDataFrame(features, "logical_date date, item_id string, behavior_date date"),
        feature_item_popularity=spark.createDataFrame(evidence, "logical_date date, item_id string, evidence_count bigint"),
    )
    found = gate_drift.measure_mass(inputs, ROW, BASE)
    live = [item for item in items if item[1] == "live"]
    total = sum(mass[name] for name, *_ in live)
    assert found["doubled_mass"] == pytest.approx(sum(mass[name] for name, *_, doubled in live if doubled) / total)
    assert found["post_base_mass"] == pytest.approx(sum(mass[name] for name, _, trained, *_ in live if trained == later) / total)
    nobody = given(monkeypatch, spark, release.where("status = 'retired'"), **{name.replace(".", "_"): inputs.frame(name) for name in MASS_TABLES})
    assert gate_drift.measure_mass(nobody, ROW, BASE) == {"post_base_mass": 0.0, "doubled_mass": 0.0}


def test_agreement_is_that_of_the_last_days_before_the_cutoff(spark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the window people meet items that share their codes; whoever reads the days before it, or events from the cutoff on, sees them meet others."""
    ctx = Context(config=config.load("tiny"), home=Home(tmp_path), stage="gate_drift", logical_date=NIGHT, run_id="run")
    params = config.GateDrift(window_days=3)
    codes = {f"i{item}": [item // 2 % 4, item // 2 // 4] for item in range(16)}  # i0 and i1 share both, i0 and i2 at most one
    release = spark.createDataFrame([(item, code, "head") for item, code in codes.items()], "item_id string, codes array<int>, popularity_stratum string")

    def met(file_date: date, moment: datetime, step: int) -> list[tuple[date, str, str, datetime]]:
        """Eight users who each met two items, so many apart."""
        return [(file_date, f"u{file_date}{moment}{user}", f"i{item % 16}", moment) for user in range(8) for item in (2 * user, 2 * user + step)]

    last = ctx.cutoff - timedelta(microseconds=1)
    inside = [*met(NIGHT - timedelta(days=2), last - timedelta(days=9), 1), *met(NIGHT, last, 1)]
    before = met(NIGHT - timedelta(days=3), last - timedelta(days=3), 2)
    after = [*met(NIGHT, ctx.cutoff, 4), *met(NIGHT + timedelta(days=1), last, 6)]

    def measured(events: list[tuple[date, str, str, datetime]]) -> dict[str, dict[str, float | None]]:
        inputs = given(
            monkeypatch,
            spark,
            release,
            raw_interaction=spark.createDataFrame(events, "file_date date, user_id string, item_id string, event_ts timestamp"),
            sid_generation=spark.createDataFrame([(1, [4, 2]), (2, [9])], "generation int, codebook_sizes array<int>"),
        )
        return gate_drift.measure_agreement(inputs, params, ctx, ROW)

    alone = measured(inside)
    assert alone["overall"]["pairs"] == 8
    assert (alone["overall"]["value"] or 0) > 0.5
    assert measured([*inside, *before, *after]) == alone
    for events in (before, after):
        assert measured(events)["overall"] == {"value": None, "se": None, "pairs": 0}
