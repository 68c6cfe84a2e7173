"""Back to an earlier release, started by hand: one commit, the alias and the event of the restored release."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG

from jobs.airflow_task import DEFAULTS, PARAMS, ROLLBACK_PARAMS, stage_tasks

DOC = """
### What it does
Withdraws every release newer than `tag` and makes `tag` the current one: one commit on `sid.release`. No tag moves, so a reader that is pinned
to one sees the same rows as before. Then the MLflow alias follows, and the asset event starts `rank_training` on the restored release;
`sid rollback` makes no event.

### Before you trigger it
1. `sid rollback --to TAG --reason WHY --dry-run` lists what would change; `sid diff TAG OTHER` says how far the two releases are apart.
2. Pause `sid_refresh` and let a running night end or stop it: a night that was planned before would publish on a withdrawn parent.
3. Is only one day's file bad? Then replace the file and run that date again: it publishes `_r2` and nothing need be withdrawn.

### A task is red
1. `ContractError`: the release is unknown, withdrawn or expired; the message lists the ones that can be restored.
2. `PublishConflict`: another run wrote `sid.release` at the same moment. The task retries on its own.
3. Killed half-way: clear the task, a second rollback changes nothing and announces again; or `sid repair` for the alias alone.

### Afterwards
The next night takes the restored release as its parent. A release with `refit_due` fits a new vocabulary then: `plan_night.refit_when_due=false` prevents it.

Owner: the data engineer on call for the recommendation lake.
"""

with DAG(
    dag_id="sid_rollback",
    schedule=None,
    start_date=datetime(1970, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS | {"owner": "data-engineering"},
    params={**ROLLBACK_PARAMS, **{name: PARAMS[name] for name in ("profile", "overrides")}},
    tags=["sid", "operations"],
    doc_md=DOC,
) as dag:
    stage_tasks(dag, "rollback")
