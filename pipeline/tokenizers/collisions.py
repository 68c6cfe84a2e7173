"""Which items share a code tuple, and the numbers that tell them apart.

Arrays in, arrays out: sort based, no loop over items. Readers of codes number their catalogues here; a night does it in Spark by the rule of `disambiguate`
(jobs/assign_sid.disambiguate_frame), and a test compares the two.
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
    order_N, begins_N = _in_order(codes_NL)
    group_N = np.empty(len(order_N), dtype=np.int64)
    group_N[order_N] = np.cumsum(begins_N) - 1
    return group_N


def group_sizes(codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """Items with the same code tuple, the row itself included, shape (N,)."""
    group_N = group_ids(codes_NL)
    return np.bincount(group_N)[group_N] if len(group_N) else group_N


def numbered(codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """Number of each item among those of its tuple, in the order of the rows, shape (N,)."""
    order_N, begins_N = _in_order(codes_NL)
    number_N = np.empty(len(order_N), dtype=np.int64)
    number_N[order_N] = _rank_in_group(np.cumsum(begins_N))
    return number_N


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
    existing_N, keys = np.asarray(existing_N, dtype=np.int64), pa.table({"first_seen": _column(first_seen_N), "item_id": _column(item_id_N)})
    order_N, begins_N = _in_order(codes_NL)
    _check(keys, len(order_N), existing_N)
    if not len(order_N):
        return np.zeros(0, dtype=np.int32)
    group_N, held_N = np.cumsum(begins_N) - 1, existing_N[order_N]  # from here on rows of a group lie side by side
    fresh_N = held_N < 0
    fresh_F, carried_C = np.flatnonzero(fresh_N), np.flatnonzero(~fresh_N)
    _check_carried(group_N[carried_C], held_N[carried_C])
    largest_G = np.full(int(group_N[-1]) + 1, UNSET, dtype=np.int64)
    np.maximum.at(largest_G, group_N[carried_C], held_N[carried_C])
    group_F = group_N[fresh_F]
    number_N, number_F = held_N, largest_G[group_F] + 1
    alike_F, same = np.zeros(len(group_F), dtype=bool), group_F[1:] == group_F[:-1]
    alike_F[1:] = same
    alike_F[:-1] |= same  # only these need an order
    number_F[alike_F] += _turns(group_F[alike_F], keys, order_N[fresh_F[alike_F]])
    number_N[fresh_F] = number_F
    found_N = np.empty(len(order_N), dtype=np.int32)
    found_N[order_N] = number_N
    return found_N


def _in_order(codes_NL: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows in lexicographic order of their codes, rows of a group in their own order, shape (N,), and whether each of them begins a group.

    Where codes and row number fit into one word, words are sorted and not an index: a seventh of the time, because nothing is fetched from afar.
    Raises: ValueError if codes is not a matrix.
    """
    codes_NL = np.asarray(codes_NL)
    if codes_NL.ndim != 2:
        raise ValueError(f"codes must be a matrix (N, L), found shape {codes_NL.shape}")
    begins_N = np.zeros(len(codes_NL), dtype=bool)
    begins_N[:1] = True
    words, bits = _packed_words(codes_NL), len(codes_NL).bit_length()
    if not words:
        return np.arange(len(codes_NL)), begins_N
    if len(words) == 1 and int(words[0].max()) < WORD >> bits:
        word_N = (words[0] << bits) | np.arange(len(codes_NL))
        word_N.sort()
        begins_N[1:] = (word_N[1:] ^ word_N[:-1]) >> bits != 0
        return word_N & ((1 << bits) - 1), begins_N
    order_N = np.lexsort(words[::-1])
    for word_N in words:
        sorted_N = word_N[order_N]
        begins_N[1:] |= sorted_N[1:] != sorted_N[:-1]
    return order_N, begins_N


def _turns(group_C: NDArray[np.int64], keys: pa.Table, row_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each row within its group in the order of (first_seen, item_id), shape (C,); groups are ascending, and so are the rows of a group."""
    place_C = np.arange(len(row_C)) if _ascending(keys["item_id"]) else pc.sort_indices(keys["item_id"].take(pa.array(row_C))).to_numpy()
    seen_C = keys["first_seen"].take(pa.array(row_C)).to_numpy().astype(np.int64)
    order_C, _ = _in_order(np.stack([group_C[place_C], seen_C[place_C]], axis=1))
    turn_C = np.empty(len(row_C), dtype=np.int64)
    turn_C[place_C[order_C]] = _rank_in_group(group_C)
    return turn_C


def _packed_words(codes_NL: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """Columns folded into as few int64 words as their ranges allow; comparing the words in order is comparing the rows."""
    words: list[NDArray[np.int64]] = []
    room = 0
    for column_N in codes_NL.T if codes_NL.size else ():
        low, high = int(column_N.min()), int(column_N.max())
        span = high - low + 1
        if span > room:
            if span > WORD:
                raise ValueError(f"codes span {span} values in one position, at most {WORD} fit")
            words.append(column_N.astype(np.int64) - low)
            room = WORD // span
        else:
            words[-1] *= span
            words[-1] += column_N
            words[-1] -= low
            room //= span
    return words


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


def _check(keys: pa.Table, count: int, existing_N: NDArray[np.int64]) -> None:
    if existing_N.shape != (count,) or len(keys) != count:
        raise ValueError(f"existing has shape {existing_N.shape}, {len(keys)} items have names, codes have {count} rows")
    for name in ("first_seen", "item_id"):
        if keys[name].null_count:
            raise ValueError(f"{name} holds {keys[name].null_count} nulls")
    if not _ascending(keys["item_id"]) and pc.count_distinct(keys["item_id"]).as_py() != len(keys):
        raise ValueError("item_id is not unique")


def _check_carried(group_C: NDArray[np.int64], number_C: NDArray[np.int64]) -> None:
    if not _in_order(np.stack([group_C, number_C], axis=1))[1].all():
        raise ValueError("two carried items share codes and disambiguator")
