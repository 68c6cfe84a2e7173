"""Ranking training on a pinned release, started by the event of a new one."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG

from jobs.airflow_task import DEFAULTS, PARAMS, RELEASE, stage_tasks

DOC = """
### What it does
Builds labelled examples around one release and trains the ranker with and without SIDs; `train_retriever` is skipped unless the profile
switches it on. The release is the parameter `release`, else the one in the newest triggering asset event; never a date.
A checkpoint stores the codebook digest it was trained on.

### A task is red
`VersionMismatch`: the checkpoint belongs to another vocabulary; train anew on the current release (`sid releases`).
`UpstreamMissing`: the release is not published (yet). Otherwise clear the task.

Owner: the ranking engineer.
"""

with DAG(
    dag_id="rank_training",
    schedule=[RELEASE],
    start_date=datetime(1970, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS | {"owner": "ranking"},
    params={name: PARAMS[name] for name in ("release", "profile", "overrides", "reason", "date")},
    tags=["sid", "consumers"],
    doc_md=DOC,
) as dag:
    stage_tasks(dag, "consumers")
