"""One thin Airflow operator: build the context, launch the stage, turn its outcome into success, a retry or a final failure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetAlias, BaseOperator, Param
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.log import mask_secret

from jobs import alerts, profiles
from pipeline.context import Home
from pipeline.stages import BY_NAME, Stage, group, upstream

RELEASE = Asset(name="sid_release", uri="sid://release", extra={"table": "sid.item_sid"})
NEW_RELEASE = AssetAlias("new_sid_release")  # an alias, because only a release that becomes the newest one makes an event
ANNOUNCING = ("publish_release", "rollback")

DEFAULTS: dict[str, Any] = {"retries": 3, "retry_delay": timedelta(minutes=2), "retry_exponential_backoff": True, "max_retry_delay": timedelta(minutes=30)}

PARAMS: dict[str, Param] = {
    "date": Param(None, type=["null", "string"], format="date", title="Logical date", description="day to refresh; empty = the run's data interval"),
    "profile": Param(
        os.environ.get("SID_PROFILE") or profiles.default(Home.from_environment()),
        type="string",
        title="Profile",
        description="a name in pipeline/profiles or a .toml file; preset by SID_PROFILE, else by the profile that made the lake",
    ),
    "overrides": Param([], type="array", items={"type": "string"}, title="Overrides", description="section.key=value"),
    "reason": Param("nightly", type="string", minLength=3, title="Reason", description="why this run exists; stored in every snapshot"),
    "release": Param(
        None, type=["null", "string"], pattern="^d[0-9]{8}(_r[0-9]+)?$", title="Release", description="tag to read; empty = from the triggering event"
    ),
}
# Counted from the queueing: a backfill of an old day is not late the moment it begins.
LATE = DeadlineAlert(
    name="night_is_late", reference=DeadlineReference.DAGRUN_QUEUED_AT, interval=alerts.night_limit(), callback=AsyncCallback(alerts.on_missed_deadline)
)
ROLLBACK_PARAMS: dict[str, Param] = {  # without defaults: nobody rolls back by pressing enter
    "tag": Param(type="string", pattern="^d[0-9]{8}(_r[0-9]+)?$", title="Release", description="tag to restore; all newer releases are withdrawn"),
    "reason": Param(type="string", minLength=3, title="Reason", description="why; stored in the snapshot"),
}


class StageOperator(BaseOperator):
    """Runs one stage; its pool, retries and place in the graph come from `pipeline.stages`.

    Args:
        stage: name of the stage, also the task_id.
    """

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(task_id=stage, **kwargs)
        self.stage = stage
        self.outcome: Mapping[str, Any] | None = None  # of this process's run, for lineage

    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """The stage's outputs, small JSON for XCom.

        Raises: AirflowFailException when a retry cannot help, AirflowException when it may.
        """
        from jobs import launchers
        from pipeline import log, redact
        from pipeline.config import load
        from pipeline.context import Context
        from pipeline.errors import SidError

        log.configure()
        for secret in redact.secret_values():  # whatever a library prints, a traceback included
            mask_secret(secret)
        params = context["params"]
        release = params.get("release") or params.get("tag") or newest_event_release(context.get("triggering_asset_events") or {})
        try:
            if BY_NAME[self.stage].group in ("maintenance", "rollback") and params["profile"] == os.environ.get("SID_PROFILE"):
                profiles.check_same(Home.from_environment(), params["profile"], "SID_PROFILE")  # as on the command line: a profile typed into the form is meant
            config = load(params["profile"], tuple(params["overrides"]))
            ctx = Context(
                config=config,
                home=Home.from_environment(),
                stage=self.stage,
                logical_date=logical_date(params, context, release),
                run_id=f"{context['run_id']}__{self.dag_id}",  # two DAGs may run for one date
                attempt=context["ti"].try_number,
                reason=params["reason"],
                params=(("release", release),) if release else (),
            )
            self.outcome = outcome = launchers.launch(ctx, launchers.Request(profile=params["profile"], overrides=tuple(params["overrides"])))
        except SidError as error:
            raise (AirflowException if error.retry else AirflowFailException)(error.message(params["profile"], params["overrides"])) from error
        announce(outcome, context)
        return {"status": outcome["status"], "seconds": outcome["seconds"]}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """The tables read and written, each at its snapshot, for Airflow's OpenLineage provider; None for a stage that did not come to its end."""
        from jobs import lineage

        return lineage.facets(self.outcome, Home.from_environment().warehouse) if self.outcome else None


def stage_tasks(dag: DAG, name: str) -> dict[str, StageOperator]:
    """One task per stage of a group inside `dag`, with the edges that `pipeline.stages` derives."""
    tasks = {stage.name: StageOperator(stage=stage.name, dag=dag, **_scheduling(stage)) for stage in group(name)}
    for stage in group(name):
        for other in upstream(stage):
            tasks[other] >> tasks[stage.name]
    return tasks


def pools() -> dict[str, int]:
    """Pool -> slots: one GPU at a time, and one writer per table-writing stage."""
    from pipeline.stages import STAGES

    return {pool: 1 for stage in STAGES if (pool := _pool(stage)) != "default_pool"}


def newest_event_release(events: Mapping[Any, Any]) -> str:
    """Tag carried by the newest triggering asset event, empty without one."""
    found = [event for asset_events in events.values() for event in asset_events]
    newest = max(found, key=lambda event: event.timestamp, default=None)
    return str(newest.extra.get("release", "")) if newest is not None else ""


def logical_date(params: Mapping[str, Any], context: Mapping[str, Any], release: str) -> date:
    """Day of the run: the parameter, else the release's day, else the start of the data interval.

    Raises: AirflowFailException for a manual run that names no date.
    """
    if params.get("date"):
        return date.fromisoformat(params["date"])
    if release:
        return date.fromisoformat(f"{release[1:5]}-{release[5:7]}-{release[7:9]}")
    start = context.get("data_interval_start") or context.get("logical_date")
    if start is None:
        raise AirflowFailException("a manual run needs the parameter `date`, e.g. 2026-11-20")
    return start.date()


def announce(outcome: Mapping[str, Any], context: Mapping[str, Any]) -> None:
    """Make the asset event of a release that became the newest one; older or reused releases make none."""
    outputs = outcome["outputs"]
    if outcome["stage"] in ANNOUNCING and outputs.get("is_current_newest"):
        extra = {name: outputs[name] for name in ("tag", "logical_date", "codebook_digest", "generation") if name in outputs}
        context["outlet_events"][NEW_RELEASE].add(RELEASE, extra={"release": outputs["tag"], **extra})


def _scheduling(stage: Stage) -> dict[str, Any]:
    outlets = [NEW_RELEASE] if stage.name in ANNOUNCING else []
    return {"pool": _pool(stage), "outlets": outlets, "doc_md": stage.summary, "on_failure_callback": alerts.on_failure}


def _pool(stage: Stage) -> str:
    if stage.gpu:
        return "gpu"
    return f"write_{stage.name}" if stage.outputs else "default_pool"
