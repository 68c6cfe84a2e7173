"""Popularity of items as pure NumPy: the definitions that sql/feature/item_popularity computes in Spark, and a test compares the two.

Events are given by their age in days at the cutoff: 0 = the logical date itself. Nothing younger exists, so nothing here can look ahead.
Suffixes: E events (or rows of counted events), N items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
STRATA = ("head", "torso", "tail")
UNIT = 2.0**-32  # of an event: weights are whole numbers of it, so that their sum is exact in any order


def decayed_count(item_index_E: ArrayLike, age_E: ArrayLike, events_E: ArrayLike, num_items: int, *, window_days: int, half_life_days: float) -> Floats:
    """Popularity per item in events, shape (N,): sum over 0 <= age < W of events * 2^(-age / H), each weight rounded to `UNIT`; an item may have 2^31 of them.

    Args:
        item_index_E: item of each row, 0 .. num_items - 1.
        age_E: whole days between the row's event day and the logical date.
        events_E: events the row stands for.
        window_days: W, days that count.
        half_life_days: H, days after which an event counts half.
    Raises: ValueError for an age below zero (an event after the cutoff), W < 1 or H <= 0.
    """
    index_E, old_E, count_E = (np.asarray(values, np.int64) for values in (item_index_E, age_E, events_E))
    if (old_E < 0).any():
        raise ValueError("an event lies after the cutoff")
    if window_days < 1 or half_life_days <= 0:
        raise ValueError(f"window_days {window_days} must be >= 1 and half_life_days {half_life_days} > 0")
    weight_E = np.where(old_E < window_days, np.round(np.exp2(-old_E / half_life_days) / UNIT), 0).astype(np.int64)
    units_N = np.zeros(num_items, np.int64)
    np.add.at(units_N, index_E, count_E * weight_E)
    return np.asarray(units_N * UNIT, np.float64)


def evidence(item_index_E: ArrayLike, age_E: ArrayLike, events_E: ArrayLike, num_items: int) -> tuple[Ints, Ints]:
    """All events per item, never decayed, and the days since its first one (-1 without events), shape (N,) each."""
    index_E, old_E = np.asarray(item_index_E, np.int64), np.asarray(age_E, np.int64)
    count_N = np.zeros(num_items, np.int64)
    np.add.at(count_N, index_E, np.asarray(events_E, np.int64))
    first_N = np.full(num_items, -1, np.int64)
    np.maximum.at(first_N, index_E, old_E)
    return count_N, first_N


def percentile(popularity_N: ArrayLike) -> Floats:
    """Rank by popularity in [0, 1], shape (N,), 1 = most popular: (items below + (ties - 1) / 2) / (N - 1); a lone item gets 1."""
    value_N = np.asarray(popularity_N, np.float64)
    if value_N.size <= 1:
        return np.ones_like(value_N)
    _, inverse_N, ties_U = np.unique(value_N, return_inverse=True, return_counts=True)
    below_U = np.cumsum(ties_U) - ties_U
    return ((below_U + (ties_U - 1) / 2) / (value_N.size - 1))[inverse_N]


def decile(percentile_N: ArrayLike) -> Ints:
    """Decile 0 (least popular) .. 9 (most popular), shape (N,): min(floor(10 * percentile), 9)."""
    return np.minimum(np.floor(np.asarray(percentile_N, np.float64) * 10), 9).astype(np.int64)


def strata(popularity_N: ArrayLike, item_id_N: ArrayLike, *, head_share: float, tail_share: float) -> NDArray[np.str_]:
    """Stratum per item, shape (N,): head = the first round(head_share N) by (popularity descending, item_id), tail = the last round(tail_share N).

    An item without events in the window is tail whatever the shares say, so that an order of ids never makes one head. Halves round up; head goes first.
    """
    value_N, id_N = np.asarray(popularity_N, np.float64), np.asarray(item_id_N, np.str_)
    place_N = np.empty(value_N.size, np.int64)
    place_N[np.lexsort((id_N, -value_N))] = np.arange(1, value_N.size + 1)
    num_head, num_tail = (np.floor(share * value_N.size + 0.5) for share in (head_share, tail_share))
    return np.select([value_N == 0, place_N <= num_head, place_N > value_N.size - num_tail], ["tail", "head", "tail"], "torso")
