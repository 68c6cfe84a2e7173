"""Housekeeping that never touches what a reader may hold: old audit branches, snapshots no reference needs, small files.

`sid.item_sid` is written once in its final layout and is never compacted. Iceberg itself keeps every snapshot a tag or branch holds.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline import lakehouse
from pipeline.config import Maintain
from pipeline.context import Context
from pipeline.stages import StageResult

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
NEVER_COMPACTED = frozenset({"sid.item_sid"})


def run(inputs: Inputs, params: Maintain, ctx: Context) -> StageResult:
    """Counts of what was dropped, expired and rewritten; with the parameter dry_run=true only the branches that would go."""
    spark = inputs.spark
    assert spark is not None
    stale = stale_branches(spark, ctx, params.keep_branches_days)
    outputs = {"branches": [f"{table}:{branch}" for table, branch in stale]}
    if ctx.param("dry_run") == "true":
        return StageResult(outputs=outputs, metrics={"stale_branches": float(len(stale))}, status="skipped")
    for table, branch in stale:
        lakehouse.drop_branch(spark, table, branch)
    older = f"{(ctx.cutoff - timedelta(days=params.keep_snapshots_days)):%Y-%m-%d %H:%M:%S}"
    expired = sum(_expire(spark, table, older) for table in lakehouse.table_names())
    rewritten = sum(_compact(spark, table) for table in lakehouse.table_names() if table not in NEVER_COMPACTED)
    logger.info("maintained branches=%d files_deleted=%d files_rewritten=%d", len(stale), expired, rewritten)
    return StageResult(outputs=outputs, metrics={"stale_branches": float(len(stale)), "files_deleted": float(expired), "files_rewritten": float(rewritten)})


def stale_branches(spark: SparkSession, ctx: Context, days: int) -> list[tuple[str, str]]:
    """(table, audit branch) of every audit branch whose newest snapshot is older than `days` before the cutoff."""
    from pyspark.sql import functions as F

    limit = (ctx.cutoff - timedelta(days=days)).replace(tzinfo=None)
    found: list[tuple[str, str]] = []
    for table in lakehouse.table_names():
        references = spark.table(f"{lakehouse.CATALOG}.{table}.refs").where(F.col("name").startswith("audit_"))
        written = spark.table(f"{lakehouse.CATALOG}.{table}.snapshots").select("snapshot_id", "committed_at")
        old = references.join(written, "snapshot_id").where(F.col("committed_at") < F.lit(limit))
        found += [(table, row.name) for row in old.select("name").collect()]
    return found


def _expire(spark: SparkSession, table: str, older: str) -> int:
    arguments = {"table": table, "older": older}
    row = spark.sql("CALL lake.system.expire_snapshots(table => :table, older_than => CAST(:older AS TIMESTAMP))", args=arguments).collect()[0]
    return sum(value or 0 for value in row.asDict().values())


def _compact(spark: SparkSession, table: str) -> int:
    row = spark.sql("CALL lake.system.rewrite_data_files(table => :table)", args={"table": table}).collect()[0]
    return int(row.rewritten_data_files_count)
