"""Labelled ranking examples around one release, in Spark: which release can be evaluated, its periods, labels and histories.

Test events always lie in files after the cutoff of the release they are read with; training rows are a function of the training
period's files alone. Labels and histories are the SELECTs of sql/rank/rank_example; training the ranker is jobs/train_ranker.py.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any

from pipeline import lakehouse
from pipeline.config import RankExample
from pipeline.context import SQL, Context, derive_seed
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
TABLE = "rank.rank_example"
LONG_AGO = date(1900, 1, 1)
FAR_AHEAD = date(9999, 12, 31)


@dataclass(frozen=True)
class Published:
    """A row of sid.release as far as evaluation needs it."""

    tag: str
    logical_date: date
    revision: int
    status: str


@dataclass(frozen=True)
class Period:
    """Files with after < file_date <= until."""

    after: date
    until: date


# ---------------------------------------------------------------- which release, which periods


def served_release(releases: Sequence[Published], tag: str) -> Published:
    """The release to serve: the one of that tag, or the newest current one when the tag is empty.

    Raises: UpstreamMissing when there is none, ContractError when it was withdrawn.
    """
    wanted = [release for release in releases if (release.tag == tag if tag else release.status == "current")]
    if not wanted:
        known = ", ".join(release.tag for release in releases) or "no release"
        raise UpstreamMissing(
            f"no release {tag!r}" if tag else "no current release",
            expected=tag or "a current release",
            found=known,
            where="sid.release",
            next_command="sid releases",
        )
    newest = max(wanted, key=_order)
    if newest.status == "withdrawn":
        raise ContractError(
            f"release {newest.tag} was withdrawn", expected="a release in use", found="withdrawn", where="sid.release", next_command="sid releases"
        )
    return newest


def candidates(releases: Sequence[Published], served: Published, held: Container[str]) -> list[Published]:
    """Releases to evaluate, newest first: the served one, then the last revision in use of each earlier date.

    Args:
        held: tags of sid.item_sid; the rows of a release without its tag were swept away.
    """
    earlier: dict[date, Published] = {}
    for release in sorted(releases, key=_order):
        if release.status != "withdrawn" and release.logical_date < served.logical_date and release.tag in held:
            earlier[release.logical_date] = release
    return [served, *(earlier[day] for day in sorted(earlier, reverse=True))]


def evaluation_release(found: Sequence[Published], events_per_day: Mapping[date, int], params: RankExample) -> Published | None:
    """The newest of the candidates after whose test cutoff enough labelled events have arrived; None when there is none."""
    for release in found:
        after = periods(release, params)[1].after
        if sum(count for day, count in events_per_day.items() if day > after) >= params.min_test_rows:
            return release
    return None


def periods(release: Published, params: RankExample) -> tuple[Period, Period]:
    """Training and test period of a release with cutoff T0: (.., T0] and (T0, ..), or (T0, T1] and (T1, ..)."""
    cutoff = release.logical_date
    if params.train_on == "before_cutoff":
        return Period(LONG_AGO, cutoff), Period(cutoff, FAR_AHEAD)
    middle = cutoff + timedelta(days=params.train_days)
    return Period(cutoff, middle), Period(middle, FAR_AHEAD)


def _order(release: Published) -> tuple[date, int]:
    return release.logical_date, release.revision


# ---------------------------------------------------------------- frames


def ordered_events(raw: DataFrame, until: date, *, baskets: bool) -> DataFrame:
    """One row per (user, item, instant) of the files up to `until`: user_id, item_id, instant, tie, value, file_date.

    Args:
        baskets: the instant of an event is the start of its session, else event_ts; inside an instant a hash decides the order.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    known = raw.where(F.col("file_date") <= F.lit(until))
    session = Window.partitionBy("user_id", F.coalesce("session_id", F.col("event_ts").cast("string")))
    instant = F.min("event_ts").over(session) if baskets else F.col("event_ts")
    tie = F.xxhash64("user_id", "item_id")
    rows = known.select("user_id", "item_id", instant.alias("instant"), tie.alias("tie"), "value", "file_date")
    return rows.groupBy("user_id", "item_id", "instant", "tie").agg(F.max("value").alias("value"), F.min("file_date").alias("file_date"))


def labelled_rows(inputs: Inputs, events: DataFrame, popularity: DataFrame, params: RankExample, *, after: date, seed: int) -> DataFrame:
    """Labelled rows (user_id, item_id, instant, label) of the files after `after`, by the configured kind of label."""
    arguments: dict[str, Any] = {"after": after}
    if params.label == "value":
        arguments |= {"threshold": params.threshold}
    else:
        arguments |= {"seed": seed, "negatives": params.negatives, "draws": 3 * params.negatives + 4}  # some draws fall on the user's own items
    for name, frame in {"event": events, "popularity": popularity}.items():
        frame.createOrReplaceTempView(name)
    namespace, table = TABLE.split(".")
    assert inputs.spark is not None, "rank_example is a Spark stage"
    return inputs.spark.sql((SQL / namespace / table / f"{params.label}.sql").read_text(encoding="utf-8"), args=arguments)


def split_rows(
    inputs: Inputs, events: DataFrame, popularity: DataFrame, release: Published, split: str, after: date, params: RankExample, *, seed: int
) -> DataFrame:
    """Rows of rank.rank_example of one split: those of files after `after`, with nothing known but `events`."""
    labelled = labelled_rows(inputs, events, popularity, params, after=after, seed=seed)
    views = {"labelled": labelled, "event": events, "popularity": popularity}
    return inputs.query(TABLE, views, logical_date=release.logical_date, release=release.tag, split=split, max_history=params.max_history)


def popularity_at(inputs: Inputs, release: Published) -> DataFrame:
    """item_popularity of the release's night.

    Raises: UpstreamMissing when the night has none.
    """
    from pyspark.sql import functions as F

    rows = inputs.frame("feature.item_popularity").where(F.col("logical_date") == F.lit(release.logical_date))
    if rows.isEmpty():
        raise UpstreamMissing(
            f"no popularity for the night of release {release.tag}",
            expected=f"rows with logical_date {release.logical_date}",
            found="none",
            where="feature.item_popularity",
            next_command=f"sid run item_popularity --date {release.logical_date}",
        )
    return rows


# ---------------------------------------------------------------- the stage


def run(inputs: Inputs, params: RankExample, ctx: Context) -> StageResult:
    """The examples of the newest release that can be tested, replacing its partition; without one, training rows only.

    `outputs`: served_release, evaluation_release (empty = nothing to test on), example_release (whose night the rows stand under),
    logical_date, periods, row counts, digest of the rows, note.
    """
    assert inputs.spark is not None, "rank_example is a Spark stage"
    releases = [Published(row.tag, row.logical_date, row.revision, row.status) for row in inputs.frame("sid.release").collect()]
    served = served_release(releases, ctx.param("release"))
    held = lakehouse.references(inputs.spark, "sid.item_sid")
    chosen = evaluation_release(candidates(releases, served, held), events_per_day(inputs), params)
    release = chosen or served
    popularity = popularity_at(inputs, release)
    baskets = params.label == "next_basket" or ctx.config.user_sequence.order == "basket"
    seed = derive_seed(ctx.config.seed, "rank_example")
    splits = dict(zip(("train", "test") if chosen else ("train",), periods(release, params), strict=False))
    events = {split: ordered_events(inputs.frame("raw.interaction"), period.until, baskets=baskets).persist() for split, period in splits.items()}
    parts = [split_rows(inputs, events[split], popularity, release, split, period.after, params, seed=seed) for split, period in splits.items()]
    frame = reduce(type(parts[0]).unionByName, parts).persist()  # counted, digested and written: three readers, one computation
    counts = {row["split"]: int(row["count"]) for row in frame.groupBy("split").count().collect()}
    for known in events.values():  # the SELECTs read them many times; `frame` now holds what came out
        known.unpersist()
    tested = chosen is not None and counts.get("test", 0) > 0  # events need not make rows: a user's first basket has no positive
    outputs = {
        "served_release": served.tag,
        "evaluation_release": release.tag if tested else "",
        **_facts(release, params, counts),
        "digest": lakehouse.rows_digest(frame),
        "note": "" if tested else f"fewer than {params.min_test_rows} labelled rows after the cutoff of any release in use: the ranker reports no AUC",
    }
    logger.info("examples release=%s train=%d test=%d digest=%s", release.tag, outputs["train_rows"], outputs["test_rows"], str(outputs["digest"])[:12])
    metrics = {f"rank_example/{name}": float(outputs[name]) for name in ("train_rows", "test_rows")}
    return StageResult(writes=(Write(table=TABLE, frame=frame, dates=(release.logical_date,)),), metrics=metrics, outputs=outputs)


def _facts(release: Published, params: RankExample, counts: Mapping[str, int]) -> dict[str, Any]:
    """Which night's rows these are, their periods and their number, as JSON."""
    train, test = periods(release, params)
    return {
        "example_release": release.tag,
        "logical_date": release.logical_date.isoformat(),
        "train_on": params.train_on,
        "train_until": train.until.isoformat(),
        "test_after": test.after.isoformat(),
        "train_rows": counts.get("train", 0),
        "test_rows": counts.get("test", 0),
    }


def events_per_day(inputs: Inputs) -> dict[date, int]:
    """Labelled events by the day of their file."""
    from pyspark.sql import functions as F

    rows = inputs.frame("raw.interaction").where(F.col("value").isNotNull()).groupBy("file_date").count().collect()
    return {row["file_date"]: int(row["count"]) for row in rows}
