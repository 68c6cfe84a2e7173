"""Weekly housekeeping: old audit branches, old snapshots that no tag holds, small files."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG, CronDataIntervalTimetable

from jobs.airflow_task import DEFAULTS, PARAMS, stage_tasks

DOC = """
### What it does
Drops audit branches nobody inspected for weeks, expires snapshots that no live tag holds, and compacts small files.
`sid.item_sid` is never compacted, a tagged snapshot is never expired.

### A task is red
Nothing is lost: every step is one Iceberg commit. Clear the task; `sid run maintain --date D --dry-run` shows what it would do.

Owner: the data engineer on call for the recommendation lake.
"""

with DAG(
    dag_id="lake_maintenance",
    schedule=CronDataIntervalTimetable("0 6 * * 0", timezone="UTC"),
    start_date=datetime(1970, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS | {"owner": "data-engineering"},
    params={name: PARAMS[name] for name in ("date", "profile", "overrides", "reason")},
    tags=["sid", "maintenance"],
    doc_md=DOC,
) as dag:
    stage_tasks(dag, "maintenance")
