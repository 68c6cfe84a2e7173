"""Each user's events before the cutoff, in order, as one row; the order itself is defined in sql/feature/user_sequence/query.sql.

Where the night before may be built on (build_on.py), only users with an event in tonight's files are put in order again; the others' rows are taken over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.build_on import LONG_AGO, Ground, ground
from pipeline import config
from pipeline.context import Context
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

TABLE = "feature.user_sequence"
COLUMNS = ("user_id", "item_id", "event_ts", "session_id", "file_date")


def run(inputs: Inputs, params: config.UserSequence, ctx: Context) -> StageResult:
    """The night's sequences; `order` and `max_events` as configured."""
    from pyspark.sql import functions as F

    base = ground(inputs, TABLE, ctx.logical_date, params.order, params.max_events)
    events = inputs.frame("raw.interaction").where(F.col("file_date") <= F.lit(ctx.logical_date))
    fresh = events.where(F.col("file_date") > F.lit(base.after)).select("user_id").distinct()
    placed = inputs.query(
        TABLE,
        {"interaction": deciding(events, base, fresh, params)},
        logical_date=ctx.logical_date,
        cutoff=ctx.cutoff,
        order_by=params.order,
        max_events=params.max_events,
        inputs_sha256=base.inputs_sha256,
    )
    kept = base.rows.join(fresh, "user_id", "left_anti")
    kept = kept.withColumns({"logical_date": F.lit(ctx.logical_date), "inputs_sha256": F.lit(base.inputs_sha256)})
    return StageResult(writes=(Write(table=TABLE, frame=placed.unionByName(kept), dates=(ctx.logical_date,)),))


def deciding(events: DataFrame, base: Ground, fresh: DataFrame, params: config.UserSequence) -> DataFrame:
    """The events that decide the sequences of the users `fresh`.

    By time a user's latest events before tonight stand in last night's row already; a basket's place is its session's first instant, which only events tell.
    """
    from pyspark.sql import functions as F

    if base.after == LONG_AGO:
        return events
    if params.order == "basket":
        return events.join(fresh, "user_id", "left_semi")
    stored = base.rows.join(fresh, "user_id", "left_semi").select("user_id", F.explode(F.arrays_zip("item_ids", "event_ts")).alias("event"))
    known = stored.select("user_id", "event.item_ids", "event.event_ts", F.lit(None).cast("string"), F.lit(base.after)).toDF(*COLUMNS)
    return events.where(F.col("file_date") > F.lit(base.after)).select(*COLUMNS).unionByName(known)
