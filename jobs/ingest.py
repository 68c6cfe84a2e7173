"""Day files become raw.interaction and raw.item; every row that is refused lands in raw.rejected_row with a reason, none is lost.

Here: reading, judging and hashing rows. Not here: which files there are and what their columns mean (pipeline/datasets), gates (sql/raw/*/expectations.json).
An item's unusable image is quarantined too, but the item goes on without it: such rows do not count as rejected rows of their file.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.images import image_reader
from jobs.plan_night import check_finished, half_ingests
from pipeline import config
from pipeline.context import Context, PlannedFile
from pipeline.datasets import base, dataset
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from jobs.inputs import Inputs
    from pipeline.datasets.base import Kind, SourceSpec

CORRUPT = "_corrupt_record"
EVENT_TYPES = {"user_id": "string", "item_id": "string", "event_ts": "timestamp", "event_type": "string", "value": "double", "session_id": "string"}
ITEM_TYPES = {
    "item_id": "string",
    "title": "string",
    "text": "string",
    "category": "string",
    "image_uri": "string",
    "text_vector": "array<float>",
    "image_vector": "array<float>",
}
JUDGED = {"file_date": "date", "source": "string", "reason": "string", "detail": "string", "row": "string"}
LEDGER_DDL = "file_date date, kind string, path string, sha256 string, bytes bigint, rows_in bigint, rejected bigint, status string"
IMAGE_DDL = "image_uri string, image_sha256 string, image_reason string, image_detail string"
NO_COLUMN = ("NULL", "CAST(NULL AS STRING)")


@dataclass(frozen=True)
class Tally:
    """Rows of one (file day, kind) by verdict: `reasons` counts the refused ones, `late` the accepted events of an earlier day."""

    rows_in: int = 0
    late: int = 0
    reasons: Mapping[str, int] | None = None

    @property
    def rejected(self) -> int:
        """Rows that went to raw.rejected_row."""
        return sum((self.reasons or {}).values())


Tallies = Mapping[tuple[date, str], Tally]


def run(inputs: Inputs, params: config.Ingest, ctx: Context) -> StageResult:
    """The night's rows, quarantine and ledger (the marker, published last).

    Raises: UpstreamMissing for an open day without a file or half an ingest of an earlier day; ContractError for a file that changed since it was planned,
        cannot be read or gave no rows.
    """
    assert inputs.spark is not None
    inputs.spark.catalog.clearCache()  # Spark knows cached rows of a file by its path: a retry on a corrected file would read the old ones
    source = ctx.config.source
    spec = dataset(source.dataset).prepare(source, ctx.home.folder("data"), ctx.config.seed)
    check_catalogue(source, spec)
    check_finished(half_ingests(ctx.home, ctx.config), ctx.plan().files, ctx.logical_date)  # again: a backfill may have been killed since the plan
    files = checked_files(ctx.plan().files, spec, ctx.logical_date)
    events = judge_events(read_rows(inputs.spark, spec, files, "events"), spec.event_key).persist()
    items = judge_items(read_rows(inputs.spark, spec, files, "items")).persist() if spec.items_path else None
    tallies = {**tally(events, "events"), **(tally(items, "items") if items is not None else {})}
    check_all_read(files, spec, tallies)
    check_unchanged(files, ctx.logical_date)  # again: all rows are read by now, and they must be those of the bytes that the ledger will name
    observed = accepted(items) if items is not None else catalogue_from_events(accepted(events))
    hashed = hash_content(observed, images_of(observed, spec, params.max_image_bytes)).persist()
    rejected = rejected_rows([events] if items is None else [events, items], hashed)
    retired = retired_share(inputs, spec, files, hashed)
    writes = writes_of(inputs, spec, files, events, hashed, rejected, tallies, retired)
    return StageResult(writes=writes, metrics={**tally_metrics(files, tallies), **image_metrics(hashed), "retired_share": retired})


# ---------------------------------------------------------------- files


def check_catalogue(source: config.Source, spec: SourceSpec) -> None:
    """Nothing, unless the profile asks for retirement by absence where the data set has no snapshots: later stages go by the profile.

    Raises: ConfigError.
    """
    if (source.catalogue == "snapshot") != (spec.catalogue == "snapshot"):
        raise ConfigError(
            f"data set {source.dataset} has no such catalogue", expected=f'catalogue = "{spec.catalogue}"', found=source.catalogue, where="source.catalogue"
        )


def checked_files(files: Sequence[PlannedFile], spec: SourceSpec, logical_date: date) -> tuple[PlannedFile, ...]:
    """The planned files, when each still is what was planned and has the declared columns.

    Raises: UpstreamMissing for an open day without a file; ContractError for another digest or other columns.
    """
    missing = sorted({file.file_date for file in files if file.status == "missing"})
    if missing:
        raise UpstreamMissing(
            f"no file for {len(missing)} open day(s)",
            expected=", ".join(file.path for file in files if file.status == "missing"),
            found="no such file",
            where=", ".join(map(str, missing)),
            next_command=f"sid run ingest --date {missing[0]}",
        )
    check_unchanged(files, logical_date)
    for file in files:
        if file.status == "present":
            base.check_header(Path(file.path), spec.format(_kind(file)), spec.columns(_kind(file)))
    return tuple(files)


def check_unchanged(files: Sequence[PlannedFile], logical_date: date) -> None:
    """Nothing, when every file that is there holds the bytes that were planned.

    Raises: ContractError naming the one that does not.
    """
    for file in files:
        path = Path(file.path)
        found = "" if file.status != "present" else base.file_digest(path) if path.is_file() else "no such file"
        if found != file.sha256:
            raise ContractError(
                "a file changed after the night was planned",
                expected=f"sha256 {file.sha256}",
                found=found,
                where=file.path,
                next_command=f"sid run plan_night --date {logical_date}",
            )


def check_all_read(files: Sequence[PlannedFile], spec: SourceSpec, tallies: Tallies) -> None:
    """Nothing, when every file that has rows gave some.

    Raises: ContractError naming a file whose rows were left out: the day must not count as loaded and empty.
    """
    for file in files:
        if file.status == "present" and (file.file_date, file.kind) not in tallies and base.has_rows(Path(file.path), spec.format(_kind(file))):
            raise ContractError(
                "a file with rows gave none",
                expected="a name that Spark does not skip (it skips names that begin with _ or .)",
                found="0 rows read",
                where=file.path,
                next_command="rename the file or change its pattern in the profile",
            )


def _kind(file: PlannedFile) -> Kind:
    return "items" if file.kind == "items" else "events"


# ---------------------------------------------------------------- reading


def read_rows(spark: SparkSession, spec: SourceSpec, files: Sequence[PlannedFile], kind: Kind) -> DataFrame:
    """Every row of the files of one kind, read at once: file_date, source, reason (null = good so far), detail, row, and our columns.

    `row` is the source's row as JSON, only where it is refused. Events of a `from_events` source also carry `catalogue`, a struct of item columns.
    Files with the same columns in the same order share one read: Spark matches the columns of CSV files by place, not by name.
    """
    present = [file for file in files if file.kind == kind and file.status == "present"]
    groups: dict[tuple[str, ...], list[PlannedFile]] = defaultdict(list)
    for file in present:
        groups[_layout(Path(file.path), spec.format(kind))].append(file)
    frames = [_judged(_read_group(spark, spec, kind, layout, group), spec, kind) for layout, group in sorted(groups.items())]
    if not frames:
        return local_frame(spark, [], _judged_ddl(spec, kind))
    result = frames[0]
    for frame in frames[1:]:
        result = result.unionByName(frame)
    return result


def _layout(path: Path, file_format: base.FileFormat) -> tuple[str, ...]:
    """What files must have in common to be read together: CSV header or Parquet schema.

    Raises: ContractError for a CSV header that names a column twice.
    """
    if file_format == "jsonl":
        return ()
    if file_format == "parquet":
        import pyarrow.parquet as pq

        return tuple(f"{field.name}:{field.type}" for field in pq.read_schema(path))
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream))
    if len({name.lower() for name in header}) < len(header):
        raise ContractError("a CSV file names a column twice", expected="different names, upper and lower case alike", found=", ".join(header), where=str(path))
    return tuple(header)


def _read_group(spark: SparkSession, spec: SourceSpec, kind: Kind, layout: tuple[str, ...], files: Sequence[PlannedFile]) -> DataFrame:
    """The files' own columns plus `_corrupt_record`, `file_date` and `source` under names no file uses."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType, StructField, StructType

    paths = [literal_path(Path(file.path)) for file in files]
    reader = spark.read.option("mode", "PERMISSIVE").option("columnNameOfCorruptRecord", CORRUPT)
    file_format = spec.format(kind)
    if file_format == "csv":
        schema = StructType([StructField(name, StringType()) for name in (*layout, CORRUPT)])
        # Quotes are doubled, as CSV writers do; only catalogue texts may hold line breaks, and reading those cannot be split.
        frame = reader.schema(schema).csv(paths, header=True, quote='"', escape='"', multiLine=kind == "items")
    elif file_format == "jsonl":
        frame = reader.schema(f"{base.schema_ddl(spec, kind)}, {CORRUPT} STRING").json(paths)
    else:
        frame = spark.read.parquet(*paths).withColumn(CORRUPT, F.lit(None).cast("string"))
    places = [{"__path": os.path.normpath(file.path), "__file_date": file.file_date, "__source": f"{kind}/{Path(file.path).name}"} for file in files]
    days = local_frame(spark, places, "__path string, __file_date date, __source string")
    return frame.withColumn("__path", _plain_path()).join(F.broadcast(days), "__path").drop("__path")


def literal_path(path: Path) -> str:
    """A local file's path as Spark's readers take it: they see a glob in it, and would not decode an address with %20."""
    return "file://" + re.sub(r"([\\*?{}\[\]])", r"\\\1", str(path))


def _plain_path() -> Column:
    """The row's file as a plain path: Java and Python percent-encode different characters in an address, so addresses are not compared."""
    from pyspark.sql import functions as F

    address = F.regexp_replace(F.col("_metadata.file_path"), "^file:/+", "/")
    return F.url_decode(F.regexp_replace(address, r"\+", "%2B"))  # it decodes forms, where a plus is a space


def _judged_ddl(spec: SourceSpec, kind: Kind) -> str:
    columns = {**JUDGED, **(EVENT_TYPES if kind == "events" else ITEM_TYPES)}
    if kind == "events" and spec.catalogue == "from_events":
        columns["catalogue"] = f"struct<{', '.join(f'{name}: {type_}' for name, type_ in ITEM_TYPES.items())}>"
    return ", ".join(f"{name} {type_}" for name, type_ in columns.items())


def local_frame(spark: SparkSession, rows: Sequence[Mapping[str, Any]], ddl: str) -> DataFrame:
    """A few rows as a DataFrame that the JVM makes by itself; `createDataFrame` of a list would start Python workers to read them back."""
    from pyspark.sql import functions as F

    text = F.lit(json.dumps(list(rows), default=str))
    return spark.range(1).select(F.explode(F.from_json(text, f"array<struct<{ddl}>>")).alias("row")).select("row.*")


# ---------------------------------------------------------------- judging


def _judged(frame: DataFrame, spec: SourceSpec, kind: Kind) -> DataFrame:
    """A group's rows under our columns with the first reason that refuses each: malformed, the data set's rules, then the rules all sets share."""
    from pyspark.sql import functions as F

    raw = F.struct(*[F.col(base.quoted(name)) for name in frame.columns if name not in (CORRUPT, "__file_date", "__source")])
    rules = spec.event_rules if kind == "events" else spec.item_rules
    verdict = [_verdict("malformed_row", F.col(CORRUPT).isNotNull(), F.lit("the line does not have the columns of its file"))]
    verdict += [_verdict(reason, F.expr(bad), F.lit(bad)) for reason, bad in rules]
    ours = _selected(spec.event_select, EVENT_TYPES) if kind == "events" else _selected(spec.item_select, ITEM_TYPES)
    if kind == "events" and spec.catalogue == "from_events":
        ours.append(F.struct(*_selected(spec.item_select, ITEM_TYPES)).alias("catalogue"))
    first = frame.select(
        F.col("__file_date").alias("file_date"), F.col("__source").alias("source"), F.coalesce(*verdict).alias("verdict"),
        F.coalesce(F.col(CORRUPT), F.to_json(raw)).alias("row"), *ours,
    )  # fmt: skip
    shared = _event_verdicts() if kind == "events" else [_no_text("missing_item", "item_id")]
    return _settle(first, F.coalesce("verdict", *shared))


def _selected(select: Mapping[str, str], types: Mapping[str, str]) -> list[Column]:
    from pyspark.sql import functions as F

    return [F.expr(select.get(name, "NULL")).cast(type_).alias(name) for name, type_ in types.items()]


def _event_verdicts() -> list[Column]:
    """The rules all event files share; a late event (of a day before its file's) is none of them."""
    from pyspark.sql import functions as F

    value, moment = F.col("value"), F.col("event_ts")
    wild = value.isNull() | F.isnan(value) | (F.abs(value) == float("inf"))
    return [
        _no_text("missing_user", "user_id"),
        _no_text("missing_item", "item_id"),
        _verdict("bad_time", moment.isNull(), F.lit("event_ts cannot be read")),
        _verdict("future_event", moment >= F.date_add("file_date", 1), F.concat(F.lit("after the day of its file: "), moment.cast("string"))),
        _verdict("bad_value", wild, F.lit("value is not a finite number")),
    ]


def _no_text(reason: str, column: str) -> Column:
    from pyspark.sql import functions as F

    return _verdict(reason, F.col(column).isNull() | (F.trim(column) == ""), F.lit(f"{column} is empty"))


def _verdict(reason: str, bad: Column, detail: Column) -> Column:
    """A struct (reason, detail) where `bad` is true, else null."""
    from pyspark.sql import functions as F

    return F.when(F.coalesce(bad, F.lit(False)), F.struct(F.lit(reason).alias("reason"), detail.cast("string").alias("detail")))


def _settle(frame: DataFrame, verdict: Column) -> DataFrame:
    """The frame with reason and detail of the verdict; `row` stays only where there is one."""
    from pyspark.sql import functions as F

    rest = [name for name in frame.columns if name not in ("verdict", *JUDGED)]
    judged = frame.withColumn("verdict", verdict)
    row = F.when(F.col("verdict").isNotNull(), F.col("row")).alias("row")
    return judged.select("file_date", "source", F.col("verdict.reason").alias("reason"), F.col("verdict.detail").alias("detail"), row, *rest)


def judge_events(frame: DataFrame, key: Sequence[str]) -> DataFrame:
    """The events with repeats refused as duplicate_event: of the good rows of one file that are equal on `key` the smallest stays."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    good = F.col("reason").isNull()
    rest = [name for name in frame.columns if name not in (*JUDGED, *key)]
    place = F.row_number().over(Window.partitionBy("file_date", good, *key).orderBy(*rest))
    again = _verdict("duplicate_event", good & (place > 1), F.lit(f"another row of the file has the same {', '.join(key)}"))
    return _with_late_verdict(frame, [again], tuple(EVENT_TYPES))


def judge_items(frame: DataFrame) -> DataFrame:
    """The catalogue rows with identical repeats refused as duplicate_item, and every row of an id with two contents on one day as conflicting_item."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    good = F.col("reason").isNull()
    content = F.sha2(F.to_json(F.struct(*ITEM_TYPES)), 256)
    same_id = Window.partitionBy("file_date", good, "item_id")
    verdicts = [
        _verdict("conflicting_item", good & (F.min("__content").over(same_id) != F.max("__content").over(same_id)), F.lit("two contents on one day")),
        _verdict("duplicate_item", good & (F.row_number().over(same_id.orderBy("__content")) > 1), F.lit("the same row stands in the file before")),
    ]
    return _with_late_verdict(frame.withColumn("__content", content), verdicts, tuple(ITEM_TYPES)).drop("__content")


def _with_late_verdict(frame: DataFrame, verdicts: Sequence[Column], columns: Sequence[str]) -> DataFrame:
    """Verdicts that look at several rows, for rows no earlier verdict refused; their JSON row is in our columns."""
    from pyspark.sql import functions as F

    judged = frame.withColumn("verdict", F.coalesce(*verdicts))
    ours = F.when(F.col("verdict").isNotNull(), F.to_json(F.struct(*columns)))
    return (
        judged.withColumn("row", F.coalesce("row", ours))
        .withColumn("reason", F.coalesce("reason", "verdict.reason"))
        .withColumn("detail", F.coalesce("detail", "verdict.detail"))
        .drop("verdict")
    )


def accepted(judged: DataFrame) -> DataFrame:
    """The rows that no rule refused."""
    return judged.where("reason IS NULL").drop("reason", "detail", "row")


# ---------------------------------------------------------------- catalogue


def catalogue_from_events(events: DataFrame) -> DataFrame:
    """One row per (file day, item) in item columns: its most frequent description that day, ties by text order; rows without any are no observation."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    columns = [name for name in ITEM_TYPES if name != "item_id"]
    seen = events.select("file_date", "source", "item_id", *[F.col(f"catalogue.{name}").alias(name) for name in columns])
    counted = seen.where(F.coalesce("title", "text").isNotNull()).groupBy("file_date", "source", "item_id", *columns).count()
    best = Window.partitionBy("file_date", "item_id").orderBy(F.desc("count"), *columns)
    return counted.withColumn("place", F.row_number().over(best)).where("place = 1").drop("count", "place")


def images_of(items: DataFrame, spec: SourceSpec, max_image_bytes: int) -> DataFrame:
    """(image_uri, image_sha256, image_reason, image_detail) of every image that an item names; each is read once."""
    named = items.select("image_uri").where("trim(image_uri) <> ''").distinct()
    if spec.item_select.get("image_uri", "NULL").upper() in NO_COLUMN:
        return local_frame(items.sparkSession, [], IMAGE_DDL)  # a source without pictures starts no Python worker
    tasks = named.sparkSession.sparkContext.defaultParallelism
    frame = named.repartition(tasks, "image_uri")  # asked for by number: Spark would join short rows into one task, and each of them is a picture to fetch
    return frame.mapInArrow(image_reader(spec.image_root, max_image_bytes), IMAGE_DDL)


def hash_content(items: DataFrame, images: DataFrame) -> DataFrame:
    """The items with text_hash, image_hash, content_hash, and image_reason / image_detail where a named image cannot be used.

    A given vector is part of the hash of its modality, so that a changed vector is a changed content.
    """
    from pyspark.sql import functions as F

    texts = {name: F.when(F.trim(name) != "", F.col(name)) for name in ("title", "text", "category", "image_uri")}
    frame = items.withColumns(texts).join(images, "image_uri", "left")
    frame = frame.withColumns(
        {"text_hash": _modality_hash(F.sha2("text", 256), "text_vector"), "image_hash": _modality_hash(F.col("image_sha256"), "image_vector")}
    )
    content = F.to_json(F.struct("title", "text", "category", "image_hash", "text_vector", "image_vector"))
    return frame.withColumn("content_hash", F.sha2(content, 256)).drop("image_sha256")


def _modality_hash(content: Column, vector: str) -> Column:
    from pyspark.sql import functions as F

    given = F.sha2(F.concat_ws("|", content, F.to_json(vector)), 256)
    return F.when(F.col(vector).isNotNull(), given).otherwise(content)


# ---------------------------------------------------------------- counting


def tally(judged: DataFrame, kind: Kind) -> dict[tuple[date, str], Tally]:
    """Rows by file day and verdict, counted once."""
    from pyspark.sql import functions as F

    late = F.to_date("event_ts") < F.col("file_date") if kind == "events" else F.lit(False)
    rows = judged.groupBy("file_date", "reason").agg(F.count(F.lit(1)).alias("rows"), F.count_if(late).alias("late")).collect()
    result: dict[tuple[date, str], Tally] = {}
    for row in rows:
        before = result.get((row.file_date, kind), Tally())
        reasons = dict(before.reasons or {}) | ({row.reason: row.rows} if row.reason else {})
        result[row.file_date, kind] = Tally(before.rows_in + row.rows, before.late + (0 if row.reason else row.late), reasons)
    return result


def tally_metrics(files: Sequence[PlannedFile], tallies: Tallies) -> dict[str, float]:
    """What MLflow shows of the night's rows: totals, share rejected, and one number per reason."""
    rows_in, rejected = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("rows_in", "rejected"))
    reasons: dict[str, float] = defaultdict(float)
    for entry in tallies.values():
        for reason, count in (entry.reasons or {}).items():
            reasons[f"rejected/{reason}"] += count
    return {
        "rows_in": float(rows_in),
        "rows_accepted": float(rows_in - rejected),
        "rows_rejected": float(rejected),
        "rejected_share": rejected / rows_in if rows_in else 0.0,
        "late_events": float(sum(entry.late for entry in tallies.values())),
        "files_loaded": float(sum(file.status == "present" for file in files)),
        "files_declared_empty": float(sum(file.status == "declared_empty" for file in files)),
        **reasons,
    }


def image_metrics(hashed: DataFrame) -> dict[str, float]:
    """Items observed, and images quarantined by reason."""
    counts = {row.image_reason: float(row["count"]) for row in hashed.groupBy("image_reason").count().collect()}
    return {"items_observed": sum(counts.values()), **{f"rejected/{reason}": count for reason, count in counts.items() if reason}}


def retired_share(inputs: Inputs, spec: SourceSpec, files: Sequence[PlannedFile], hashed: DataFrame) -> float:
    """Largest share of one catalogue snapshot's items that the next snapshot lacks, over the snapshots loaded tonight; 0 for other catalogues."""
    if spec.catalogue != "snapshot":
        return 0.0
    tonight = {file.file_date for file in files if file.kind == "items"}
    loaded = {file.file_date for file in files if file.kind == "items" and file.status == "present"}
    ledger = inputs.frame("raw.source_file").where("kind = 'items' AND status = 'loaded'").select("file_date").collect()
    days = sorted(({row.file_date for row in ledger} - tonight) | loaded)
    steps = [(earlier, later) for earlier, later in itertools.pairwise(days) if {earlier, later} & loaded]
    return _largest_loss(inputs.frame("raw.item"), hashed, tonight, steps)


def _largest_loss(before: DataFrame, hashed: DataFrame, tonight: Iterable[date], steps: Sequence[tuple[date, date]]) -> float:
    """Largest share of the items of `earlier` that `later` lacks, over the steps."""
    from pyspark.sql import functions as F

    if not steps:
        return 0.0
    wanted = [F.lit(day) for day in sorted({day for step in steps for day in step} - set(tonight))]
    kept = before.where(F.col("file_date").isin(wanted)) if wanted else before.limit(0)
    seen = kept.select("file_date", "item_id").unionByName(hashed.select("file_date", "item_id"))
    pairs = local_frame(hashed.sparkSession, [{"file_date": earlier, "later": later} for earlier, later in steps], "file_date date, later date")
    here = seen.select(F.col("file_date").alias("later"), "item_id", F.lit(0.0).alias("lost"))
    lost = (
        seen.join(F.broadcast(pairs), "file_date")
        .join(here, ["later", "item_id"], "left")
        .groupBy("later")
        .agg(F.avg(F.coalesce("lost", F.lit(1.0))).alias("share"))
    )
    return float(lost.agg(F.max("share")).first()[0] or 0.0)  # type: ignore[index]


# ---------------------------------------------------------------- writing


def rejected_rows(judged: Sequence[DataFrame], hashed: DataFrame) -> DataFrame:
    """Rows of raw.rejected_row: refused rows of every kind and the images that items go on without."""
    from pyspark.sql import functions as F

    image = hashed.where("image_reason IS NOT NULL").select(
        "file_date",
        "source",
        F.col("image_reason").alias("reason"),
        F.col("image_detail").alias("detail"),
        F.to_json(F.struct("item_id", "image_uri")).alias("row"),
    )
    result = image
    for frame in judged:
        result = result.unionByName(frame.where("reason IS NOT NULL").select(*JUDGED))
    return result.withColumnRenamed("file_date", "logical_date").withColumn("stage", F.lit("ingest"))


def ledger_rows(files: Sequence[PlannedFile], tallies: Tallies) -> list[dict[str, Any]]:
    """Rows of raw.source_file, one per planned file."""
    rows = []
    for file in files:
        entry = tallies.get((file.file_date, file.kind), Tally())
        counts = {"rows_in": entry.rows_in, "rejected": entry.rejected}
        rows.append({**file.model_dump(), **counts, "status": "loaded" if file.status == "present" else file.status})
    return rows


def writes_of(
    inputs: Inputs,
    spec: SourceSpec,
    files: Sequence[PlannedFile],
    events: DataFrame,
    hashed: DataFrame,
    rejected: DataFrame,
    tallies: Tallies,
    retired: float,
) -> tuple[Write, ...]:
    """The four writes, the ledger last, none without files; a kind of a day that was not planned keeps its rows in the tables both kinds share."""
    assert inputs.spark is not None
    event_days, all_days = _days(files, ("events",)), _days(files, ("events", "items"))
    if not all_days:
        return ()
    item_days = event_days if spec.items_path is None else _days(files, ("items",))
    ledger = local_frame(inputs.spark, ledger_rows(files, tallies), LEDGER_DDL)
    others: dict[str, list[date]] = {kind: sorted(set(all_days) - set(_days(files, (kind,)))) for kind in spec.kinds}
    copies = any(others.values())
    if copies:
        ledger = ledger.unionByName(_unplanned(inputs.frame("raw.source_file"), "file_date", "kind", others))
        earlier = inputs.frame("raw.rejected_row").where("stage = 'ingest'")
        rejected = rejected.unionByName(_unplanned(earlier, "logical_date", "substring_index(source, '/', 1)", others))
    raw_event, raw_item = accepted(events).select("file_date", *EVENT_TYPES), hashed.drop("source", "image_reason", "image_detail")
    return (
        *([Write(table="raw.interaction", frame=raw_event, dates=event_days)] if event_days else []),
        *([Write(table="raw.item", frame=raw_item, dates=item_days, metrics={"retired_share": retired})] if item_days else []),
        Write(table="raw.rejected_row", frame=rejected, dates=all_days, slice={"stage": "ingest"}, copies=copies),
        Write(table="raw.source_file", frame=ledger, dates=all_days, copies=copies),
    )


def _days(files: Sequence[PlannedFile], kinds: Sequence[str]) -> tuple[date, ...]:
    return tuple(sorted({file.file_date for file in files if file.kind in kinds}))


def _unplanned(frame: DataFrame, day: str, kind: str, others: Mapping[str, Sequence[date]]) -> DataFrame:
    """Rows of (day, kind) pairs that tonight's plan does not replace."""
    from pyspark.sql import functions as F

    keep = F.lit(False)
    for name, days in others.items():
        keep = keep | ((F.expr(kind) == name) & F.col(day).isin([F.lit(value) for value in days]))
    return frame.where(keep)
