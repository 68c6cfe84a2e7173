"""The night's release: the audited branch becomes main with its tag, and sid.release gets its row.

Order of effects: (1) sid.item_sid main + tag, ONE metadata commit; (2) the row of sid.release, one commit by the runner. A kill between them leaves a tag
without a row, which is no release; the next try finds the tag, compares its rows with the night's and either writes the missing row or takes the next
revision. The audited branch is given up last: a kill at any point leaves the rows where the next try finds them.
Before the job starts the runner has flushed the run's records to MLflow: a release whose runs nobody can find is not published.
This is the only job that moves a reference itself, because the tag is its result.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.plan_night import MANIFEST, release_order, tag_name
from jobs.releases import newest_current
from pipeline import lakehouse
from pipeline.config import PublishRelease
from pipeline.context import Context, Plan
from pipeline.errors import ContractError, PublishConflict
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
TABLE = "sid.item_sid"
OWN_PROPERTY = "sid."
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with the held branch: `reused` (the rows are published), `roll_forward` (tag without a row), `publish`."""

    action: str
    tag: str
    revision: int
    snapshot_id: int | None = None


def run(inputs: Inputs, params: PublishRelease, ctx: Context) -> StageResult:
    """The release's tag and row; status `reused` when the date's current release has the same rows, whose row then names tonight's parent and inputs.

    Raises: ContractError when the run holds no audited branch, or not any more; PublishConflict when main moved twice while it was published.
    """
    assert inputs.spark is not None, "a Spark stage"
    plan, outcome = ctx.plan(), ctx.outcome("assign_sid")
    assigned = outcome["outputs"]
    branch = held_branch(assigned)
    releases = [row.asDict() for row in inputs.frame("sid.release").collect()]
    check_parent(plan, releases)
    held = lakehouse.references(inputs.spark, TABLE)
    decision = decide(plan, releases, assigned["rows_digest"], bare_tags(inputs.spark, plan, releases, held), held)
    check_branch(decision, branch["branch"], held)
    with lakehouse.table_locks(ctx.home, ctx.config.lake, [TABLE, MANIFEST]):
        snapshot_id = apply(inputs.spark, decision, branch, plan)
        if decision.action == "reused" and outcome.get("read", {}).get(MANIFEST):
            lakehouse.put_tag(inputs.spark, MANIFEST, decision.tag, outcome["read"][MANIFEST])  # the manifest these rows were made from this time
    if decision.action == "reused":
        same = reaffirmed(releases, decision, plan)
        writes = (released(inputs, same),) if same != releases else ()
        return StageResult(status="reused", writes=writes, outputs=outputs(decision, plan, assigned, same, again=same != releases))
    rows = with_release(releases, release_row(decision, plan, assigned, snapshot_id))
    return StageResult(
        writes=(released(inputs, rows),),
        metrics={"items": float(assigned["items"]), "revision": float(decision.revision)},
        outputs={**outputs(decision, plan, assigned, rows), "limits": params.model_dump()},  # a page made later shows what was judged by
    )


def released(inputs: Inputs, rows: Sequence[Row]) -> Write:
    """All of sid.release as one commit."""
    assert inputs.spark is not None, "a Spark stage"
    schema = inputs.frame("sid.release").schema
    frame = inputs.spark.createDataFrame([tuple(row[name] for name in schema.names) for row in rows], schema).coalesce(1)
    return Write(table="sid.release", frame=frame, whole=True)


def held_branch(assigned: Mapping[str, Any]) -> dict[str, Any]:
    """The branch and snapshot_id of the audited rows that assign_sid left.

    Raises: ContractError when there are none.
    """
    held = assigned.get("held", {}).get(TABLE)
    if not held:
        raise ContractError(
            "the run holds no audited branch",
            expected=f"outputs.held of assign_sid with {TABLE}",
            found=", ".join(assigned) or "nothing",
            where="assign_sid.json",
            next_command="sid run assign_sid --date D",
        )
    return dict(held)


# ---------------------------------------------------------------- deciding (pure)


def check_parent(plan: Plan, releases: Sequence[Row]) -> None:
    """Nothing, when the release that the night was built on still stands; a night that was planned before a rollback is not published after it.

    Raises: ContractError for a parent that was withdrawn meanwhile.
    """
    if plan.parent is not None and any(row["tag"] == plan.parent.tag and row["status"] == "withdrawn" for row in releases):
        raise ContractError(
            f"the night was built on {plan.parent.tag}, which was withdrawn meanwhile",
            expected="a parent that is current or superseded",
            found="withdrawn",
            where="sid.release",
            next_command=f"sid run refresh --date {plan.logical_date}",
        )


def check_branch(decision: Decision, branch: str, held: Container[str]) -> None:
    """Nothing, when the branch to publish is there.

    Args:
        held: branches and tags of sid.item_sid.
    Raises: ContractError for one that was swept away: only the stage that made it can make it again.
    """
    if decision.action == "publish" and branch not in held:
        raise ContractError(
            "the audited branch is gone",
            expected=f"branch {branch}",
            found="swept away by `sid maintain`, or dropped by hand",
            where=TABLE,
            next_command="sid run assign_sid --date D",
        )


def decide(plan: Plan, releases: Sequence[Row], rows_digest: str, tags: Mapping[str, tuple[int, str]], held: Container[str]) -> Decision:
    """What to do with the night's rows.

    Args:
        tags: tags of the date on sid.item_sid that no release names -> (snapshot id, digest of the tag's rows).
        held: all tags of sid.item_sid; a release without its tag has expired, and its rows take the next revision.
    """
    of_date = [row for row in releases if row["logical_date"] == plan.logical_date]
    current = next((row for row in of_date if row["status"] == "current"), None)
    if current is not None and current["rows_digest"] == rows_digest and current["tag"] in held:
        return Decision(action="reused", tag=current["tag"], revision=current["revision"], snapshot_id=current["snapshot_id"])
    revision = max((row["revision"] for row in of_date), default=0) + 1
    while (tag := tag_name(plan.logical_date, revision)) in tags:
        snapshot_id, digest = tags[tag]
        if digest == rows_digest:
            return Decision(action="roll_forward", tag=tag, revision=revision, snapshot_id=snapshot_id)
        revision += 1  # a tag is never moved: other rows take the next one
    return Decision(action="publish", tag=tag, revision=revision)


def release_row(decision: Decision, plan: Plan, assigned: Mapping[str, Any], snapshot_id: int) -> dict[str, Any]:
    """The new row of sid.release, current and not yet measured by gate_drift."""
    return {
        "tag": decision.tag,
        "logical_date": plan.logical_date,
        "revision": decision.revision,
        "generation": plan.generation,
        "codebook_digest": assigned["codebook_digest"],
        "parent_tag": plan.parent.tag if plan.parent else None,
        "snapshot_id": snapshot_id,
        "rows_digest": assigned["rows_digest"],
        "input_fingerprint": plan.input_fingerprint,
        "status": "current",
        "refit_due": False,
        "drift": None,
        "items": assigned["items"],
        "reason": plan.reason,
    }


def with_release(releases: Sequence[Row], new: Row) -> list[dict[str, Any]]:
    """All rows with the new one; what was current on its date is superseded. Other dates keep their status."""
    older = [
        {**row, "status": "superseded"} if row["logical_date"] == new["logical_date"] and row["status"] == "current" else dict(row)
        for row in releases
        if row["tag"] != new["tag"]
    ]
    return sorted([*older, dict(new)], key=release_order)


def reaffirmed(releases: Sequence[Row], decision: Decision, plan: Plan) -> list[Row]:
    """All rows; that of the reused release names the parent and the inputs which gave the same rows again, so that it no longer shows as superseded."""
    again = {"parent_tag": plan.parent.tag if plan.parent else None, "input_fingerprint": plan.input_fingerprint}
    return [{**row, **again} if row["tag"] == decision.tag else row for row in releases]


def outputs(decision: Decision, plan: Plan, assigned: Mapping[str, Any], rows: Sequence[Row], *, again: bool = False) -> dict[str, Any]:
    """tag, date and digest of the release, and whether consumers shall read it: only the newest current date makes the asset event.

    Args:
        again: an earlier night published these rows, so consumers know of them; a try that was killed after its row says what it had no time to say.
    """
    newest = newest_current(rows)
    return {
        "tag": decision.tag,
        "logical_date": str(plan.logical_date),
        "revision": decision.revision,
        "generation": plan.generation,
        "codebook_digest": assigned["codebook_digest"],
        "rows_digest": assigned["rows_digest"],
        "action": decision.action,
        "current": any(row["tag"] == decision.tag and row["status"] == "current" for row in rows),
        "is_current_newest": not again and newest is not None and newest["tag"] == decision.tag,
    }


# ---------------------------------------------------------------- effects


def bare_tags(spark: SparkSession, plan: Plan, releases: Sequence[Row], held: Mapping[str, int]) -> dict[str, tuple[int, str]]:
    """Tags of the date on sid.item_sid that no release names, as a kill leaves them -> (snapshot id, digest of their rows of that date)."""
    first, named = tag_name(plan.logical_date, 1), {row["tag"] for row in releases}
    of_date = {name: at for name, at in held.items() if name == first or name.startswith(f"{first}_r")}
    return {name: (at, lakehouse.rows_digest(lakehouse.read_release_frame(spark, at, plan.logical_date))) for name, at in of_date.items() if name not in named}


def apply(spark: SparkSession, decision: Decision, branch: Mapping[str, Any], plan: Plan) -> int:
    """Snapshot id of the release after the decision was carried out; the held branch is gone afterwards.

    Only the audited snapshot is published: where main moved, or another try of the run wrote to the branch or cut it anew, its rows are written again.
    """
    again = f"{branch['branch']}_again"
    snapshot_id = decision.snapshot_id
    if snapshot_id is not None:
        logger.info("kept tag=%s action=%s", decision.tag, decision.action)
    else:
        try:
            return lakehouse.publish(spark, TABLE, branch["branch"], tag=decision.tag, expect=branch["snapshot_id"])
        except PublishConflict as conflict:
            logger.warning("%s, writing the audited rows again on a new branch", conflict.headline)
            snapshot_id = lakehouse.publish(spark, TABLE, again, tag=decision.tag, expect=recut(spark, branch["snapshot_id"], again, plan))
    for name in (branch["branch"], again):
        lakehouse.drop_branch(spark, TABLE, name)
    return snapshot_id


def recut(spark: SparkSession, audited: int, again: str, plan: Plan) -> int:
    """Snapshot of the audited rows on a branch `again`, cut from main as it is now, with the properties of the snapshot they came from.

    The rows are those that passed the audit, so they are not judged a second time; the partition of another date that moved main is untouched.
    """
    rows = lakehouse.read_release_frame(spark, audited, plan.logical_date).localCheckpoint()
    properties = snapshot_properties(spark, audited)
    lakehouse.cut_branch(spark, TABLE, again)
    lakehouse.replace(rows, TABLE, again, dates=(plan.logical_date,), equal={}, properties=properties)
    written = lakehouse.snapshot(spark, TABLE, again)
    assert written is not None, "it was written a moment ago"
    return written


def snapshot_properties(spark: SparkSession, snapshot_id: int) -> dict[str, str]:
    """The house's own properties of a snapshot (`sid.*`)."""
    from pyspark.sql import functions as F

    found = spark.table(f"{lakehouse.CATALOG}.{TABLE}.snapshots").where(F.col("snapshot_id") == snapshot_id).select("summary").collect()
    return {name: value for row in found for name, value in row.summary.items() if name.startswith(OWN_PROPERTY)}
