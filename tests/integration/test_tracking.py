"""MLflow on a real local store: records, tries, repair after a kill, models, aliases, and the way from table to run and back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import runner, train_tokenizer
from pipeline import tracking
from pipeline.config import Config
from pipeline.context import Context, Home, write_json
from pipeline.errors import ContractError, GateFailed, UpstreamMissing
from pipeline.stages import BY_NAME, FigureData, ModelBundle, StageResult

DAY = date(1998, 4, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One store for the module (making one takes seconds); every test uses its own run ids."""
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield Home(tmp_path_factory.mktemp("a home"))
    assert "MLFLOW_TRACKING_URI" not in os.environ, "tracking must not leave its address in the environment"
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


def context(home: Home, run_id: str, stage: str = "assign_sid", attempt: int = 1) -> Context:
    return Context(config=Config(name="test"), home=home, stage=stage, logical_date=DAY, run_id=run_id, attempt=attempt)


def result(**changes: Any) -> StageResult:
    full = StageResult(
        metrics={"tokenizer/collision_rate": np.float32(0.25), "odd%name": 1.0},
        curves={"loss": [3.0, 2.0, 1.5]},
        outputs={"rows": np.int64(3)},
        figures={"churn": FigureData(kind="churn", data={"by_position": {"shared_0": np.float64(0.1)}})},
    )
    return dataclasses.replace(full, **changes)


def recorded(ctx: Context, **changes: Any) -> tracking.Record:
    given = {"status": "done", "seconds": 2.0, "inputs": {"feature.item_feature": 11, "sid.item_sid": None}, "outputs": {"sid.item_sid": 7}} | changes
    return tracking.record(ctx, given.pop("result", result()), **given)


def client(home: Home) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(home.tracking_uri)


def runs(home: Home, run_id: str) -> tuple[Any, list[Any]]:
    """(the run's parent, its children in order)."""
    store = client(home)
    experiment = store.get_experiment_by_name("sid/test").experiment_id
    found = store.search_runs([experiment], f"tags.`sid.run_id` = '{run_id}'", order_by=["attributes.start_time ASC"])
    (parent,) = [run for run in found if run.data.tags["sid.kind"] == "run"]
    return parent, [run for run in found if run.data.tags["sid.kind"] == "stage"]


def bundle(**changes: Any) -> ModelBundle:
    import torch

    table = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    full = ModelBundle(
        name="behavior_encoder",
        tensors={"item": table, "view": table.t(), "bias": np.zeros(3, np.float32)},
        config={"item_ids": ["c", "a", "b", "d"], "generation": np.int64(3), "codebook_digest": "ff00"},
        example_input={"item_id": np.array(["a", "b"])},
        example_output={"vector": np.zeros((2, 3), np.float32)},
    )
    return dataclasses.replace(full, **changes)


def test_importing_tracking_and_recording_need_no_heavy_library(tmp_path: Path) -> None:
    script = """
import sys
from datetime import date
from pathlib import Path
from pipeline import tracking
from pipeline.config import Config
from pipeline.context import Context, Home
from pipeline.stages import StageResult
ctx = Context(config=Config(), home=Home(Path(sys.argv[1])), stage="ingest", logical_date=date(2020, 1, 1), run_id="r")
tracking.record(ctx, StageResult(metrics={"rows": 1}), status="done", seconds=1.0, inputs={}, outputs={})
assert not {"mlflow", "torch", "matplotlib", "pandas", "sqlalchemy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "staging" / "r" / "mlflow" / "ingest-1" / "record.json").is_file()


def test_a_record_becomes_one_child_of_one_parent(home: Home) -> None:
    ctx = context(home, "night-1")
    record = recorded(ctx, result=result(outputs={"tag": "d19980402"}), outputs={"sid.item_sid": 7001})
    recorded(context(home, "night-1", "ingest"), outputs={"raw.item": 5})
    assert record.key.startswith("night-1/assign_sid-1~")
    assert tracking.flush(home, ctx.staging) == 2
    parent, (child, sibling) = runs(home, "night-1")
    assert {child.info.run_name, sibling.info.run_name} == {"assign_sid", "ingest"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    expected = {"logical_date": "1998-04-02", "config_hash": ctx.config.digest(), "input:feature.item_feature": "11", "input:sid.item_sid": "none"}
    expected |= {"output:sid.item_sid": "7001", "attempt_key": "night-1/assign_sid", "release": "d19980402", "status": "done"}
    assert expected.items() <= child.data.tags.items()
    assert len(child.data.tags["git_sha"]) in (40, 7)
    assert parent.data.tags["release"] == "d19980402"
    assert parent.data.metrics["seconds/assign_sid"] == 2.0


def test_parameters_metrics_curves_and_data_sets_are_logged(home: Home) -> None:
    ctx = context(home, "numbers")
    recorded(ctx)
    tracking.flush(home, ctx.staging)
    parent, (child,) = runs(home, "numbers")
    flat = ctx.config.flat()
    assert len(flat) > tracking.PARAMS_PER_BATCH
    assert set(parent.data.params) == set(flat)
    assert set(child.data.params) == {key for key in flat if key.startswith("assign_sid.")} | {"seed"}
    assert child.data.params["assign_sid.max_disambiguator"] == "64"
    assert child.data.metrics["tokenizer/collision_rate"] == pytest.approx(0.25)
    assert child.data.metrics["odd_name"] == 1.0
    history = client(home).get_metric_history(child.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(0, 3.0), (1, 2.0), (2, 1.5)]
    assert [(each.dataset.name, each.dataset.digest) for each in child.inputs.dataset_inputs] == [("feature.item_feature", "11")]


def test_figures_lie_as_pictures_beside_their_numbers(home: Home) -> None:
    ctx = context(home, "figures")
    figures = {"churn": result().figures["churn"], "broken": FigureData(kind="churn", data={"by_position": {"a": "x"}}), "pie": FigureData(kind="pie", data={})}
    recorded(ctx, result=result(figures=figures))
    tracking.flush(home, ctx.staging)
    _, (child,) = runs(home, "figures")
    names = {entry.path for entry in client(home).list_artifacts(child.info.run_id, "figures")}
    assert names == {"figures/churn.png", "figures/churn.json", "figures/broken.json", "figures/pie.json"}
    assert "pie: unknown figure" in child.data.tags["undrawn_figures"]
    assert "broken" in child.data.tags["undrawn_figures"]
    assert {"config.json", "outputs.json"} <= {entry.path for entry in client(home).list_artifacts(child.info.run_id)}


def test_flushing_again_changes_nothing_and_a_kill_between_is_repaired(home: Home) -> None:
    ctx = context(home, "again")
    record = recorded(ctx)
    assert tracking.flush(home, ctx.staging) == 1
    assert tracking.flush(home, ctx.staging) == 0
    (record.folder / tracking.FLUSHED).unlink()  # as if killed after pushing and before saying so
    assert tracking.flush(home, ctx.staging) == 1
    _, (child,) = runs(home, "again")
    assert len(client(home).get_metric_history(child.info.run_id, "loss")) == 3


def test_a_kill_in_the_middle_of_a_push_leaves_no_second_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(home, "killed")
    recorded(ctx)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_log_inputs", die)
        with pytest.raises(KeyboardInterrupt):
            tracking.flush(home, ctx.staging)
    assert tracking.flush(home, ctx.staging) == 1
    parent, (child,) = runs(home, "killed")
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")


def test_a_retry_supersedes_the_failed_try(home: Home) -> None:
    first = context(home, "retry", attempt=1)
    recorded(first, result=StageResult(), status="failed", outputs={}, error=GateFailed("too many collisions", found="0.4"))
    tracking.flush(home, first.staging)
    parent, (child,) = runs(home, "retry")
    assert (parent.info.status, child.info.status) == ("FAILED", "FAILED")
    assert child.data.tags["error_class"] == "GateFailed"
    assert child.data.tags["error_found"] == "0.4"
    second = context(home, "retry", attempt=2)
    recorded(second)
    tracking.flush(home, second.staging)
    parent, (old, new) = runs(home, "retry")
    assert old.data.tags["superseded"] == "true"
    assert "superseded" not in new.data.tags
    assert (parent.info.status, new.info.status) == ("FINISHED", "FINISHED")


def test_a_second_finished_try_with_the_same_number_is_kept_apart(home: Home) -> None:
    ctx = context(home, "rerun")
    assert recorded(ctx).key.startswith("rerun/assign_sid-1~")
    again = recorded(ctx, status="reused", result=StageResult(status="reused", outputs={"tag": "d19980402"}))
    assert again.key.startswith("rerun/assign_sid-1.1~")
    assert tracking.flush(home, ctx.staging) == 2
    parent, children = runs(home, "rerun")
    assert [child.data.tags["status"] for child in children] == ["done", "reused"]
    assert all("superseded" not in child.data.tags for child in children)
    assert parent.data.tags["release"] == "d19980402"


def test_nothing_is_left_looking_alive(home: Home) -> None:
    ctx = context(home, "ghost", "train_behavior_encoder")
    tracking.log_model(ctx, bundle(name="ghost_model"))  # and then the process is gone
    _, (child,) = runs(home, "ghost")
    assert child.info.status == "KILLED"
    retry = context(home, "ghost", "train_behavior_encoder", attempt=2)
    recorded(retry, seconds=0.0)
    tracking.flush(home, retry.staging)
    parent, (old, new) = runs(home, "ghost")
    assert old.data.tags["superseded"] == "true"
    assert {parent.info.status, new.info.status} == {"FINISHED"}


def test_a_model_belongs_to_the_run_of_its_try_and_is_never_pickled(home: Home) -> None:
    ctx = context(home, "model", "train_behavior_encoder")
    uri = tracking.log_model(ctx, bundle())
    recorded(ctx)
    tracking.flush(home, ctx.staging)
    _, (child,) = runs(home, "model")
    assert child.info.status == "FINISHED"
    version = client(home).get_model_version("behavior_encoder", uri.rsplit("/", 1)[-1])
    assert version.run_id == child.info.run_id
    assert {"generation": "3", "codebook_digest": "ff00", "logical_date": "1998-04-02"}.items() <= version.tags.items()
    folder = tracking.download(home, uri)
    assert home.root in folder.parents, "a local model is read where it lies"
    everything = {path.name for path in folder.parent.parent.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "serving.py", "MLmodel"} <= everything
    assert not [name for name in everything if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    assert json.loads((folder / "config.json").read_text())["generation"] == 3


def test_a_logged_encoder_answers_in_another_process(home: Home) -> None:
    uri = tracking.log_model(context(home, "serve", "train_behavior_encoder"), bundle())
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
assert [column.name for column in model.metadata.signature.inputs] == ["item_id"]
answer = model.predict({"item_id": np.array(["d", "a", "nobody", "c"])})["vector"]
assert answer[[0, 1, 3]].tolist() == [[9, 10, 11], [3, 4, 5], [0, 1, 2]], answer
assert np.isnan(answer[2]).all()
"""
    subprocess.run([sys.executable, "-c", script, home.tracking_uri, uri], check=True, timeout=120, env=os.environ | tracking.ENVIRONMENT)


def test_a_logged_tokenizer_answers_the_codes_of_the_tokenizer(home: Home) -> None:
    import mlflow
    import torch

    from pipeline.config import RqKmeans, TrainTokenizer
    from pipeline.tokenizers.base import FitOptions, ItemBatch
    from pipeline.tokenizers.registry import TOKENIZERS

    torch.manual_seed(0)
    text, behavior = torch.randn(200, 8), torch.randn(200, 6)
    masked = torch.arange(200) % 5 == 0
    ones = torch.ones(200, dtype=torch.bool)
    vectors = {"text_ND": text, "image_ND": None, "behavior_ND": behavior, "text_N": ones, "image_N": ~ones, "behavior_N": ~masked}
    items = ItemBatch(**vectors, richness_N=torch.rand(200), strength_N=torch.rand(200))
    settings = TrainTokenizer(tokenizer="rq_kmeans", rq_kmeans=RqKmeans(num_levels=3, codebook_size=8))
    tokenizer = TOKENIZERS["rq_kmeans"](settings.rq_kmeans)
    tokenizer.fit(items, FitOptions(seed=1, settings=settings))
    expected = tokenizer.encode(items)
    columns = {"text": text.numpy(), "behavior": np.where(masked[:, None].numpy(), np.float32(np.nan), behavior.numpy())}
    columns |= {"richness": items.richness_N.numpy(), "strength": items.strength_N.numpy()}
    uri = tracking.log_model(
        context(home, "tokenizer", "train_tokenizer"),
        ModelBundle(
            name="sid_tokenizer", tensors=tokenizer.state(), config=tokenizer.config(),
            example_input={name: values[:2] for name, values in columns.items()},
            example_output={"codes": expected.codes_NL[:2].numpy(), "weights": expected.weights_NL[:2].numpy()},
        ),
    )  # fmt: skip
    mlflow.set_tracking_uri(home.tracking_uri)
    try:
        answer = mlflow.pyfunc.load_model(uri).predict(columns)
    finally:
        mlflow.set_tracking_uri(None)
    assert np.array_equal(answer["codes"], expected.codes_NL.numpy())
    assert np.array_equal(answer["weights"], expected.weights_NL.numpy())


def test_aliases_move_and_are_read_back(home: Home) -> None:
    ctx = context(home, "alias", "train_behavior_encoder")
    assert tracking.alias_target(home, "aliased", "current") == ""
    first, second = tracking.log_model(ctx, bundle(name="aliased")), tracking.log_model(ctx, bundle(name="aliased"))
    assert (first, second) == ("models:/aliased/1", "models:/aliased/2")
    tracking.set_alias(home, "aliased", second, "current")
    assert tracking.alias_target(home, "aliased", "current") == second
    assert tracking.download(home, "models:/aliased@current") == tracking.download(home, second)
    tracking.set_alias(home, "aliased", "1", "current")
    assert tracking.alias_target(home, "aliased", "current") == first
    with pytest.raises(UpstreamMissing, match="no model at models:/aliased/7"):
        tracking.set_alias(home, "aliased", "models:/aliased/7", "current")


def test_lakes_with_names_share_a_server_without_touching_each_other(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", home.tracking_uri)
    logged = {}
    for name in ("prod_1", "prod-1"):  # to SQL's LIKE one pattern
        monkeypatch.setenv("SID_NAMESPACE", name)
        own = Home(tmp_path / name)
        ctx = context(own, "shared-night")
        uri = tracking.log_model(ctx, bundle())
        recorded(ctx)
        tracking.flush(own, ctx.staging)
        tracking.set_alias(own, uri.removeprefix("models:/").rsplit("/", 1)[0], uri, "current")
        (run,) = tracking.runs_of(own, "shared-night")
        assert tracking.read_bundle(tracking.download(own, uri))[0]["generation"] == 3
        logged[name] = (uri, run)
    assert [uri for uri, _ in logged.values()] == ["models:/prod_1.behavior_encoder/1", "models:/prod-1.behavior_encoder/1"]
    assert tracking.alias_target(home, "prod_1.behavior_encoder", "current") == "models:/prod_1.behavior_encoder/1"
    one, other = (client(home).get_run(run.mlflow_run_id).data.tags for _, run in logged.values())
    assert one["mlflow.parentRunId"] != other["mlflow.parentRunId"]
    assert client(home).get_experiment(logged["prod_1"][1].experiment_id).name == "sid/prod_1/test"
    assert not {tag for tag in (*one, *other) if "supersed" in tag}


def test_from_table_to_run_and_from_run_to_table(home: Home) -> None:
    ctx = context(home, "lineage")
    record = recorded(ctx, outputs={"sid.item_sid": 1234})
    recorded(context(home, "lineage", "ingest"), outputs={"raw.item": 12345})
    tracking.flush(home, ctx.staging)
    found = tracking.run_of_record(home, record.key)
    assert found is not None
    assert (found.stage, found.run_id, found.record_key) == ("assign_sid", "lineage", record.key)
    assert tracking.run_of_record(home, "lineage/assign_sid") == found
    assert tracking.tables_of_run(home, found.mlflow_run_id)["outputs"] == {"sid.item_sid": "1234"}
    assert tracking.tables_of_run(home, found.mlflow_run_id)["inputs"] == {"feature.item_feature": "11", "sid.item_sid": "none"}
    assert tracking.run_of_record(home, "lineage/nothing") is None
    assert {run.stage for run in tracking.runs_of(home, "lineage")} == {"assign_sid", "ingest"}


def test_run_ids_with_quotes_and_colons_are_found_again(home: Home) -> None:
    ctx = context(home, "manual__1998-04-02T00:00:00+00:00 o'clock")
    record = recorded(ctx)
    tracking.flush(home, ctx.staging)
    assert tracking.run_of_record(home, record.key) is not None


def test_a_missing_model_and_a_broken_one_say_so(home: Home, tmp_path: Path) -> None:
    with pytest.raises(UpstreamMissing, match="no model"):
        tracking.download(home, "models:/nobody/1")
    with pytest.raises(UpstreamMissing, match="no model"):
        tracking.download(home, "models:/nobody@current")
    with pytest.raises(ContractError, match="not there"):
        tracking.download(home, str(tmp_path))
    folder = tracking.save_bundle(tmp_path / "plain", bundle(config={"z": 1, "a": {"y": 2, "b": 3}}))
    assert tracking.download(home, str(folder)) == folder
    assert json.dumps(json.loads((folder / "config.json").read_text())) == '{"z": 1, "a": {"y": 2, "b": 3}}', "the order of keys is the model's own"


def test_without_mlflow_the_record_waits_and_flush_may_be_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    ctx = context(home, "down")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")  # a folder is no database
    record = recorded(ctx)
    with pytest.raises(UpstreamMissing, match="cannot be reached") as caught:
        tracking.flush(home, ctx.staging)
    assert caught.value.retry
    assert caught.value.next_command
    assert (record.folder / tracking.RECORD).is_file()
    assert not (record.folder / tracking.FLUSHED).exists()


def test_nothing_is_trained_while_mlflow_cannot_take_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(Home(tmp_path / "home"), "down", "train_tokenizer")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")
    recorded(context(ctx.home, "down", "item_feature"))  # what an earlier stage of the night could not send either
    monkeypatch.setattr(train_tokenizer, "run", lambda *given: pytest.fail("hours of training, and every try again"))
    with pytest.raises(UpstreamMissing, match="cannot be reached"):
        runner._once(BY_NAME["train_tokenizer"], ctx, {}, runner.Ledger())


def test_a_server_that_does_not_answer_is_upstream_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    ctx = context(Home(tmp_path), "unreachable")
    recorded(ctx)
    with pytest.raises(UpstreamMissing, match="cannot be reached"):
        tracking.flush(ctx.home, ctx.staging)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_the_login_is_upstream_missing(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status, "log in, please")

        def log_message(self, *words: Any) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    ctx = context(Home(tmp_path), "refused")
    record = recorded(ctx)
    try:
        with pytest.raises(UpstreamMissing, match=f"error code {status}"):
            tracking.flush(ctx.home, ctx.staging)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not (record.folder / tracking.FLUSHED).exists(), "it waits for a login that is let in"


def test_an_unfinished_record_is_not_pushed(home: Home) -> None:
    ctx = context(home, "half")
    write_json(recorded(ctx).folder.parent / "stray.json", {})
    (ctx.staging / "mlflow" / "ingest-1").mkdir()
    assert tracking.flush(home, ctx.staging) == 1
