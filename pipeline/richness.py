"""How informative an item's behaviour is (richness N in [0, 1]) and how strongly it is aligned (w), through one frozen reference per generation.

NumPy only. A reference is fitted once, on the items that have a behaviour vector, and stored as JSON; afterwards N is a function of the item's own
evidence count and norm alone, so that a new item, however popular, moves no other row.

    norm         N = (norm - min) / (max - min)                 the paper's; of a table that is the output's as well its sign is wrong
    count        N = log1p(count) / log1p(max count)
    rank         N = mid-rank of the count among the reference's items, in [0, 1]
    reliability  N = count / (count + kappa), kappa fitted to split-half neighbour overlap
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
KINDS = ("norm", "count", "rank", "reliability")
LOW_STRENGTH = 0.05
MAX_BETA = 30.0
MAX_KNOTS = 512
KAPPA_GRID = 121


def fit_reference(
    kind: str,
    counts: ArrayLike,
    norms: ArrayLike,
    overlap: ArrayLike | None = None,
    *,
    alpha: float = 10.0,
    low_strength_share: float = 0.4,
    beta: float | None = None,
) -> dict[str, Any]:
    """The frozen reference of a generation, JSON: kind, its constants, alpha, beta, smallest and largest norm.

    Args:
        kind: one of KINDS.
        counts: events behind each item that has a behaviour vector.
        norms: L2 norm of each of these vectors.
        overlap: split-half neighbour overlap per item, NaN where not measured; needed by `reliability`.
        low_strength_share: share of these items that shall get w < 0.05; fixes beta unless it is given.
    Raises: ValueError for an unknown kind, no items, values that are not finite, or `reliability` without overlap.
    """
    count_N, norm_N = _checked(kind, counts, norms)
    if kind == "reliability" and overlap is None:
        raise ValueError("richness 'reliability' needs the split-half overlap")
    reference: dict[str, Any] = {
        "kind": kind,
        "alpha": float(alpha),
        "min_norm": float(norm_N.min()),
        "max_norm": float(norm_N.max()),
        "max_count": float(count_N.max()),
        "num_items": int(count_N.size),
    }
    if kind == "rank":
        reference["knots"] = rank_knots(count_N)
    if overlap is not None:
        reference["kappa"] = fit_kappa(count_N, np.asarray(overlap, np.float64))
    cut = share_cut(richness(reference, count_N, norm_N), low_strength_share)
    reference["beta"] = float(beta) if beta is not None else beta_for(cut, alpha)
    return reference


def richness(reference: Mapping[str, Any], count: ArrayLike, norm: ArrayLike) -> Floats:
    """N in [0, 1] per item, a pure function of the item's own count and norm through the frozen reference.

    Source: ADC-SID eq. (15)-(16) for kind `norm`.
    differs: minimum and maximum are the generation's, N is clipped; three further kinds that do not rest on the norm.
    """
    count_N, norm_N = np.broadcast_arrays(np.asarray(count, np.float64), np.asarray(norm, np.float64))
    kind = reference["kind"]
    if kind == "norm":
        span = reference["max_norm"] - reference["min_norm"]
        value_N = (norm_N - reference["min_norm"]) / span if span > 0 else np.zeros_like(norm_N)
    elif kind == "count":
        value_N = np.log1p(count_N) / np.log1p(max(reference["max_count"], 1.0))
    elif kind == "rank":
        value_N = np.interp(count_N, reference["knots"]["count"], reference["knots"]["rank"])
    elif kind == "reliability":
        value_N = count_N / (count_N + reference["kappa"])
    else:
        raise ValueError(f"unknown richness kind {kind!r}, expected one of {KINDS}")
    return np.clip(value_N, 0.0, 1.0)


def alignment_strength(richness: ArrayLike, alpha: float, beta: float) -> Floats:
    """Alignment strength w in (0, 1] per item, w = sigmoid(alpha N - beta) / sigmoid(alpha - beta); 1 at N = 1.

    Source: ADC-SID eq. (17); differs: N is the rank of the evidence unless `richness = "norm"`, and beta is fitted so that a given share of the items has w
    below .05 unless it is set; the paper has the norm and (alpha, beta) = (10, 9), as the profile `paper` does.
    """
    return np.exp(_log_sigmoid(alpha * np.asarray(richness, np.float64) - beta) - _log_sigmoid(np.float64(alpha - beta)))


def evidence_bucket(count: ArrayLike) -> NDArray[np.int64]:
    """floor(log2(count)) per item, exact at powers of two; -1 for no events."""
    exponent = np.frexp(np.asarray(count, np.float64))[1].astype(np.int64)
    return np.where(np.asarray(count) > 0, exponent - 1, -1)


def beta_for(richness: float, alpha: float) -> float:
    """Beta at which an item of this richness gets w = 0.05, in closed form from eq. (17).

    Above richness 1 - ln(20) / alpha no beta reaches 0.05 (w there is at least exp(alpha (N - 1))): the answer is then MAX_BETA
    and the share of weakly aligned items falls short, which the caller's gate shows.
    """
    slope = LOW_STRENGTH * np.exp(-alpha * richness) - np.exp(-alpha)
    if slope <= 0:
        return MAX_BETA
    return float(min(np.log((1 - LOW_STRENGTH) / slope), MAX_BETA))


def share_cut(richness_N: Floats, share: float) -> float:
    """The richness between two items below which the share of items comes nearest to `share`; items of equal richness stay together."""
    values, frequency = np.unique(richness_N, return_counts=True)
    if values.size == 1:
        return float(values[0])
    below = np.cumsum(frequency)[:-1] / richness_N.size
    cut = int(np.argmin(np.abs(below - share)))
    return float((values[cut] + values[cut + 1]) / 2)


def rank_knots(counts: Floats) -> dict[str, list[float]]:
    """Counts and their mid-ranks in [0, 1], at most MAX_KNOTS pairs; between two knots the rank is interpolated."""
    values, frequency = np.unique(counts, return_counts=True)
    below = np.cumsum(frequency) - frequency
    rank = (below + (frequency - 1) / 2) / max(counts.size - 1, 1)
    kept = np.unique(np.linspace(0, values.size - 1, MAX_KNOTS).round().astype(np.int64)) if values.size > MAX_KNOTS else np.arange(values.size)
    return {"count": values[kept].tolist(), "rank": rank[kept].tolist()}


def fit_kappa(counts: Floats, overlap: Floats) -> float:
    """Events at which behaviour is half reliable: least squares of overlap = c h / (h + kappa), 0 <= c <= 1, over a grid of kappa.

    h = count / 2, because each half encoder saw half of the item's events; applied to whole counts afterwards (Spearman-Brown in spirit).
    """
    known = np.isfinite(overlap)
    if not known.any():
        raise ValueError("no item has a measured overlap")
    values, inverse, weight_V = np.unique(counts[known], return_inverse=True, return_counts=True)
    overlap_V = np.bincount(inverse, weights=overlap[known]) / weight_V
    half_V = values / 2
    kappa_G = np.geomspace(0.25, 10 * max(values.max(), 1.0), KAPPA_GRID)
    shape_GV = half_V / (half_V + kappa_G[:, None])
    scale_G = (shape_GV * overlap_V * weight_V).sum(1) / (shape_GV**2 * weight_V).sum(1).clip(1e-12)
    error_G = ((scale_G.clip(0, 1)[:, None] * shape_GV - overlap_V) ** 2 * weight_V).sum(1)
    return float(kappa_G[np.argmin(error_G)])


def _checked(kind: str, counts: ArrayLike, norms: ArrayLike) -> tuple[Floats, Floats]:
    count_N, norm_N = np.asarray(counts, np.float64), np.asarray(norms, np.float64)
    if kind not in KINDS:
        raise ValueError(f"unknown richness kind {kind!r}, expected one of {KINDS}")
    if count_N.size == 0 or count_N.shape != norm_N.shape:
        raise ValueError(f"counts {count_N.shape} and norms {norm_N.shape} must be of one non-empty shape")
    if not (np.isfinite(count_N).all() and np.isfinite(norm_N).all()):
        raise ValueError("counts and norms must be finite")
    return count_N, norm_N


def _log_sigmoid(x: Floats | np.float64) -> Floats:
    return -np.logaddexp(0.0, -x)
