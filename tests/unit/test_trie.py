"""The table of allowed tokens on a small catalogue with a masked slot: children, states, lookup, digest, refusals."""

from __future__ import annotations

import pytest
import torch

from pipeline.retrievers import trie

SIZES = (4, 3, 2)  # token 3 of the first step and 2 of the second are reserved
TUPLES = torch.tensor([[0, 1, 0], [2, 2, 0], [0, 1, 1], [3, 0, 0], [0, 0, 0]])


def tokens(table: trie.Trie, step: int, node: torch.Tensor) -> list[int]:
    """What may follow one beam."""
    _, token, closed = table.children(step, node)
    return token[~closed].tolist()


def test_children_and_states_follow_the_tuples() -> None:
    table = trie.build(TUPLES, SIZES)
    root = table.root(1)
    assert tokens(table, 0, root) == [0, 2, 3]
    zero = table.advance(0, root, torch.tensor([0]))
    assert tokens(table, 1, zero) == [0, 1]
    pair = table.advance(1, zero, torch.tensor([1]))
    assert tokens(table, 2, pair) == [0, 1]
    assert table.items[table.advance(2, pair, torch.tensor([1]))].tolist() == [2]


def test_a_beam_that_left_the_table_is_dead_for_good() -> None:
    table = trie.build(TUPLES, SIZES)
    lost = table.advance(0, table.root(3), torch.tensor([1, -1, 4]))
    assert lost.tolist() == [trie.DEAD] * 3
    assert tokens(table, 1, lost) == []
    assert table.advance(1, lost, torch.tensor([0, 1, 2])).tolist() == [trie.DEAD] * 3


def test_every_tuple_finds_its_item_and_no_other_finds_any() -> None:
    table = trie.build(TUPLES, SIZES, torch.tensor([50, 40, 30, 20, 10]))
    every = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    known = {tuple(row): item for row, item in zip(TUPLES.tolist(), (50, 40, 30, 20, 10), strict=True)}
    assert table.find(every).tolist() == [known.get(tuple(row), trie.DEAD) for row in every.tolist()]


def test_steps_that_do_not_fit_one_key_are_sorted_alike() -> None:
    sizes = (2**40, 3, 2**40)
    rows = torch.tensor([[2**39, 1, 5], [7, 2, 2**38], [7, 2, 3], [7, 0, 9]])
    table = trie.build(rows, sizes)
    assert table.items.tolist() == [3, 2, 1, 0]
    assert [token.tolist() for token in trie.build(torch.flip(rows, [0]), sizes).tokens[:2]] == [token.tolist() for token in table.tokens[:2]]


def test_the_state_is_the_table_and_the_digest_names_it() -> None:
    table = trie.build(TUPLES, SIZES)
    again = trie.from_state(table.state(), SIZES)
    assert again.digest() == table.digest() == trie.build(TUPLES.clone(), SIZES).digest()
    assert all(torch.equal(one, other) for one, other in zip(again.children(1, torch.arange(3)), table.children(1, torch.arange(3)), strict=True))
    assert trie.build(TUPLES.flip(0), SIZES).digest() != table.digest(), "another item stands at a leaf"
    assert trie.build(TUPLES, (5, 3, 2)).digest() != table.digest()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 1, 0], [0, 1, 0]], "disambiguator is missing"),
        ([[0, 3, 0]], "tokens must lie below"),
        ([[0, -1, 0]], "tokens must lie below"),
        ([[0, 1]], "matrix of 3 steps"),
    ],
)
def test_rows_that_are_no_catalogue_are_refused(rows: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trie.build(torch.tensor(rows), SIZES)
    with pytest.raises(ValueError, match="matrix of"):
        trie.build(torch.zeros(0, 3, dtype=torch.int64), SIZES)
