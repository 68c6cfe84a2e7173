"""Each user's events before the cutoff, in order, as one row; the order itself is defined in sql/feature/user_sequence/query.sql."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import config
from pipeline.context import Context
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from jobs.inputs import Inputs


def run(inputs: Inputs, params: config.UserSequence, ctx: Context) -> StageResult:
    """The night's sequences; `order` and `max_events` as configured."""
    frame = inputs.query(
        "feature.user_sequence",
        {"interaction": inputs.frame("raw.interaction")},
        logical_date=ctx.logical_date,
        cutoff=ctx.cutoff,
        order_by=params.order,
        max_events=params.max_events,
    )
    return StageResult(writes=(Write(table="feature.user_sequence", frame=frame, dates=(ctx.logical_date,)),))
