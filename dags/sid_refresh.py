"""The nightly refresh: from the day's files to an audited, tagged SID release."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG, CronDataIntervalTimetable

from jobs.airflow_task import DEFAULTS, LATE, PARAMS, stage_tasks

DOC = """
### What it does
Loads the day's events and catalogue, updates popularity, content and behaviour vectors, assigns semantic IDs,
audits them and publishes one tagged release. Each table is written on an audit branch and published in one commit.

### A task is red
1. Read the last lines of its log: every error says what was expected, what was found, where, and the next command.
2. `GateFailed`: main is untouched; `sid inspect BRANCH` shows what was measured, the limit's setting, and refused rows by reason.
3. `UpstreamMissing`: a day's file is not there; the message names the command for it. The task retries on its own first.
4. `StageFailed`: an exception nobody foresaw, not tried again; the traceback is in the log.
5. Anything else: clear the task. Stages are safe to run again, and a published night ends as `reused`.

### Who is told
Every failed task, and a night that has not ended six hours after it was queued, goes to the log and to the webhook in `SID_ALERT_WEBHOOK`.

### Run it again
Trigger with the parameter `date`; the same inputs publish nothing new, other inputs publish `d<yyyymmdd>_r2`.

Owner: the data engineer on call for the recommendation lake.
"""

with DAG(
    dag_id="sid_refresh",
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=datetime(1970, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS | {"owner": "data-engineering"},
    params={name: PARAMS[name] for name in ("date", "profile", "overrides", "reason")},
    deadline=LATE,
    tags=["sid", "nightly"],
    doc_md=DOC,
) as dag:
    stage_tasks(dag, "refresh")
