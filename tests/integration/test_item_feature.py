"""The night's manifest: under `frozen` only tonight's behaviour rows differ from the parent, whatever else arrives."""

import json
from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from jobs import item_feature
from jobs.inputs import Inputs
from pipeline import config, richness
from pipeline.context import Context, Home, Plan, Release, write_json
from pipeline.errors import ContractError, UpstreamMissing

BASE, D = date(2026, 3, 1), date(2026, 3, 2)
COUNTS, NORMS = np.array([5, 8, 13, 40]), np.array([0.5, 0.7, 1.0, 2.0])
TABLES = {
    "raw.item": "file_date date, item_id string, title string, text string, category string, image_uri string, text_hash string, image_hash string,"
    " content_hash string, text_vector array<float>, image_vector array<float>",
    "raw.source_file": "file_date date, kind string, status string",
    "feature.item_popularity": "logical_date date, item_id string, popularity double, popularity_stratum string, first_event_date date",
    "feature.item_content_vector": "encoder_id string, modality string, content_hash string, vector array<float>",
    "feature.item_behavior_vector": "logical_date date, item_id string, generation int, norm float, evidence_count bigint, evidence_bucket int",
    "feature.item_feature": "logical_date date, item_id string, generation int, behavior_date date, evidence_count bigint, evidence_bucket int,"
    " richness float, strength float, status string, content_hash string",
    "sid.release": "tag string, logical_date date, revision int",
    "sid.generation": "generation int, logical_date date, richness_reference string, text_encoder_id string, image_encoder_id string",
}


class Frames(Inputs):
    """Tables given as rows instead of snapshots."""

    def frame(self, table, *, at=None):
        return self.spark.createDataFrame(self.lake.get(table, []), TABLES[table])


def item(name, text="t"):
    return (BASE, name, name, text, None, None, text, None, f"c-{name}", None, None)


def reference():
    return richness.fit_reference("norm", COUNTS, NORMS)


def night(spark, tmp_path, *, new_generation, extra=(), start=""):
    """Inputs and context of a night with four items: trained tonight, copied, masked, and known by events only; `extra` arrive on top.

    A new generation is the lake's first, unless `start` says how it begins at the parent's.
    """
    parent = None if new_generation else Release(tag="d20260301", logical_date=BASE, revision=1, generation=7, snapshot_id=1)
    plan = Plan(
        logical_date=D, tag="d20260302", revision=1, generation=8 if start else 7, start="cold" if new_generation else start, reason="test", parent=parent,
        files=(), input_fingerprint="f", config_hash="c", seed=0,
    )  # fmt: skip
    ctx = Context(config.Config(), Home(tmp_path), "item_feature", D, "test")
    write_json(ctx.staging / "plan_night.json", {"outputs": plan.model_dump(mode="json")})
    write_json(ctx.staging / "content_embedding.json", {"outputs": {"text_encoder_id": "T", "image_encoder_id": None}})
    write_json(ctx.staging / "train_behavior_encoder.json", {"outputs": {"richness_reference": reference()}})
    names = ["trained", "copied", "masked", "sold", *extra]
    tables = {
        "raw.item": [item(name) for name in names if name != "sold"],
        "feature.item_popularity": [(D, name, 1.0 + place, "torso", D) for place, name in enumerate(names)],
        "feature.item_content_vector": [("T", "text", "t", [1.0])],
        "feature.item_behavior_vector": [(D, "trained", 7, 1.0, 8, 3), (D, "trained", 6, 9.0, 99, 6), (BASE, "copied", 7, 0.7, 5, 2)]
        + [(D, name, 7, 50.0, 4096, 12) for name in extra],
        "feature.item_feature": [
            (BASE, "trained", 7, BASE, 4, 2, 0.1, 0.2, "live", "c-old"),
            (BASE, "copied", 7, BASE, 5, 2, 0.123456789, 0.987654321, "retired", "c-copied"),
            (BASE, "masked", 7, None, 0, -1, 0.0, 0.0, "retired", "c-old"),
        ],
        "sid.generation": [(7, BASE, json.dumps(reference()), "T", None)],
    }
    return Frames(ctx.home, tables, {}, spark), ctx


def rows(result):
    return {row.item_id: row for row in result.writes[0].frame.collect()}


@pytest.mark.spark
def test_a_frozen_night_copies_the_parent_bit_by_bit_except_what_was_trained(spark, tmp_path):
    inputs, ctx = night(spark, tmp_path, new_generation=False)
    result = item_feature.run(inputs, config.ItemFeature(), ctx)
    found = rows(result)
    expected = richness.richness(reference(), 8, 1.0)
    assert (found["trained"].behavior_date, found["trained"].evidence_count, found["trained"].evidence_bucket) == (D, 8, 3)
    assert found["trained"].richness == np.float32(expected)
    assert found["trained"].strength == np.float32(richness.alignment_strength(expected, 10.0, reference()["beta"]))
    assert (found["copied"].behavior_date, found["copied"].richness, found["copied"].strength) == (BASE, np.float32(0.123456789), np.float32(0.987654321))
    for name in ("masked", "sold"):
        assert (found[name].behavior_date, found[name].evidence_bucket, found[name].richness, found[name].strength) == (None, -1, 0.0, 0.0)
    assert (found["sold"].text_hash, found["sold"].first_seen, found["sold"].status) == (None, D, "live")
    assert result.metrics["moved_rows"] == 1
    assert result.metrics["unmasked_rows"] == 0
    assert result.metrics["new_items"] == 1
    assert result.metrics["post_base_mass"] == pytest.approx(1 / 10)
    assert result.metrics["text_share"] == 0.75
    spark.catalog.clearCache()


@pytest.mark.spark
def test_a_record_breaking_new_item_moves_no_other_row(spark, tmp_path):
    before = rows(item_feature.run(*_arguments(night(spark, tmp_path, new_generation=False))))
    after = rows(item_feature.run(*_arguments(night(spark, tmp_path, new_generation=False, extra=("star",)))))
    assert after.pop("star").richness == 1.0
    assert after == before
    spark.catalog.clearCache()


@pytest.mark.spark
def test_a_new_generation_takes_nothing_from_the_parent(spark, tmp_path):
    result = item_feature.run(*_arguments(night(spark, tmp_path, new_generation=True)))
    assert [name for name, row in rows(result).items() if row.behavior_date is not None] == ["trained"]
    assert result.metrics["post_base_mass"] == 0
    spark.catalog.clearCache()


@pytest.mark.spark
def test_a_generation_that_is_not_recorded_is_named(spark, tmp_path):
    inputs, ctx = night(spark, tmp_path, new_generation=False)
    inputs.lake["sid.generation"] = []
    with pytest.raises(UpstreamMissing, match="generation 7"):
        item_feature.run(inputs, config.ItemFeature(), ctx)


@pytest.mark.spark
@pytest.mark.parametrize(
    ("start", "generation", "tonight", "refused"),
    [
        ("", ("T", None), ("other", None), True),
        ("anchored", ("T", None), ("other", None), True),
        ("warm", ("T", "P"), ("T", "other"), True),
        ("cold", ("T", None), ("other", None), False),
        ("", (None, None), ("T", "P"), False),
        ("", ("T", "P"), ("T", None), False),  # nothing to compare
        ("anchored", ("T", None), ("T", "P"), False),
    ],
)
def test_a_night_whose_content_encoder_is_not_the_generations_is_refused_unless_it_begins_anew(spark, tmp_path, start, generation, tonight, refused):
    inputs, ctx = night(spark, tmp_path, new_generation=False, start=start)
    inputs.lake["sid.generation"] = [(7, BASE, json.dumps(reference()), *generation)]
    write_json(ctx.staging / "content_embedding.json", {"outputs": dict(zip(("text_encoder_id", "image_encoder_id"), tonight, strict=True))})
    encoders = item_feature.content_encoders(ctx)
    if not refused:
        item_feature.check_encoders(item_feature.recorded_generation(inputs, ctx.plan()), encoders)
        return
    with pytest.raises(ContractError, match="generation 7 was fitted to another") as caught:
        item_feature.run(inputs, config.ItemFeature(), ctx)
    assert caught.value.found == "other"
    assert "plan_night.policy=cold" in caught.value.next_command


def test_the_mapper_is_the_richness_module_in_float32():
    batch = pa.RecordBatch.from_pydict(
        {"item_id": list("abcd"), "evidence_count": COUNTS, "evidence_bucket": pa.array([2, 3, 3, 5], pa.int32()), "norm": pa.array(NORMS, pa.float32())}
    )
    (found,) = item_feature.richness_mapper(reference())(iter([batch]))
    expected_N = richness.richness(reference(), COUNTS, NORMS.astype(np.float32))
    np.testing.assert_array_equal(found.column("richness"), expected_N.astype(np.float32))
    np.testing.assert_array_equal(found.column("strength"), richness.alignment_strength(expected_N, 10.0, reference()["beta"]).astype(np.float32))
    assert found.column("item_id").to_pylist() == list("abcd")
    assert [batch.num_rows for batch in item_feature.richness_mapper(reference())(iter([batch.slice(0, 0)]))] == [0]


def _arguments(made):
    inputs, ctx = made
    return inputs, config.ItemFeature(), ctx


@pytest.mark.spark
def test_a_retired_id_that_comes_back_with_other_content_is_named(spark, tmp_path):
    inputs, ctx = night(spark, tmp_path, new_generation=False)
    result = item_feature.run(inputs, ctx.config.item_feature, ctx)
    assert result.outputs == {"returned_as_others": ["masked"]}, "not the one that changed while it lived, nor the one that came back as it was"
    assert result.writes[0].metrics == {"returned_as_others": 1.0}
