"""Behaviour vectors from sequences to table: a new generation, a frozen night, a night on which nothing moved, and what must be refused."""

from __future__ import annotations

import json
import shlex
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

from jobs import behavior_embedding, behavior_inputs, runner
from jobs import train_behavior_encoder as job
from pipeline import config as profile
from pipeline import lakehouse, richness, tracking
from pipeline.context import Context, Home, Plan, Release, read_json, write_json
from pipeline.errors import ConfigError, ContractError, GateFailed, UpstreamMissing

D1, D2 = date(2026, 1, 5), date(2026, 1, 6)
ITEMS, USERS, LENGTH = 30, 60, 10
SASREC = {
    "dim": 8,
    "num_blocks": 1,
    "num_heads": 1,
    "max_length": 8,
    "max_epochs": 6,
    "batch_size": 32,
    "row_steps": 10,
    "learning_rate": 0.01,
    "valid_users": 20,
}
SECTION = {"sasrec": SASREC, "half_epochs": 4, "min_spearman": -1.0, "n_min": 5}


@pytest.fixture
def config():
    return profile.parse({"seed": 3, "train_behavior_encoder": SECTION, "launch": {"threads": 1}}, where="test")


def walks(extra: dict[int, list[str]] | None = None) -> dict[str, list[str]]:
    """Users walking a circle of items, more often near its beginning; `extra` adds events at the end of some users."""
    rng = np.random.default_rng(0)
    starts = np.minimum(rng.geometric(0.15, USERS) - 1, ITEMS - 1)
    lists = [[f"i{(start + step) % ITEMS:02d}" for step in range(LENGTH)] for start in starts]
    return {f"u{user:03d}": [*items, *(extra or {}).get(user, [])] for user, items in enumerate(lists)}


def tables(day: date, users: dict[str, list[str]]) -> dict[str, pa.Table]:
    """feature.user_sequence and feature.item_popularity of a day."""
    names, counts = np.unique(np.concatenate([np.asarray(items) for items in users.values()]), return_counts=True)
    strata = np.where(counts >= np.quantile(counts, 0.8), "head", np.where(counts <= np.median(counts), "tail", "torso"))
    sequence = {
        "logical_date": [day] * len(users),
        "user_id": list(users),
        "item_ids": list(users.values()),
        "baskets": pa.array([list(range(len(items))) for items in users.values()], pa.list_(pa.int32())),
        "num_events": pa.array([len(items) for items in users.values()], pa.int32()),
    }
    popularity = {"logical_date": [day] * len(names), "item_id": names.tolist(), "evidence_count": counts, "popularity_stratum": strata.tolist()}
    return {"feature.user_sequence": pa.table(sequence), "feature.item_popularity": pa.table(popularity)}


class Lake:
    """The tables that a test has made, behind the part of `Inputs` that torch jobs use; `where` is left to the test."""

    def __init__(self, **tables: pa.Table) -> None:
        self.tables = {name.replace("__", "."): table for name, table in tables.items()}

    def arrow(self, table: str, *, columns: tuple[str, ...] = ("*",), where: str = "", at: int | None = None, **among: list[str]) -> pa.Table:
        rows = self.tables[table]
        if "num_events >= 2" in where:
            rows = rows.filter(pc.greater_equal(rows["num_events"], 2))
        for name, wanted in among.items():
            rows = rows.filter(pa.array([bool(set(wanted) & set(held)) for held in rows[name].to_pylist()], pa.bool_()))
        return rows.select(list(columns))

    def model(self, uri: str) -> Path:
        return Path(uri)


def plan(day: date, *, generation: int = 1, parent: Release | None = None, new: bool = True) -> Plan:
    return Plan(
        logical_date=day, tag=f"d{day:%Y%m%d}", revision=1, generation=generation, start="cold" if new else "", reason="test", parent=parent, files=(),
        input_fingerprint="f", config_hash="c", seed=3,
    )  # fmt: skip


def context(home: Home, config: profile.Config, stage: str, night: Plan, run_id: str = "run") -> Context:
    ctx = Context(config=config, home=home, stage=stage, logical_date=night.logical_date, run_id=run_id)
    write_json(ctx.staging / "plan_night.json", {"outputs": night.model_dump(mode="json")})
    return ctx


def first_night(tmp_path: Path, config: profile.Config, users: dict[str, list[str]] | None = None, **changes: object):
    """(result, folder of its bundle) of the first generation."""
    data = tables(D1, users or walks())
    lake = Lake(feature__user_sequence=data["feature.user_sequence"], feature__item_popularity=data["feature.item_popularity"])
    result = job.run(lake, config.train_behavior_encoder.model_copy(update=changes), context(Home(tmp_path), config, "train_behavior_encoder", plan(D1)))
    return result, tracking.save_bundle(tmp_path / "base", result.model)


def feature_rows(result, buckets: dict[str, int] | None = None) -> pa.Table:
    """The parent's item_feature: every exported item with the bucket that trained it."""
    names = result.model.config["item_ids"]
    counts = dict(zip(*np.unique([item for items in walks().values() for item in items], return_counts=True), strict=True))
    found = {name: int(richness.evidence_bucket(counts[name])) for name in names} | (buckets or {})
    return pa.table({"item_id": list(found), "evidence_bucket": pa.array(list(found.values()), pa.int32())})


def second_night(tmp_path: Path, config: profile.Config, users: dict[str, list[str]], base: Path, features: pa.Table):
    data = tables(D2, users)
    lake = Lake(
        feature__user_sequence=data["feature.user_sequence"],
        feature__item_popularity=data["feature.item_popularity"],
        feature__item_feature=features,
        sid__generation=pa.table({"generation": [1], "logical_date": [D1], "encoder_uri": [str(base)]}),
    )
    night = plan(D2, parent=Release(tag="d20260105", logical_date=D1, revision=1, generation=1, snapshot_id=1), new=False)
    return job.run(lake, config.train_behavior_encoder, context(Home(tmp_path), config, "train_behavior_encoder", night, "run2"))


def test_a_new_generation_exports_warm_items_and_a_frozen_reference(tmp_path: Path, config: profile.Config) -> None:
    users = walks({0: ["rare", "rare", "rare", "rare"]})
    result, folder = first_night(tmp_path, config, users)
    state, kept = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    counts = dict(zip(*np.unique([item for items in users.values() for item in items], return_counts=True), strict=True))
    assert kept["item_ids"] == sorted(name for name, count in counts.items() if count >= 5)
    assert "rare" not in kept["item_ids"]
    assert behavior_inputs.unpack_ids(state["vocabulary_bytes"].numpy(), state["vocabulary_offsets"].numpy()).to_pylist() == sorted(counts)
    places = [sorted(counts).index(name) for name in kept["item_ids"]]
    torch.testing.assert_close(state["behavior_vectors"], state["network.input_rows.weight"][places])
    assert torch.equal(state["rotation"], torch.eye(8))
    assert {f"richness_spearman/{kind}" for kind in richness.KINDS} <= set(result.metrics)
    assert {"floor/popularity_recall@10", "floor/markov_recall@10", "valid_recall@10", "low_strength_share", "spearman_norm_count"} <= set(result.metrics)
    reference = json.loads(json.dumps(result.outputs["richness_reference"]))
    assert reference == kept["richness_reference"]
    assert sum(map(sum, result.figures["strength_by_stratum"].data["counts"].values())) == len(kept["item_ids"])
    assert result.outputs["gate"] == {}  # so few items decide nothing


def test_too_few_items_to_measure_reliability_are_told_with_the_setting_to_change() -> None:
    params = profile.TrainBehaviorEncoder(richness="reliability")
    with pytest.raises(ContractError, match="too few items") as caught:
        job.fit_richness(params, np.array([5, 6]), np.ones(2), np.full(2, np.nan), np.array(["head", "tail"]))
    assert caught.value.found == "at most 2"
    assert caught.value.where == "[train_behavior_encoder] richness"
    assert caught.value.next_command.endswith("--set train_behavior_encoder.richness=rank")


def test_few_items_are_not_judged_and_many_are() -> None:
    found = {"low_strength_share": 0.4, "mean_strength": 0.3, "richness_spearman": 0.1, "measured_items": 199.0, "beta": 7.0}
    assert job.gated(found, 199) == {}
    assert job.gated(found | {"probe_lift": 4.0}, 200) == {"low_strength_share": 0.4, "mean_strength": 0.3, "probe_lift": 4.0}
    assert set(job.gated(found | {"measured_items": 200.0}, 500)) == {"low_strength_share", "mean_strength", "richness_spearman"}
    assert set(job.gated({"low_strength_share": 0.4, "mean_strength": 0.3}, 500)) == {"low_strength_share", "mean_strength"}


def test_a_rerun_and_another_order_of_rows_give_the_same_bits(tmp_path: Path, config: profile.Config) -> None:
    users = walks()
    first, _ = first_night(tmp_path / "a", config, users, measure_reliability=False)
    again, _ = first_night(tmp_path / "b", config, dict(sorted(users.items(), reverse=True)), measure_reliability=False)
    assert first.model.config == again.model.config
    assert first.metrics == again.metrics
    assert all(np.asarray(tensor).tobytes() == np.asarray(again.model.tensors[name]).tobytes() for name, tensor in first.model.tensors.items())


def test_a_frozen_night_trains_only_rows_whose_bucket_rose(tmp_path: Path, config: profile.Config) -> None:
    result, base = first_night(tmp_path, config)
    features = feature_rows(result, {"i00": 1, "i05": -1})
    users = walks({user: ["new", "i20"] for user in range(6)} | {7: ["young", "young"]})
    night = second_night(tmp_path, config, users, base, features)
    counts = dict(zip(*np.unique([item for items in users.values() for item in items], return_counts=True), strict=True))
    before = dict(zip(features["item_id"].to_pylist(), features["evidence_bucket"].to_pylist(), strict=True))
    expected = sorted(name for name, count in counts.items() if count >= 5 and richness.evidence_bucket(count) > before.get(name, -1))
    assert night.model.config["item_ids"] == expected
    assert {"i00", "i05", "new"} <= set(expected)
    assert "young" not in expected
    assert night.metrics["first_rows"] == len([name for name in expected if before.get(name, -1) < 0])
    assert night.outputs["richness_reference"] == result.outputs["richness_reference"]
    assert night.model.name == "behavior_rows"


def test_a_moved_row_is_a_function_of_its_own_events(tmp_path: Path, config: profile.Config) -> None:
    result, base = first_night(tmp_path, config)
    some = {user: ["new"] for user in range(6)}
    alone = second_night(tmp_path, config, walks(some), base, feature_rows(result))
    # another new item, in users who never met the first, and a further item that moves
    more = second_night(tmp_path, config, walks(some | {user: ["other"] for user in range(20, 27)}), base, feature_rows(result, {"i00": 0}))
    assert "other" in more.model.config["item_ids"]
    assert len(more.model.config["item_ids"]) > len(alone.model.config["item_ids"])

    def row(night):
        return night.model.tensors["behavior_vectors"][night.model.config["item_ids"].index("new")]

    np.testing.assert_allclose(row(alone), row(more), rtol=1e-4, atol=1e-5)


def test_nothing_moved_is_skipped(tmp_path: Path, config: profile.Config) -> None:
    result, base = first_night(tmp_path, config)
    night = second_night(tmp_path, config, walks(), base, feature_rows(result))
    assert (night.status, night.model, night.metrics["moved_items"]) == ("skipped", None, 0)


def test_a_second_generation_is_brought_back_to_the_first(tmp_path: Path, config: profile.Config) -> None:
    _, base = first_night(tmp_path, config)
    data = tables(D2, walks({user: ["i01", "i02"] for user in range(9)}))
    lake = Lake(
        feature__user_sequence=data["feature.user_sequence"],
        feature__item_popularity=data["feature.item_popularity"],
        sid__generation=pa.table({"generation": [1], "logical_date": [D1], "encoder_uri": [str(base)]}),
    )
    night = plan(D2, generation=2, parent=Release(tag="d20260105", logical_date=D1, revision=1, generation=1, snapshot_id=1))
    result = job.run(lake, config.train_behavior_encoder, context(Home(tmp_path), config, "train_behavior_encoder", night))
    assert result.metrics["procrustes/cosine_after"] > result.metrics["procrustes/cosine_before"] + 0.1
    rotation = result.model.tensors["rotation"]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), rtol=1e-4, atol=1e-5)
    exported = np.linalg.norm(result.model.tensors["behavior_vectors"], axis=1)
    own = result.model.tensors["network.input_rows.weight"].norm(dim=1).numpy()
    assert np.isclose(exported[:, None], own[None, :], rtol=1e-4).any(1).all()


def test_what_cannot_be_trained_is_refused(tmp_path: Path, config: profile.Config) -> None:
    section = config.train_behavior_encoder
    with pytest.raises(ConfigError, match="unknown behaviour encoder"):
        first_night(tmp_path, config, encoder="lstm")
    with pytest.raises(ConfigError, match="must be measured"):
        first_night(tmp_path, config, richness="reliability", measure_reliability=False)
    with pytest.raises(ContractError, match="enough events"):
        first_night(tmp_path, config, n_min=10_000)
    with pytest.raises(UpstreamMissing, match="two events"):
        first_night(tmp_path, config, {"u": ["a"]})
    data = tables(D1, walks())
    short = data["feature.item_popularity"].slice(2)
    lake = Lake(feature__user_sequence=data["feature.user_sequence"], feature__item_popularity=short)
    with pytest.raises(ContractError, match="item_popularity lacks"):
        job.run(lake, section, context(Home(tmp_path), config, "train_behavior_encoder", plan(D1)))


def test_item_ids_survive_packing() -> None:
    ids = pa.array(["x", "", "a long id \u00e9", "z"], pa.large_string())
    assert behavior_inputs.unpack_ids(*behavior_inputs.pack_ids(ids.slice(1))).to_pylist() == ["", "a long id \u00e9", "z"]
    assert behavior_inputs.unpack_ids(*behavior_inputs.pack_ids(ids.slice(0, 0))).to_pylist() == []


def test_vectors_that_are_not_finite_name_their_items(tmp_path: Path, config: profile.Config) -> None:
    result, _ = first_night(tmp_path, config)
    vectors = np.array(result.model.tensors["behavior_vectors"])
    vectors[3, 2] = np.nan
    with pytest.raises(ContractError, match=result.model.config["item_ids"][3]):
        job.checked(vectors, pa.array(result.model.config["item_ids"]), "test", "sid releases")
    broken = SimpleNamespace(tensors={"behavior_vectors": vectors}, config=result.model.config)
    with pytest.raises(ContractError, match="not finite"):
        behavior_embedding.bundle_rows(tracking.save_bundle(tmp_path / "broken", broken))


def test_a_smaller_step_is_offered_as_a_setting_that_can_be_typed(config: profile.Config) -> None:
    *command, setting = shlex.split(job.slower(config.train_behavior_encoder))
    assert command == ["sid", "run", "refresh", "--date", "D", "--set"], "a single stage would not be planned with the setting"
    assert profile.load("tiny", (setting,)).train_behavior_encoder.sasrec.learning_rate == config.train_behavior_encoder.sasrec.learning_rate / 2


# ---------------------------------------------------------------- encoders on the graph

GRAPH = {"dim": 8, "max_epochs": 6, "batch_size": 32, "learning_rate": 0.02, "valid_users": 20, "row_steps": 10}
GRAPHS = {"bpr_mf": GRAPH, "lightgcn": GRAPH, "ngcf": GRAPH | {"num_layers": 2}, "alpharec": GRAPH | {"hidden_dim": 8, "num_negatives": 8}}
WIDTHS = {"bpr_mf": 8, "lightgcn": 8, "ngcf": 24, "alpharec": 8}


def with_encoder(name: str, **changes: object) -> profile.Config:
    section = {**SECTION, "encoder": name, name: GRAPHS[name] | changes}
    return profile.parse({"seed": 3, "train_behavior_encoder": section, "launch": {"threads": 1}}, where="test")


def texts(names: list[str], day: date) -> dict[str, pa.Table]:
    """raw.item with two observations per item and feature.item_content_vector, one row per text."""
    rng = np.random.default_rng(7)
    vectors = {name: rng.normal(size=6).astype(np.float32) for name in [*names, "older"]}
    item = {"file_date": [day] * len(names) * 2, "item_id": names * 2, "text_hash": ["older"] * len(names) + names}
    item["file_date"] = [date(2026, 1, 1)] * len(names) + [day] * len(names)
    content = {"encoder_id": ["e"] * len(vectors), "modality": ["text"] * len(vectors), "content_hash": list(vectors), "vector": list(vectors.values())}
    return {"raw__item": pa.table(item), "feature__item_content_vector": pa.table(content)}


def night_of(tmp_path: Path, config: profile.Config, users: dict[str, list[str]], day: date, cold: list[str] = [], base: object = None):  # noqa: B006 - read only
    """Result of the stage on one night, new or (with the base's folder and the parent's item_feature) frozen; `cold` items are listed and have no event."""
    data = tables(day, users)
    counts = data["feature.item_popularity"]
    extra = {"logical_date": [day] * len(cold), "item_id": cold, "evidence_count": [0] * len(cold), "popularity_stratum": ["tail"] * len(cold)}
    popularity = pa.concat_tables([counts, pa.table(extra, schema=counts.schema)]) if cold else counts
    lake = Lake(feature__user_sequence=data["feature.user_sequence"], feature__item_popularity=popularity, **texts(popularity["item_id"].to_pylist(), day))
    night = plan(day)
    if base is not None:
        folder, features = base
        lake.tables |= {"feature.item_feature": features, "sid.generation": pa.table({"generation": [1], "logical_date": [D1], "encoder_uri": [str(folder)]})}
        night = plan(day, parent=Release(tag="d20260105", logical_date=D1, revision=1, generation=1, snapshot_id=1), new=False)
    ctx = context(Home(tmp_path), config, "train_behavior_encoder", night, f"run{day.day}")
    write_json(ctx.staging / "content_embedding.json", {"status": "done", "outputs": {"text_encoder_id": "e", "image_encoder_id": None}})
    return job.run(lake, config.train_behavior_encoder, ctx)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_every_encoder_serves_a_new_generation_and_a_frozen_night(tmp_path: Path, name: str) -> None:
    config = with_encoder(name)
    result = night_of(tmp_path, config, walks(), D1)
    assert np.asarray(result.model.tensors["behavior_vectors"]).shape == (len(result.model.config["item_ids"]), WIDTHS[name])
    assert result.model.config["encoder"] == name
    assert {"floor/popularity_recall@20", "valid_recall@20", "richness_spearman", "spearman_norm_count"} <= set(result.metrics)
    assert ("probe/recall@20" in result.metrics) is (name == "alpharec")
    assert result.metrics["cold_vectors"] == 0
    again = night_of(tmp_path / "again", config, walks(), D1)
    assert all(np.asarray(tensor).tobytes() == np.asarray(again.model.tensors[key]).tobytes() for key, tensor in result.model.tensors.items())

    base = tracking.save_bundle(tmp_path / "base", result.model), feature_rows(result, {"i00": 1})
    some = {user: ["new"] for user in range(6)}
    alone = night_of(tmp_path / "alone", config, walks(some), D2, base=base)
    more = night_of(tmp_path / "more", config, walks(some | {user: ["other"] for user in range(20, 27)}), D2, base=base)
    assert {"i00", "new"} <= set(alone.model.config["item_ids"])
    assert alone.outputs["richness_reference"] == result.outputs["richness_reference"]
    rows = [night.model.tensors["behavior_vectors"][night.model.config["item_ids"].index("new")] for night in (alone, more)]
    assert set(more.model.config["item_ids"]) > set(alone.model.config["item_ids"])
    if name != "alpharec":  # whose texts above depend on which items there are
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-3, atol=1e-4)


def test_cold_items_get_a_vector_from_their_text_and_leave_the_reference_alone(tmp_path: Path) -> None:
    config = with_encoder("alpharec", cold_items=True)
    users = walks({0: ["rare", "rare"]})
    warm = night_of(tmp_path / "warm", with_encoder("alpharec"), users, D1)
    result = night_of(tmp_path, config, users, D1, cold=["unsold"])
    assert set(result.model.config["item_ids"]) == set(warm.model.config["item_ids"]) | {"rare", "unsold"} | set(np.concatenate(list(users.values())))
    assert result.outputs["richness_reference"]["num_items"] == warm.outputs["richness_reference"]["num_items"] == len(warm.model.config["item_ids"])
    assert result.metrics["cold_vectors"] == len(result.model.config["item_ids"]) - len(warm.model.config["item_ids"])
    events = np.concatenate([np.asarray(items) for items in users.values()])
    buckets = [max(int(richness.evidence_bucket((events == name).sum())), 0) for name in result.model.config["item_ids"]]
    features = pa.table({"item_id": result.model.config["item_ids"], "evidence_bucket": pa.array(buckets, pa.int32())})
    base = tracking.save_bundle(tmp_path / "base", result.model), features
    users = walks({0: ["rare"] * 4})
    night = night_of(tmp_path / "next", config, users, D2, cold=["unsold", "listed today"], base=base)
    assert night.model.config["item_ids"] == ["listed today", "rare"]  # unsold has its row, rare has four events now
    assert np.isfinite(night.model.tensors["behavior_vectors"]).all()


def test_an_encoder_of_texts_needs_texts(tmp_path: Path) -> None:
    config = with_encoder("alpharec")
    ctx = context(Home(tmp_path), config, "train_behavior_encoder", plan(D1))
    data = tables(D1, walks())
    lake = Lake(feature__user_sequence=data["feature.user_sequence"], feature__item_popularity=data["feature.item_popularity"], **texts(["nobody"], D1))
    write_json(ctx.staging / "content_embedding.json", {"status": "done", "outputs": {"text_encoder_id": None}})
    with pytest.raises(ConfigError, match="reads texts"):
        job.run(lake, config.train_behavior_encoder, ctx)
    write_json(ctx.staging / "content_embedding.json", {"status": "done", "outputs": {"text_encoder_id": "e"}})
    lake.tables["feature.item_content_vector"] = lake.tables["feature.item_content_vector"].slice(0, 0)
    with pytest.raises(UpstreamMissing, match="no text has a vector"):
        job.run(lake, config.train_behavior_encoder, ctx)


def test_the_newest_text_of_an_item_counts(tmp_path: Path) -> None:
    config = with_encoder("alpharec")
    ctx = context(Home(tmp_path), config, "train_behavior_encoder", plan(D1))
    write_json(ctx.staging / "content_embedding.json", {"status": "done", "outputs": {"text_encoder_id": "e"}})
    lake = Lake(**texts(["b", "a"], D1))
    content = behavior_inputs.read_content(lake, ctx)
    stored = {row["content_hash"]: row["vector"] for row in lake.tables["feature.item_content_vector"].to_pylist()}
    found = content.of(pa.array(["a", "nobody", "b"], pa.large_string()))
    np.testing.assert_allclose(found.numpy(), [stored["a"], [0.0] * 6, stored["b"]], rtol=1e-6)


# ---------------------------------------------------------------- through the runner, on Iceberg


def append(spark, name: str, rows: pa.Table) -> None:
    """Rows of some of a table's columns; the others are null."""
    fields = spark.table(f"lake.{name}").schema.fields
    frame = spark.createDataFrame(rows.to_pylist(), ", ".join(f"{f.name} {f.dataType.simpleString()}" for f in fields if f.name in rows.column_names))
    full = [f.name if f.name in rows.column_names else f"cast(null as {f.dataType.simpleString()}) as {f.name}" for f in fields]
    frame.selectExpr(*full).writeTo(f"lake.{name}").append()


def fill(spark, day: date, users: dict[str, list[str]]) -> None:
    for name, table in tables(day, users).items():
        append(spark, name, table)


def stages(home: Home, config: profile.Config, night: Plan, run_id: str) -> list[str]:
    """How train_behavior_encoder and behavior_embedding of a night ended."""
    return [runner.run_stage(context(home, config, stage, night, run_id))["status"] for stage in ("train_behavior_encoder", "behavior_embedding")]


def vectors_of(spark, day: date) -> dict[str, tuple]:
    rows = spark.table("lake.feature.item_behavior_vector").where(f"logical_date = date'{day}'").collect()
    return {row.item_id: (row.vector, row.norm, row.evidence_count, row.evidence_bucket, row.generation) for row in rows}


@pytest.mark.spark
@pytest.mark.usefixtures("models_in_folders")
def test_two_nights_on_the_lake_and_an_empty_one_in_place_of_a_full_one(spark, lake_home: Home, config: profile.Config) -> None:
    fill(spark, D1, walks())
    assert stages(lake_home, config, plan(D1), "night1") == ["done", "done"]
    base = vectors_of(spark, D1)
    counts = dict(zip(*np.unique([item for items in walks().values() for item in items], return_counts=True), strict=True))
    assert set(base) == {name for name, count in counts.items() if count >= 5}
    for name, (vector, norm, evidence, bucket, generation) in base.items():
        assert (len(vector), evidence, bucket, generation) == (8, counts[name], int(richness.evidence_bucket(counts[name])), 1)
        assert norm == pytest.approx(float(np.linalg.norm(vector)), rel=1e-5)

    model_uri = read_json(lake_home.folder("staging") / "night1" / "train_behavior_encoder.json")["outputs"]["model_uri"]
    append(spark, "sid.generation", pa.table({"generation": [1], "logical_date": [D1], "encoder_uri": [model_uri]}))
    buckets = {"item_id": list(base), "evidence_bucket": [row[3] for row in base.values()]}
    append(spark, "feature.item_feature", pa.table({"logical_date": [D1] * len(base), "generation": [1] * len(base), **buckets}))
    fill(spark, D2, walks({user: ["new"] for user in range(6)}))
    night = plan(D2, parent=Release(tag="d20260105", logical_date=D1, revision=1, generation=1, snapshot_id=1), new=False)
    assert stages(lake_home, config, night, "night2") == ["done", "done"]
    moved = vectors_of(spark, D2)
    assert set(moved) == {"new"}
    assert moved["new"][2:] == (6, 2, 1)
    assert vectors_of(spark, D1) == base

    append(spark, "feature.item_feature", pa.table({"logical_date": [D1], "generation": [1], "item_id": ["new"], "evidence_bucket": [2]}))
    assert stages(lake_home, config, night, "night2b") == ["skipped", "done"]
    assert vectors_of(spark, D2) == {}
    assert vectors_of(spark, D1) == base


@pytest.mark.spark
@pytest.mark.usefixtures("models_in_folders")
def test_a_row_from_text_alone_passes_the_audit_with_no_evidence(spark, lake_home: Home, tmp_path: Path) -> None:
    config = with_encoder("alpharec", cold_items=True)
    fill(spark, D1, walks())
    counted = {"logical_date": [D1], "item_id": ["unsold"], "evidence_count": [0], "popularity_stratum": ["tail"]}
    append(spark, "feature.item_popularity", pa.table(counted))
    listed = texts(["unsold", *sorted(set(np.concatenate(list(walks().values())).tolist()))], D1)
    append(spark, "raw.item", listed["raw__item"])
    append(spark, "feature.item_content_vector", listed["feature__item_content_vector"])
    ctx = context(lake_home, config, "content_embedding", plan(D1), "night1")
    write_json(ctx.staging / "content_embedding.json", {"status": "done", "outputs": {"text_encoder_id": "e", "image_encoder_id": None}})
    assert stages(lake_home, config, plan(D1), "night1") == ["done", "done"]
    _, norm, evidence, bucket, _ = vectors_of(spark, D1)["unsold"]
    assert (evidence, bucket) == (0, 0)
    assert norm > 0


@pytest.mark.spark
@pytest.mark.usefixtures("models_in_folders")
def test_bad_vectors_leave_the_table_as_it_was(spark, lake_home: Home, config: profile.Config, tmp_path: Path) -> None:
    fill(spark, D1, walks())
    stages(lake_home, config, plan(D1), "night1")
    before = lakehouse.references(spark, "feature.item_behavior_vector")
    ctx = context(lake_home, config, "behavior_embedding", plan(D1), "night1")
    outcome = read_json(ctx.staging / "train_behavior_encoder.json")
    folder = Path(outcome["outputs"]["model_uri"])
    ids = json.loads((folder / "config.json").read_text())["item_ids"]
    whole = load_file(folder / "model.safetensors")["behavior_vectors"]

    def run_with(vectors: torch.Tensor, names: list[str]) -> None:
        bundle = SimpleNamespace(tensors={"behavior_vectors": vectors}, config={"item_ids": names})
        outcome["outputs"]["model_uri"] = str(tracking.save_bundle(tmp_path / "bad", bundle))
        write_json(ctx.staging / "train_behavior_encoder.json", outcome)
        runner.run_stage(ctx)

    spoilt = whole.clone()
    spoilt[0, 0] = float("inf")
    with pytest.raises(ContractError, match="not finite"):
        run_with(spoilt, ids)
    with pytest.raises(GateFailed, match="norm_ratio"):
        run_with(whole * 1000, ids)
    with pytest.raises(GateFailed, match="repeated_items"):
        run_with(whole, [ids[1], *ids[1:]])
    with pytest.raises(GateFailed, match="without_evidence"):
        run_with(whole, ["never seen", *ids[1:]])
    assert lakehouse.references(spark, "feature.item_behavior_vector")["main"] == before["main"]
