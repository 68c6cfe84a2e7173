"""A night's popularity after D days of history: our incremental Spark job beside a full recount of the same day files by DuckDB and Polars.

Ours reads the night's events from raw.interaction, the older days of the window from feature.item_day_stat and what never decays from the night before; the
peers read the Parquet files of all days. The session of Spark is there before the clock starts. The frames alone and the whole stage (branch, audit, publish,
MLflow) are clocked apart.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from bench import Case, answered, peer

from jobs import item_popularity
from jobs.inputs import Inputs
from jobs.runner import run_stage
from pipeline import config, lakehouse
from pipeline import spark as spark_gate
from pipeline.context import Context, Home, Plan, write_json
from pipeline.stages import BY_NAME

NUMBER, TITLE = 7, "popularity"
ITEMS, SKEW = 200_000, 1.2
FIRST = date(2026, 1, 1)
DAYS = {"quick": (10, 30), "normal": (30, 90), "full": (30, 90)}
SHORT = 10_000_000  # events; fewer take the profile whose JVM compiles lightly
A_DAY = {"quick": (50_000,), "normal": (222_222,), "full": (222_222, 2_222_222)}  # 20 M and 200 M events in 90 days
NIGHTS = 4  # whole stages run one after the other; each finds its own day uncounted
CLOSE = 1e-12  # relative
COLUMNS = ("item_id", "popularity", "evidence_count", "first_event_date", "percentile", "popularity_decile", "popularity_stratum")
STAGE = BY_NAME["item_popularity"]
PARAMS = config.ItemPopularity()


@dataclass(frozen=True)
class World:
    """Day files, and a lake in which every day before the last NIGHTS ones is counted and the last of those days had its night."""

    files: Path
    home: Home
    loaded: config.Config
    days: int
    events: int

    def night(self, number: int = 0) -> date:
        """The first night that is not counted, or a later one."""
        return FIRST + timedelta(days=self.days - 1 + number)

    def until(self, night: date) -> list[str]:
        """The day files up to a night."""
        return [str(path) for path in sorted(self.files.glob("*.parquet")) if path.stem <= str(night)]


def cases(scale: str) -> Iterator[Case]:
    for events in A_DAY[scale]:
        for days in DAYS[scale]:
            with tempfile.TemporaryDirectory() as folder:
                world, started = _world(Path(folder), days, events)
                yield frames(world, started)
                yield stage(world)
                spark_gate.stop()


def frames(world: World, started: float) -> Case:
    """The night's rows and nothing else, against the peers."""
    night, cores = world.night(), torch.get_num_threads()
    snapshots = {table: lakehouse.current_snapshot(world.home, world.loaded.lake, table) for table in STAGE.inputs}
    inputs = Inputs(world.home, world.loaded.lake, snapshots, spark_gate.session(world.home, world.loaded.lake, world.loaded.launch))

    def ours() -> pa.Table:
        """The rows that the job would write."""
        found = item_popularity.run(inputs, PARAMS, _context(world, night))
        rows = pa.Table.from_batches(found.writes[-1].frame.select(*COLUMNS)._collect_as_arrow())
        found.writes[0].frame.unpersist()  # the next round counts anew
        return rows

    peers: dict[str, Callable[[], Any]] = {}
    if peer("duckdb") is not None:
        peers["DuckDB, all days again"] = partial(by_duckdb, world, night, cores)
    if peer("polars") is not None:
        peers["Polars, all days again"] = partial(by_polars, world, night)
    return Case(
        name=f"rows of a night, {world.days} days of {world.events:,} events",
        ours=ours,
        peers=peers,
        equal=same_rows,
        units=world.events * world.days,
        unit="events",
        target=1.0 if world.days >= max(DAYS["normal"]) else 0.0,
        rounds=3,
        series=f"popularity over days of {world.events:,} events",
        size=world.days,
        notices=tuple(f"{name} is not installed" for name in ("duckdb", "polars") if peer(name) is None),
        facts=lambda: {"start of JVM, session and tables, s, once a process": round(started, 1)},
    )


def stage(world: World) -> Case:
    """The whole stage as a night runs it; every call is the next night."""
    nights = iter(range(NIGHTS))
    return Case(
        name=f"the whole stage, {world.days} days of {world.events:,} events",
        ours=lambda: run_stage(_context(world, world.night(next(nights)))),
        rounds=NIGHTS - 1,
        units=world.events * world.days,
        unit="events",
        series=f"the stage over days of {world.events:,} events",
        size=world.days,
    )


def _context(world: World, night: date) -> Context:
    """The context of a night, its manifest beside it."""
    ctx = Context(config=world.loaded, home=world.home, stage=STAGE.name, logical_date=night, run_id=f"bench__{night}")
    plan = Plan(
        logical_date=night, tag=f"d{night:%Y%m%d}", revision=1, generation=1, start="", reason="bench", parent=None, files=(),
        input_fingerprint=str(night), config_hash=world.loaded.digest(), seed=0,
    )  # fmt: skip
    write_json(ctx.staging / "plan_night.json", {"stage": "plan_night", "status": "done", "outputs": plan.model_dump(mode="json")})
    return ctx


def same_rows(ours: pa.Table, theirs: pa.Table) -> str:
    """What is wrong, nothing when all columns are equal; sums are of whole numbers, so no order of adding shows."""
    mine, other = (rows.select(COLUMNS).sort_by("item_id") for rows in (ours, theirs))
    if len(mine) != len(other):
        return f"{len(other)} items, ours are {len(mine)}"
    for name in COLUMNS:
        left, right = mine[name], pc.cast(other[name], mine[name].type)
        doubles = pa.types.is_floating(left.type)
        apart = ~np.isclose(left.to_numpy(), right.to_numpy(), rtol=CLOSE, atol=0) if doubles else pc.fill_null(pc.not_equal(left, right), False).to_numpy()
        if apart.any() or left.null_count != right.null_count:
            return f"another {name}"
    return ""


# ---------------------------------------------------------------- the peers


def by_duckdb(world: World, night: date, cores: int) -> pa.Table:
    """The definitions of sql/feature/item_popularity over all events up to the night."""
    duckdb: Any = peer("duckdb")
    with duckdb.connect() as base:
        base.execute(f"SET threads={cores}")
        return base.sql(
            """
            WITH daily AS (
              SELECT item_id, date_diff('day', event_ts::DATE, $night) AS age, count(*) AS events FROM read_parquet($files) GROUP BY 1, 2
            ), scored AS (
              SELECT item_id, sum(CASE WHEN age < $window THEN events * round(pow(2.0, 32 - age / $half))::BIGINT ELSE 0 END) / pow(2.0, 32) AS popularity,
                sum(events)::BIGINT AS evidence_count, ($night - max(age)::INT)::DATE AS first_event_date
              FROM daily GROUP BY 1
            ), known AS (
              SELECT item_id, coalesce(popularity, 0.0) AS popularity, coalesce(evidence_count, 0) AS evidence_count, first_event_date
              FROM read_parquet($items) LEFT JOIN scored USING (item_id)
            ), placed AS (
              SELECT *, count(*) OVER () AS items, rank() OVER (ORDER BY popularity) - 1 AS below, count(*) OVER (PARTITION BY popularity) AS ties,
                row_number() OVER (ORDER BY popularity DESC, item_id) AS place
              FROM known
            )
            SELECT item_id, popularity, evidence_count, first_event_date, (below + (ties - 1) / 2.0) / (items - 1) AS percentile,
              least(floor(percentile * 10), 9)::INT AS popularity_decile,
              CASE WHEN popularity = 0 THEN 'tail' WHEN place <= floor($head * items + 0.5) THEN 'head'
                WHEN place > items - floor($tail * items + 0.5) THEN 'tail' ELSE 'torso' END AS popularity_stratum
            FROM placed
            """,
            params={"night": night, "files": world.until(night), "items": str(world.files / "items" / "items.parquet"), **_parameters()},
        ).to_arrow_table()


def _parameters() -> dict[str, float]:
    return {"window": PARAMS.window_days, "half": PARAMS.half_life_days, "head": PARAMS.head_share, "tail": PARAMS.tail_share}


def by_polars(world: World, night: date) -> pa.Table:
    """The same as one lazy frame."""
    pl: Any = peer("polars")
    age, events, value = pl.col("age"), pl.col("events"), pl.col("popularity")
    daily = pl.scan_parquet(world.until(night)).group_by("item_id", pl.col("event_ts").dt.date().alias("day")).agg(pl.len().cast(pl.Int64).alias("events"))
    daily = daily.with_columns((pl.lit(night) - pl.col("day")).dt.total_days().alias("age"))
    units = pl.lit(2.0).pow(32 - age / PARAMS.half_life_days).round().cast(pl.Int64)
    weight = pl.when(age < PARAMS.window_days).then(events * units).otherwise(0)
    scored = daily.group_by("item_id").agg(
        (weight.sum() * 2.0**-32).alias("popularity"), events.sum().alias("evidence_count"), pl.col("day").min().alias("first_event_date")
    )
    known = pl.scan_parquet(world.files / "items" / "items.parquet").join(scored, on="item_id", how="left")
    known = known.with_columns(value.fill_null(0.0), pl.col("evidence_count").fill_null(0)).sort("popularity", "item_id", descending=[True, False])
    items, place = pl.len(), pl.int_range(1, pl.len() + 1)
    percentile = (value.rank("average") - 1) / (items - 1)
    head, tail = ((share * items + 0.5).floor() for share in (PARAMS.head_share, PARAMS.tail_share))
    stratum = pl.when(value == 0).then(pl.lit("tail")).when(place <= head).then(pl.lit("head")).when(place > items - tail).then(pl.lit("tail"))
    found = known.with_columns(
        percentile.alias("percentile"),
        (percentile * 10).floor().clip(upper_bound=9).cast(pl.Int32).alias("popularity_decile"),
        stratum.otherwise(pl.lit("torso")).alias("popularity_stratum"),
    )
    rows: pa.Table = found.select(COLUMNS).collect(engine="streaming").to_arrow()
    return rows


# ---------------------------------------------------------------- the lake before the night


def _world(folder: Path, days: int, events: int) -> tuple[World, float]:
    """The day files and the lake, and the seconds that the JVM, the session and the empty tables took."""
    (folder / "files" / "items").mkdir(parents=True)
    (folder / "counted").mkdir()
    names = pa.array(np.char.add("item", np.char.zfill(np.arange(ITEMS).astype(str), 7)))
    pq.write_table(pa.table({"item_id": names}), folder / "files" / "items" / "items.parquet")
    share_N = np.cumsum(np.arange(1, ITEMS + 1) ** -SKEW)
    generator = np.random.default_rng(0)
    for number in range(days + NIGHTS - 1):
        _day(folder, FIRST + timedelta(days=number), generator.permutation(np.searchsorted(share_N / share_N[-1], generator.random(events))), names)
    loaded = config.load("tiny" if days * events < SHORT else "shop", (f"launch.master=local[{torch.get_num_threads()}]", "launch.driver_memory=4g"))
    world = World(folder / "files", Home(folder / "home"), loaded, days, events)
    session, seconds, _ = answered(lambda: _session(world))
    _fill(session, world)
    run_stage(_context(world, world.night(-1)))
    return world, seconds


def _session(world: World) -> Any:
    session = spark_gate.session(world.home, world.loaded.lake, world.loaded.launch)
    lakehouse.create_tables(session)
    return session


def _day(folder: Path, day: date, item_E: np.ndarray, names: pa.Array) -> None:
    """A day's events, and their counts as a night would have left them."""
    second_E = np.sort(np.random.default_rng(day.toordinal()).integers(0, 86_400, len(item_E)))
    moment_E = np.datetime64(datetime.combine(day, time()), "us") + second_E.astype("timedelta64[s]")
    pq.write_table(pa.table({"item_id": names.take(pa.array(item_E)), "event_ts": pa.array(moment_E)}), folder / "files" / f"{day}.parquet")
    count_N = np.bincount(item_E, minlength=ITEMS)
    seen = np.flatnonzero(count_N)
    rows = {"logical_date": pa.array([day] * len(seen)), "event_date": pa.array([day] * len(seen)), "item_id": names.take(pa.array(seen))}
    pq.write_table(pa.table({**rows, "events": count_N[seen], "source_sha256": pa.array([_digest(day)] * len(seen))}), folder / "counted" / f"{day}.parquet")


def _digest(day: date) -> str:
    return hashlib.sha256(str(day).encode()).hexdigest()


def _fill(spark: Any, world: World) -> None:
    """The tables that the stage reads; ingest is another row's work."""
    from pyspark.sql import functions as F

    def add(frame: Any, table: str) -> None:
        """The rows, columns as the table has them, absent ones null."""
        fields = spark.table(f"lake.{table}").schema.fields
        columns = [(F.col(f.name) if f.name in frame.columns else F.lit(None)).cast(f.dataType).alias(f.name) for f in fields]
        frame.select(*columns).writeTo(f"lake.{table}").append()

    days = [FIRST + timedelta(days=number) for number in range(world.days + NIGHTS - 1)]
    kept, fresh = days[: world.days - 1], days[world.days - 1 :]
    counted = world.files.parent / "counted"
    add(spark.read.parquet(*[str(counted / f"{day}.parquet") for day in kept]), "feature.item_day_stat")
    for day in fresh:
        events = spark.read.parquet(str(world.files / f"{day}.parquet")).withColumns(
            {"file_date": F.lit(day), "user_id": F.lit("u"), "event_type": F.lit("click")}
        )
        add(events, "raw.interaction")
    add(spark.read.parquet(str(world.files / "items" / "items.parquet")).withColumns({"file_date": F.lit(FIRST), "content_hash": F.col("item_id")}), "raw.item")
    entries = [(day, "events", str(day), _digest(day), 1, world.events, 0, "loaded") for day in days]
    ledger = spark.createDataFrame(entries, "file_date date, kind string, path string, sha256 string, bytes long, rows_in long, rejected long, status string")
    add(ledger, "raw.source_file")
