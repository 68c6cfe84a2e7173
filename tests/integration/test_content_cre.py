"""The content encoder on real tables through the real runner: pairs, training, vectors under an id of their own, and the nights that keep it.

MLflow is left out (its own tests hold it): models lie in folders.
"""

from __future__ import annotations

import json
from datetime import date

import numpy as np
import pytest

from jobs import content_cre, runner
from pipeline import config as profile
from pipeline.context import Context, Home, Plan, Release, write_json
from pipeline.errors import ContractError, UpstreamMissing

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("models_in_folders")]
D1, D2 = date(2026, 1, 5), date(2026, 1, 6)
ITEMS = 40
SECTION = {
    "enabled": True, "widths": [4, 8], "hidden_dim": 16, "steps": 4, "sequence_steps": 2, "identity_steps": 2, "round_steps": 2, "batch_size": 8, "sample": 64,
    "clusters": 4, "held_share": 0.25, "min_together": 1, "cluster_sizes": [4], "quantise_levels": 2, "min_peak": 1,
}  # fmt: skip


def settings(**changes):
    return profile.parse({"content_cre": {**SECTION, **changes}}, where="test")


def context(home: Home, stage: str, day: date, start: str, config: profile.Config) -> Context:
    """A night that begins cold, or goes on from the first one."""
    parent = None if start == "cold" else Release(tag="d20260105", logical_date=D1, revision=1, generation=1, snapshot_id=1)
    plan = Plan(
        logical_date=day, tag="d", revision=1, generation=1 if start != "anchored" else 2, start=start, reason="test", parent=parent, files=(),
        input_fingerprint="f", config_hash="c", seed=1,
    )  # fmt: skip
    ctx = Context(config=config, home=home, stage=stage, logical_date=day, run_id=f"{start or 'frozen'}_{day}")
    write_json(ctx.staging / "plan_night.json", {"outputs": plan.model_dump(mode="json")})
    write_json(ctx.staging / "content_embedding.json", {"outputs": {"text_encoder_id": "T", "image_encoder_id": None}})
    if not (ctx.staging / "train_behavior_encoder.json").is_file():
        write_json(ctx.staging / "train_behavior_encoder.json", {"outputs": {}})
    return ctx


def stage(home, name, day=D1, start="cold", config=None):
    return runner.run_stage(context(home, name, day, start, config or settings()))


def put_items(spark, day, first, last):
    rng = np.random.default_rng(first)
    rows = [
        (day, f"i{n:02d}", f"{'red' if n % 2 else 'blue'} lamp number {n % 7}", "t", f"k{n % 3}", None, f"h{n:02d}", None, f"c{n}", None, None)
        for n in range(first, last)
    ]
    spark.createDataFrame(rows, spark.table("lake.raw.item").schema).writeTo("lake.raw.item").append()
    vectors = [("T", "text", f"h{n:02d}", rng.normal(size=6).tolist()) for n in range(first, last)]
    spark.createDataFrame(vectors, spark.table("lake.feature.item_content_vector").schema).writeTo("lake.feature.item_content_vector").append()


def put_events(spark):
    frame = spark.range(300).selectExpr(
        f"DATE'{D1}' file_date", "concat('u', id % 20) user_id", f"concat('i', lpad(CAST((id * 7) % {ITEMS} AS STRING), 2, '0')) item_id",
        "timestamp_seconds(1767600000 + id * 60) event_ts", "'click' event_type", "1.0D value", "concat('s', id % 40) session_id",
    )  # fmt: skip
    frame.writeTo("lake.raw.interaction").append()


def put_generation(spark, outputs):
    target = spark.table("lake.sid.generation").schema
    row = {"generation": 1, "logical_date": D1, **outputs}
    spark.createDataFrame([tuple(row.get(name) for name in target.names)], target).writeTo("lake.sid.generation").append()


def made(spark, encoder_id):
    return {row.content_hash: row.vector for row in spark.table("lake.feature.item_content_vector").where(f"encoder_id = '{encoder_id}'").collect()}


def first_night(spark, home):
    put_items(spark, D1, 0, ITEMS)
    put_events(spark)
    for name in ("user_sequence", "content_pair", "train_content_encoder", "content_cre"):
        outcome = stage(home, name)
    return outcome


def test_a_cold_night_trains_and_stores_and_a_frozen_night_keeps_the_encoder(spark, lake_home):
    outcome = first_night(spark, lake_home)
    encoder_id = outcome["outputs"]["text_encoder_id"]
    assert encoder_id.startswith("cre-")
    assert outcome["outputs"]["image_encoder_id"] is None
    before = made(spark, encoder_id)
    assert len(before) == ITEMS
    assert all(len(vector) == 8 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in before.values())
    assert len(made(spark, "T")) == ITEMS, "base vectors stay"
    trained = json.loads((lake_home.folder("staging") / f"cold_{D1}" / "train_content_encoder.json").read_text())
    assert trained["figures"]["embedding_report"]["kind"] == "embedding_report"
    assert trained["metrics"]["embedding/cre_text/recall@50/content"] >= 0

    again = stage(lake_home, "content_cre")
    assert again["metrics"]["projected"] == 0
    assert spark.table("lake.feature.content_encoder").count() == 1

    put_generation(spark, {"text_encoder_id": encoder_id})
    put_items(spark, D2, ITEMS, ITEMS + 3)
    for start, fresh in (("", 3), ("anchored", 0)):
        later = stage(lake_home, "content_cre", D2, start, settings(enabled=False))
        assert later["outputs"]["text_encoder_id"] == encoder_id, "whatever the profile says now"
        assert later["metrics"]["projected"] == fresh
        assert stage(lake_home, "train_content_encoder", D2, start)["status"] == "skipped"
    after = made(spark, encoder_id)
    assert len(after) == ITEMS + 3
    assert all(after[name] == vector for name, vector in before.items())


def test_the_same_night_again_gives_the_same_encoder(spark, lake_home):
    first = first_night(spark, lake_home)["outputs"]
    assert stage(lake_home, "train_content_encoder")["outputs"]["encoder_id"] == first["text_encoder_id"]


def test_a_generation_without_an_encoder_reads_base_vectors(spark, lake_home):
    put_items(spark, D1, 0, 4)
    off = settings(enabled=False)
    for name in ("content_pair", "train_content_encoder", "content_cre"):
        outcome = stage(lake_home, name, config=off)
        assert outcome["status"] == "skipped"
    assert outcome["outputs"] == {"text_encoder_id": "T", "image_encoder_id": None}
    put_generation(spark, {"text_encoder_id": "T"})
    switched_on = stage(lake_home, "content_cre", D2, "")
    assert switched_on["status"] == "skipped", "a frozen generation does not change its space"
    assert switched_on["outputs"]["text_encoder_id"] == "T"


def test_other_base_vectors_are_refused(spark, lake_home):
    encoder_id = first_night(spark, lake_home)["outputs"]["text_encoder_id"]
    put_generation(spark, {"text_encoder_id": encoder_id})
    ctx = context(lake_home, "content_cre", D2, "", settings())
    write_json(ctx.staging / "content_embedding.json", {"outputs": {"text_encoder_id": "other", "image_encoder_id": None}})
    with pytest.raises(ContractError, match="other base vectors"):
        runner.run_stage(ctx)
    assert content_cre.MODALITIES == ("text", "image")


def test_a_night_without_pairs_says_so(spark, lake_home):
    put_items(spark, D1, 0, 4)
    with pytest.raises(UpstreamMissing, match="no pairs"):
        stage(lake_home, "train_content_encoder")
