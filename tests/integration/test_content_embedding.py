"""Content vectors on real tables through the real runner: only new content is encoded, unusable images and vectors leave a row and nothing else.

MLflow is left out (its own tests hold it).
"""

from __future__ import annotations

import hashlib
import json
from datetime import date

import numpy as np
import pytest
from PIL import Image

from jobs import content_embedding as job
from jobs import runner
from pipeline import config as profile
from pipeline.context import Context, Plan, write_json
from pipeline.errors import GateFailed

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("without_mlflow")]
D1, D2, D3 = date(2026, 1, 5), date(2026, 1, 6), date(2026, 1, 7)
ITEM = (
    "file_date date, item_id string, title string, text string, category string, image_uri string, text_hash string, image_hash string, "
    "content_hash string, text_vector array<float>, image_vector array<float>"
)


@pytest.fixture
def shop(tmp_path):
    """A folder data set: an events file that is never read, and pictures of which two are unusable."""
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / f"{D1}.csv").write_text("user_id,item_id,event_ts\n", encoding="utf-8")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(4)
    for name in ("a.jpg", "b.png", "cut.jpg"):
        Image.fromarray(rng.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "cut.jpg").write_bytes((tmp_path / "images" / "cut.jpg").read_bytes()[:900])
    (tmp_path / "images" / "words.jpg").write_text("no picture", encoding="utf-8")
    return tmp_path


def settings(shop, **section):
    source = {"dataset": "folder", "path": str(shop), "events_pattern": "events/{date}.csv", "items_pattern": "items/{date}.csv", "image_root": "images"}
    return profile.parse({"source": source, "content_embedding": section, "ingest": {"max_rejected_share": 0.5}}, where="test")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def row(day, item_id, *, text=None, image=None, shop=None, text_vector=None):
    image_hash = digest((shop / "images" / image).read_bytes()) if image else None
    text_hash = digest(json.dumps([text, text_vector]).encode()) if text or text_vector else None
    return (day, item_id, item_id, text, None, image, text_hash, image_hash, f"{text_hash}{image_hash}", text_vector, None)


def ingest(spark, *rows):
    spark.createDataFrame(list(rows), ITEM).writeTo("lake.raw.item").append()


def run(home, config, day, run_id="r1"):
    plan = Plan(
        logical_date=day, tag="d", revision=1, generation=1, start="cold", reason="test", parent=None, files=(), input_fingerprint="f",
        config_hash="c", seed=1,
    )  # fmt: skip
    ctx = Context(config=config, home=home, stage="content_embedding", logical_date=day, run_id=f"{run_id}_{day}")
    write_json(ctx.staging / "plan_night.json", {"outputs": plan.model_dump(mode="json")})
    return runner.run_stage(ctx)


def vectors(spark):
    return {(row.modality, row.content_hash): np.array(row.vector, np.float32) for row in spark.table("lake.feature.item_content_vector").collect()}


def rejects(spark, day):
    found = spark.table("lake.raw.rejected_row").where(f"logical_date = DATE'{day}' AND stage = 'content_embedding'").collect()
    return {(row.reason, row.source, json.loads(row.row)["item_id"]) for row in found}


def test_two_nights_encode_only_what_is_new(spark, lake_home, shop, monkeypatch):
    config = settings(shop, image_encoder="efficientnet_lite0", image_size=64, text_batch=4, image_batch=2)
    first = [
        row(D1, "i1", text="a red hat", image="a.jpg", shop=shop),
        row(D1, "i2", text="a red hat", image="b.png", shop=shop),
        row(D1, "i3", text="a blue shoe that was described at some length, so that it needs a longer pass than the others"),
        row(D1, "i4", image="cut.jpg", shop=shop),
        row(D1, "i5", text="green scarf", image="words.jpg", shop=shop),
    ]
    ingest(spark, *first)
    outcome = run(lake_home, config, D1)
    assert outcome["outputs"]["text_encoder_id"] == "minilm-53aa51172d14-mean-s128-b4-l2"
    assert outcome["outputs"]["image_encoder_id"] == "efficientnet_lite0-579344248a93-s64-b2-l2"
    bad = {("image_truncated", "cut.jpg", "i4"), ("image_undecodable", "words.jpg", "i5")}
    assert rejects(spark, D1) == bad
    night1 = vectors(spark)
    assert {modality: sum(key[0] == modality for key in night1) for modality in ("text", "image")} == {"text": 3, "image": 2}
    assert {len(vector) for (modality, _), vector in night1.items() if modality == "image"} == {1280}
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in night1.values())
    metrics = outcome["metrics"]
    assert (metrics["text_encoded"], metrics["image_encoded"], metrics["rejected/image_truncated"]) == (3, 2, 1)
    assert metrics["feature.item_content_vector/rejected_share"] == pytest.approx(2 / 7)

    # Night 2: i1 has a new text, i6 brings a known one; an item of the day after must not be seen.
    ingest(spark, row(D2, "i1", text="a crimson hat", image="a.jpg", shop=shop), row(D2, "i6", text="green scarf"), row(D3, "i7", text="tomorrow"))
    metrics = run(lake_home, config, D2)["metrics"]
    assert (metrics["text_encoded"], metrics["text_stored_before"], metrics["image_encoded"], metrics["image_stored_before"]) == (1, 3, 0, 2)
    night2 = vectors(spark)
    assert len(night2) == len(night1) + 1
    assert all(np.array_equal(night2[key], vector) for key, vector in night1.items())
    assert rejects(spark, D1) == rejects(spark, D2) == bad

    # The broken pictures are gone from the catalogue: a rerun empties the date's refusals and loads no model.
    ingest(spark, row(D2, "i4", text="a red hat"), row(D2, "i5", text="green scarf"))
    monkeypatch.setattr(job, "encode_batches", None)
    outcome = run(lake_home, config, D2, "r2")
    assert set(outcome["snapshots"]) == {"raw.rejected_row"}
    assert rejects(spark, D2) == set()
    assert rejects(spark, D1) == bad
    outcome = run(lake_home, config, D2, "r3")
    assert outcome["snapshots"] == {}
    assert outcome["status"] == "done"


def test_vectors_do_not_depend_on_the_night_they_were_encoded_in(spark, lake_home, shop):
    config = settings(shop, text_batch=4)
    texts = ["hat", "a longer description of a hat that is worn in winter", "shoe", "coat of wool", "scarf, long"]
    ingest(spark, *(row(D1, f"i{number}", text=text) for number, text in enumerate(texts)))
    run(lake_home, config, D1)
    together = vectors(spark)
    spark.sql("DELETE FROM lake.feature.item_content_vector")
    spark.sql("DELETE FROM lake.raw.item")
    for day, text in zip((D1, D2, D3), texts[2::-1], strict=True):
        ingest(spark, row(day, text, text=text))
        run(lake_home, config, day, "again")
    apart = vectors(spark)
    assert len(apart) == 3
    assert all(np.array_equal(together[key], vector) for key, vector in apart.items())


def test_given_vectors_are_stored_or_refused(spark, lake_home, shop):
    config = settings(shop, text_encoder="precomputed")
    ingest(
        spark,
        row(D1, "i1", text_vector=[3.0, 4.0]),
        row(D1, "i2", text_vector=[1.0, 0.0]),
        row(D1, "i3", text_vector=[float("nan"), 1.0]),
        row(D1, "i4", text_vector=[1.0, 2.0, 3.0]),
        row(D1, "i5", text="a text without a vector"),
    )
    outcome = run(lake_home, config, D1)
    assert outcome["outputs"] == {"text_encoder_id": "precomputed-d2-l2", "image_encoder_id": None}
    assert sorted(vector.tolist() for vector in vectors(spark).values()) == [pytest.approx([0.6, 0.8]), [1.0, 0.0]]
    assert rejects(spark, D1) == {("bad_vector", "raw.item", "i3"), ("bad_vector", "raw.item", "i4")}


def test_too_many_refusals_fail_the_gate_and_leave_the_lake_as_it_was(spark, lake_home, shop):
    config = settings(shop, text_encoder="none", image_encoder="efficientnet_lite0", image_size=64)
    ingest(spark, row(D1, "i1", image="cut.jpg", shop=shop), row(D1, "i2", image="words.jpg", shop=shop), row(D1, "i3", image="a.jpg", shop=shop))
    with pytest.raises(GateFailed, match="rejected_share"):
        run(lake_home, config, D1)
    assert vectors(spark) == {}
    assert rejects(spark, D1) == set()
