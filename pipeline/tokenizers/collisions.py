"""Numbers that make shared code tuples unique, and the group ids they rest on.

Arrays in, arrays out: sort based, no loop over items. The Spark form of the same rule is jobs/assign_sid.disambiguate_frame; a test compares the two.
Suffixes: N items, L positions, G groups.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

UNSET = -1
WORD = 2**62  # a packed word stays below this, so that int64 never overflows


def group_ids(codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """Dense group number per row, shape (N,), equal exactly where the rows of codes are equal, numbered in lexicographic order.

    Args:
        codes_NL: integers, shape (N, L); L = 0 puts every row into one group.
    Raises: ValueError if codes is not a matrix.
    """
    codes_NL = np.asarray(codes_NL)
    if codes_NL.ndim != 2:
        raise ValueError(f"codes must be a matrix (N, L), found shape {codes_NL.shape}")
    count = len(codes_NL)
    words = _packed_words(codes_NL)
    if count == 0 or not words:
        return np.zeros(count, dtype=np.int64)
    order_N = np.argsort(words[0]) if len(words) == 1 else np.lexsort(words[::-1])
    starts_N = np.zeros(count, dtype=bool)
    for word_N in words:
        starts_N[1:] |= np.diff(word_N[order_N]) != 0
    group_N = np.empty(count, dtype=np.int64)
    group_N[order_N] = np.cumsum(starts_N)
    return group_N


def group_sizes(codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """Items with the same code tuple, the row itself included, shape (N,)."""
    group_N = group_ids(codes_NL)
    return np.bincount(group_N)[group_N] if len(group_N) else group_N


def disambiguate(codes_NL: NDArray[np.integer], first_seen_N: ArrayLike, item_id_N: ArrayLike, existing_N: ArrayLike) -> NDArray[np.int32]:
    """Number per item, shape (N,), int32, unique within its code tuple; numbers that exist are returned unchanged.

    An item without a number gets the next one after the largest of its group, in the order of (first_seen, item_id). Rows of retired items take part
    like any other, so their numbers stay taken. The result does not depend on the order of the rows.

    Args:
        codes_NL: integers, shape (N, L).
        first_seen_N: dates or integers, shape (N,), no nulls.
        item_id_N: strings, shape (N,), unique, no nulls.
        existing_N: number of a carried-over item, -1 for a new or moved one, shape (N,).
    Raises: ValueError for unequal lengths, nulls, repeated item ids, or two carried items with the same codes and number.
    """
    group_N = group_ids(codes_NL)
    existing_N = np.asarray(existing_N, dtype=np.int64)
    keys = pa.table({"group": group_N, "first_seen": _column(first_seen_N), "item_id": _column(item_id_N)}) if len(group_N) else None
    if keys is None:
        return np.zeros(0, dtype=np.int32)
    _check(keys, group_N, existing_N)
    number_N = existing_N.copy()
    fresh_F = np.flatnonzero(existing_N < 0)
    number_N[fresh_F] = _largest(group_N, existing_N)[group_N[fresh_F]] + 1
    contested_C = fresh_F[np.bincount(group_N[fresh_F], minlength=1)[group_N[fresh_F]] > 1]  # only these need an order, and it is the dear part
    order = [("group", "ascending"), ("first_seen", "ascending"), ("item_id", "ascending")]
    sorted_C = contested_C[pc.sort_indices(keys.take(pa.array(contested_C)), sort_keys=order).to_numpy()]
    number_N[sorted_C] += _rank_in_group(group_N[sorted_C])
    return number_N.astype(np.int32)


def _packed_words(codes_NL: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """Columns folded into as few int64 words as their ranges allow; comparing the words in order is comparing the rows."""
    words: list[NDArray[np.int64]] = []
    room = 0
    for column_N in codes_NL.T.astype(np.int64) if codes_NL.size else ():
        low, high = int(column_N.min()), int(column_N.max())
        span = high - low + 1
        if span > room:
            if span > WORD:
                raise ValueError(f"codes span {span} values in one position, at most {WORD} fit")
            words.append(column_N - low)
            room = WORD // span
        else:
            words[-1] = words[-1] * span + (column_N - low)
            room //= span
    return words


def _largest(group_N: NDArray[np.int64], existing_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest existing number per group, -1 where there is none, shape (G,)."""
    largest_G = np.full(int(group_N.max()) + 1, UNSET, dtype=np.int64)
    carried = existing_N >= 0
    np.maximum.at(largest_G, group_N[carried], existing_N[carried])
    return largest_G


def _rank_in_group(group_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, ... within each run of equal values of a sorted array."""
    position_F = np.arange(len(group_F), dtype=np.int64)
    first_F = np.concatenate([[True], np.diff(group_F) != 0]) if len(group_F) else np.zeros(0, dtype=bool)
    return position_F - np.maximum.accumulate(np.where(first_F, position_F, 0)) if len(group_F) else position_F


def _column(values: ArrayLike) -> pa.Array:
    """Values as one Arrow array; a chunked one is joined."""
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    return values if isinstance(values, pa.Array) else pa.array(values)


def _ascending(values_N: pa.ChunkedArray) -> bool:
    """Whether each value is above the one before, as in rows sorted by a unique key: a hundredth of the cost of counting distinct ones."""
    return bool(pc.all(pc.less(values_N.slice(0, len(values_N) - 1), values_N.slice(1)), min_count=0).as_py())


def _check(keys: pa.Table, group_N: NDArray[np.int64], existing_N: NDArray[np.int64]) -> None:
    if existing_N.shape != group_N.shape:
        raise ValueError(f"existing has shape {existing_N.shape}, codes have {len(group_N)} rows")
    for name in ("first_seen", "item_id"):
        if keys[name].null_count:
            raise ValueError(f"{name} holds {keys[name].null_count} nulls")
    if not _ascending(keys["item_id"]) and pc.count_distinct(keys["item_id"]).as_py() != len(keys):
        raise ValueError("item_id is not unique")
    carried = existing_N >= 0
    pairs_C = np.stack([group_N[carried], existing_N[carried]], axis=1)
    if len(pairs_C) and int(group_ids(pairs_C).max()) + 1 != len(pairs_C):
        raise ValueError("two carried items share codes and disambiguator")
