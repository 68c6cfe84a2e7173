"""Counts per item and day for the files that changed, and from them the decayed popularity of every item known at the cutoff.

Only the events of new or corrected day files are read; everything older comes from feature.item_day_stat. The definitions stand in pipeline/popularity.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from jobs.ingest import local_frame
from pipeline import config
from pipeline.context import SQL, Context
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)


def run(inputs: Inputs, params: config.ItemPopularity, ctx: Context) -> StageResult:
    """The counts of the day files that changed since they were last counted, and the night's popularity."""
    day = ctx.logical_date
    ledger, counted = inputs.frame("raw.source_file"), inputs.frame("feature.item_day_stat")
    pending = pending_days(ledger, counted, day)
    fresh = day_stats(inputs, pending).persist()
    merged = merged_stats(counted, fresh, pending, day)
    known = items_as_of(inputs.frame("raw.item"), ledger, first_events(merged), day, ctx.config.source.catalogue)
    popularity = item_popularity(inputs, merged, known, params, day)
    logger.info("counting day files=%d date=%s", len(pending), day)
    stats = Write(table="feature.item_day_stat", frame=fresh, dates=tuple(day for day, _ in pending))
    return StageResult(
        writes=(*([stats] if pending else []), Write(table="feature.item_popularity", frame=popularity, dates=(day,))),
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


def first_events(stats: DataFrame) -> DataFrame:
    """(item_id, first_event_date) of every item with events."""
    from pyspark.sql import functions as F

    return stats.groupBy("item_id").agg(F.min("event_date").alias("first_event_date"))


def items_as_of(item: DataFrame, source_file: DataFrame, first_event: DataFrame, logical_date: date, catalogue: str) -> DataFrame:
    """Every item known at the logical date with its newest version, by sql/raw/item/as_of.sql.

    Columns: item_id, title, text, category, image_uri, hashes, vectors, valid_from, first_seen, retired_at; content is null for an item known by events only.
    """
    for name, frame in (("item", item), ("source_file", source_file), ("first_event", first_event)):
        frame.createOrReplaceTempView(name)
    text = (SQL / "raw" / "item" / "as_of.sql").read_text(encoding="utf-8")
    return item.sparkSession.sql(text, args={"logical_date": logical_date, "catalogue": catalogue})


def item_popularity(inputs: Inputs, stats: DataFrame, known: DataFrame, params: config.ItemPopularity, logical_date: date) -> DataFrame:
    """Rows of feature.item_popularity for one night."""
    return inputs.query(
        "feature.item_popularity",
        {"item_day_stat": stats, "known_item": known.select("item_id")},
        logical_date=logical_date,
        window_days=params.window_days,
        half_life_days=params.half_life_days,
        head_share=params.head_share,
        tail_share=params.tail_share,
    )
