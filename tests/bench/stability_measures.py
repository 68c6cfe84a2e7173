"""What is measured of a chain of releases: SIDs kept, neighbours by shared codes against what is bought next, and what readers make of the codes.

Pure functions on Arrow tables of releases (item_id, codes, weights, disambiguator, popularity, popularity_stratum, status, behavior_date).
Suffixes: N items, L positions, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from pipeline.tokenizers import collisions

NEIGHBOURS = 20
LONGEST_BASKET = 30  # a wholesaler's list says little
QUERIES = 256  # scored at once
TIE = 1e-9  # what a row later in the order costs: below any difference of weights


def matrix(lists: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of lists of one length as a matrix."""
    return pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(len(lists), -1)


def live(release: pa.Table) -> pa.Table:
    """The live items in order of item_id."""
    return release.filter(pc.equal(release["status"], "live")).sort_by("item_id")


def aged(release: pa.Table, tonight: pa.Table) -> pa.Table:
    """A release with the popularity and strata of a later night, so that two releases differ in codes alone; its items must be known tonight."""
    place = pc.index_in(release["item_id"], value_set=tonight["item_id"].combine_chunks())
    for name in ("popularity", "popularity_stratum"):
        release = release.set_column(release.column_names.index(name), name, tonight[name].take(place))
    return release


# ---------------------------------------------------------------- kept SIDs


def compared(old: pa.Table, new: pa.Table) -> pa.Table:
    """The items of both releases: item_id, popularity, head, and what became of each.

    same: full SID, codes and number. first_row: it had no behaviour row and has one, so its masked slots have codes. retrained: it had another row.
    """
    before, after = live(old), live(new)
    place = pc.index_in(after["item_id"], value_set=before["item_id"].combine_chunks())
    known = place.is_valid()
    before, after = before.take(place.drop_null()), after.filter(known)
    same_codes_N = (matrix(before["codes"]) == matrix(after["codes"])).all(1)
    same_number_N = before["disambiguator"].to_numpy() == after["disambiguator"].to_numpy()
    had_N, has_N = (rows["behavior_date"].is_valid().to_numpy() for rows in (before, after))
    other_row_N = pc.fill_null(pc.not_equal(before["behavior_date"], after["behavior_date"]), False).to_numpy()
    return pa.table(
        {
            "item_id": after["item_id"],
            "popularity": after["popularity"],
            "head": pc.equal(after["popularity_stratum"], "head"),
            "same": same_codes_N & same_number_N,
            "first_row": ~had_N & has_N,
            "retrained": had_N & other_row_N,
        }
    )


def kept(items: pa.Table) -> dict[str, float]:
    """Shares of the items of `compared` that keep their full SID.

    items / mass / head: an item whose first behaviour row gave it another SID counts as moved. apart_*: among the items without a first row.
    retrained: among the items whose behaviour row was trained again; a copied item cannot move. moved / unmasked: items with another SID, by reason.
    """
    same_N, first_N, head_N, retrained_N = (items[name].to_numpy() for name in ("same", "first_row", "head", "retrained"))
    mass_N, apart_N = items["popularity"].to_numpy(), ~first_N

    def shares(chosen_N: np.ndarray) -> dict[str, float]:
        """Of the chosen items: share that keeps, of items, of mass, in the head."""
        return {
            "items": mean(same_N[chosen_N]),
            "mass": ratio(mass_N[chosen_N & same_N].sum(), mass_N[chosen_N].sum()),
            "head": mean(same_N[chosen_N & head_N]),
        }

    found = shares(np.ones_like(same_N)) | {f"apart_{name}": value for name, value in shares(apart_N).items()}
    return found | {
        "retrained": mean(same_N[retrained_N & apart_N]),
        "moved": float((~same_N & apart_N).sum()),
        "unmasked": float((~same_N & first_N).sum()),
    }


def mean(values: np.ndarray) -> float:
    """The mean, NaN of nothing."""
    return float(values.mean()) if len(values) else float("nan")


def ratio(part: float, whole: float) -> float:
    """part / whole, NaN of nothing."""
    return float(part / whole) if whole else float("nan")


def collision_rate(release: pa.Table, sizes: Sequence[int]) -> float:
    """Share of the live items with a code whose codes another such item has too."""
    codes_NL = matrix(live(release)["codes"])
    codes_NL = codes_NL[(codes_NL < np.asarray(sizes)).any(1)]
    return float((collisions.group_sizes(codes_NL) > 1).mean())


# ---------------------------------------------------------------- neighbours by shared codes


def baskets(events: pa.Table) -> pa.Table:
    """(item_id, item_id_b) of different items that were in one session, both directions, distinct; sessions with more than LONGEST_BASKET items left out."""
    bought = events.select(["session_id", "item_id"]).group_by(["session_id", "item_id"]).aggregate([])
    small = bought.group_by("session_id").aggregate([("item_id", "count")]).filter(pc.field("item_id_count") <= LONGEST_BASKET)
    bought = bought.filter(pc.is_in(bought["session_id"], value_set=small["session_id"].combine_chunks()))
    pairs = bought.join(bought, "session_id", right_suffix="_b", join_type="inner")
    return pairs.filter(pc.not_equal(pairs["item_id"], pairs["item_id_b"])).group_by(["item_id", "item_id_b"]).aggregate([])


def recalls(release: pa.Table, sizes: Sequence[int], pairs: pa.Table, shelf: pa.ChunkedArray) -> pa.Table:
    """(item_id, recall): share of an item's future partners among its 20 items with most shared codes, ties to the more popular item.

    Args:
        pairs: `baskets` of the days to come, (item_id, item_id_b) in both directions; items asked for are those of the first column.
        shelf: the items that may be partners or queries; one that the release does not know is never found and finds nothing.
    """
    rows = live(release).sort_by([("popularity", "descending"), ("item_id", "ascending")])
    asked = pairs.filter(pc.and_(*(pc.is_in(pairs[name], value_set=shelf.combine_chunks()) for name in ("item_id", "item_id_b"))))
    ids, queries = rows["item_id"].combine_chunks(), pc.unique(asked["item_id"]).sort()
    query_P, partner_P = (
        pc.fill_null(pc.index_in(asked[name], value_set=values), -1).to_numpy().astype(np.int64) for name, values in (("item_id", queries), ("item_id_b", ids))
    )
    place_Q = pc.fill_null(pc.index_in(queries, value_set=ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    near_QK = nearest(matrix(rows["codes"]), matrix(rows["weights"]), np.asarray(sizes), np.maximum(place_Q, 0))
    hit_P = (near_QK[query_P] == partner_P[:, None]).any(1) & (partner_P >= 0) & (place_Q[query_P] >= 0)
    wanted_Q, hits_Q = (np.bincount(query_P, weights=weight_P, minlength=len(queries)) for weight_P in (np.ones(len(query_P)), hit_P))
    return pa.table({"item_id": queries, "recall": hits_Q / np.minimum(wanted_Q, NEIGHBOURS)})


def nearest(codes_NL: np.ndarray, weights_NL: np.ndarray, sizes_L: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    """Rows of the 20 items that share most codes with each query row, (Q, 20), in no order; a shared code counts its smaller weight, earlier rows win ties."""
    described_NL, few = codes_NL < sizes_L, min(NEIGHBOURS, len(codes_NL))
    first_N = np.arange(len(codes_NL)) * TIE
    found = [np.zeros((0, few), np.int64)]
    for chosen_B in np.split(query_Q, range(QUERIES, len(query_Q), QUERIES)):
        score_BN = np.tile(-first_N, (len(chosen_B), 1))
        for code_N, weight_N, described_N in zip(codes_NL.T, weights_NL.T, described_NL.T, strict=True):  # over positions, never over items
            shared_BN = (code_N == code_N[chosen_B, None]) & described_N
            score_BN += shared_BN * np.minimum(weight_N, weight_N[chosen_B, None])
        score_BN[np.arange(len(chosen_B)), chosen_B] = -np.inf
        found.append(np.argpartition(-score_BN, few - 1, axis=1)[:, :few])
    return np.concatenate(found)


def mean_recall(found: pa.Table, item_ids: pa.ChunkedArray | None = None) -> tuple[float, int]:
    """(mean, how many) of `recalls` over all queries, or over those among the items."""
    if item_ids is not None:
        found = found.filter(pc.is_in(found["item_id"], value_set=item_ids.combine_chunks()))
    return mean(found["recall"].to_numpy()), len(found)


# ---------------------------------------------------------------- over nights


def over_nights(rows: Sequence[Mapping[str, Any]], name: str, count: str = "") -> float:
    """Mean of a number over the nights that have it, weighted by another one where that is named."""
    values = np.array([row.get(name, np.nan) for row in rows], float)
    weights = np.array([row.get(count, 0) if count else 1 for row in rows], float)
    there = np.isfinite(values) & (weights > 0)
    return float(np.average(values[there], weights=weights[there])) if there.any() else float("nan")


def upper_bound(values: Sequence[Sequence[float]]) -> float:
    """Upper end of the 95 % interval, over readers, of each one's mean over nights.

    Args:
        values: per night one number per reader.
    """
    by_reader = np.array(values).mean(axis=0)
    return float(by_reader.mean() + stats.t.ppf(0.975, len(by_reader) - 1) * stats.sem(by_reader))
