"""What SAIL learns from: pair sets of several sources, hard negatives under a threshold that F1 chooses, weights of the sources, questions from sequences.

Pure functions on tensors; how a source is made of events and catalogue stands in sql/feature/content_pair/query.sql.
Tensor suffixes: P pairs, N items, B rows, C candidates, H hard negatives, K centroids, D width, S sources, Q questions, T places of a history.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.tokenizers.base import History
from pipeline.tokenizers.fit import generator_for
from pipeline.tokenizers.histories import context
from pipeline.tokenizers.quantize import kmeans, nearest_centroid, sinkhorn

BLOCK = 4096  # rows scored against candidates at once
PLAN_EPSILON, PLAN_ROUNDS = 0.1, 100  # temperature and rounds of the transport plan between two sets of centroids
CROSS_PAIRS = 1024  # pairs whose cross pairs choose the threshold: their number is squared
RANDOM_PAIRS = 10_000  # pairs that say how similar two items are by chance


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One source of pairs; an unordered pair stands once.

    Args:
        name: of the source. collaborative: made of behaviour, else of content.
        left_P / right_P: rows of the items, int64. grade_P: how alike the source says they are, in [0, 1].
    """

    name: str
    collaborative: bool
    left_P: Tensor
    right_P: Tensor
    grade_P: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.left_P)

    def take(self, rows: Tensor) -> PairSet:
        """The pairs of those rows."""
        return PairSet(name=self.name, collaborative=self.collaborative, left_P=self.left_P[rows], right_P=self.right_P[rows], grade_P=self.grade_P[rows])

    def keys(self, num_items: int) -> Tensor:
        """Both directions of every pair as sorted numbers left * N + right, (2 P,)."""
        return torch.cat([self.left_P * num_items + self.right_P, self.right_P * num_items + self.left_P]).unique()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Histories with the item that came next.

    Args:
        rows_QT / shown_QT: items of the history, newest first, and which places count. target_Q: the item that came next.
    """

    rows_QT: Tensor
    shown_QT: Tensor
    target_Q: Tensor

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.target_Q)

    def take(self, rows: Tensor) -> Questions:
        """The questions of those rows."""
        return Questions(rows_QT=self.rows_QT[rows], shown_QT=self.shown_QT[rows], target_Q=self.target_Q[rows])


def split(pairs: PairSet, usable_N: Tensor, held_N: Tensor) -> tuple[PairSet, PairSet]:
    """(pairs of two usable items, pairs of two held items): no item of the second is ever trained on; all other pairs are dropped."""
    both = [torch.nonzero(mask_N[pairs.left_P] & mask_N[pairs.right_P]).flatten() for mask_N in (usable_N, held_N)]
    return pairs.take(both[0]), pairs.take(both[1])


def contains(keys_S: Tensor, asked: Tensor) -> Tensor:
    """Whether each asked number is among the sorted keys, bool in the shape of `asked`."""
    if not len(keys_S):
        return torch.zeros_like(asked, dtype=torch.bool)
    return keys_S[torch.searchsorted(keys_S, asked).clamp(max=len(keys_S) - 1)] == asked


def f1_threshold(positive_P: Tensor, negative_C: Tensor) -> float:
    """The score lambda* for which "at or above it is a positive" has the largest F1; the highest one of several.

    Source: SAIL-Embedding (arXiv 2510.12709), dynamic hard negative mining: lambda* = argmax F1(lambda).
    """
    score = torch.cat([positive_P, negative_C]).double()
    order = score.argsort(descending=True, stable=True)
    score, hit = score[order], (order < len(positive_P)).double()
    f1 = 2 * hit.cumsum(0) / (torch.arange(1, len(score) + 1, device=score.device) + len(positive_P))
    last_of_ties = F.pad(score[1:] != score[:-1], (0, 1), value=True)
    return float(score[torch.where(last_of_ties, f1, -1.0).argmax()])


def hard_negatives(queries_BD: Tensor, candidates_CD: Tensor, allowed_BC: Tensor, *, threshold: float, most: int) -> Tensor:
    """Places of the highest-scoring candidates below the threshold, best first, (B, H) int64; -1 where there are no more.

    What scores at or above the threshold is taken for a positive that nobody labelled and is left out.
    Source: SAIL-Embedding (arXiv 2510.12709), dynamic hard negative mining.

    Args:
        allowed_BC: False where the candidate is known not to be a negative.
    """
    score_BC = F.normalize(queries_BD, dim=1) @ F.normalize(candidates_CD, dim=1).T
    best = score_BC.masked_fill(~allowed_BC | (score_BC >= threshold), -torch.inf).topk(min(most, len(candidates_CD)), 1)
    return torch.where(torch.isfinite(best.values), best.indices, -1)


def mine(
    vectors_ND: Tensor, shown_N: Tensor, pairs: PairSet, *, most: int, sample: int, fixed: float | None, generator: torch.Generator
) -> tuple[Tensor, float]:
    """(hard negatives of the left and right items of a source, (N, H) item rows with -1, the threshold).

    Args:
        shown_N: items that may be negatives. sample: candidates at most.
        fixed: a threshold to use instead of F1's (ablation).
    """
    num_items, device = len(vectors_ND), vectors_ND.device
    chosen = pairs.take(torch.randperm(len(pairs), generator=generator)[:CROSS_PAIRS])
    unit_ND = F.normalize(vectors_ND, dim=1)
    left_P, right_P, keys = chosen.left_P.to(device), chosen.right_P.to(device), pairs.keys(num_items).to(device)
    cross_PP = unit_ND[left_P] @ unit_ND[right_P].T
    rival_PP = ~contains(keys, left_P[:, None] * num_items + right_P[None, :]) & (left_P[:, None] != right_P[None, :])
    threshold = f1_threshold(cross_PP.diagonal(), cross_PP[rival_PP]) if fixed is None else fixed
    pool_C = torch.nonzero(shown_N.cpu()).flatten()
    pool_C = pool_C[torch.randperm(len(pool_C), generator=generator)[:sample]].sort().values.to(device)
    asked_B = torch.cat([pairs.left_P, pairs.right_P]).unique().to(device)
    hard_NH = torch.full((num_items, min(most, len(pool_C))), -1, device=device)
    for rows_B in asked_B.split(BLOCK):
        allowed_BC = ~contains(keys, rows_B[:, None] * num_items + pool_C[None, :]) & (rows_B[:, None] != pool_C[None, :])
        place_BH = hard_negatives(unit_ND[rows_B], unit_ND[pool_C], allowed_BC, threshold=threshold, most=most)
        hard_NH[rows_B] = torch.where(place_BH >= 0, pool_C[place_BH.clamp(min=0)], -1)
    return hard_NH, threshold


def agreement(train_KD: Tensor, valid_KD: Tensor) -> float:
    """How well the centroids of a training set meet those of a validation set, sum(P * C) in [-1, 1], C their cosines, P the Sinkhorn plan for the cost 1 - C.

    Source: SAIL-Embedding (arXiv 2510.12709), adaptive multi-source balancing.
    """
    cosine_KK = F.normalize(train_KD, dim=1) @ F.normalize(valid_KD, dim=1).T
    plan_KK = sinkhorn(1 - cosine_KK, epsilon=PLAN_EPSILON, rounds=PLAN_ROUNDS) / len(cosine_KK)
    return float((plan_KK * cosine_KK.double()).sum())


def source_weights(train: Sequence[Tensor], valid: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Sampling weight of each training set, (S,) float64 adding up to 1: softmax of its mean agreement with the validation sets.

    Source: SAIL-Embedding (arXiv 2510.12709), adaptive multi-source balancing; differs: a temperature, because agreements lie close together.

    Args:
        train / valid: centroids (K, D) of each set.
    """
    scores = [[agreement(train_KD, valid_KD) for valid_KD in valid] for train_KD in train]
    return torch.softmax(torch.tensor(scores, dtype=torch.float64).mean(1) / temperature, 0)


def centroids(vectors_ND: Tensor, pairs: PairSet, *, size: int, sample: int, generator: torch.Generator) -> Tensor:
    """Centroids of the items of a pair set, each as often as it stands in a sample of the pairs, (K, D) float32."""
    chosen = pairs.take(torch.randperm(len(pairs), generator=generator)[:sample])
    rows = torch.cat([chosen.left_P, chosen.right_P]).to(vectors_ND.device)
    return kmeans(F.normalize(vectors_ND[rows], dim=1), min(size, len(rows)), generator=generator, iterations=10)


def draw_source(weights_S: Tensor, uniform: float) -> int:
    """The source of a whole batch, drawn with the weights by one uniform number.

    Source: SAIL-Embedding (arXiv 2510.12709), stochastic specialisation: every step has one source.
    """
    return int(torch.searchsorted(weights_S.cumsum(0), uniform).clamp(max=len(weights_S) - 1))


# ---------------------------------------------------------------- sequences


def questions(history: History, usable_N: Tensor, *, length: int, most: int, generator: torch.Generator) -> Questions:
    """Events with an earlier usable item of the same user, at most so many of them, drawn evenly.

    Args:
        usable_N: items that may stand in a history or be asked for; length: latest items of a history.
    """
    first_T = torch.repeat_interleave(history.offset_U[:-1], history.offset_U.diff())
    asked_Q = torch.nonzero((torch.arange(len(history.index_T)) > first_T) & usable_N[history.index_T]).flatten()
    asked_Q = asked_Q[torch.randperm(len(asked_Q), generator=generator)[:most]].sort().values
    rows_QT, shown_QT = context(history.index_T, asked_Q, first_T[asked_Q], length)
    target_Q = history.index_T[asked_Q]
    shown_QT = shown_QT & usable_N[rows_QT] & (rows_QT != target_Q[:, None])
    found = Questions(rows_QT=rows_QT, shown_QT=shown_QT, target_Q=target_Q)
    return found.take(torch.nonzero(shown_QT.any(1)).flatten())


def single_peak(asked: Questions, similarity_QT: Tensor, *, threshold: float, least: int) -> Questions:
    """Questions whose history has `least` items like the target, with those items alone.

    Source: SAIL-Embedding (arXiv 2510.12709), sequence-to-item, single-peak sampler; differs: an event here is one behaviour, so `least` counts similar items
    of the history in place of positive behaviours per item.
    """
    kept_QT = asked.shown_QT & (similarity_QT >= threshold)
    found = Questions(rows_QT=asked.rows_QT, shown_QT=kept_QT, target_Q=asked.target_Q)
    return found.take(torch.nonzero(kept_QT.sum(1) >= least).flatten())


def multi_peak(asked: Questions, label_N: Tensor, *, share: float) -> Questions:
    """Questions of whose history at least `share` has the target's label, with the whole history.

    Source: SAIL-Embedding (arXiv 2510.12709), sequence-to-item, multi-peak sampler by cluster proportions.
    """
    same_QT = asked.shown_QT & (label_N[asked.rows_QT] == label_N[asked.target_Q][:, None])
    return asked.take(torch.nonzero(same_QT.sum(1) >= share * asked.shown_QT.sum(1)).flatten())


def samplers(asked: Questions, spaces: Mapping[str, Tensor], *, quantile: float, least: int, share: float, clusters: int, seed: int) -> dict[str, Questions]:
    """Questions of {space} x {single, multi} peak, without samplers that find none.

    Source: SAIL-Embedding (arXiv 2510.12709), sequence-to-item; differs: "like" = above a quantile of the similarity of random pairs, whatever the space.

    Args:
        spaces: name -> frozen vectors (N, D), zeros where the item has none.
    """
    found = {}
    for name, vectors_ND in spaces.items():
        unit_ND = F.normalize(vectors_ND.float(), dim=1)
        drawn = torch.randint(len(unit_ND), (2, RANDOM_PAIRS), generator=generator_for(seed, "chance", name))
        threshold = float((unit_ND[drawn[0]] * unit_ND[drawn[1]]).sum(1).quantile(quantile))
        similarity_QT = torch.cat([_similarity(unit_ND, asked.take(rows)) for rows in torch.arange(len(asked)).split(BLOCK)])
        found[f"{name}/single"] = single_peak(asked, similarity_QT, threshold=threshold, least=least)
        centres_KD = kmeans(unit_ND, min(clusters, len(unit_ND)), generator=generator_for(seed, "labels", name), iterations=10)
        found[f"{name}/multi"] = multi_peak(asked, nearest_centroid(unit_ND, centres_KD), share=share)
    return {name: part for name, part in found.items() if len(part) > 1}


def _similarity(unit_ND: Tensor, asked: Questions) -> Tensor:
    return torch.einsum("qtd,qd->qt", unit_ND[asked.rows_QT], unit_ND[asked.target_Q])
