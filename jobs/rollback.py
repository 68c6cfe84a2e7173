"""Back to an earlier release: one commit on sid.release, nothing else moves.

Releases newer than the target become `withdrawn`, the target `current`; everything of earlier dates, backfilled revisions too, stays as it is. No tag and
no branch moves, so whoever is pinned to a tag reads the same rows as before. The MLflow alias and the asset event follow from the row (jobs/derived.py,
jobs/airflow_task.py). The next night plans on the restored release, because its parent is the latest earlier date that is current.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.plan_night import release_order
from jobs.publish_release import released
from pipeline import lakehouse
from pipeline.config import PublishRelease
from pipeline.context import Context
from pipeline.errors import ContractError
from pipeline.stages import StageResult

if TYPE_CHECKING:
    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
SHOWN = 10  # candidates that an error lists
Row = Mapping[str, Any]


def run(inputs: Inputs, params: PublishRelease, ctx: Context) -> StageResult:
    """All rows of sid.release with the run parameter `release` restored; status `reused` when it is the newest already.

    Raises: ContractError when the release cannot be restored.
    """
    assert inputs.spark is not None, "a Spark stage"
    releases = [row.asDict() for row in inputs.frame("sid.release").collect()]
    target = restorable(releases, ctx.param("release"), lakehouse.references(inputs.spark, "sid.item_sid"))
    moves = changes(releases, target)
    logger.info("rollback to=%s withdrawn=%s", target["tag"], ",".join(move["tag"] for move in moves if move["becomes"] == "withdrawn") or "-")
    if not moves:
        return StageResult(status="reused", outputs=outputs(target, moves))
    withdrawn = sum(move["becomes"] == "withdrawn" for move in moves)
    return StageResult(writes=(released(inputs, restored(releases, moves)),), metrics={"withdrawn": float(withdrawn)}, outputs=outputs(target, moves))


def restorable(releases: Sequence[Row], tag: str, held: Collection[str]) -> Row:
    """The row of a release that can be made current: it was not withdrawn, and its rows are still there.

    Args:
        held: names of the tags on sid.item_sid; a release without its tag has expired.
    Raises: ContractError naming the newest candidates.
    """
    row = next((row for row in releases if row["tag"] == tag), None)
    if row is not None and row["status"] != "withdrawn" and tag in held:
        return row
    good = [other for other in releases if other["status"] != "withdrawn" and other["tag"] in held]
    newest = sorted(good, key=release_order, reverse=True)[:SHOWN]
    raise ContractError(
        f"release {tag!r} cannot be restored",
        expected=f"one of: {', '.join(other['tag'] for other in newest) or 'none'}",
        found="no such release" if row is None else "it was withdrawn" if row["status"] == "withdrawn" else "it has expired: its rows were swept away",
        where="sid.release",
        next_command="sid releases",
    )


def changes(releases: Sequence[Row], target: Row) -> list[dict[str, str]]:
    """tag, was, becomes of every release whose status changes, by date and revision; empty when the target is the newest current release already.

    Newer is a later date, or a later revision of the target's own date.
    """
    becomes = {row["tag"]: "withdrawn" for row in releases if release_order(row) > release_order(target)} | {target["tag"]: "current"}
    ordered = sorted(releases, key=release_order)
    return [
        {"tag": row["tag"], "was": row["status"], "becomes": becomes[row["tag"]]}
        for row in ordered
        if row["tag"] in becomes and becomes[row["tag"]] != row["status"]
    ]


def restored(releases: Sequence[Row], moves: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """All rows with the new statuses, by date and revision."""
    becomes = {move["tag"]: move["becomes"] for move in moves}
    return [{**row, "status": becomes.get(row["tag"], row["status"])} for row in sorted(releases, key=release_order)]


def outputs(target: Row, moves: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the asset event says, as publish_release says it, and the statuses that changed; a retry announces what a killed try did not."""
    facts = {name: target[name] for name in ("tag", "revision", "generation", "codebook_digest", "rows_digest")}
    return {**facts, "logical_date": str(target["logical_date"]), "current": True, "is_current_newest": True, "changes": list(moves)}
