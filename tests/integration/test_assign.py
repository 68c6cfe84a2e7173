"""assign_sid on small frames: who is encoded, what is carried over, numbers as in collisions.py, what the gate measures."""

from __future__ import annotations

import json
from datetime import date, timedelta
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from jobs import assign_sid
from pipeline.context import Plan, Release
from pipeline.errors import ContractError
from pipeline.tokenizers.collisions import disambiguate

pytestmark = pytest.mark.spark
D = date(2026, 1, 5)
SIZES = (10, 10)
FEATURE = (
    "logical_date date, item_id string, generation int, content_hash string, text_hash string, image_hash string, "
    "text_encoder_id string, image_encoder_id string, behavior_date date, evidence_count bigint, evidence_bucket int, richness float, strength float, "
    "popularity double, popularity_stratum string, status string, first_seen date, retired_at date"
)
SID = (
    "logical_date date, item_id string, codes array<int>, weights array<float>, disambiguator int, popularity double, popularity_stratum string, "
    "status string, is_new boolean, first_seen date, retired_at date, changed_from_parent boolean, generation int"
)


def plan(*, new_generation=False, parent=True):
    """A night on D whose parent is the night before."""
    before = Release(tag="d20260104", logical_date=D - timedelta(days=1), revision=1, generation=1, snapshot_id=1)
    return Plan(
        logical_date=D, tag="d20260105", revision=1, generation=2 if new_generation and parent else 1, start="cold" if new_generation else "", reason="test",
        parent=before if parent else None, files=(), input_fingerprint="f", config_hash="c", seed=1,
    )  # fmt: skip


def feature(item_id, *, text="t", behavior_date=None, popularity=1.0, stratum="head", status="live", first_seen=D):
    """A row of item_feature."""
    encoder = "enc" if text else None
    retired = D if status == "retired" else None
    return (D, item_id, 1, "c", text, None, encoder, None, behavior_date, 0, -1, 0.5, 0.5, popularity, stratum, status, first_seen, retired)


def released(item_id, codes, number=0, *, weights=(1.0, 1.0), stratum="head", popularity=1.0):
    """A row of the parent release."""
    return (D - timedelta(days=1), item_id, list(codes), list(weights), number, popularity, stratum, "live", True, D - timedelta(days=9), None, False, 1)


def night_rows(features, encoded, parent, night):
    return assign_sid.release_rows(assign_sid.beside_parent(features, parent, night), encoded, night)


def encoded_frame(spark, rows):
    return spark.createDataFrame([(item, list(codes), [1.0] * len(codes), False) for item, codes in rows], assign_sid.CODES_SCHEMA)


def by_item(frame, *columns):
    return {row["item_id"]: tuple(row[column] for column in columns) for row in frame.select("item_id", *columns).collect()}


def test_spark_numbers_items_exactly_as_the_array_function_does(spark):
    rng = np.random.default_rng(5)
    count = 400
    codes_NL = rng.integers(0, 4, size=(count, 3)).astype(np.int32)
    first_seen = [D + timedelta(days=int(day)) for day in rng.integers(0, 4, count)]
    items = [f"item {row * 7 % count}" for row in range(count)]
    carried = rng.random(count) < 0.5
    existing = np.full(count, -1)
    existing[carried] = disambiguate(codes_NL[carried], np.array(first_seen)[carried], np.array(items)[carried], existing[carried]) * 2
    expected = disambiguate(codes_NL, first_seen, items, existing)
    rows = [
        (item, codes.tolist(), day, None if number < 0 else int(number)) for item, codes, day, number in zip(items, codes_NL, first_seen, existing, strict=True)
    ]
    frame = spark.createDataFrame(rows, "item_id string, codes array<int>, first_seen date, existing int").repartition(3)
    found = by_item(assign_sid.disambiguate_frame(frame), "disambiguator")
    assert found == {item: (int(number),) for item, number in zip(items, expected, strict=True)}


def test_frozen_encodes_new_items_and_rows_trained_tonight_only(spark):
    features = spark.createDataFrame(
        [feature("old", behavior_date=D - timedelta(days=3)), feature("moved", behavior_date=D), feature("new"), feature("cold")], FEATURE
    )
    parent = spark.createDataFrame([released("old", (1, 1)), released("moved", (2, 2)), released("cold", (3, 3))], SID)
    assert by_item(assign_sid.beside_parent(features, parent, plan()), "chosen") == {"old": (False,), "moved": (True,), "new": (True,), "cold": (False,)}
    assert assign_sid.beside_parent(features, parent, plan(new_generation=True)).where("chosen").count() == 4


def test_everything_not_encoded_is_carried_over_bit_by_bit(spark):
    odd = float(np.float32(0.1) + np.float32(1e-7))
    features = spark.createDataFrame(
        [feature("a"), feature("gone", status="retired"), feature("same", behavior_date=D), feature("moved", behavior_date=D), feature("new")], FEATURE
    )
    parent = spark.createDataFrame(
        [released("a", (1, 1), 3, weights=(odd, 0.5)), released("gone", (1, 1), 4), released("same", (2, 2), 7), released("moved", (2, 2), 8)], SID
    )
    encoded = encoded_frame(spark, [("same", (2, 2)), ("moved", (1, 1)), ("new", (1, 1))])
    rows = night_rows(features, encoded, parent, plan())
    found = by_item(rows, "codes", "disambiguator", "changed_from_parent", "is_new")
    assert found == {
        "a": ([1, 1], 3, False, False),
        "gone": ([1, 1], 4, False, False),  # a tombstone keeps its number
        "same": ([2, 2], 7, False, False),  # encoded again to the same codes: the number stays
        "moved": ([1, 1], 5, True, False),
        "new": ([1, 1], 6, False, True),
    }
    kept = {row.item_id: row.weights for row in rows.collect()}
    assert kept["a"] == [odd, 0.5]


def test_a_new_generation_numbers_from_zero(spark):
    features = spark.createDataFrame([feature("b", first_seen=D), feature("a", first_seen=D), feature("late", first_seen=D + timedelta(days=1))], FEATURE)
    parent = spark.createDataFrame([released("a", (1, 1), 9)], SID)
    encoded = encoded_frame(spark, [("a", (1, 1)), ("b", (1, 1)), ("late", (1, 1))])
    found = by_item(night_rows(features, encoded, parent, plan(new_generation=True)), "disambiguator", "generation")
    assert found == {"a": (0, 2), "b": (1, 2), "late": (2, 2)}


def test_an_anchored_generation_keeps_the_numbers_of_unmoved_items(spark):
    features = spark.createDataFrame([feature("a"), feature("b"), feature("new")], FEATURE)
    parent = spark.createDataFrame([released("a", (1, 1), 9), released("b", (2, 2), 4)], SID)
    encoded = encoded_frame(spark, [("a", (1, 1)), ("b", (1, 1)), ("new", (1, 1))])
    night = plan(new_generation=True).model_copy(update={"start": "anchored"})
    found = by_item(night_rows(features, encoded, parent, night), "disambiguator", "changed_from_parent", "generation")
    assert found == {"a": (9, False, 2), "b": (10, True, 2), "new": (11, False, 2)}


def test_an_item_without_parent_codes_holds_on_to_none():
    column = pa.array([[1, 2], None, [0, 5]], pa.list_(pa.int32()))
    keep = assign_sid.kept_codes(column, 2, 0.1)
    assert keep.codes_NL[[0, 2]].tolist() == [[1, 2], [0, 5]]
    assert int(keep.codes_NL[1].min()) > 10**9
    assert keep.margin == 0.1


def test_vectors_are_joined_by_reference_and_a_dangling_one_is_refused(spark):
    rows = [feature("both", behavior_date=D), feature("text only"), feature("nothing", text=None)]
    content = spark.createDataFrame(
        [("enc", "text", "t", [1.0, 2.0]), ("enc", "image", "t", [9.0])], "encoder_id string, modality string, content_hash string, vector array<float>"
    )
    schema = "logical_date date, item_id string, generation int, vector array<float>"
    behavior = spark.createDataFrame([(D, "both", 1, [3.0]), (D, "both", 2, [4.0]), (D - timedelta(days=1), "both", 1, [5.0])], schema)
    vectors = assign_sid.item_vectors(spark.createDataFrame(rows, FEATURE), content, behavior, 1)
    assert by_item(vectors, "text", "image", "behavior", "dangling") == {
        "both": ([1.0, 2.0], None, [3.0], False),
        "text only": ([1.0, 2.0], None, None, False),
        "nothing": (None, None, None, False),
    }
    broken = assign_sid.item_vectors(spark.createDataFrame([feature("x", text="unknown"), feature("both", behavior_date=D)], FEATURE), content, behavior, 1)
    assert by_item(broken, "dangling") == {"x": (True,), "both": (False,)}
    with pytest.raises(ContractError, match="do not exist") as caught:
        assign_sid.check_references({"dangling": 1.0})
    assert "1 item" in caught.value.found


def test_an_item_without_any_modality_is_masked_without_asking_the_tokenizer(spark):
    def mapper(batches):
        for batch in batches:
            codes = pa.array([[int(vector[0].as_py()), 1] for vector in batch.column("text")], pa.list_(pa.int32()))
            yield pa.RecordBatch.from_arrays(
                [batch.column("item_id"), codes, pa.array([[1.0, 0.5]] * batch.num_rows, pa.list_(pa.float32())), batch.column("dangling")],
                names=["item_id", "codes", "weights", "dangling"],
            )

    schema = "item_id string, text array<float>, image array<float>, behavior array<float>, richness float, strength float, dangling boolean"
    vectors = spark.createDataFrame([("a", [4.0], None, None, 0.0, 0.0, False), ("none", None, None, None, 0.0, 0.0, False)], schema)
    assert by_item(assign_sid.encode(vectors, mapper, SIZES), "codes", "weights") == {"a": ([4, 1], [1.0, 0.5]), "none": ([10, 10], [0.0, 0.0])}


def test_metrics_count_what_their_names_say(spark):
    features = spark.createDataFrame(
        [
            feature("a", behavior_date=D, popularity=6.0),
            feature("b", behavior_date=D, popularity=2.0, stratum="tail"),
            feature("c", popularity=2.0, stratum="tail"),
            feature("retired", popularity=0.0, status="retired"),
            feature("empty", text=None, popularity=0.0, stratum="tail"),
            feature("empty too", text=None, popularity=0.0, stratum="tail"),
        ],
        FEATURE,
    )
    parent = spark.createDataFrame([released("a", (1, 2)), released("b", (3, 10), weights=(1.0, 0.0), stratum="tail"), released("retired", (1, 1))], SID)
    encoded = encoded_frame(spark, [("a", (1, 1)), ("b", (3, 4)), ("c", (1, 1)), ("empty", (10, 10)), ("empty too", (10, 10))])
    encoded = encoded.selectExpr("item_id", "codes", "IF(codes[0] = 10, array(0f, 0f), weights) AS weights", "item_id = 'c' AS dangling")
    metrics, usage = assign_sid.measure(assign_sid.with_groups(night_rows(features, encoded, parent, plan()), SIZES), SIZES)
    expected = {
        "rows": 6, "live": 5, "known": 3, "new_items": 3, "dangling": 1, "codes_out_of_range": 0, "masked_with_weight": 0, "disambiguators": 3,
        "collision_rate": 2 / 3,  # a and c of a, b, c: neither the retired nor the masked items count
        "shared_mass": 8 / 10, "masked_share": 2 / 5,
        "churn": 1 / 3, "churn_head": 1 / 2, "churn_tail": 0, "churn_mass": 6 / 8, "unmasked_share": 1 / 3,
        "churn_position_0": 0, "churn_position_1": 2 / 3, "reencoded": 2, "reencoded_kept_share": 0,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert [counts_K.tolist() for counts_K in usage] == [[0, 2, 0, 1, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 1, 0, 0, 0, 0, 0]]
    assert metrics["min_perplexity_share"] == pytest.approx(np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))) / 3)
    assert metrics["max_dead_share"] == pytest.approx(1 / 3)


def test_broken_codes_are_counted(spark):
    features = spark.createDataFrame([feature(name) for name in ("high", "short", "null", "loud", "good")], FEATURE)
    encoded = spark.createDataFrame(
        [
            ("high", [11, 1], [1.0, 1.0], False),
            ("short", [1], [1.0], False),
            ("null", [1, None], [1.0, 1.0], False),
            ("loud", [10, 1], [0.5, 1.0], False),
            ("good", [10, 9], [0.0, 1.0], False),
        ],
        assign_sid.CODES_SCHEMA,
    )
    rows = night_rows(features, encoded, spark.createDataFrame([], SID), plan(parent=False))
    metrics, _ = assign_sid.measure(assign_sid.with_groups(rows, SIZES), SIZES)
    assert metrics["codes_out_of_range"] == 3
    assert metrics["masked_with_weight"] >= 1


def test_the_churn_budget_holds_within_a_generation_only_and_lost_items_are_counted():
    measured = {"rows": 1.0, "known": 1.0, "churn": 0.4, "churn_head": 0.2}
    sources = assign_sid.Sources(items=3, parent_items=2, text_encoder_id="enc", image_encoder_id=None)
    within = assign_sid.against_sources(measured, sources, plan())
    assert within == {"rows_missing": 2.0, "items_lost": 1.0, "budget_churn": 0.4, "budget_churn_head": 0.2, "budget_churn_refit": 0.0}
    cold = plan(new_generation=True)
    budgets = {start: assign_sid.against_sources(measured, sources, cold.model_copy(update={"start": start})) for start in ("cold", "warm", "anchored")}
    assert {start: found["budget_churn"] for start, found in budgets.items()} == {"cold": 0.0, "warm": 0.0, "anchored": 0.0}
    assert {start: found["budget_churn_refit"] for start, found in budgets.items()} == {"cold": 0.0, "warm": 0.0, "anchored": 0.4}


def test_collisions_by_decile(spark):
    features = spark.createDataFrame([feature(f"i{number}", popularity=float(number)) for number in range(20)], FEATURE)
    encoded = encoded_frame(spark, [(f"i{number}", (0, 0) if number < 2 else (number % 10, number // 10 + 1)) for number in range(20)])
    rows = night_rows(features, encoded, spark.createDataFrame([], SID), plan(parent=False))
    rates = assign_sid.collisions_by_decile(assign_sid.with_groups(rows, SIZES))
    assert len(rates) == 10
    assert rates[0] == 1.0
    assert sum(rates[1:]) == 0.0


def test_two_encoders_of_one_modality_are_refused(spark):
    features = spark.createDataFrame([feature("a"), feature("b")], FEATURE)
    nobody = spark.createDataFrame([], SID)
    assert assign_sid.read_sources(features, nobody, D) == assign_sid.Sources(items=2, parent_items=0, text_encoder_id="enc", image_encoder_id=None)
    other = features.selectExpr("*").replace("enc", "other", subset=["text_encoder_id"])
    with pytest.raises(ContractError, match="more than one text_encoder_id"):
        assign_sid.read_sources(features.unionByName(other), nobody, D)


def test_gate_names_only_metrics_that_somebody_measures(spark):
    from pipeline import quality

    contract = quality.read_expectations("sid.item_sid")
    features = spark.createDataFrame([feature("a")], FEATURE)
    rows = night_rows(features, encoded_frame(spark, [("a", (1, 1))]), spark.createDataFrame([], SID), plan(parent=False))
    metrics, _ = assign_sid.measure(assign_sid.with_groups(rows, SIZES), SIZES)
    known = {*contract["metrics"], *metrics, "rows_missing", "items_lost", "budget_churn", "budget_churn_head", "budget_churn_refit"}
    assert {rule["metric"] for rule in contract["expect"]} <= known


# ---------------------------------------------------------------- users


@pytest.fixture(scope="module")
def two_sided():
    """(a small DAS with its items and users, what a worker is given of it)."""
    from safetensors.torch import save
    from tokenizer_items import das_settings, tiny_history, tiny_items, training

    from pipeline.tokenizers.base import FitOptions
    from pipeline.tokenizers.das import Das

    items, history = tiny_items(), tiny_history()
    tokenizer = Das(das_settings())
    tokenizer.fit(items, FitOptions(seed=1, settings=training(), history=history))
    return tokenizer, items, history, SimpleNamespace(value=(json.dumps(tokenizer.config()), save(tokenizer.state())))


def item_frame(spark, items):
    def cell(name, row):
        return items.vectors(name)[row].tolist() if items.mask(name)[row] else None

    rows = [(f"i{row:02d}", cell("text", row), cell("image", row)) for row in range(len(items))]
    return spark.createDataFrame(rows, "item_id string, text array<float>, image array<float>")


def user_frame(spark, history):
    ends = history.offset_U.tolist()
    rows = [(f"u{user:02d}", [f"i{row:02d}" for row in history.index_T[start:stop].tolist()]) for user, (start, stop) in enumerate(pairwise(ends))]
    return spark.createDataFrame(rows, "user_id string, item_ids array<string>")


def test_codes_of_users_are_those_of_the_tokenizer_whatever_the_batches(spark, two_sided):
    tokenizer, items, history, model = two_sided
    expected = tokenizer.encode_users(items, history)
    taken = assign_sid.taken_items(user_frame(spark, history), item_frame(spark, items), tokenizer.settings.max_history)
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "7")  # borders lie inside users
    try:
        coded = taken.mapInArrow(partial(assign_sid.user_batches, model=model), assign_sid.USERS_SCHEMA)
        rows = assign_sid.every_user(user_frame(spark, history), coded, tuple(tokenizer.config()["user_codebook_sizes"]))
        found = by_item(rows.withColumnRenamed("user_id", "item_id"), "codes", "num_items")
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    assert {user: codes for user, (codes, _) in found.items()} == {f"u{row:02d}": codes for row, codes in enumerate(expected.codes_NL.tolist())}
    assert found["u40"] == ([12, 12], 0), "who took nothing is masked"
    assert found["u00"][1] == sum(bool(items.text_N[row] | items.image_N[row]) for row in history.index_T[3:8].tolist()), "the latest five with content"


def test_an_item_that_is_not_live_counts_for_no_user(spark, two_sided):
    _, items, history, _ = two_sided
    kept = item_frame(spark, items).where("item_id > 'i20'")
    taken = assign_sid.taken_items(user_frame(spark, history), kept, 5)
    assert min(row.item_id for row in taken.collect()) > "i20"


def test_a_tokenizer_of_items_alone_writes_no_users():
    model = SimpleNamespace(value=('{"tokenizer": "rq_kmeans"}', b""))
    assert assign_sid.user_writes(None, None, plan(), model) == ()


def test_users_stay_whole_where_batches_end():
    ids = ["a", "a", "b", "c", "c", "c", "d"]
    for size in range(1, 9):
        table = pa.table({"user_id": ids, "row": list(range(7))})
        tables = list(assign_sid.whole_users(iter(table.to_batches(max_chunksize=size))))
        assert [row for part in tables for row in part["row"].to_pylist()] == list(range(7))
        assert sum(len(set(part["user_id"].to_pylist())) for part in tables) == 4
