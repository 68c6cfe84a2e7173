"""Counts per item and day for the files that changed, and from them the decayed popularity of every item known at the cutoff.

Only the events of new or corrected day files are read; everything older comes from feature.item_day_stat: the days of the window, and for what never decays
the night before, where it may be built on (build_on.py), else all days. The definitions stand in pipeline/popularity.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING

from jobs.build_on import LONG_AGO, Ground, ground
from jobs.ingest import local_frame
from pipeline import config
from pipeline.context import Context
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
TABLE = "feature.item_popularity"


def run(inputs: Inputs, params: config.ItemPopularity, ctx: Context) -> StageResult:
    """The counts of the day files that changed since they were last counted, and the night's popularity."""
    from pyspark.sql import functions as F

    day, base = ctx.logical_date, ground(inputs, TABLE, ctx.logical_date)
    window = timedelta(days=min(params.window_days, (day - LONG_AGO).days) - 1)
    first = min(base.after + timedelta(days=1), day - window)  # an event is never later than its file
    ledger = inputs.frame("raw.source_file").where(F.col("file_date") >= F.lit(first))
    counted = inputs.frame("feature.item_day_stat").where(F.col("logical_date") >= F.lit(first))
    pending = pending_days(ledger, counted, day)
    fresh = day_stats(inputs, pending).persist()
    merged = merged_stats(counted, fresh, pending, day)
    popularity = item_popularity(inputs, merged, base, params, day)
    logger.info("counting day files=%d date=%s added up before=%s", len(pending), day, base.after)
    stats = Write(table="feature.item_day_stat", frame=fresh, dates=tuple(day for day, _ in pending))
    return StageResult(
        writes=(*([stats] if pending else []), Write(table=TABLE, frame=popularity, dates=(day,))),
        metrics={"files_counted": float(len(pending)), "rows_counted": float(fresh.count())},
    )


def pending_days(ledger: DataFrame, counted: DataFrame, logical_date: date) -> list[tuple[date, str]]:
    """File days up to the logical date whose ledger entry and counts disagree, with the file's digest (empty = no accepted events any more).

    They disagree when the digest or the number of accepted events differs: new files, corrected files, emptied days, and files whose rules changed.
    """
    from pyspark.sql import functions as F

    wanted = (
        ledger.where((F.col("kind") == "events") & (F.col("file_date") <= F.lit(logical_date)) & (F.col("rows_in") > F.col("rejected")))
        .select(F.col("file_date").alias("day"), "sha256", (F.col("rows_in") - F.col("rejected")).alias("wanted"))
    )  # fmt: skip
    present = (
        counted.where(F.col("logical_date") <= F.lit(logical_date))
        .groupBy(F.col("logical_date").alias("day"))
        .agg(F.sum("events").alias("events"), F.min("source_sha256").alias("low"), F.max("source_sha256").alias("high"))
    )
    same = F.col("sha256").eqNullSafe(F.col("low")) & F.col("sha256").eqNullSafe(F.col("high")) & F.col("wanted").eqNullSafe(F.col("events"))
    rows = wanted.join(present, "day", "full").where(~same).select("day", F.coalesce("sha256", F.lit("")).alias("sha256")).orderBy("day").collect()
    return [(row.day, row.sha256) for row in rows]


def day_stats(inputs: Inputs, pending: Sequence[tuple[date, str]]) -> DataFrame:
    """Rows of feature.item_day_stat for the pending file days; only their partitions of raw.interaction are read."""
    from pyspark.sql import functions as F

    assert inputs.spark is not None
    days = local_frame(inputs.spark, [{"logical_date": day, "sha256": digest} for day, digest in pending], "logical_date date, sha256 string")
    events = inputs.frame("raw.interaction").where(F.col("file_date").isin([F.lit(day) for day, _ in pending]))
    return inputs.query("feature.item_day_stat", {"interaction": events, "pending": F.broadcast(days)})


def merged_stats(counted: DataFrame, fresh: DataFrame, pending: Sequence[tuple[date, str]], logical_date: date) -> DataFrame:
    """The counts up to the logical date as they will be once `fresh` is published."""
    from pyspark.sql import functions as F

    kept = counted.where((F.col("logical_date") <= F.lit(logical_date)) & ~F.col("logical_date").isin([F.lit(day) for day, _ in pending]))
    return kept.unionByName(fresh)


def item_popularity(inputs: Inputs, stats: DataFrame, base: Ground, params: config.ItemPopularity, logical_date: date) -> DataFrame:
    """Rows of feature.item_popularity for one night.

    Args:
        stats: the counts of the window's files, and of those that are not in `base.rows` yet.
    """
    from pyspark.sql import functions as F

    listed = inputs.frame("raw.item").where((F.col("file_date") > F.lit(base.after)) & (F.col("file_date") <= F.lit(logical_date)))
    scored = inputs.query(
        TABLE,
        {"item_day_stat": stats, "listed": listed.select("item_id"), "before": base.rows.select("item_id", "evidence_count", "first_event_date")},
        name="scored",
        logical_date=logical_date,
        added_up=base.after,
        window_days=params.window_days,
        half_life_days=params.half_life_days,
    ).persist()  # ranks read it twice: the steps of popularity and the items on them
    return inputs.query(
        TABLE,
        {"scored": scored},
        logical_date=logical_date,
        inputs_sha256=base.inputs_sha256,
        head_share=params.head_share,
        tail_share=params.tail_share,
    )
