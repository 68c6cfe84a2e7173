"""Runs one stage: pins snapshots, calls the job, cuts branches, gates, publishes, tracks, and says how it ended.

The same for every launcher. A job computes (`run`) and may say beforehand that the night has no work for it (`idle`, asked before there is a session,
returns the stage's result or None); only this module has side effects on the lake and on MLflow
(publish_release alone moves its held branch itself, because the tag is its result).

The steps a kill may fall between are named (`step`); SID_KILL_AT=<stage>:<step> kills the process there, for tests.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jobs import derived, lineage
from jobs.inputs import Inputs
from pipeline import lakehouse, quality, tracking
from pipeline import spark as spark_gate
from pipeline.context import Context, write_json
from pipeline.errors import ContractError, GateFailed, PublishConflict, ResourceLost, SidError, UpstreamMissing, unforeseen
from pipeline.redact import scrub
from pipeline.stages import BY_NAME, Stage, StageResult, Write, group

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)
TRIES = 3  # publishing may meet another publisher; more than this means something else is wrong


@dataclass
class Ledger:
    """What one run of a stage found and did to the lake, for the outcome file and MLflow; of a failed one as far as it came."""

    found: StageResult = field(default_factory=StageResult)
    published: dict[str, int] = field(default_factory=dict)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def run_stage(ctx: Context) -> dict[str, Any]:
    """The stage's outcome document, which is also written to staging/<run>/<stage>.json.

    Keys: stage, status (done | reused | skipped | failed), seconds, outputs, metrics, read and snapshots (table -> snapshot read, written), error.
    Raises: the SidError that stopped the stage, after it was written down; StageFailed or ResourceLost for any other exception.
    """
    stage = BY_NAME[ctx.stage]
    path = ctx.staging / f"{stage.name}.json"
    if _speaks():
        path.unlink(missing_ok=True)  # a killed try must not look like an old success
    started = time.monotonic()
    logger.info("stage start name=%s date=%s run=%s attempt=%d", stage.name, ctx.logical_date, ctx.run_id, ctx.attempt)
    snapshots: dict[str, int | None] = {}
    ledger = Ledger()
    try:
        planned = ctx.fingerprint()
        if not _lake_ready(stage, ctx):  # costs a session only then
            _make_ready(stage, ctx)
        snapshots = _pinned(stage, ctx)
        result = _settled(stage, ctx, snapshots) or _with_retries(stage, ctx, snapshots, ledger)
    except SidError as error:
        _failed(stage, ctx, started, ledger, snapshots, error)
        raise
    except Exception as error:  # the one place where a foreign exception becomes one of ours: it must be written down whatever it is
        logger.error("stage ended by an exception name=%s\n%s", stage.name, "".join(traceback.format_exception(error)))  # as text: a log line is scrubbed
        known = unforeseen(error, where=stage.name, next_command=f"sid run {stage.name} --date D")
        _failed(stage, ctx, started, ledger, snapshots, known)
        raise known from error
    outcome = _outcome(stage, result.status, started, result, ledger, snapshots) | {"branch": ctx.branch}
    if stage.group == "refresh" and stage.name != "plan_night":
        outcome["plan"] = planned  # an outcome serves only the plan it was made under
    if not _speaks():
        return outcome
    write_json(path, outcome)
    if stage.name in ("publish_release", "rollback"):
        _align(ctx)
    _remember(stage, ctx, outcome)
    _track(ctx, result, result.status, outcome, None)
    logger.info("stage end name=%s status=%s seconds=%.1f", stage.name, result.status, outcome["seconds"])
    return outcome


def _speaks() -> bool:
    """Whether this process writes documents: under torchrun the first one speaks for all, and the others can often say only that it left them."""
    return os.environ.get("RANK", "0") == "0"


def _align(ctx: Context) -> None:
    """Bring the alias in line. Not being able to is no failure: sid.release is written, and whoever reads it reads the new state."""
    step(ctx, "before_alias")
    try:
        derived.align(ctx.home, ctx.config)
    except (ResourceLost, UpstreamMissing) as unreachable:
        logger.warning("the change of sid.release took effect; the model's alias does not follow yet, type `sid repair`: %s", unreachable.headline)


def _failed(stage: Stage, ctx: Context, started: float, ledger: Ledger, snapshots: Mapping[str, int | None], error: SidError) -> None:
    """Write down how far the stage came and what stopped it, with the next command completed; where another try may help and nothing else is named, that."""
    again = f"sid run {stage.name} --date D" if error.retry else ""
    error.next_command = completed(error.next_command or again, ctx)
    if not _speaks():
        return
    found = StageResult(metrics=ledger.found.metrics, curves=ledger.found.curves, figures=ledger.found.figures)
    outcome = _outcome(stage, "failed", started, found, ledger, snapshots) | {"branch": ctx.branch, "error": error.fields(), "retry": error.retry}
    try:
        write_json(ctx.staging / f"{stage.name}.json", outcome)
        _track(ctx, found, "failed", outcome, error)
    except OSError as full:  # say what stopped the stage, not that it could not be written down
        logger.error("the failure could not be written down: %s", full)


def completed(command: str, ctx: Context) -> str:
    """The command with the run's date for `--date D`, and with the run's id and parameters for a stage of the run.

    Another id would find no manifest and no outcomes; without its parameters the run would go on with another release than the one it was given.
    """
    command = command.replace("--date D", f"--date {ctx.logical_date}")
    named = [] if ctx.run_id == f"cli__{ctx.config.name}__{ctx.logical_date}" else [("--run-id", ctx.run_id)]  # that one the command line takes by itself
    options = [*named, *(("--param", f"{name}={value}") for name, value in ctx.params)]
    same_run = scrub("".join(f" {option} {shlex.quote(value)}" for option, value in options))
    names = "|".join(stage.name for stage in group(BY_NAME[ctx.stage].group))
    ours = re.compile(rf"\bsid run ({names}) --date {ctx.logical_date}\b(?!{re.escape(same_run)})")
    return ours.sub(lambda found: found[0] + same_run, command)


def step(ctx: Context, name: str) -> None:
    """A named point between two effects; the place where a test may kill the process."""
    if os.environ.get("SID_KILL_AT") == f"{ctx.stage}:{name}":
        os.kill(os.getpid(), signal.SIGKILL)


def _with_retries(stage: Stage, ctx: Context, snapshots: dict[str, int | None], ledger: Ledger) -> StageResult:
    """The job and its writes; when main moved meanwhile everything is computed again from the new state."""
    for attempt in range(1, TRIES + 1):
        try:
            return _once(stage, ctx, snapshots, ledger)
        except PublishConflict:
            if attempt == TRIES:
                raise
            logger.warning("main moved, running again stage=%s attempt=%d", stage.name, attempt)
            snapshots.update(_pinned(stage, ctx))
    raise AssertionError("unreachable")


def _once(stage: Stage, ctx: Context, snapshots: Mapping[str, int | None], ledger: Ledger) -> StageResult:
    spark = _session(ctx) if stage.engine == "spark" else None
    if stage.name == "publish_release" or stage.engine == "torch":
        sent = tracking.flush(ctx.home, ctx.staging)  # a release without its runs could not be traced back
        if stage.engine == "torch" and not sent:
            tracking.reach(ctx.home)  # a model that cannot be logged was trained for nothing
    inputs = Inputs(ctx.home, ctx.config.lake, dict(snapshots), spark)
    job: Callable[..., StageResult] = _job(stage).run
    step(ctx, "before_job")
    with _torch_threads(stage, ctx):
        result = ledger.found = job(inputs, getattr(ctx.config, stage.section), ctx)
    try:
        return _effects(stage, ctx, spark, result, snapshots, ledger)
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


def _effects(stage: Stage, ctx: Context, spark: SparkSession | None, result: StageResult, snapshots: Mapping[str, int | None], ledger: Ledger) -> StageResult:
    """The job's result after its writes were published and its model logged."""
    if result.writes:
        assert spark is not None, "only Spark stages write tables"
        _check_declared(stage, result.writes)
        with lakehouse.table_locks(ctx.home, ctx.config.lake, [write.table for write in result.writes]):
            _write_all(spark, ctx, result.writes, snapshots, ledger)
    if spark is not None:
        _sweep(spark, stage, ctx, {write.table for write in result.writes})
    if result.model is not None:
        uri = tracking.log_model(ctx, result.model)
        step(ctx, "after_model")
        result = replace(result, outputs={**result.outputs, "model_uri": uri})
    return result


def _sweep(spark: SparkSession, stage: Stage, ctx: Context, written: Container[str]) -> None:
    """Drop what an earlier try of this run left on tables that this one had nothing to write to, because another run wrote the same rows meanwhile."""
    for table in stage.outputs:
        if table not in written and ctx.branch in lakehouse.history(ctx.home, ctx.config.lake, table).branches:
            with lakehouse.table_locks(ctx.home, ctx.config.lake, [table]):
                lakehouse.drop_branch(spark, table, ctx.branch)


def _write_all(spark: SparkSession, ctx: Context, writes: tuple[Write, ...], snapshots: Mapping[str, int | None], ledger: Ledger) -> None:
    """Audit every branch first, then publish in the declared order, the marker table last."""
    step(ctx, "before_write")
    audited = [_write_and_audit(spark, ctx, write, snapshots, ledger) for write in writes]
    step(ctx, "after_audit")
    for number, (write, snapshot_id) in enumerate(zip(writes, audited, strict=True)):
        if write.hold:
            ledger.held[write.table] = {"branch": ctx.branch, "snapshot_id": snapshot_id}
            continue
        ledger.published[write.table] = lakehouse.publish(spark, write.table, ctx.branch, expect=snapshot_id)
        step(ctx, f"after_publish_{number + 1}")


def _write_and_audit(spark: SparkSession, ctx: Context, write: Write, snapshots: Mapping[str, int | None], ledger: Ledger) -> int:
    """Snapshot of the branch that was audited: only this one may be published, whatever another try of the run does to the branch."""
    frame = lakehouse.check_columns(write.frame, spark, write.table)
    base = lakehouse.cut_branch(spark, write.table, ctx.branch)
    if (write.copies or not write.dates) and write.table in snapshots and base != snapshots[write.table]:
        # What replaces no day, or copies rows of it, was computed from the pinned rows; from newer rows it would come out differently.
        raise PublishConflict(f"main of {write.table} moved since the stage began", expected=str(snapshots[write.table]), found=str(base), where=write.table)
    properties = _properties(ctx)
    if write.whole:
        lakehouse.replace_all(frame, write.table, ctx.branch, properties)
    elif write.appends:
        lakehouse.append(frame, write.table, ctx.branch, properties)
    else:
        lakehouse.replace(frame, write.table, ctx.branch, dates=write.dates, equal=write.slice, properties=properties)
    step(ctx, "after_write")
    head = lakehouse.snapshot(spark, write.table, ctx.branch)
    if head is None or base is None or head == base:  # a write always makes a snapshot
        raise PublishConflict(f"another try took {ctx.branch} of {write.table} away", expected="a snapshot of this try", found=str(head), where=write.table)
    added = lakehouse.read_added(spark, write.table, base, head) if write.appends else lakehouse.read_frame(spark, write.table, head)
    try:
        metrics: Mapping[str, float] = quality.audit(
            added, write.table, dates=write.dates, equal=write.slice, known=write.metrics, config=ctx.config, branch=ctx.branch, reason=ctx.reason
        ).metrics
    except GateFailed as failed:
        _measured(ledger, write.table, failed.metrics)
        raise
    _measured(ledger, write.table, metrics)
    return head


def _measured(ledger: Ledger, table: str, metrics: Mapping[str, float]) -> None:
    ledger.metrics.update({f"{table}/{name}": value for name, value in metrics.items()})


def _check_declared(stage: Stage, writes: tuple[Write, ...]) -> None:
    unknown = [write.table for write in writes if write.table not in stage.outputs]
    if unknown:
        raise ContractError(
            f"stage {stage.name} writes tables it did not declare", expected=", ".join(stage.outputs), found=", ".join(unknown), where="pipeline/stages.py"
        )


def has_no_work(ctx: Context) -> bool:
    """Whether the stage would end as `reused` or `skipped`: no process and no JVM need be started to write that down.

    What keeps the stage from starting at all is left to the stage itself to find and to record.
    """
    stage = BY_NAME[ctx.stage]
    try:
        return _lake_ready(stage, ctx) and _settled(stage, ctx, _pinned(stage, ctx)) is not None
    except SidError:
        return False


def _settled(stage: Stage, ctx: Context, snapshots: Mapping[str, int | None]) -> StageResult | None:
    """The result of a stage without work, found without a session: the night is published already, or the job's `idle` says so."""
    idle: Callable[..., StageResult | None] | None = getattr(_job(stage), "idle", None)
    without_session = Inputs(ctx.home, ctx.config.lake, dict(snapshots))
    return _reused(stage, ctx) or (idle(without_session, getattr(ctx.config, stage.section), ctx) if idle else None)


def _reused(stage: Stage, ctx: Context) -> StageResult | None:
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
    return StageResult(status="reused", outputs={"tag": plan.reuse}) if plan.reuse else None


def _lake_ready(stage: Stage, ctx: Context) -> bool:
    """Whether the stage's tables are there and none is behind its migrations."""
    return all(lakehouse.is_ready(ctx.home, ctx.config.lake, table) for table in {*stage.inputs, *stage.outputs})


def _make_ready(stage: Stage, ctx: Context) -> None:
    """Create and migrate the tables, unless a stage that started beside this one did it meanwhile."""
    spark = _session(ctx)
    with lakehouse.table_locks(ctx.home, ctx.config.lake, lakehouse.table_names()):
        if not _lake_ready(stage, ctx):
            lakehouse.create_tables(spark)


def _pinned(stage: Stage, ctx: Context) -> dict[str, int | None]:
    """Table -> snapshot of main now, of everything the stage reads."""
    return {table: lakehouse.current_snapshot(ctx.home, ctx.config.lake, table) for table in stage.inputs}


def _job(stage: Stage) -> ModuleType:
    return importlib.import_module(f"jobs.{stage.name}")


def _session(ctx: Context) -> SparkSession:
    return spark_gate.session(ctx.home, ctx.config.lake, ctx.config.launch)


def _properties(ctx: Context) -> dict[str, str]:
    """What every snapshot says of its origin: rows themselves carry no run and no clock."""
    return {
        "sid.stage": ctx.stage,
        "sid.logical_date": str(ctx.logical_date),
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
    if tag and outcome["status"] != "reused" and not outcome["outputs"].get("reuse"):  # plan_night, which says that the others reuse, ends as done itself
        folder = ctx.home.folder("reports") / tag
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{stage.name}.json", outcome)


def _track(ctx: Context, result: StageResult, status: str, outcome: Mapping[str, Any], error: SidError | None) -> None:
    """Buffer the record, then try to hand it to MLflow; a Spark stage does not depend on MLflow being there."""
    full = replace(result, metrics=outcome["metrics"])
    tracking.record(ctx, full, status=status, seconds=outcome["seconds"], inputs=outcome["read"], outputs=lineage.written(outcome), error=error)
    try:
        tracking.flush(ctx.home, ctx.staging)
    except UpstreamMissing as unreachable:
        logger.warning("metrics stay in staging until MLflow answers: %s", unreachable.headline)
