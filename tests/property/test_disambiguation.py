"""Properties of the disambiguator: injective, stable when items are added, blind to row order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tokenizers.collisions import disambiguate, group_ids

ITEMS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40)


def arrays(items):
    """codes (N, 2), first_seen (N,), item ids (N,); ids do not follow the row order."""
    codes_NL = np.array([item[:2] for item in items])
    first_seen_N = np.array([item[2] for item in items])
    item_id_N = np.array([f"i{(row * 7919) % 1009:04d}" for row in range(len(items))])
    return codes_NL, first_seen_N, item_id_N


@given(ITEMS)
def test_codes_and_number_name_one_item_and_numbers_start_at_zero(items):
    codes_NL, first_seen_N, item_id_N = arrays(items)
    numbers = disambiguate(codes_NL, first_seen_N, item_id_N, np.full(len(items), -1))
    named = {(*codes, number) for codes, number in zip(codes_NL.tolist(), numbers.tolist(), strict=True) for codes in [tuple(codes)]}
    assert len(named) == len(items)
    group_N = group_ids(codes_NL)
    assert all(sorted(numbers[group_N == group]) == list(range((group_N == group).sum())) for group in np.unique(group_N))


@given(ITEMS, st.integers(0, 40))
@settings(max_examples=200)
def test_adding_items_never_changes_a_number(items, cut):
    codes_NL, first_seen_N, item_id_N = arrays(items)
    cut = min(cut, len(items))
    before = disambiguate(codes_NL[:cut], first_seen_N[:cut], item_id_N[:cut], np.full(cut, -1))
    existing = np.concatenate([before, np.full(len(items) - cut, -1)])
    after = disambiguate(codes_NL, first_seen_N, item_id_N, existing)
    assert after[:cut].tolist() == before.tolist()
    pairs = np.column_stack([group_ids(codes_NL), after])
    assert len(np.unique(pairs, axis=0)) == len(items)


@given(ITEMS, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(items, random):
    codes_NL, first_seen_N, item_id_N = arrays(items)
    order = list(range(len(items)))
    random.shuffle(order)
    # the first half of the items by id is carried over with numbers nobody else in the group has
    existing = np.where(np.arange(len(items)) % 2 == 0, np.arange(len(items)) * 3, -1)
    straight = disambiguate(codes_NL, first_seen_N, item_id_N, existing)
    shuffled = disambiguate(codes_NL[order], first_seen_N[order], item_id_N[order], existing[order])
    assert shuffled.tolist() == straight[order].tolist()
