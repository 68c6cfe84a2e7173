"""Every metric of sidmill in its one definition, and floors that need no training.

Ranking is over the full catalogue, one relevant item per row. Ties: a target stands at the middle of the items that share its score (mid-rank), so a model
that scores everything alike gets no credit. History masked or not is the caller's switch and must be the same for all arms.
Tensor suffixes: B rows (one target each), N items, U users, G tie groups, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor

from pipeline import intervals
from pipeline.popularity import STRATA

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Score = Callable[[slice], Tensor]
CELLS = 4_000_000  # cells of a temporary matrix, so that memory does not grow with the catalogue
PROBABILITY_FLOOR = 1e-7
CUTOFFS = (5, 10, 50, 100)  # k of Recall@k and NDCG@k


@dataclass(frozen=True)
class Packed:
    """Lists of items end to end: list u is items[offsets[u] : offsets[u + 1]]; shapes [U + 1] and [T]."""

    offsets: Ints
    items: Ints

    def __len__(self) -> int:
        """Number of lists U."""
        return self.offsets.size - 1

    def lengths(self) -> Ints:
        """Items per list [U]."""
        return np.diff(self.offsets)

    def rows(self) -> Ints:
        """List number of every item [T]."""
        return np.repeat(np.arange(len(self)), self.lengths())

    def part(self, start: int, stop: int) -> Packed:
        """Lists start .. stop - 1."""
        low, high = self.offsets[start], self.offsets[stop]
        return Packed(self.offsets[start : stop + 1] - low, self.items[low:high])


# ---------------------------------------------------------------- ranking


def target_ranks(scores_BN: Tensor, targets_B: Tensor, history: Packed | None = None) -> Tensor:
    """Rank of each target, 1 = best, as float64 [B]: 1 + items above + half of the other items at the same score.

    Args:
        scores_BN: finite scores of all items.
        targets_B: item_index of the relevant item.
        history: items that leave the ranking of their row (the target itself never does, so a target out of it tells itself); None ranks against everything.
    Raises: ValueError when a score is not finite, which would otherwise count as a perfect rank.
    """
    if not torch.isfinite(scores_BN).all():
        raise ValueError("scores must be finite")
    target_B1 = scores_BN.gather(1, targets_B[:, None])
    if history is not None:
        scores_BN = scores_BN.clone()
        scores_BN[torch.from_numpy(history.rows()), torch.from_numpy(history.items)] = -torch.inf
        scores_BN.scatter_(1, targets_B[:, None], target_B1)
    above_B = (scores_BN > target_B1).sum(1)
    equal_B = (scores_BN == target_B1).sum(1) - 1
    return 1.0 + above_B.double() + 0.5 * equal_B.double()


def ranks_in_chunks(score: Score, targets_B: ArrayLike, num_items: int, history: Packed | None = None) -> Floats:
    """Rank of each target as float64 [B], scored chunk by chunk.

    Args:
        score: rows start:stop -> scores [stop - start, N].
        history: one list per row that leaves its ranking; None masks nothing.
    """
    targets = torch.as_tensor(np.asarray(targets_B, np.int64))
    # laid out before: small results kept one by one pinned the heap between large scores, 10 GB at a million items
    ranks_B = torch.empty(targets.numel(), dtype=torch.float64)
    for rows in _chunks(targets.numel(), num_items):
        ranks_B[rows] = target_ranks(score(rows), targets[rows], None if history is None else history.part(rows.start, rows.stop))
    return ranks_B.numpy()


def leaving(history: Packed, targets_B: ArrayLike, num_items: int) -> Packed:
    """Items that leave the ranking of their row: those of the history, each once and ascending, but for the target itself."""
    targets = np.asarray(targets_B, np.int64)
    pairs = np.unique(history.rows() * num_items + history.items)
    pairs = np.setdiff1d(pairs, np.arange(targets.size) * num_items + targets, assume_unique=True)
    return Packed(np.searchsorted(pairs, np.arange(targets.size + 1) * num_items), pairs % num_items)


def listed_ranks(items_BW: Tensor, scores_BW: Tensor, targets_B: ArrayLike, num_items: int, history: Packed | None = None) -> Floats:
    """Rank of each target in a list of found items, float64 [B]; a target that was not found stands at the middle of the items that were not.

    Args:
        items_BW: item_index of what was found, -1 = nothing.
        scores_BW: finite where an item was found.
        num_items: size N of the catalogue.
        history: items that leave the ranking of their row (the target itself never does); None ranks against everything.
    """
    targets = torch.as_tensor(np.asarray(targets_B, np.int64))
    is_target_BW = items_BW == targets[:, None]
    counts_BW, out_B = items_BW >= 0, torch.zeros(len(targets), dtype=torch.int64)
    if history is not None:
        gone = leaving(history, targets.numpy(), num_items)
        keys = (torch.arange(len(targets))[:, None] * num_items + items_BW).numpy()
        counts_BW = counts_BW & ~torch.from_numpy(np.isin(keys, gone.rows() * num_items + gone.items))
        out_B = torch.from_numpy(gone.lengths())
    found_B, count_B = is_target_BW.any(1), counts_BW.sum(1)
    score_B1 = scores_BW.masked_fill(~is_target_BW, -torch.inf).max(1, keepdim=True).values
    above_B = ((scores_BW > score_B1) & counts_BW).sum(1)
    equal_B = ((scores_BW == score_B1) & counts_BW).sum(1) - 1
    missed_B = (count_B + 1 + num_items - out_B).double() / 2
    return torch.where(found_B, 1.0 + above_B.double() + 0.5 * equal_B.double(), missed_B).numpy()


def recall_at(ranks_B: ArrayLike, k: int) -> Floats:
    """1.0 where the target stands at rank k or better, else 0.0, per row; the mean is Recall@k (= hit rate, one target a row)."""
    return (np.asarray(ranks_B) <= k).astype(np.float64)


def ndcg_at(ranks_B: ArrayLike, k: int) -> Floats:
    """1 / log2(rank + 1) where the target stands at rank k or better, else 0.0, per row; the mean is NDCG@k."""
    rank_B = np.asarray(ranks_B, np.float64)
    return np.where(rank_B <= k, 1.0 / np.log2(rank_B + 1.0), 0.0)


def ranking_metrics(ranks_B: ArrayLike, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """`recall@k` and `ndcg@k` for every k; empty without rows."""
    if not np.size(ranks_B):
        return {}
    return {name: float(metric(ranks_B, k).mean()) for k in ks for name, metric in ((f"recall@{k}", recall_at), (f"ndcg@{k}", ndcg_at))}


# ---------------------------------------------------------------- two classes


@dataclass(frozen=True)
class UserAuc:
    """AUC per user that has both classes, with the user's rows; `covered` = share of all rows that these users hold, `users_covered` of all users."""

    users: NDArray[Any]
    auc: Floats
    impressions: Ints
    covered: float
    users_covered: float

    @property
    def gauc(self) -> float:
        """Impression-weighted mean of the users' AUC; NaN when no user has both classes."""
        return float(np.average(self.auc, weights=self.impressions)) if self.auc.size else float("nan")


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive outscores a negative, a tie counts half; NaN when a class is missing."""
    return user_auc(labels, scores, np.zeros(np.size(labels), np.int64)).gauc


def user_auc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> UserAuc:
    """AUC of every user with both classes and how much of the data they cover; the one definition behind AUC and GAUC.

    Raises: ValueError for a score that is not finite.
    """
    score_B = np.asarray(scores, np.float64)
    if not np.isfinite(score_B).all():
        raise ValueError("scores must be finite")
    user_U, user_B = np.unique(np.asarray(users), return_inverse=True)
    order = np.lexsort((score_B, user_B))
    user_B, score_B, positive_B = user_B[order], score_B[order], np.asarray(labels)[order] > 0
    rows_U = np.bincount(user_B, minlength=user_U.size)
    rank_B = _tie_means(np.arange(1, user_B.size + 1), _starts(user_B, score_B)) - (np.cumsum(rows_U) - rows_U)[user_B]
    positives_U = np.bincount(user_B, weights=positive_B, minlength=user_U.size)
    rank_sum_U = np.bincount(user_B, weights=rank_B * positive_B, minlength=user_U.size)
    pairs_U = positives_U * (rows_U - positives_U)
    both = pairs_U > 0
    auc_U = (rank_sum_U - positives_U * (positives_U + 1) / 2)[both] / pairs_U[both]
    covered = float(rows_U[both].sum() / max(user_B.size, 1))
    return UserAuc(user_U[both], auc_U, rows_U[both], covered, float(both.mean()) if both.size else 0.0)


def gauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> tuple[float, float]:
    """(GAUC, share of users covered): impression-weighted over users with both classes."""
    result = user_auc(labels, scores, users)
    return result.gauc, result.users_covered


def row_logloss(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Negative log-likelihood per row, nats; probabilities are kept 1e-7 away from 0 and 1."""
    p_B = np.clip(np.asarray(probabilities, np.float64), PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.where(np.asarray(labels) > 0, np.log(p_B), np.log1p(-p_B))


def logloss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log-likelihood, nats; NaN without rows."""
    loss_B = row_logloss(labels, probabilities)
    return float(loss_B.mean()) if loss_B.size else float("nan")


def strata(stratum_B: NDArray[np.str_], evidence_B: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Slice -> mask of its rows, empty ones left out: all, by popularity, and cold items (0 and 1-4 events at the cutoff).

    Args:
        stratum_B: head | torso | tail of the row's item.
        evidence_B: events of the row's item at the cutoff.
    """
    evidence = np.asarray(evidence_B)
    masks = {"all": np.ones(len(evidence), dtype=bool)}
    masks |= {name: stratum_B == name for name in STRATA}
    masks |= {"evidence_0": evidence == 0, "evidence_1_4": (evidence >= 1) & (evidence <= 4)}
    return {name: mask for name, mask in masks.items() if mask.any()}


# ---------------------------------------------------------------- the table of a report


def retrieval_table(
    ranks: Mapping[str, Sequence[Floats]],
    users: ArrayLike,
    masks: Mapping[str, NDArray[np.bool_]],
    pairs: Sequence[tuple[str, str]],
    *,
    ks: Sequence[int] = CUTOFFS,
) -> dict[str, Any]:
    """Tables of a report as JSON: `arms` (arm -> slice -> recall@k, ndcg@k, rows, thin) and `differences` (a, b, stratum, metric, mean, low, high, ...).

    Args:
        ranks: arm -> ranks of the same rows, one array per seed; a metric is the mean over seeds.
        users: user of each row, who counts with all rows.
        masks: slices as of `strata`; thin ones have fewer than 1,000 rows and carry no verdict.
        pairs: arms to compare, absent ones are left out.
    """
    user_B = np.asarray(users)
    values = {arm: [_row_metrics(run, ks) for run in runs] for arm, runs in ranks.items()}
    arms = {
        arm: {
            name: {metric: float(np.mean([run[metric][mask].mean() for run in runs])) for metric in runs[0]}
            | {"rows": int(mask.sum()), "thin": bool(mask.sum() < intervals.THIN_ROWS)}
            for name, mask in masks.items()
        }
        for arm, runs in values.items()
    }
    differences = [
        {"a": a, "b": b, "stratum": name, "metric": metric, "thin": bool(mask.sum() < intervals.THIN_ROWS)}
        | _paired(values[a], values[b], metric, mask, user_B)
        for a, b in pairs
        if a in values and b in values
        for name, mask in masks.items()
        for metric in values[a][0]
    ]
    return {"arms": arms, "differences": differences}


def _row_metrics(ranks_B: Floats, ks: Sequence[int]) -> dict[str, Floats]:
    return {name: metric(ranks_B, k) for k in ks for name, metric in ((f"recall@{k}", recall_at), (f"ndcg@{k}", ndcg_at))}


def _paired(a: Sequence[Mapping[str, Floats]], b: Sequence[Mapping[str, Floats]], metric: str, mask: NDArray[np.bool_], user_B: NDArray[Any]) -> dict[str, Any]:
    """Mean difference over seeds with its interval over users and seeds, and the deviation between seeds; a floor has one run for all seeds."""
    by_seed = [x[metric][mask] - y[metric][mask] for x, y in itertools.zip_longest(a, b, fillvalue=(b if len(b) < len(a) else a)[0])]
    return difference(intervals.mean_effect(by_seed, user_B[mask]))


def gauc_effect(labels: ArrayLike, a_SB: Iterable[ArrayLike], b_SB: Iterable[ArrayLike], users: ArrayLike) -> intervals.Effect:
    """The effect on GAUC(a) - GAUC(b), one row of scores per seed; both arms cover the same users, because labels decide."""
    a, b = ([user_auc(labels, row_B, users) for row_B in side] for side in (a_SB, b_SB))
    effect = intervals.mean_effect([one.auc - other.auc for one, other in zip(a, b, strict=True)], a[0].users, a[0].impressions)
    return replace(effect, rows=np.asarray(labels).size)


def difference(effect: intervals.Effect) -> dict[str, Any]:
    """mean, low, high, seed_sd and seeds of a paired effect as JSON; null where a class is missing."""
    found = intervals.estimate(effect)
    values = {"mean": found.difference, "low": found.low, "high": found.high, "seed_sd": found.seed_sd}
    return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()} | {"seeds": found.seeds}


# ---------------------------------------------------------------- vectors and ranks


def midranks(values: ArrayLike) -> Floats:
    """Rank of each value, 1 = smallest; equal values share the mean of their ranks."""
    value_N = np.asarray(values, np.float64)
    order = np.argsort(value_N, kind="stable")
    rank_N = np.empty(value_N.size)
    rank_N[order] = _tie_means(np.arange(1, value_N.size + 1), _starts(value_N[order]))
    return rank_N


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation in [-1, 1] over rows where both are known; NaN for fewer than 3 rows or a constant."""
    a_N, b_N = np.asarray(a, np.float64), np.asarray(b, np.float64)
    known = np.isfinite(a_N) & np.isfinite(b_N)
    if known.sum() < 3 or np.ptp(a_N[known]) == 0 or np.ptp(b_N[known]) == 0:
        return float("nan")
    return float(np.corrcoef(midranks(a_N[known]), midranks(b_N[known]))[0, 1])


def nearest(queries_BD: Tensor, items_ND: Tensor, own_B: Tensor, k: int) -> Tensor:
    """item_index of the k items with the largest cosine to each query [B, k]; `own_B` is the query's own item, left out."""
    unit_ND = torch.nn.functional.normalize(items_ND, dim=1)
    found_Bk = own_B.new_empty((queries_BD.shape[0], k))
    for rows in _chunks(queries_BD.shape[0], items_ND.shape[0]):
        cosine_BN = torch.nn.functional.normalize(queries_BD[rows], dim=1) @ unit_ND.T
        found_Bk[rows] = cosine_BN.scatter_(1, own_B[rows, None], -torch.inf).topk(k, dim=1).indices
    return found_Bk


def neighbor_overlap(a_ND: Tensor, b_ND: Tensor, *, k: int = 20, rows_B: Tensor | None = None) -> Floats:
    """Share of each item's k nearest neighbours that two spaces of the same items agree on [B], in [0, 1].

    Args:
        rows_B: items to measure; None = all.
    """
    own_B = torch.arange(a_ND.shape[0]) if rows_B is None else rows_B
    k = min(k, a_ND.shape[0] - 1)
    if k < 1:
        return np.full(own_B.numel(), np.nan)
    in_a_Bk, in_b_Bk = nearest(a_ND[own_B], a_ND, own_B, k), nearest(b_ND[own_B], b_ND, own_B, k)
    return (in_a_Bk[:, :, None] == in_b_Bk[:, None, :]).any(2).double().mean(1).numpy()


# ---------------------------------------------------------------- floors


def history_matrix(histories: Packed, num_items: int, *, decay: float = 1.0) -> sparse.csr_matrix:
    """Users x items, decay ** age with age 0 = latest event; an item seen twice counts once, with its latest age."""
    stop_T = np.repeat(histories.offsets[1:], histories.lengths())
    age_T = stop_T - 1 - np.arange(histories.items.size)
    key_T = histories.rows() * num_items + histories.items
    order = np.lexsort((age_T, key_T))
    first = order[_starts(key_T[order])]
    return sparse.csr_matrix((decay ** age_T[first].astype(np.float64), (histories.rows()[first], histories.items[first])), shape=(len(histories), num_items))


def popularity_scores(histories: Packed, num_items: int) -> Floats:
    """Events per item [N]: the floor that ignores the user."""
    return np.bincount(histories.items, minlength=num_items).astype(np.float64)


def markov_counts(histories: Packed, num_items: int) -> sparse.csr_matrix:
    """How often item j directly followed item i within a user [N, N], sparse."""
    rows = histories.rows()
    same = rows[1:] == rows[:-1]
    before, after = histories.items[:-1][same], histories.items[1:][same]
    return sparse.csr_matrix((np.ones(before.size), (before, after)), shape=(num_items, num_items))


def ease_weights(histories: Packed, num_items: int, *, l2: float = 200.0) -> Floats:
    """Item-to-item weights [N, N] with a zero diagonal, B = I - P / diag(P), P = (X'X + l2 I)^-1, X = users x items in 0/1.

    Memory is about 3 N^2 doubles. Source: Steck 2019, EASE, closed form.
    """
    matrix = history_matrix(histories, num_items)
    gram_NN = torch.from_numpy((matrix.T @ matrix).toarray()) + l2 * torch.eye(num_items, dtype=torch.float64)
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(gram_NN))
    weights_NN = -inverse_NN / inverse_NN.diagonal()[None, :]
    return weights_NN.fill_diagonal_(0.0).numpy()


def floor_ranks(
    histories: Packed,
    targets_B: ArrayLike,
    num_items: int,
    *,
    mask_history: bool,
    ease: bool = True,
    l2: float = 200.0,
    decay: float = 1.0,
    fitted_on: Packed | None = None,
    seen: Packed | None = None,
) -> dict[str, Floats]:
    """Rank of each target under popularity, first-order Markov (popularity breaks ties) and EASE.

    Args:
        histories: each row's events before the target, at least one.
        ease: False leaves EASE out (it costs N^3).
        decay: EASE's context counts decay ** age.
        fitted_on: events that counts and weights come from; None = the histories themselves.
        seen: items that leave the ranking when the history is masked; None = the history.
    """
    known = histories if fitted_on is None else fitted_on
    popularity_N = popularity_scores(known, num_items)
    successors = markov_counts(known, num_items)
    last_B = histories.items[histories.offsets[1:] - 1]
    tie_N = popularity_N / (popularity_N.max() + 1.0)
    scorers: dict[str, Callable[[slice], Floats]] = {
        "popularity": lambda rows: np.broadcast_to(popularity_N, (rows.stop - rows.start, num_items)).copy(),
        "markov": lambda rows: successors[last_B[rows]].toarray() + tie_N,
    }
    if ease:
        matrix, weights_NN = history_matrix(histories, num_items, decay=decay), ease_weights(known, num_items, l2=l2)
        scorers["ease"] = lambda rows: matrix[rows] @ weights_NN
    left_out = (histories if seen is None else seen) if mask_history else None
    return {name: ranks_in_chunks(_as_tensor(score), targets_B, num_items, left_out) for name, score in scorers.items()}


def _as_tensor(score: Callable[[slice], Floats]) -> Score:
    return lambda rows: torch.from_numpy(np.asarray(score(rows)))


# ---------------------------------------------------------------- shared pieces


def _chunks(rows: int, width: int) -> Iterator[slice]:
    size = max(1, CELLS // max(width, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _starts(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    """True where a sorted row differs from the one before it in any key."""
    changed = np.ones(keys[0].size, dtype=bool)
    if changed.size:
        changed[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return changed


def _tie_means(ranks: NDArray[Any], starts: NDArray[np.bool_]) -> Floats:
    """Ranks with every tie group replaced by its mean."""
    group = np.cumsum(starts) - 1
    return (np.bincount(group, weights=ranks) / np.maximum(np.bincount(group), 1))[group] if group.size else np.empty(0)
