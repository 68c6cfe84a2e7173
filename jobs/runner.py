"""Runs one stage: pins snapshots, calls the job, cuts branches, gates, publishes, tracks, and says how it ended.

The same for every launcher. A job computes; only this module has side effects on the lake and on MLflow
(publish_release alone moves its held branch itself, because the tag is its result).

The steps a kill may fall between are named (`step`); SID_KILL_AT=<stage>:<step> kills the process there, for tests.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs import derived, lineage
from jobs.inputs import Inputs
from pipeline import lakehouse, quality, tracking
from pipeline import spark as spark_gate
from pipeline.context import Context, write_json
from pipeline.errors import ContractError, PublishConflict, SidError, UpstreamMissing
from pipeline.stages import BY_NAME, Stage, StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)
TRIES = 3  # publishing may meet another publisher; more than this means something else is wrong


@dataclass
class Ledger:
    """What one run of a stage did to the lake, for the outcome file and MLflow."""

    published: dict[str, int] = field(default_factory=dict)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def run_stage(ctx: Context) -> dict[str, Any]:
    """The stage's outcome document, which is also written to staging/<run>/<stage>.json.

    Keys: stage, status (done | reused | skipped | failed), seconds, outputs, metrics, read and snapshots (table -> snapshot read, written), error.
    Raises: the SidError that stopped the stage, after it was written down.
    """
    stage = BY_NAME[ctx.stage]
    path = ctx.staging / f"{stage.name}.json"
    path.unlink(missing_ok=True)  # a killed try must not look like an old success
    started = time.monotonic()
    logger.info("stage start name=%s date=%s run=%s attempt=%d", stage.name, ctx.logical_date, ctx.run_id, ctx.attempt)
    snapshots: dict[str, int | None] = {}
    try:
        _require_lake(stage, ctx)
        snapshots = {table: lakehouse.current_snapshot(ctx.home, ctx.config.lake, table) for table in stage.inputs}
        result, ledger = _reused(stage, ctx) or _with_retries(stage, ctx, snapshots)
    except SidError as error:
        outcome = _outcome(stage, "failed", started, StageResult(), Ledger(), snapshots) | {"error": error.fields(), "retry": error.retry}
        write_json(path, outcome)
        _track(stage, ctx, None, "failed", outcome, error)
        raise
    if stage.name in ("publish_release", "rollback"):
        step(ctx, "before_alias")
        derived.align(ctx.home, ctx.config)
    outcome = _outcome(stage, result.status, started, result, ledger, snapshots)
    if os.environ.get("RANK", "0") != "0":
        return outcome  # under torchrun the first process speaks for all
    write_json(path, outcome)
    _remember(stage, ctx, outcome)
    _track(stage, ctx, result, result.status, outcome, None)
    logger.info("stage end name=%s status=%s seconds=%.1f", stage.name, result.status, outcome["seconds"])
    return outcome


def step(ctx: Context, name: str) -> None:
    """A named point between two effects; the place where a test may kill the process."""
    if os.environ.get("SID_KILL_AT") == f"{ctx.stage}:{name}":
        os.kill(os.getpid(), signal.SIGKILL)


def _with_retries(stage: Stage, ctx: Context, snapshots: dict[str, int | None]) -> tuple[StageResult, Ledger]:
    """The job and its writes; when main moved meanwhile everything is computed again from the new state."""
    for attempt in range(1, TRIES + 1):
        try:
            return _once(stage, ctx, snapshots)
        except PublishConflict:
            if attempt == TRIES:
                raise
            logger.warning("main moved, running again stage=%s attempt=%d", stage.name, attempt)
            snapshots.update({table: lakehouse.current_snapshot(ctx.home, ctx.config.lake, table) for table in stage.inputs})
    raise AssertionError("unreachable")


def _once(stage: Stage, ctx: Context, snapshots: Mapping[str, int | None]) -> tuple[StageResult, Ledger]:
    spark = _session(ctx) if stage.engine == "spark" else None
    if stage.name == "publish_release":
        tracking.flush(ctx.home, ctx.staging)  # a release without its runs in MLflow could not be traced back
    inputs = Inputs(ctx.home, ctx.config.lake, dict(snapshots), spark)
    job: Callable[..., StageResult] = importlib.import_module(f"jobs.{stage.name}").run
    step(ctx, "before_job")
    with _torch_threads(stage, ctx):
        result = job(inputs, getattr(ctx.config, stage.section), ctx)
    try:
        return _effects(stage, ctx, spark, result, snapshots)
    finally:
        if spark is not None:
            spark.catalog.clearCache()  # one session serves all stages of an inline run; what a job kept in memory goes with it


@contextmanager
def _torch_threads(stage: Stage, ctx: Context) -> Iterator[None]:
    """Torch stages compute with the profile's number of threads, whatever the machine has."""
    if stage.engine != "torch":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(ctx.config.launch.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _effects(stage: Stage, ctx: Context, spark: SparkSession | None, result: StageResult, snapshots: Mapping[str, int | None]) -> tuple[StageResult, Ledger]:
    """The job's writes published and its model logged."""
    ledger = Ledger()
    if result.writes:
        assert spark is not None, "only Spark stages write tables"
        _check_declared(stage, result.writes)
        with lakehouse.table_locks(ctx.home, ctx.config.lake, [write.table for write in result.writes]):
            _write_all(spark, ctx, result.writes, snapshots, ledger)
    if result.model is not None:
        uri = tracking.log_model(ctx, result.model)
        step(ctx, "after_model")
        result = StageResult(**{**vars(result), "outputs": {**result.outputs, "model_uri": uri}})
    return result, ledger


def _write_all(spark: SparkSession, ctx: Context, writes: tuple[Write, ...], snapshots: Mapping[str, int | None], ledger: Ledger) -> None:
    """Audit every branch first, then publish in the declared order, the marker table last."""
    step(ctx, "before_write")
    for write in writes:
        _write_and_audit(spark, ctx, write, snapshots, ledger)
    step(ctx, "after_audit")
    for number, write in enumerate(writes):
        if write.hold:
            ledger.held[write.table] = {"branch": ctx.branch, "snapshot_id": lakehouse.snapshot(spark, write.table, ctx.branch)}
            continue
        ledger.published[write.table] = lakehouse.publish(spark, write.table, ctx.branch)
        step(ctx, f"after_publish_{number + 1}")


def _write_and_audit(spark: SparkSession, ctx: Context, write: Write, snapshots: Mapping[str, int | None], ledger: Ledger) -> None:
    frame = lakehouse.check_columns(write.frame, spark, write.table)
    base = lakehouse.cut_branch(spark, write.table, ctx.branch)
    if not write.dates and write.table in snapshots and base != snapshots[write.table]:
        # Appends and whole tables were computed from the pinned rows; from newer rows they would come out differently.
        raise PublishConflict(f"main of {write.table} moved since the stage began", expected=str(snapshots[write.table]), found=str(base), where=write.table)
    properties = _properties(ctx)
    if write.whole:
        lakehouse.replace_all(spark, frame, write.table, ctx.branch, properties)
    elif write.dates:
        lakehouse.replace(spark, frame, write.table, ctx.branch, dates=write.dates, equal=write.slice, properties=properties)
    else:
        lakehouse.append(spark, frame, write.table, ctx.branch, properties)
    step(ctx, "after_write")
    added = lakehouse.read_branch(spark, write.table, ctx.branch) if write.dates or write.whole else lakehouse.read_added(spark, write.table, ctx.branch, base)
    audit = quality.audit(
        added, write.table, dates=write.dates, equal=write.slice, known=write.metrics, config=ctx.config, branch=ctx.branch, reason=ctx.reason
    )
    ledger.metrics.update({f"{write.table}/{name}": value for name, value in audit.metrics.items()})


def _check_declared(stage: Stage, writes: tuple[Write, ...]) -> None:
    unknown = [write.table for write in writes if write.table not in stage.outputs]
    if unknown:
        raise ContractError(
            f"stage {stage.name} writes tables it did not declare", expected=", ".join(stage.outputs), found=", ".join(unknown), where="pipeline/stages.py"
        )


def _reused(stage: Stage, ctx: Context) -> tuple[StageResult, Ledger] | None:
    """The outcome of a stage of a night that is published already from the same inputs: nothing to do."""
    if stage.group != "refresh" or stage.name == "plan_night":
        return None
    plan = ctx.plan()
    if plan.logical_date != ctx.logical_date:
        raise ContractError(
            "the run's manifest belongs to another date",
            expected=str(ctx.logical_date),
            found=str(plan.logical_date),
            where=str(ctx.staging),
            next_command="sid run plan_night --date D",
        )
    return (StageResult(status="reused", outputs={"tag": plan.reuse}), Ledger()) if plan.reuse else None


def _require_lake(stage: Stage, ctx: Context) -> None:
    """Make the tables of a lake that is not there yet, and migrate those that are behind; costs a session only then."""
    if not all(lakehouse.is_ready(ctx.home, ctx.config.lake, table) for table in {*stage.inputs, *stage.outputs}):
        lakehouse.create_tables(_session(ctx))


def _session(ctx: Context) -> SparkSession:
    return spark_gate.session(ctx.home, ctx.config.lake, ctx.config.launch)


def _properties(ctx: Context) -> dict[str, str]:
    """What every snapshot says of its origin: rows themselves carry no run and no clock."""
    return {
        "sid.stage": ctx.stage,
        "sid.run_id": ctx.run_id,
        "sid.record_key": tracking.record_key(ctx),
        "sid.git_sha": tracking.git_sha(),
        "sid.config_hash": ctx.config.digest(),
        "sid.reason": ctx.reason,
    }


def _outcome(stage: Stage, status: str, started: float, result: StageResult, ledger: Ledger, read: Mapping[str, int | None]) -> dict[str, Any]:
    outputs = dict(result.outputs)
    if ledger.held:
        outputs["held"] = ledger.held
    return {
        "stage": stage.name,
        "status": status,
        "seconds": round(time.monotonic() - started, 3),
        "outputs": outputs,
        "metrics": {**{name: float(value) for name, value in result.metrics.items()}, **ledger.metrics},
        "read": dict(read),
        "snapshots": ledger.published,
        "figures": {name: {"kind": figure.kind, "data": figure.data} for name, figure in result.figures.items()},
    }


def _remember(stage: Stage, ctx: Context, outcome: Mapping[str, Any]) -> None:
    """Keep what a release's own run found under reports/<tag>/; a later run that reuses the release must not blank its report."""
    tag = ctx.param("release") if stage.group == "consumers" else ctx.plan().tag if stage.group == "refresh" else ""
    if tag and outcome["status"] != "reused":
        folder = ctx.home.folder("reports") / tag
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{stage.name}.json", outcome)


def _track(stage: Stage, ctx: Context, result: StageResult | None, status: str, outcome: Mapping[str, Any], error: SidError | None) -> None:
    """Buffer the record, then try to hand it to MLflow; a Spark stage does not depend on MLflow being there."""
    full = None if result is None else StageResult(**{**vars(result), "metrics": outcome["metrics"]})
    tracking.record(ctx, full, status=status, seconds=outcome["seconds"], inputs=outcome["read"], outputs=lineage.written(outcome), error=error)
    try:
        tracking.flush(ctx.home, ctx.staging)
    except UpstreamMissing as unreachable:
        logger.warning("metrics stay in staging until MLflow answers: %s", unreachable.headline)
