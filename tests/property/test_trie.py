"""Properties of the table of allowed tokens: the same children as nested dicts, whatever the tuples."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.retrievers import trie

SIZES = (4, 3, 5)
TUPLES = st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=40, unique=True)


def nested(tuples: list[tuple[int, ...]]) -> dict:
    """The trie as dicts in dicts, items at the leaves."""
    root: dict = {}
    for item, tuple_ in enumerate(tuples):
        node = root
        for token in tuple_[:-1]:
            node = node.setdefault(token, {})
        node[tuple_[-1]] = item
    return root


@settings(max_examples=60, deadline=None)
@given(TUPLES, st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=20))
def test_children_states_and_items_equal_nested_dicts(tuples: list[tuple[int, ...]], walks: list[tuple[int, ...]]) -> None:
    table = trie.build(torch.tensor(tuples), SIZES)
    walk_BS = torch.tensor(walks)
    state_B, slow_B = table.root(len(walks)), [nested(tuples) for _ in walks]
    for step in range(len(SIZES)):
        child_BC, token_BC, closed_BC = table.children(step, state_B)
        assert [token_C[~closed_C].tolist() for token_C, closed_C in zip(token_BC, closed_BC, strict=True)] == [sorted(node or {}) for node in slow_B]
        assert torch.equal(table.advance(step, state_B, token_BC[:, 0]), child_BC[:, 0].where(~closed_BC[:, 0], trie.DEAD))
        state_B = table.advance(step, state_B, walk_BS[:, step])
        slow_B = [None if node is None else node.get(walk[step]) for node, walk in zip(slow_B, walks, strict=True)]
        assert (state_B >= 0).tolist() == [node is not None for node in slow_B]
    assert table.find(walk_BS).tolist() == [trie.DEAD if item is None else item for item in slow_B]


@settings(max_examples=30, deadline=None)
@given(TUPLES, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_moves_nothing_but_the_numbers_of_the_items(tuples: list[tuple[int, ...]], random) -> None:
    shuffled = list(range(len(tuples)))
    random.shuffle(shuffled)
    one = trie.build(torch.tensor(tuples), SIZES)
    other = trie.build(torch.tensor([tuples[item] for item in shuffled]), SIZES, torch.tensor(shuffled))
    assert one.digest() == other.digest()
