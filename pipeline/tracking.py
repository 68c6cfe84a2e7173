"""MLflow, and nothing else of sidmill knows it: records of stages, models, aliases, and the way between runs and tables.

A stage's record is first written to the run's staging folder (`record`, needs no MLflow), and pushed later (`flush`), so Spark stages run without MLflow.
    experiment sid/[<namespace>/]<profile>  >  one parent run per DAG or CLI run  >  one child run per try of a stage
Pushing is idempotent: a child is found again by its `record_key`, its parent by `sid.run_id`. Next: `jobs/runner.py` calls all of this.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.context import ROOT, Context, Home, read_json, write_json
from pipeline.errors import ConfigError, ContractError, SidError, UpstreamMissing
from pipeline.stages import BY_NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from torch import Tensor

    from pipeline.stages import ModelBundle, StageResult

logger = logging.getLogger(__name__)

PARAMS_PER_BATCH, METRICS_PER_BATCH, PARAM_LENGTH, TAG_LENGTH = 100, 1000, 6000, 8000
RECORD, FLUSHED, MARK = "record.json", "flushed.json", "named"
TENSORS, CONFIG = "model.safetensors", "config.json"
SERVING_NEEDS = ("mlflow", "numpy", "pyarrow", "pydantic", "safetensors", "torch")
# What its client says of a server that refuses the login or has another in its place, and of one that is down: none of them looked at what we asked.
REFUSED = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND"})
AWAY = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}) | REFUSED
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else a server leaves job workers behind
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command line
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the runner retries as well
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A stage's try as it waits in staging: its key, its stage, how it ended and where its files lie."""

    key: str
    stage: str
    status: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """A child run of MLflow: its id, the experiment's id, the stage and the keys it was recorded under."""

    mlflow_run_id: str
    experiment_id: str
    stage: str
    run_id: str
    record_key: str
    status: str


# ---------------------------------------------------------------------------------------------------------------- buffer


def record_key(ctx: Context) -> str:
    """The name of this try, `<run_id>/<stage>-<attempt>~<mark>`: fit for a snapshot property, known before any MLflow run exists.

    A finished try with the same attempt number (a rerun of the same run) gets `.1`, `.2`, ... so no try overwrites another; the mark tells it from one of the
    same name whose folder has been swept away since.
    """
    slot = _slot(ctx)
    return f"{_quotable(ctx.run_id)}/{slot.name}~{_mark(slot)}"


def record(
    ctx: Context,
    result: StageResult,
    *,
    status: str,
    seconds: float,
    inputs: Mapping[str, int | None],
    outputs: Mapping[str, int],
    error: SidError | None = None,
) -> Record:
    """The try, written to staging with its parameters, numbers, curves and figures; needs no MLflow and no matplotlib.

    Args:
        result: what the job returned; when it failed, what it had found by then.
        status: done | reused | skipped | failed.
        seconds: wall time of the stage.
        inputs: table -> pinned snapshot id, None for a table without rows.
        outputs: table -> snapshot id.
    """
    folder = _slot(ctx)
    ended = time.time()
    document = _header(ctx) | {
        "status": status,
        "started_ms": int((ended - seconds) * 1000),
        "ended_ms": int(ended * 1000),
        "seconds": float(seconds),
        "inputs": {table: _reference(value) for table, value in inputs.items()},
        "outputs": {table: _reference(value) for table, value in outputs.items()},
        "release": str(result.outputs.get("tag") or ""),
        "error": error.fields() if error else {},
        **_numbers(result),
    }
    _stage_artifacts(folder / "artifacts", ctx, result)
    write_json(folder / RECORD, document)  # last: a folder without it is no record
    return Record(key=document["record_key"], stage=ctx.stage, status=status, folder=folder)


@functools.cache
def git_sha() -> str:
    """`SID_GIT_SHA` (images), else the commit of the checkout, else `unknown`."""
    return os.environ["SID_GIT_SHA"] if "SID_GIT_SHA" in os.environ else _git("rev-parse", "HEAD") or "unknown"


def committed_sha() -> str:
    """`git_sha` where it tells all of the code: what is looked at once must be possible to name later.

    Raises: ConfigError when the commit is unknown, or jobs/ and pipeline/ are not as committed.
    """
    expected = "a commit that holds all of jobs/ and pipeline/"
    changed = "" if "SID_GIT_SHA" in os.environ else _git("status", "--porcelain", "--", "jobs", "pipeline")
    if (sha := git_sha()) in ("", "unknown") or changed is None:
        raise ConfigError(
            "the commit is not known", expected=expected, found="no git, no SID_GIT_SHA", where=str(ROOT), next_command="export SID_GIT_SHA=COMMIT"
        )
    if changed:
        raise ConfigError("the code is not as committed", expected=expected, found=changed, where=str(ROOT), next_command="git commit, then the same again")
    return sha


def _git(*arguments: str) -> str | None:
    """What git says of the checkout, None where it cannot say."""
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        return None
    done = subprocess.run([git, "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _slot(ctx: Context) -> Path:
    """The staging folder of this try: the first of its name without a finished record."""
    root = ctx.staging / "mlflow"
    name = f"{ctx.stage}-{ctx.attempt}"
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
    return next(root / each for each in names if not (root / each / RECORD).is_file())


def _mark(slot: Path) -> str:
    """The instant at which a try was first named, which a kill does not change: that of an empty file, for a file's text could be read before it is written."""
    slot.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (slot / MARK).touch(exist_ok=False)
    return f"{(slot / MARK).stat().st_mtime_ns:x}"


def _header(ctx: Context) -> dict[str, Any]:
    """What is known about a try before it has run."""
    run_id = _quotable(ctx.run_id)
    return {
        "experiment": _experiments(ctx.home) + ctx.config.name,
        "run_id": run_id,
        "stage": ctx.stage,
        "group": BY_NAME[ctx.stage].group if ctx.stage in BY_NAME else ctx.stage,
        "attempt": ctx.attempt,
        "attempt_key": f"{run_id}/{ctx.stage}",
        "record_key": record_key(ctx),
        "logical_date": ctx.logical_date.isoformat(),
        "reason": ctx.reason,
        "git_sha": git_sha(),
        "config_hash": ctx.config.digest(),
        "config": ctx.config.model_dump(mode="json"),
        "params": ctx.config.flat(),
        "started_ms": int(time.time() * 1000),
    }


def _numbers(result: StageResult) -> dict[str, Any]:
    return {
        "metrics": {name: float(value) for name, value in result.metrics.items()},
        "curves": {name: [float(value) for value in values] for name, values in result.curves.items()},
        "figures": {name: {"kind": figure.kind, "data": _plain(figure.data)} for name, figure in result.figures.items()},
    }


def _stage_artifacts(folder: Path, ctx: Context, result: StageResult) -> None:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, ctx.config.model_dump(mode="json"))
    write_json(folder / "outputs.json", _plain(result.outputs))
    for name, figure in result.figures.items():
        write_json(folder / "figures" / f"{_filename(name)}.json", {"kind": figure.kind, "data": _plain(figure.data)})


def _plain(value: Any) -> Any:
    """The value with NumPy scalars and arrays turned into JSON's own types."""
    return json.loads(json.dumps(value, default=lambda each: each.tolist() if hasattr(each, "tolist") else str(each)))


def _reference(snapshot_id: int | None) -> str:
    """A snapshot as a tag's text, `none` for a table without rows."""
    return "none" if snapshot_id is None else str(snapshot_id)


def _filename(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _quotable(text: str) -> str:
    """The text without the characters that an MLflow filter string cannot hold."""
    return re.sub(r"['\"`\\]", "_", text)


# ------------------------------------------------------------------------------------------------------------------ push


def flush(home: Home, staging: Path) -> int:
    """Number of buffered records of a run pushed to MLflow just now; 0 when there is nothing to do.

    Args:
        staging: the run's staging folder (`ctx.staging`).
    Raises: UpstreamMissing if MLflow cannot be reached; the records stay buffered.
    """
    pending = [folder for folder in _records(staging) if not (folder / FLUSHED).is_file()]
    if not pending:
        return 0
    with _session(home) as client:
        for folder in pending:
            _push(client, home, folder, read_json(folder / RECORD))
    logger.info("flushed records=%d mlflow=%s", len(pending), home.tracking_uri)
    return len(pending)


def reach(home: Home) -> None:
    """Ask MLflow whether it is there.

    Raises: UpstreamMissing if it cannot be reached.
    """
    with _session(home, locked=False) as client:
        client.search_experiments(max_results=1)


def _records(staging: Path) -> list[Path]:
    """Folders of finished records, in the order in which they ended."""
    folders = [path.parent for path in (staging / "mlflow").glob(f"*/{RECORD}")]
    return sorted(folders, key=lambda folder: (read_json(folder / RECORD)["ended_ms"], folder.name))


def _push(client: MlflowClient, home: Home, folder: Path, document: dict[str, Any]) -> None:
    """Make MLflow show the record; doing it again changes nothing."""
    experiment = _experiment(client, home, document["experiment"])
    parent = _parent(client, experiment, document)
    child = _child(client, experiment, parent, document)
    stage = document["stage"]
    _log_params(client, child, {key: value for key, value in document["params"].items() if key.startswith(f"{stage}.") or key == "seed"})
    _log_metrics(client, child, document["metrics"] | {"seconds": document["seconds"]}, document["curves"], document["ended_ms"])
    _log_metrics(client, parent, {f"seconds/{stage}": document["seconds"]}, {}, document["ended_ms"])
    _log_inputs(client, child, document["inputs"])
    undrawn = _draw(folder / "artifacts" / "figures", document)
    client.log_artifacts(child, str(folder / "artifacts"))
    client.set_terminated(child, "FAILED" if document["status"] == "failed" else "FINISHED", end_time=document["ended_ms"])
    _log_tags(client, child, _result_tags(document) | ({"undrawn_figures": undrawn} if undrawn else {}) | {"sid.flushed": "true"})
    _supersede(client, experiment, document["attempt_key"])
    _settle_parent(client, experiment, parent, document)
    write_json(folder / FLUSHED, {"mlflow_run_id": child, "parent_run_id": parent})


def _experiment(client: MlflowClient, home: Home, name: str) -> str:
    """Id of the experiment, made on first use; with a SQLite store its artifacts lie in the home folder."""
    found = client.get_experiment_by_name(name)
    if found is None:
        place = (home.folder("mlartifacts") / _filename(name)).as_uri() if home.tracking_uri.startswith("sqlite:") else None
        return str(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _parent(client: MlflowClient, experiment: str, document: dict[str, Any]) -> str:
    """MLflow id of the run's parent, made once, holding the whole configuration."""
    found = _search(client, [experiment], {"sid.run_id": document["run_id"], "sid.kind": "run"})
    if found and "sid.configured" in found[0].data.tags:
        return str(found[0].info.run_id)
    tags = {"sid.kind": "run"} | _common_tags(document)
    name = f"{document['logical_date']} {document['group']}"  # the interface cuts names short; the run's identity is a tag
    run_id = found[0].info.run_id if found else client.create_run(experiment, document["started_ms"], tags, name).info.run_id
    _log_params(client, run_id, document["params"])
    client.log_dict(run_id, document["config"], CONFIG)
    client.set_tag(run_id, "sid.configured", "true")
    return str(run_id)


def _child(client: MlflowClient, experiment: str, parent: str, document: dict[str, Any]) -> str:
    """MLflow id of the try's run: the one its model was logged to, if any, else a new one."""
    found = _search(client, [experiment], {"record_key": document["record_key"], "sid.kind": "stage"})
    if found:
        return str(found[0].info.run_id)
    keys = {"attempt_key", "record_key", "stage", "attempt"}
    tags = {"sid.kind": "stage", "mlflow.parentRunId": parent} | _common_tags(document) | {key: str(document[key]) for key in keys}
    return str(client.create_run(experiment, document["started_ms"], tags, document["stage"]).info.run_id)


def _common_tags(document: dict[str, Any]) -> dict[str, str]:
    return {"sid.run_id": document["run_id"]} | {key: str(document[key]) for key in ("logical_date", "git_sha", "config_hash", "reason")}


def _result_tags(document: dict[str, Any]) -> dict[str, str]:
    """Tags known when the stage has ended: status, error, and the tables with their snapshots."""
    tags = {"status": document["status"]}
    tags |= {f"input:{table}": text for table, text in document["inputs"].items()}
    tags |= {f"output:{table}": text for table, text in document["outputs"].items()}
    tags |= {f"error_{name}": text for name, text in document["error"].items() if text}
    return tags | _release_tag(document)


def _release_tag(document: dict[str, Any]) -> dict[str, str]:
    return {"release": document["release"]} if document["release"] else {}


def _supersede(client: MlflowClient, experiment: str, attempt_key: str) -> None:
    """Mark every earlier try of the stage that did not finish; end those that still look alive."""
    *earlier, _ = sorted(_search(client, [experiment], {"attempt_key": attempt_key}), key=lambda run: (run.info.start_time, run.data.tags["record_key"]))
    for run in earlier:
        if run.info.status == "FINISHED" and "sid.flushed" in run.data.tags:
            continue
        if run.info.status in ("RUNNING", "SCHEDULED"):
            client.set_terminated(run.info.run_id, "KILLED")
        client.set_tag(run.info.run_id, "superseded", "true")


def _settle_parent(client: MlflowClient, experiment: str, parent: str, document: dict[str, Any]) -> None:
    """End the parent as its stages stand now, so that no parent is left looking alive."""
    children = _search(client, [experiment], {"sid.run_id": document["run_id"], "sid.kind": "stage", "sid.flushed": "true"})
    latest = {run.data.tags["stage"]: run for run in sorted(children, key=lambda run: run.info.start_time)}
    failed = any(run.info.status != "FINISHED" for run in latest.values())
    client.set_terminated(parent, "FAILED" if failed else "FINISHED", end_time=max(run.info.end_time for run in children))
    _log_tags(client, parent, _release_tag(document))


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
    for batch in _batches([Param(key, text[:PARAM_LENGTH]) for key, text in texts.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, params=batch)


def _log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float], curves: Mapping[str, Sequence[float]], timestamp_ms: int) -> None:
    """Log numbers and per-step series; the fixed timestamp makes a second push a repetition, not a new point."""
    from mlflow.entities import Metric

    points = [Metric(_metric_name(name), value, timestamp_ms, 0) for name, value in metrics.items()]
    points += [Metric(_metric_name(name), value, timestamp_ms, step) for name, values in curves.items() for step, value in enumerate(values)]
    for batch in _batches(points, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w.\- :/]", "_", name)


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for batch in _batches([RunTag(key, text[:TAG_LENGTH]) for key, text in tags.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=batch)


def _log_inputs(client: MlflowClient, run_id: str, inputs: Mapping[str, str]) -> None:
    """Show each pinned table as an MLflow data set whose digest is its snapshot id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    pinned = {table: snapshot for table, snapshot in inputs.items() if snapshot != "none"}
    sources = {table: json.dumps({"table": table, "snapshot_id": snapshot}) for table, snapshot in pinned.items()}
    datasets = [
        DatasetInput(Dataset(name=table, digest=snapshot[:36], source_type="iceberg", source=sources[table]), tags=[InputTag("mlflow.data.context", "input")])
        for table, snapshot in pinned.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets=datasets)


def _draw(folder: Path, document: dict[str, Any]) -> str:
    """Draw the record's figures as PNG beside their numbers; returns what could not be drawn and why."""
    if not document["figures"]:
        return ""
    from pipeline import report

    footer = f"{document['logical_date']}, {document['run_id']}"
    undrawn = []
    for name, figure in document["figures"].items():
        try:
            report.draw(figure["kind"], figure["data"], footer=footer).savefig(folder / f"{_filename(name)}.png", dpi=120)
        except (ValueError, TypeError, KeyError) as error:  # bad numbers must not hold back a release: the JSON is kept, the run says so
            logger.warning("figure not drawn name=%s kind=%s reason=%s", name, figure["kind"], error)
            undrawn.append(f"{name}: {error}")
    return "; ".join(undrawn)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --------------------------------------------------------------------------------------------------------------- studies


def log_study(home: Home, name: str, config_hash: str, page: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """MLflow id of the study's run, one per name and configuration, with one child per cell; a cell that is there already is not logged again.

    Args:
        page: the study's page, kept as a file of the run.
        cells: documents of finished cells: name, key, kind, commit, config, data_digest, command, seconds, metrics, and curves where there are any.
    Raises: UpstreamMissing if MLflow cannot be reached.
    """
    if not cells:
        return ""
    with _session(home) as client:
        experiment = _experiment(client, home, f"{_experiments(home)}study-{name}")
        found = _search(client, [experiment], {"sid.kind": "study", "config_hash": config_hash})
        tags = {"sid.kind": "study", "config_hash": config_hash, "git_sha": git_sha()}
        parent = str((found[0] if found else client.create_run(experiment, None, tags, f"{name} {config_hash}")).info.run_id)
        if not found:
            client.log_dict(parent, dict(page), "page.json")
        known = {run.data.tags["study.cell"] for run in _search(client, [experiment], {"sid.kind": "cell", "mlflow.parentRunId": parent})}
        for cell in cells:
            if cell["key"] not in known:
                _log_cell(client, experiment, parent, cell)
        client.set_terminated(parent, "FINISHED")
    return parent


def _log_cell(client: MlflowClient, experiment: str, parent: str, cell: Mapping[str, Any]) -> None:
    """A child run that is finished: its numbers, its curves and where they come from."""
    texts = {name: str(cell[name]) for name in ("kind", "commit", "config", "data_digest", "command")}
    tags = {"sid.kind": "cell", "study.cell": cell["key"], "mlflow.parentRunId": parent, **texts}
    run_id = client.create_run(experiment, None, tags, cell["name"]).info.run_id
    ranked = {f"{stratum}/{metric}": value for stratum, row in cell.get("table", {}).items() if isinstance(row, Mapping) for metric, value in row.items()}
    values = {**cell.get("metrics", {}), **ranked, "seconds": cell["seconds"]}
    metrics = {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
    _log_metrics(
        client, run_id, metrics, {name: [x for x in curve if x is not None] for name, curve in cell.get("curves", {}).items()}, int(time.time() * 1000)
    )
    client.set_terminated(run_id, "FINISHED")


# ---------------------------------------------------------------------------------------------------------------- models


def log_model(ctx: Context, bundle: ModelBundle) -> str:
    """Durable address `models:/<name>/<version>` of the model, logged to this try's own run: safetensors + JSON, nothing pickled.

    Raises: UpstreamMissing if MLflow cannot be reached.
    """
    header = _header(ctx)
    with _session(ctx.home) as client:
        experiment = _experiment(client, ctx.home, header["experiment"])
        child = _child(client, experiment, _parent(client, experiment, header), header)
        _supersede(client, experiment, header["attempt_key"])
        model_id, model_uri = _log_pyfunc(child, bundle)
        client.set_terminated(child, "KILLED")  # until flush tells how the stage ended: never a run that looks alive
        name = f"{ctx.home.namespace}.{bundle.name}".removeprefix(".")
        version = _register(client, name, bundle, header, run_id=child, model_id=model_id, model_uri=model_uri)
    uri = f"models:/{name}/{version}"
    logger.info("logged model=%s run=%s", uri, child)
    return uri


def save_bundle(folder: Path, bundle: ModelBundle) -> Path:
    """The folder, now holding model.safetensors and config.json."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.as_tensor(tensor).detach().cpu().contiguous().clone() for name, tensor in bundle.tensors.items()}
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(_plain(dict(bundle.config)), indent=1), encoding="utf-8")  # keys stay in the model's order
    return folder


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a folder that `save_bundle` wrote, or a copy of one; nothing is unpickled."""
    from safetensors.torch import load_file

    return json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / TENSORS)


def download(home: Home, uri: str) -> Path:
    """Local folder holding model.safetensors + config.json; models in a local store are not copied.

    Args:
        uri: `models:/<name>/<version>`, `models:/<name>@<alias>`, `runs:/...`, or a local folder.
    Raises: UpstreamMissing if MLflow or the model is not there; ContractError if it does not hold the two files.
    """
    if ":" not in uri:
        return _model_folder(Path(uri), uri)
    with _session(home, locked=False) as client:
        location = _artifact_uri(client, uri)
        address = urllib.parse.urlparse(location)
        if address.scheme == "file":
            return _model_folder(Path(urllib.request.url2pathname(address.path)), uri)
        return _model_folder(_fetch(home, location), uri)


def set_alias(home: Home, name: str, version: str, alias: str) -> None:
    """Point the alias of a registered model at a version (`3` or `models:/<name>/3`).

    Raises: UpstreamMissing if MLflow cannot be reached or the version is not there (any more).
    """
    number = version.rsplit("/", 1)[-1]
    with _session(home) as client, _found(f"models:/{name}/{number}"):
        client.set_registered_model_alias(name, alias, number)


def alias_target(home: Home, name: str, alias: str) -> str:
    """Address of the version that the alias points at; empty when there is none."""
    with _session(home, locked=False) as client:
        found = client.search_registered_models(f"name = '{_quotable(name)}'")
        version = found[0].aliases.get(alias) if found else None
    return f"models:/{name}/{version}" if version else ""


def _log_pyfunc(run_id: str, bundle: ModelBundle) -> tuple[str, str]:
    """(model id, model address) of the bundle logged as models-from-code."""
    import mlflow
    from mlflow.models import infer_signature

    with tempfile.TemporaryDirectory() as scratch, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice about type hints and input examples: the signature is explicit
        info = mlflow.pyfunc.log_model(
            name=bundle.name,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"model": str(save_bundle(Path(scratch) / "model", bundle))},
            code_paths=[str(_package_copy(Path(scratch)))],
            signature=infer_signature(dict(bundle.example_input), dict(bundle.example_output)),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in SERVING_NEEDS],
        )
    return str(info.model_id), str(info.model_uri)


def _package_copy(scratch: Path) -> Path:
    """The modules a served model needs, copied, so that it loads where sidmill is not installed."""
    skip = shutil.ignore_patterns("__pycache__", "templates", "profiles", "studies", "datasets", "serving.py")
    return Path(shutil.copytree(Path(__file__).parent, scratch / "pipeline", ignore=skip))


def _register(client: MlflowClient, name: str, bundle: ModelBundle, header: dict[str, Any], *, run_id: str, model_id: str, model_uri: str) -> str:
    """Version number of the model in the registry, tagged with what it belongs to."""
    if not client.search_registered_models(f"name = '{_quotable(name)}'"):
        client.create_registered_model(name)
    tags = {key: str(bundle.config[key]) for key in ("generation", "codebook_digest") if key in bundle.config}
    tags |= {key: header[key] for key in ("logical_date", "config_hash", "git_sha", "record_key")}
    version = client.create_model_version(name, source=model_uri, run_id=run_id, model_id=model_id, tags=tags)
    return str(version.version)


def _artifact_uri(client: MlflowClient, uri: str) -> str:
    """Where the files of a `models:/` or `runs:/` address lie."""
    with _found(uri):
        if uri.startswith("models:/"):
            name, _, alias = uri.removeprefix("models:/").partition("@")
            name, _, version = name.partition("/")
            number = version or client.get_model_version_by_alias(name, alias).version
            return str(client.get_model_version_download_uri(name, str(number)))
        if uri.startswith("runs:/"):
            run_id, _, path = uri.removeprefix("runs:/").partition("/")
            return f"{client.get_run(run_id).info.artifact_uri}/{path}"
    return uri


@contextmanager
def _found(uri: str) -> Iterator[None]:
    """Say UpstreamMissing where MLflow says that the address names nothing."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UpstreamMissing(f"no model at {uri}", expected="a registered version", found=error.message, where=uri, next_command="sid releases") from error


def _fetch(home: Home, location: str) -> Path:
    """Folder with a remote model's files, fetched once per home; its time is that of its last use, by which `sid maintain` finds what nobody reads."""
    import mlflow

    target = home.folder("models") / hashlib.sha256(location.encode()).hexdigest()[:16]
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=home.folder("models")) as scratch:
            fetched = Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=scratch))
            try:
                fetched.rename(target)
            except OSError:  # another process was first: its copy is the same
                if not target.is_dir():
                    raise
    os.utime(target)
    return target


def _model_folder(root: Path, uri: str) -> Path:
    found = sorted(path.parent for path in root.rglob(TENSORS) if (path.parent / CONFIG).is_file())
    if not found:
        raise ContractError("the model's files are not there", expected=f"{TENSORS} and {CONFIG}", found=f"neither under {root}", where=uri)
    return found[0]


# --------------------------------------------------------------------------------------------------------------- lineage


def run_of_record(home: Home, key: str) -> RunRef | None:
    """The run of a try, by the record key that its snapshots carry (or the latest of an attempt key); None if it was not flushed here."""
    with _session(home, locked=False) as client:
        experiments = _own_experiments(client, home)
        runs = _search(client, experiments, {"record_key": key}) or _search(client, experiments, {"attempt_key": key})
    return _run_ref(max(runs, key=lambda run: run.info.start_time)) if runs else None


def tables_of_run(home: Home, mlflow_run_id: str) -> dict[str, dict[str, str]]:
    """{"inputs": table -> snapshot, "outputs": table -> snapshot} of a child run, from its tags."""
    with _session(home, locked=False) as client:
        tags = client.get_run(mlflow_run_id).data.tags
    return {f"{side}s": {key.split(":", 1)[1]: text for key, text in tags.items() if key.startswith(f"{side}:")} for side in ("input", "output")}


def runs_of(home: Home, run_id: str) -> list[RunRef]:
    """The child runs of one DAG or CLI run, in the order in which they started."""
    with _session(home, locked=False) as client:
        runs = _search(client, _own_experiments(client, home), {"sid.run_id": _quotable(run_id), "sid.kind": "stage"})
    return [_run_ref(run) for run in sorted(runs, key=lambda run: run.info.start_time)]


def _run_ref(run: Run) -> RunRef:
    tags = run.data.tags
    return RunRef(
        mlflow_run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        stage=tags.get("stage", ""),
        run_id=tags.get("sid.run_id", ""),
        record_key=tags.get("record_key", ""),
        status=run.info.status,
    )


# ---------------------------------------------------------------------------------------------------------------- client


def _search(client: MlflowClient, experiments: list[str], tags: Mapping[str, str]) -> list[Run]:
    """All runs that carry the tags."""
    from mlflow.entities import ViewType

    clauses = " and ".join(f"tags.`{key}` = '{_quotable(value)}'" for key, value in tags.items())
    found: list[Run] = []
    token = None
    while experiments:
        page = client.search_runs(experiments, clauses, ViewType.ACTIVE_ONLY, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return found


def _experiments(home: Home) -> str:
    """What the names of this lake's experiments begin with."""
    return f"sid/{home.namespace}/" if home.namespace else "sid/"


def _own_experiments(client: MlflowClient, home: Home) -> list[str]:
    begin = _experiments(home)
    found = client.search_experiments(filter_string=f"name LIKE '{begin}%'")
    return [each.experiment_id for each in found if each.name.startswith(begin)]  # to LIKE an underscore is any character


@contextmanager
def _session(home: Home, *, locked: bool = True) -> Iterator[MlflowClient]:
    """A client of the home's MLflow; writers hold the home's lock, so two processes cannot both make the parent.

    Raises: UpstreamMissing if MLflow cannot be reached.
    """
    _preflight(home.tracking_uri)
    mlflow = _mlflow()
    import sqlalchemy.exc
    from filelock import FileLock
    from requests.exceptions import RequestException

    try:
        with FileLock(home.folder("locks") / "mlflow.lock") if locked else nullcontext(), _global_address(mlflow, home.tracking_uri):
            yield mlflow.MlflowClient(home.tracking_uri)
    except (sqlalchemy.exc.OperationalError, RequestException) as error:
        raise _unreachable(home.tracking_uri, str(error)) from error
    except mlflow.exceptions.MlflowException as error:
        if error.error_code not in AWAY:
            raise
        raise _unreachable(home.tracking_uri, str(error)) from error


@functools.cache
def _mlflow() -> Any:
    """The library, imported with its environment set and its own import warnings silenced."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.pyfunc
    return mlflow


def _preflight(uri: str) -> None:
    """Fail at once on a SQLite file that cannot be opened; MLflow would try for minutes."""
    if not uri.startswith("sqlite:///"):
        return
    try:
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(uri.removeprefix("sqlite:///"))
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise _unreachable(uri, str(error)) from error


def _unreachable(uri: str, found: str) -> UpstreamMissing:
    """The error to raise when MLflow does not answer."""
    return UpstreamMissing("MLflow cannot be reached", expected="an answering tracking store", found=found[:500], where=uri, next_command="sid repair")


@contextmanager
def _global_address(mlflow: Any, uri: str) -> Iterator[None]:
    """Point MLflow's global functions at the store, and leave its environment variable as it was: `Home` reads it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
