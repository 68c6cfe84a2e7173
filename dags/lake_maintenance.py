"""Weekly housekeeping: old audit branches, old snapshots that no tag holds, small files."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG, CronTriggerTimetable

from jobs.airflow_task import DEFAULTS, PARAMS, stage_tasks

DOC = """
### What it does
Drops the tags of releases older than `maintain.release_days` (never the newest current one, the first of a generation, or a pinned one), audit
branches nobody inspected for weeks, snapshots nothing points at, orphan files and old folders; then takes days that serve no live release
off the derived tables and joins small files. `sid.item_sid` is never compacted; raw tables lose no row.

### Before something goes
`sid maintain --dry-run` lists it, with the bytes that are really freed. `sid pin TAG --by NAME` holds a release, `--release` lets it go.

### A task is red
Nothing is lost: every step is one Iceberg commit, and a second run goes on where the first stopped. Clear the task.

### The disk is full
Lower `maintain.release_days` or `maintain.keep_snapshots_days` for one run through `overrides`; days and small files become free only with the
snapshots that still show them, so run it again when those have aged.

Owner: the data engineer on call for the recommendation lake.
"""

with DAG(
    dag_id="lake_maintenance",
    schedule=CronTriggerTimetable("0 6 * * 0", timezone="UTC"),  # ages count from the day of the run, as on the command line
    start_date=datetime(1970, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS | {"owner": "data-engineering"},
    params={name: PARAMS[name] for name in ("date", "profile", "overrides", "reason")},
    tags=["sid", "maintenance"],
    doc_md=DOC,
) as dag:
    stage_tasks(dag, "maintenance")
