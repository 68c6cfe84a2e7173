"""Has the world moved away from the vocabulary? Measured without the frozen encoder, written to the release as `drift` and `refit_due`.

Two signs: (a) items that people met together in the last days share codes more often than popularity-matched strangers do; how much of that is left
against the generation's first release that was measured? (b) how much popularity sits on rows trained after the base, and on items whose evidence has
at least doubled?
The plan of the next night obeys `refit_due`. Cost is bounded: at most MAX_PAIRS pairs are compared, chosen by hash, so that a rerun compares the same.
Suffixes: P pairs, L positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.plan_night import release_order
from jobs.publish_release import released
from pipeline import lakehouse
from pipeline.config import GateDrift
from pipeline.context import Context
from pipeline.errors import UpstreamMissing
from pipeline.popularity import STRATA
from pipeline.stages import StageResult

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

MAX_PAIRS = 2000
ITEMS_PER_USER = 20  # a user's pairs grow with the square of this
MEETINGS = 32  # users that may meet a pair on average before all pairs are compared
MIN_PAIRS = 200  # below this the agreement is printed, never judged
UNKNOWN: Mapping[str, Any] = {"overall": {"value": None, "se": None, "pairs": 0}}
Row = Mapping[str, Any]


def run(inputs: Inputs, params: GateDrift, ctx: Context) -> StageResult:
    """`drift` and `refit_due` of tonight's release, in one commit on sid.release; status `reused` when they stand there already.

    Raises: UpstreamMissing when the release has no row.
    """
    tag = ctx.outcome("publish_release")["outputs"]["tag"]
    releases = [row.asDict() for row in inputs.frame("sid.release").collect()]
    row = next((row for row in releases if row["tag"] == tag), None)
    if row is None:
        raise UpstreamMissing(
            f"release {tag} has no row", expected=tag, found="none", where="sid.release", next_command=f"sid run publish_release --date {ctx.logical_date}"
        )
    agreed = measure_agreement(inputs, params, ctx, row)
    measured = {"agreement": agreed, **measure_mass(inputs, row, birth(releases, row)["logical_date"])}
    drift = verdict(measured, at_birth(releases, row, agreed), params)
    text, due = json.dumps(drift, sort_keys=True), bool(drift["reasons"])
    outputs = {"tag": tag, "refit_due": due, "drift": drift}
    if (row["drift"], row["refit_due"]) == (text, due):
        return StageResult(status="reused", metrics=metrics(drift), outputs=outputs)
    rows = [{**other, "drift": text, "refit_due": due} if other["tag"] == tag else other for other in releases]
    return StageResult(writes=(released(inputs, rows),), metrics=metrics(drift), outputs=outputs)


def birth(releases: Sequence[Row], row: Row) -> Row:
    """The first release of the row's generation that was not withdrawn, on whose night its base was trained."""
    return [*earlier(releases, row), row][0]


def earlier(releases: Sequence[Row], row: Row) -> list[Row]:
    """Releases of the row's generation before it that were not withdrawn, the first one first."""
    standing = [other for other in releases if other["generation"] == row["generation"] and other["status"] != "withdrawn"]
    return sorted((other for other in standing if release_order(other) < release_order(row)), key=release_order)


def at_birth(releases: Sequence[Row], row: Row, agreed: Mapping[str, Any]) -> dict[str, Any]:
    """Tag and agreement of the earliest release of the generation that was measured; of the row, by itself, when it is the first.

    Where no earlier one was measured (gate_drift failed on every night so far) the agreement is unknown: the row's own would show no loss, ever.
    """
    before = earlier(releases, row)
    if not before:
        return {"tag": row["tag"], "agreement": agreed}
    known = next((other for other in before if other["drift"]), None)
    return {"tag": known["tag"], "agreement": json.loads(known["drift"])["agreement"]} if known else {"tag": before[0]["tag"], "agreement": UNKNOWN}


# ---------------------------------------------------------------- (a) agreement of shared codes with co-occurrence


def measure_agreement(inputs: Inputs, params: GateDrift, ctx: Context, row: Row) -> dict[str, dict[str, float | None]]:
    """Agreement overall and by stratum over the last `window_days` day files."""
    from pyspark.sql import functions as F

    day = row["logical_date"]
    first = day - timedelta(days=params.window_days)
    events = inputs.frame("raw.interaction").where(
        (F.col("file_date") > F.lit(first)) & (F.col("file_date") <= F.lit(day)) & (F.col("event_ts") < F.lit(ctx.cutoff))
    )
    found: Any = with_codes(cooccurring_pairs(events), release_frame(inputs, row)).toPandas()
    pairs = found.sort_values(["key", "item_a", "item_b"])  # a stranger is the next pair's
    sizes = inputs.frame("sid.generation").where(F.col("generation") == row["generation"]).select("codebook_sizes").collect()[0].codebook_sizes
    width = len(sizes)
    return agreement(
        np.array(pairs["codes_a"].tolist(), dtype=np.int64).reshape(-1, width),
        np.array(pairs["codes_b"].tolist(), dtype=np.int64).reshape(-1, width),
        pairs[["item_a", "item_b"]].to_numpy(dtype=str),
        pairs["stratum_b"].to_numpy(dtype=str),
        np.asarray(sizes),
    )


def release_frame(inputs: Inputs, row: Row) -> DataFrame:
    """Rows of a release at its snapshot and date."""
    assert inputs.spark is not None, "a Spark stage"
    return lakehouse.read_release_frame(inputs.spark, row["snapshot_id"], row["logical_date"])


def cooccurring_pairs(events: DataFrame, *, max_pairs: int = MAX_PAIRS, items_per_user: int = ITEMS_PER_USER) -> DataFrame:
    """item_a, item_b, key: the `max_pairs` pairs of items that one user met in the window, item_a < item_b, with the smallest hashes; all if fewer."""
    from pyspark.sql import functions as F

    met = items_met(events, items_per_user).persist()
    size = F.size("items")
    total = met.agg(F.sum(size * (size - 1) / 2)).collect()[0][0] or 0.0
    share = MEETINGS * max_pairs / max(total, 1.0)
    found = smallest_keys(met, share, max_pairs)
    if share < 1.0 and len(found) < max_pairs:  # the same pairs meet so often that too few are below the bound
        found = smallest_keys(met, 1.0, max_pairs)
    return events.sparkSession.createDataFrame(found, "item_a string, item_b string, key bigint")


def items_met(events: DataFrame, most: int) -> DataFrame:
    """items: the distinct items of one user, sorted, at most `most` of them, chosen by hash."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    order = Window.partitionBy("user_id").orderBy("hash", "item_id")
    placed = events.select("user_id", "item_id", F.xxhash64("user_id", "item_id").alias("hash")).withColumn("place", F.dense_rank().over(order))
    return placed.where(F.col("place") <= most).groupBy("user_id").agg(F.sort_array(F.collect_set("item_id")).alias("items")).select("items")


def smallest_keys(met: DataFrame, share: float, max_pairs: int) -> list[tuple[str, str, int]]:
    """(item_a, item_b, key) of the distinct pairs with the smallest keys among those in the lowest `share` of all keys, in order.

    The bound spares the comparison of millions of pairs that cannot be among the smallest.
    """
    from pyspark.sql import functions as F

    first = met.select(F.posexplode("items").alias("place", "item_a"), "items")
    pairs = first.select("item_a", F.explode(F.expr("slice(items, place + 2, size(items))")).alias("item_b")).withColumn("key", F.xxhash64("item_a", "item_b"))
    below = pairs if share >= 1.0 else pairs.where(F.col("key") < F.lit(int(share * 2**64) - 2**63))
    return [tuple(row) for row in below.distinct().orderBy("key", "item_a", "item_b").limit(max_pairs).collect()]


def with_codes(pairs: DataFrame, release: DataFrame) -> DataFrame:
    """The pairs with codes_a, codes_b and stratum_b; a pair with an item outside the release is left out."""
    from pyspark.sql import functions as F

    left = release.select(F.col("item_id").alias("item_a"), F.col("codes").alias("codes_a"))
    right = release.select(F.col("item_id").alias("item_b"), F.col("codes").alias("codes_b"), F.col("popularity_stratum").alias("stratum_b"))
    half = F.broadcast(pairs).join(left, "item_a")  # few pairs: the release is not shuffled
    return F.broadcast(half).join(right, "item_b")


def agreement(
    codes_a_PL: np.ndarray, codes_b_PL: np.ndarray, items_P2: np.ndarray, stratum_P: np.ndarray, sizes_L: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Per stratum of b, and overall: value = mean shared-code share of the pairs minus that of matched strangers, its standard error `se`, and `pairs`.

    A stranger of a pair (a, b) is (a, b'): b' is the b of the next pair of the same stratum, so that both sides hold the same items equally often and
    popularity cancels. Pairs whose b' is a or b have no stranger and are left out. value and se are None below 2 pairs.
    """
    partner_P = next_of_group(stratum_P)
    other_P = items_P2[partner_P, 1] if len(items_P2) else np.zeros(0, dtype=str)
    usable_P = (other_P != items_P2[:, 0]) & (other_P != items_P2[:, 1])
    gain_P = shared_share(codes_a_PL, codes_b_PL, sizes_L) - shared_share(codes_a_PL, codes_b_PL[partner_P], sizes_L)
    result = {"overall": _mean(gain_P[usable_P])}
    return result | {stratum: _mean(gain_P[usable_P & (stratum_P == stratum)]) for stratum in STRATA}


def shared_share(codes_a_PL: np.ndarray, codes_b_PL: np.ndarray, sizes_L: np.ndarray) -> np.ndarray:
    """Share of equal codes among the positions that both items have, shape (P,); 0 where they have none in common."""
    present_PL = (codes_a_PL < sizes_L) & (codes_b_PL < sizes_L)
    equal_P = ((codes_a_PL == codes_b_PL) & present_PL).sum(axis=1)
    return equal_P / np.maximum(present_PL.sum(axis=1), 1)


def next_of_group(group_P: np.ndarray) -> np.ndarray:
    """Index of the next row of the same group, the last one pointing at the first, shape (P,)."""
    order_P = np.argsort(group_P, kind="stable")
    sorted_P = group_P[order_P]
    starts_P = np.searchsorted(sorted_P, sorted_P, side="left")
    ends_P = np.searchsorted(sorted_P, sorted_P, side="right")
    following_P = np.arange(len(group_P)) + 1
    following_P = np.where(following_P == ends_P, starts_P, following_P)
    partner_P = np.empty(len(group_P), dtype=np.int64)
    partner_P[order_P] = order_P[following_P] if len(order_P) else order_P
    return partner_P


def _mean(gain_P: np.ndarray) -> dict[str, float | None]:
    if len(gain_P) < 2:
        return {"value": None, "se": None, "pairs": len(gain_P)}
    return {"value": round(float(gain_P.mean()), 6), "se": round(float(gain_P.std(ddof=1) / np.sqrt(len(gain_P))), 6), "pairs": len(gain_P)}


# ---------------------------------------------------------------- (b) popularity mass on what is new since the base


def measure_mass(inputs: Inputs, row: Row, base: date) -> dict[str, float]:
    """post_base_mass and doubled_mass of a release."""
    from pyspark.sql import functions as F

    def on(table: str, day: date) -> DataFrame:
        """The table's rows of one day."""
        return inputs.frame(table).where(F.col("logical_date") == F.lit(day))

    tonight = row["logical_date"]
    evidence = {day: on("feature.item_popularity", day).select("item_id", "evidence_count") for day in (tonight, base)}
    return masses(release_frame(inputs, row), on("feature.item_feature", tonight), evidence[tonight], evidence[base], base)


def masses(release: DataFrame, features: DataFrame, evidence_now: DataFrame, evidence_base: DataFrame, base: date) -> dict[str, float]:
    """Shares of the live items' popularity: on behaviour rows trained after the base, and on items whose evidence at least doubled since it.

    An item that had no event at the base has doubled with its second event.
    """
    from pyspark.sql import functions as F

    rows = (
        release.where(F.col("status") == "live")
        .select("item_id", "popularity")
        .join(features.select("item_id", "behavior_date"), "item_id", "left")
        .join(evidence_now.withColumnRenamed("evidence_count", "now"), "item_id", "left")
        .join(evidence_base.withColumnRenamed("evidence_count", "base"), "item_id", "left")
    )
    later = F.coalesce(F.col("behavior_date") > F.lit(base), F.lit(False))
    doubled = F.coalesce(F.col("now"), F.lit(0)) >= 2 * F.greatest(F.coalesce(F.col("base"), F.lit(0)), F.lit(1))
    mass = F.col("popularity")
    found = rows.agg(F.sum(mass).alias("all"), F.sum(F.when(later, mass)).alias("later"), F.sum(F.when(doubled, mass)).alias("doubled")).collect()[0]
    total = float(found["all"] or 0.0)
    # Rounded: the order in which partitions are added up must not make a rerun differ.
    return {
        name: round(float(found[column] or 0.0) / total, 9) if total else 0.0 for name, column in (("post_base_mass", "later"), ("doubled_mass", "doubled"))
    }


# ---------------------------------------------------------------- judging


def verdict(measured: Mapping[str, Any], born: Mapping[str, Any], params: GateDrift) -> dict[str, Any]:
    """The drift document: what was measured, the birth it is compared with, agreement_loss (None = cannot tell), and `reasons` for a refit."""
    now, then = measured["agreement"]["overall"], born["agreement"]["overall"]
    loss, certain = agreement_loss(now, then, params.max_agreement_loss)
    reasons = []
    if certain:
        reasons.append(f"agreement with co-occurrence fell by {loss:.0%} since {born['tag']}, limit {params.max_agreement_loss:.0%}")
    for name, limit in (("post_base_mass", params.max_post_base_mass), ("doubled_mass", params.max_doubled_mass)):
        if measured[name] > limit:
            reasons.append(f"{name} {measured[name]:.3f} above {limit:.3f}")
    return {**measured, "birth": dict(born), "agreement_loss": loss, "reasons": reasons}


def agreement_loss(now: Mapping[str, Any], then: Mapping[str, Any], limit: float) -> tuple[float | None, bool]:
    """(relative loss, whether it is above the limit beyond two standard errors); (None, False) where pairs are too few or nothing agreed at birth."""
    if min(now["pairs"], then["pairs"]) < MIN_PAIRS or then["value"] <= 2 * then["se"]:
        return None, False
    loss = max(0.0, 1.0 - now["value"] / then["value"])
    return round(loss, 6), now["value"] + 2 * now["se"] < (1.0 - limit) * then["value"]


def metrics(drift: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the drift document that are there."""
    numbers = {"post_base_mass": drift["post_base_mass"], "doubled_mass": drift["doubled_mass"], "refit_due": float(bool(drift["reasons"]))}
    numbers |= {f"agreement_{name}": found["value"] for name, found in drift["agreement"].items() if found["value"] is not None}
    numbers |= {"pairs": float(drift["agreement"]["overall"]["pairs"])}
    return numbers | ({"agreement_loss": drift["agreement_loss"]} if drift["agreement_loss"] is not None else {})
