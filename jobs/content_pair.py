"""Pair sets for the content encoder, from catalogue and events as of the cutoff; only for a generation that trains one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import config
from pipeline.context import Context, Plan
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from jobs.inputs import Inputs

TABLE = "feature.content_pair"


def wanted(params: config.ContentCre, plan: Plan) -> bool:
    """Whether the night trains a content encoder: switched on, and a generation begins cold.

    An anchored or warm generation holds code rows near the parent's, which mean nothing in another space, so it keeps the parent's encoder.
    """
    return params.enabled and plan.new_generation and plan.start == "cold"


def idle(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult | None:
    """`skipped` when no content encoder is trained."""
    return None if wanted(params, ctx.plan()) else StageResult(status="skipped")


def run(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult:
    """The night's pairs."""
    from pyspark.sql import functions as F

    frame = inputs.query(
        TABLE,
        {
            "item": inputs.frame("raw.item"),
            "interaction": inputs.frame("raw.interaction"),
            "user_sequence": inputs.frame("feature.user_sequence").where(F.col("logical_date") == F.lit(ctx.logical_date)),
        },
        logical_date=ctx.logical_date,
        cutoff=ctx.cutoff,
        pairs_per_item=params.pairs_per_item,
        min_together=params.min_together,
        window=params.window,
        max_holders=params.max_holders,
    ).persist()
    counts = {row.source: float(row["count"]) for row in frame.groupBy("source").count().collect()}
    return StageResult(writes=(Write(table=TABLE, frame=frame, dates=(ctx.logical_date,)),), metrics={f"pairs/{name}": value for name, value in counts.items()})
