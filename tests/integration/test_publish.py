"""From item_feature to a tagged release through the real runner: two nights, reruns, kills between effects, a main that moved, drift.

MLflow is left out (its own tests hold it): the runner's records stay in staging.
"""

from __future__ import annotations

import json
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from jobs import publish_release, runner, views
from pipeline import config as profile
from pipeline import lakehouse, tracking
from pipeline.context import Context, Plan, Release, read_json, write_json
from pipeline.errors import ContractError, GateFailed
from pipeline.tokenizers.base import FitOptions, History, codebook_digest, items_from_arrow
from pipeline.tokenizers.das import Das
from pipeline.tokenizers.rq_kmeans import RqKmeans

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("without_mlflow")]
D1, D2 = date(2026, 1, 5), date(2026, 1, 6)
ITEMS, WIDTH = 24, 6
LOOSE = {"max_collision_rate": 1.0, "min_perplexity_share": 0.0, "max_dead_share": 1.0, "max_shared_mass": 1.0, "max_churn": 0.2, "max_head_churn": 1.0}


@pytest.fixture
def config():
    return profile.parse({"train_tokenizer": {"tokenizer": "rq_kmeans"}, "publish_release": LOOSE}, where="test")


@pytest.fixture
def model(tmp_path):
    """(folder, outputs of train_tokenizer) of a small residual k-means; few codes, so that items collide."""
    rng = np.random.default_rng(1)
    rows = pa.table(
        {
            "item_id": [f"i{row}" for row in range(40)],
            "text": pa.array(list(rng.normal(size=(40, WIDTH)).astype(np.float32)), pa.list_(pa.float32())),
            "image": pa.nulls(40, pa.list_(pa.float32())),
            "behavior": pa.array(list(rng.normal(size=(40, WIDTH)).astype(np.float32)), pa.list_(pa.float32())),
            "richness": np.full(40, 0.5, np.float32),
            "strength": np.full(40, 0.5, np.float32),
        }
    )
    torch.set_num_threads(1)
    tokenizer = RqKmeans(profile.RqKmeans(num_levels=2, codebook_size=4, iterations=5, balanced=False))
    tokenizer.fit(items_from_arrow(rows), FitOptions(seed=3, settings=profile.TrainTokenizer()))
    (tmp_path / "config.json").write_text(json.dumps(tokenizer.config()), encoding="utf-8")
    save_file(tokenizer.state(), tmp_path / "model.safetensors")
    facts = {"tokenizer": "rq_kmeans", "codebook_sizes": [4, 4], "slots": list(tokenizer.slots), "codebook_digest": codebook_digest(tokenizer.codebooks())}
    return tokenizer, {**facts, "model_uri": str(tmp_path)}


def night(day, *, parent=None, fingerprint="f1"):
    """The manifest of a night; without a parent it fits generation 1."""
    return Plan(
        logical_date=day, tag=f"d{day:%Y%m%d}", revision=1, generation=1, start="cold" if parent is None else "", reason="test", parent=parent, files=(),
        input_fingerprint=fingerprint, config_hash="c", seed=1,
    )  # fmt: skip


def run(home, config, stage, plan, model, run_id):
    ctx = Context(config=config, home=home, stage=stage, logical_date=plan.logical_date, run_id=run_id)
    write_json(ctx.staging / "plan_night.json", {"outputs": plan.model_dump(mode="json")})
    write_json(ctx.staging / "train_tokenizer.json", {"outputs": model[1]})
    write_json(ctx.staging / "train_behavior_encoder.json", {"outputs": {"model_uri": "none", "richness_reference": {"kind": "rank"}}})
    return runner.run_stage(ctx)


def put(spark, table, frame, dates=()):
    lakehouse.cut_branch(spark, table, "fill")
    if dates:
        lakehouse.replace(lakehouse.check_columns(frame, spark, table), table, "fill", dates=dates, equal={}, properties={})
    else:
        lakehouse.append(lakehouse.check_columns(frame, spark, table), table, "fill", {})
    lakehouse.publish(spark, table, "fill")


def fill(spark, day, items, *, moved=(), trained=None, vectors=True):
    """The feature tables of a night: every item has text, those in `moved` (default all) a behaviour row trained on `day`."""
    rng = np.random.default_rng(day.toordinal())
    moved = items if trained is None and not moved else moved
    schema = {
        name: spark.table(f"lake.{name}").schema
        for name in ("feature.item_feature", "feature.item_content_vector", "feature.item_behavior_vector", "feature.item_popularity")
    }
    date_of = {item: day if item in moved else trained for item in items}
    features = [
        (day, item, 1, "c", f"h{item}", None, "enc", None, date_of[item], 8, 3, 0.5, 0.5, float(row % 5), ("head", "torso", "tail")[row % 3], "live", D1, None)
        for row, item in enumerate(items)
    ]
    put(spark, "feature.item_feature", spark.createDataFrame(features, schema["feature.item_feature"]), [day])
    behavior = [(day, item, 1, rng.normal(size=WIDTH).tolist(), 1.0, 8, 3) for item in moved]
    put(spark, "feature.item_behavior_vector", spark.createDataFrame(behavior, schema["feature.item_behavior_vector"]), [day])
    popularity = [(day, item, 1.0, 0.5, 5, "head", 8, D1, 0, "s") for item in items]
    put(spark, "feature.item_popularity", spark.createDataFrame(popularity, schema["feature.item_popularity"]), [day])
    known = {row.content_hash for row in spark.table("lake.feature.item_content_vector").collect()}
    content = [("enc", "text", f"h{item}", rng.normal(size=WIDTH).tolist()) for item in items if f"h{item}" not in known]
    if content and vectors:
        put(spark, "feature.item_content_vector", spark.createDataFrame(content, schema["feature.item_content_vector"]))


def names(count):
    return [f"i{row:02d}" for row in range(count)]


def release_rows(spark):
    return {row.tag: row.asDict() for row in spark.table("lake.sid.release").collect()}


def sids(home, config, tag):
    return {row["item_id"]: row for row in lakehouse.read_release(home, config.lake, tag).to_pylist()}


def first_night(spark, home, config, model, run_id="run1"):
    fill(spark, D1, names(ITEMS))
    run(home, config, "assign_sid", night(D1), model, run_id)
    return run(home, config, "publish_release", night(D1), model, run_id)


def parent_of(spark, tag):
    row = release_rows(spark)[tag]
    return Release(**{name: row[name] for name in Release.model_fields if name in row})


def test_two_nights(spark, lake_home, config, model):
    fill(spark, D1, names(ITEMS))
    assigned = run(lake_home, config, "assign_sid", night(D1), model, "run1")
    held = assigned["outputs"]["held"]["sid.item_sid"]
    assert spark.table("lake.sid.item_sid").count() == 0, "held rows are not on main"
    assert lakehouse.snapshot(spark, "sid.item_sid", held["branch"]) == held["snapshot_id"]

    done = run(lake_home, config, "publish_release", night(D1), model, "run1")
    assert done["outputs"]["tag"] == "d20260105"
    assert done["outputs"]["is_current_newest"]
    assert done["outputs"]["limits"] == LOOSE | {"max_refit_churn": 0.6}
    assert set(lakehouse.references(spark, "sid.item_sid")) == {"main", "d20260105"}
    row = release_rows(spark)["d20260105"]
    assert (row["status"], row["items"], row["parent_tag"], row["rows_digest"]) == ("current", ITEMS, None, assigned["outputs"]["rows_digest"])
    assert lakehouse.rows_digest(lakehouse.read_frame(spark, "sid.item_sid", row["snapshot_id"])) == row["rows_digest"]

    first = sids(lake_home, config, "d20260105")
    tokenizer = model[0]
    direct = tokenizer.encode(items_from_arrow(vectors_of(spark, D1))).codes_NL.tolist()
    assert [first[item]["codes"] for item in sorted(first)] == direct, "codes do not depend on how Spark cuts the batches"
    assert spark.table("lake.sid.codebook").count() == 8
    assert [row.asDict()["codebook_digest"] for row in spark.table("lake.sid.generation").collect()] == [model[1]["codebook_digest"]]

    # the second night: two items come, one has a new behaviour row
    items = names(ITEMS + 2)
    fill(spark, D2, items, moved=["i03", "i24", "i25"], trained=D1)
    second = night(D2, parent=parent_of(spark, "d20260105"), fingerprint="f2")
    assigned = run(lake_home, config, "assign_sid", second, model, "run2")
    run(lake_home, config, "publish_release", second, model, "run2")
    after = sids(lake_home, config, "d20260106")
    carried = [item for item in first if item != "i03"]
    assert all(after[item][column] == first[item][column] for item in carried for column in ("codes", "weights", "disambiguator"))
    assert [item for item in sorted(after) if after[item]["is_new"]] == ["i24", "i25"]
    assert assigned["outputs"]["metrics"]["reencoded"] == 1
    assert spark.table("lake.sid.codebook").count() == 8, "a generation's codebook is written once"
    assert sids(lake_home, config, "d20260105") == first, "the older release reads as before"


def test_a_codebook_that_a_kill_left_without_its_generation_is_replaced(spark, lake_home, config, model):
    """Another fingerprint takes the same number: its codes must not stand beside the code rows of the fit that was killed."""
    orphans = [(number, 0, "level_0", code, [9.0]) for number in (1, 7) for code in range(3)]
    put(spark, "sid.codebook", spark.createDataFrame(orphans, spark.table("lake.sid.codebook").schema))
    first_night(spark, lake_home, config, model)
    book = {(row.position, row.code): row.vector for row in spark.table("lake.sid.codebook").where("generation = 1").collect()}
    assert book == {(place, code): row for place, codes_KD in enumerate(model[0].codebooks()) for code, row in enumerate(codes_KD.tolist())}
    assert spark.table("lake.sid.codebook").where("generation = 7").count() == 3, "another generation's rows stay"


def test_a_number_that_is_taken_by_another_codebook_asks_for_another_seed(spark, lake_home, config, model):
    first_night(spark, lake_home, config, model)
    other = {**model[1], "codebook_digest": "other"}
    with pytest.raises(ContractError, match="generation 1 exists with another codebook") as caught:
        run(lake_home, config, "assign_sid", night(D1), (model[0], other), "run2")
    assert caught.value.next_command.startswith(f"sid run refresh --date {D1} --set seed=2")


def vectors_of(spark, day):
    """item_id, text, image, behavior, richness, strength of a night in the order of item_id."""
    features = sorted(spark.table("lake.feature.item_feature").where(f"logical_date = '{day}'").collect(), key=lambda row: row.item_id)
    text = {row.content_hash: row.vector for row in spark.table("lake.feature.item_content_vector").collect()}
    behavior = {(row.logical_date, row.item_id): row.vector for row in spark.table("lake.feature.item_behavior_vector").collect()}
    lists = pa.list_(pa.float32())
    return pa.table(
        {
            "item_id": [row.item_id for row in features],
            "text": pa.array([text[row.text_hash] for row in features], lists),
            "image": pa.nulls(len(features), lists),
            "behavior": pa.array([behavior[row.behavior_date, row.item_id] for row in features], lists),
            "richness": [row.richness for row in features],
            "strength": [row.strength for row in features],
        }
    )


def test_the_same_rows_again_are_reused_and_other_rows_are_a_revision(spark, lake_home, config, model):
    first_night(spark, lake_home, config, model)
    other = night(D1, fingerprint="other inputs, same rows")
    assigned = run(lake_home, config, "assign_sid", other, model, "again")
    again = run(lake_home, config, "publish_release", other, model, "again")
    assert again["status"] == "reused"
    assert again["outputs"]["tag"] == "d20260105"
    assert not again["outputs"]["is_current_newest"], "its readers have read it: they are not started again"
    assert set(lakehouse.references(spark, "sid.item_sid")) == {"main", "d20260105"}, "the branch is gone, there is no second tag"
    assert release_rows(spark)["d20260105"]["input_fingerprint"] == other.input_fingerprint, "so that the next rerun is reused before it begins"
    assert lakehouse.references(spark, "feature.item_feature")["d20260105"] == assigned["read"]["feature.item_feature"]

    fill(spark, D1, names(ITEMS + 1), trained=D1, moved=names(ITEMS + 1))
    run(lake_home, config, "assign_sid", night(D1, fingerprint="f2"), model, "more")
    more = run(lake_home, config, "publish_release", night(D1, fingerprint="f2"), model, "more")
    assert more["outputs"]["tag"] == "d20260105_r2"
    assert {tag: row["status"] for tag, row in release_rows(spark).items()} == {"d20260105": "superseded", "d20260105_r2": "current"}
    assert len(sids(lake_home, config, "d20260105")) == ITEMS, "the tag still shows the old rows"


def test_a_kill_between_tag_and_row_rolls_forward(spark, lake_home, config, model):
    fill(spark, D1, names(ITEMS))
    assigned = run(lake_home, config, "assign_sid", night(D1), model, "run1")
    branch = assigned["outputs"]["held"]["sid.item_sid"]["branch"]
    tagged = lakehouse.publish(spark, "sid.item_sid", branch, tag="d20260105")  # and here the process dies
    done = run(lake_home, config, "publish_release", night(D1), model, "run1")
    assert done["outputs"]["action"] == "roll_forward"
    assert release_rows(spark)["d20260105"]["snapshot_id"] == tagged

    retried = run(lake_home, config, "publish_release", night(D1), model, "run1")  # killed after the row, before anybody heard of it
    assert (retried["status"], retried["outputs"]["is_current_newest"]) == ("reused", True)


def test_main_that_moved_is_met_by_writing_the_audited_rows_again(spark, lake_home, config, model, monkeypatch):
    fill(spark, D1, names(ITEMS))
    assigned = run(lake_home, config, "assign_sid", night(D1), model, "run1")
    held = assigned["outputs"]["held"]["sid.item_sid"]
    other = D1 - timedelta(days=1)
    frame = lakehouse.read_frame(spark, "sid.item_sid", held["snapshot_id"]).selectExpr("*").limit(3)
    from pyspark.sql import functions as F

    put(spark, "sid.item_sid", frame.withColumn("logical_date", F.lit(other)), [other])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lakehouse, "replace", killed)  # a new branch is cut, and nothing is on it yet
        with pytest.raises(KeyboardInterrupt):
            run(lake_home, config, "publish_release", night(D1), model, "run1")
    assert set(lakehouse.references(spark, "sid.item_sid")) == {"main", held["branch"], f"{held['branch']}_again"}, "nothing was published"
    lakehouse.cut_branch(spark, "sid.item_sid", held["branch"])  # and another try of assign_sid begins anew on the same name
    done = run(lake_home, config, "publish_release", night(D1), model, "run1")
    row = release_rows(spark)[done["outputs"]["tag"]]
    assert row["snapshot_id"] != held["snapshot_id"]
    assert lakehouse.rows_digest(lakehouse.read_release_frame(spark, row["snapshot_id"], D1)) == assigned["outputs"]["rows_digest"]
    assert spark.table("lake.sid.item_sid").where(f"logical_date = '{other}'").count() == 3
    assert set(lakehouse.references(spark, "sid.item_sid")) == {"main", "d20260105"}
    assert publish_release.snapshot_properties(spark, row["snapshot_id"])["sid.stage"] == "assign_sid"

    asked = []
    monkeypatch.setattr(tracking, "run_of_record", lambda home, key: asked.append(key))
    assert views.lineage((lake_home, config), done["outputs"]["tag"]) == []
    assert [key.partition("~")[0] for key in asked] == ["run1/assign_sid-1"], "the run whose rows these are, though their snapshot is another one than it wrote"


def test_churn_above_the_budget_and_overflow_leave_main_untouched(spark, lake_home, config, model):
    first_night(spark, lake_home, config, model)
    before = lakehouse.references(spark, "sid.item_sid")
    fill(spark, D2, names(ITEMS), moved=names(ITEMS), trained=D1)
    second = night(D2, parent=parent_of(spark, "d20260105"), fingerprint="f2")
    with pytest.raises(GateFailed, match="do not hold") as caught:
        run(lake_home, config, "assign_sid", second, model, "run2")
    assert "budget_churn" in caught.value.found
    assert lakehouse.references(spark, "sid.item_sid").items() >= before.items()

    fill(spark, D2, names(ITEMS), moved=["i00"], trained=D1)
    narrow = profile.parse({"assign_sid": {"max_disambiguator": 1}, "publish_release": LOOSE}, where="test")
    with pytest.raises(GateFailed) as caught:
        run(lake_home, narrow, "assign_sid", second, model, "run3")
    assert "disambiguators" in caught.value.found


def test_drift_is_written_once_and_a_grown_base_makes_a_refit_due(spark, lake_home, config, model):
    first_night(spark, lake_home, config, model)
    schema = spark.table("lake.raw.interaction").schema
    from datetime import datetime

    events = [(D1, f"u{user}", item, datetime(2026, 1, 5, 8), "click", 1.0, None) for user in range(6) for item in names(ITEMS)[user::3]]
    put(spark, "raw.interaction", spark.createDataFrame(events, schema), [D1])
    measured = run(lake_home, config, "gate_drift", night(D1), model, "run1")
    row = release_rows(spark)["d20260105"]
    drift = json.loads(row["drift"])
    assert not row["refit_due"]
    assert drift["agreement"]["overall"]["pairs"] > 20
    assert (drift["post_base_mass"], drift["doubled_mass"], drift["birth"]["tag"]) == (0.0, 0.0, "d20260105")
    assert measured["outputs"]["tag"] == "d20260105"
    assert run(lake_home, config, "gate_drift", night(D1), model, "run1")["status"] == "reused", "the same numbers make no second commit"

    moved = names(ITEMS)[:3]
    fill(spark, D2, names(ITEMS), moved=moved, trained=D1)
    second = night(D2, parent=parent_of(spark, "d20260105"), fingerprint="f2")
    eager = profile.parse({"publish_release": LOOSE, "gate_drift": {"max_post_base_mass": 0.01}}, where="test")
    run(lake_home, eager, "assign_sid", second, model, "run2")
    run(lake_home, eager, "publish_release", second, model, "run2")
    due = run(lake_home, eager, "gate_drift", second, model, "run2")["outputs"]
    mass = {row: float(row % 5) for row in range(ITEMS)}
    assert due["refit_due"]
    assert due["drift"]["post_base_mass"] == pytest.approx(sum(mass[row] for row in range(3)) / sum(mass.values()))
    assert release_rows(spark)["d20260106"]["refit_due"]
    assert read_json(Context(config=config, home=lake_home, stage="gate_drift", logical_date=D2, run_id="run2").staging / "gate_drift.json")["status"] == "done"


# ---------------------------------------------------------------- codes of users


@pytest.fixture
def das(tmp_path):
    """(tokenizer, outputs of train_tokenizer) of a small DAS, which codes users as well."""
    rng = np.random.default_rng(2)
    vectors = {name: pa.array(list(rng.normal(size=(40, WIDTH)).astype(np.float32)), pa.list_(pa.float32())) for name in ("text", "behavior")}
    flat = dict.fromkeys(("richness", "strength"), np.full(40, 0.5, np.float32))
    rows = pa.table({"item_id": [f"i{row}" for row in range(40)], "image": pa.nulls(40, pa.list_(pa.float32())), **vectors, **flat})
    history = History(index_T=torch.from_numpy(rng.integers(0, 40, 96)), offset_U=torch.arange(0, 97, 8))
    tokenizer = Das(profile.Das(num_levels=2, codebook_size=4, latent_dim=4, hidden_dims=[8], tower_dim=8, warmup_epochs=1, max_history=3))
    tokenizer.fit(items_from_arrow(rows), FitOptions(seed=3, settings=profile.TrainTokenizer(max_epochs=3), history=history))
    (tmp_path / "config.json").write_text(json.dumps(tokenizer.config()), encoding="utf-8")
    save_file(tokenizer.state(), tmp_path / "model.safetensors")
    facts = {"tokenizer": "das", "codebook_sizes": [4, 4], "slots": list(tokenizer.slots), "codebook_digest": codebook_digest(tokenizer.codebooks())}
    return tokenizer, {**facts, "model_uri": str(tmp_path)}


def sequences(spark, day, taken):
    """The night's users, each with the items taken, oldest first."""
    rows = [(day, user, items, None, None, len(items), "s") for user, items in taken.items()]
    put(spark, "feature.user_sequence", spark.createDataFrame(rows, spark.table("lake.feature.user_sequence").schema), [day])


def users(home, config, day):
    rows = lakehouse.read_arrow(home, config.lake, "sid.user_sid", where=f"logical_date == '{day}'").to_pylist()
    return {row["user_id"]: (row["codes"], row["num_items"], row["generation"]) for row in rows}


def test_codes_of_users_are_written_beside_the_release(spark, lake_home, config, das):
    sequences(spark, D1, {"a": ["i00", "i01", "i02", "i03"], "b": ["i05"], "nobody": ["gone"]})
    first_night(spark, lake_home, config, das)
    found = users(lake_home, config, D1)
    assert {user: row[1:] for user, row in found.items()} == {"a": (3, 1), "b": (1, 1), "nobody": (0, 1)}
    assert found["nobody"][0] == [4, 4], "the reserved code"
    assert all(0 <= code < 4 for user in "ab" for code in found[user][0])

    parent = parent_of(spark, "d20260105")
    fill(spark, D2, names(ITEMS), trained=D1, moved=["i00"])
    sequences(spark, D2, {"a": ["i00", "i01", "i02", "i03"], "b": ["i05", "i06"], "new": ["i01", "i02", "i03"]})
    run(lake_home, config, "assign_sid", night(D2, parent=parent, fingerprint="f2"), das, "run2")
    later = users(lake_home, config, D2)
    assert later["a"] == found["a"], "nothing new was taken"
    assert later["new"][0] == later["a"][0], "who took the same has the same codes"
    assert set(later) == {"a", "b", "new"}
    assert users(lake_home, config, D1) == found
