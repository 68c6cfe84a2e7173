"""Which token may come next: every code tuple of a release as one sorted table with child offsets per step (CSR), built and walked without a loop over items.

A tuple is the item's codes and, last, its disambiguator; a masked slot is the reserved token K. Nodes of step s are the distinct prefixes of length s, numbered
in lexicographic order, so the children of a node lie side by side and a leaf is a row of the sorted table. A function of the release's rows alone.
Tensor suffixes: N items, S steps, B beams, K tokens of a step (its codebook and the reserved one), C children, P nodes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEAD = -1  # state of a beam that has left the table
WORD = 2**62  # packed tokens stay below this, so that int64 never overflows
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trie:
    """The sorted table and its child offsets.

    Args:
        sizes: number of tokens per step, the reserved one included.
        starts: per step int64 [P_s + 1]; children of node p are the nodes starts[p] .. starts[p + 1] - 1 of the next step.
        tokens: per step int32 [P_{s+1}], the last token of every node of the next step.
        items: int64 [N], the item at each leaf.
        widest: per step, the largest number of children.
    """

    sizes: tuple[int, ...]
    starts: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    items: Tensor
    widest: tuple[int, ...]

    def root(self, beams: int) -> Tensor:
        """State of beams that have not chosen yet, int64 [B]."""
        return torch.zeros(beams, dtype=torch.int64, device=self.items.device)

    def children(self, step: int, node_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each beam's node: the nodes below it, int32 [B, C], the tokens that lead there, int64 [B, C], and True where there is no such child, bool [B, C].

        C is the largest number of children at this step: late steps, where most nodes have one, cost next to nothing. A dead beam has no children.
        """
        first_B = self.starts[step].index_select(0, node_B.clamp(min=0))
        count_B = self.starts[step].index_select(0, node_B + 1) - first_B  # what begins at 0 ends at 0 if the beam is dead
        place_C = torch.arange(self.widest[step], dtype=torch.int32, device=node_B.device)
        child_BC = (first_B[:, None].int() + place_C).clamp_(max=len(self.tokens[step]) - 1)
        token_X = self.tokens[step].index_select(0, child_BC.flatten())
        return child_BC, token_X.view_as(child_BC).long(), place_C >= count_B[:, None]

    @functools.cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """Per step int64 [P_{s+1} + 1]: below node p of the next step lie the leaves leaves[p] .. leaves[p + 1] - 1."""
        found = [torch.arange(len(self.items) + 1, device=self.items.device)]
        for start_P in reversed(self.starts[1:]):
            found.append(found[-1][start_P])
        return tuple(reversed(found))

    @functools.cached_property
    def places(self) -> Tensor:
        """Leaf of each item, int64 [largest item + 1]; the number of leaves where an item has no tuple."""
        place_N = torch.full((int(self.items.max()) + 1,), len(self.items), device=self.items.device)
        return place_N.scatter_(0, self.items, torch.arange(len(self.items), device=self.items.device))

    def emptied(self, step: int, child_BC: Tensor, gone_BT: Tensor) -> Tensor:
        """Whether every item below a child has gone, bool [B, C].

        Args:
            gone_BT: leaves that are gone, ascending, int64; the number of leaves fills up.
        """
        leaf_P = self.leaves[step]
        first_BC, beyond_BC = leaf_P[child_BC.long()], leaf_P[child_BC.long() + 1]
        return torch.searchsorted(gone_BT, beyond_BC) - torch.searchsorted(gone_BT, first_BC) == beyond_BC - first_BC

    def advance(self, step: int, node_B: Tensor, token_B: Tensor) -> Tensor:
        """State after choosing a token, int64 [B]; DEAD when no item continues so."""
        child_BC, token_BC, closed_BC = self.children(step, node_B)
        return child_BC.where((token_BC == token_B[:, None]) & ~closed_BC, DEAD).amax(1)

    def find(self, tokens_BS: Tensor) -> Tensor:
        """Item of each whole tuple, int64 [B]; DEAD when there is none."""
        node_B = self.root(len(tokens_BS))
        for step, token_B in enumerate(tokens_BS.unbind(1)):
            node_B = self.advance(step, node_B, token_B)
        return torch.where(node_B >= 0, self.items[node_B.clamp(min=0)], DEAD)

    def to(self, device: torch.device | str) -> Trie:
        """The same table on another device."""
        starts, tokens = (tuple(part.to(device) for part in parts) for parts in (self.starts, self.tokens))
        return Trie(self.sizes, starts, tokens, self.items.to(device), self.widest)

    def state(self) -> dict[str, Tensor]:
        """Tensors that can be shipped beside a release; `from_state` reads them without building again."""
        parts = {f"starts_{step}": start for step, start in enumerate(self.starts)}
        return {**parts, **{f"tokens_{step}": token for step, token in enumerate(self.tokens)}, "items": self.items}

    def digest(self) -> str:
        """SHA-256 of the table, hex: equal exactly for equal tuples, sizes and item order."""
        found = hashlib.sha256(repr(self.sizes).encode())
        for tensor in self.state().values():
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


def build(tokens_NS: Tensor, sizes: Sequence[int], items_N: Tensor | None = None) -> Trie:
    """The table of those tuples, one item each; 1 M items of seven tokens take well under a second.

    Args:
        tokens_NS: integers, shape (N, S).
        sizes: number of tokens per step, the reserved one included.
        items_N: number of the item of each row; None = the row itself.
    Raises: ValueError without items or steps, for a token outside 0 .. size - 1, or for two items of one tuple.
    """
    table_NS = tokens_NS.cpu().numpy().astype(np.int64, copy=False)
    if table_NS.ndim != 2 or 0 in table_NS.shape or table_NS.shape[1] != len(sizes):
        raise ValueError(f"tuples must be a matrix of {len(sizes)} steps with a row, found shape {table_NS.shape}")
    if (table_NS.min(0) < 0).any() or (table_NS.max(0) >= np.asarray(sizes)).any():
        raise ValueError(f"tokens must lie below {list(sizes)}, found {table_NS.min(0).tolist()} .. {table_NS.max(0).tolist()}")
    order_N, column_SN = _sorted(table_NS, sizes)
    starts, tokens = [], []
    above_N, new_N = np.zeros(len(table_NS), dtype=bool), np.zeros(len(table_NS), dtype=bool)
    above_N[0] = new_N[0] = True
    for column_N in column_SN:  # over steps, never over items
        new_N[1:] |= column_N[1:] != column_N[:-1]  # a prefix that ends here has not been seen before
        at = np.flatnonzero(new_N)
        children_P = np.bincount(np.cumsum(above_N)[at] - 1, minlength=int(above_N.sum()))
        starts.append(torch.from_numpy(np.concatenate([[0], np.cumsum(children_P)]).astype(np.int64)))
        tokens.append(torch.from_numpy(column_N[at].astype(np.int32)))
        above_N = new_N.copy()
    if not new_N.all():
        raise ValueError(f"{int((~new_N).sum())} items share the tuple of another: a disambiguator is missing")
    leaf_N = torch.from_numpy(order_N)
    return _finish(sizes, tuple(starts), tuple(tokens), leaf_N if items_N is None else items_N.cpu()[leaf_N])


def from_state(state: Mapping[str, Tensor], sizes: Sequence[int]) -> Trie:
    """The table that gave `state`."""
    steps = range(len(sizes))
    starts, tokens = tuple(state[f"starts_{step}"] for step in steps), tuple(state[f"tokens_{step}"] for step in steps)
    return _finish(sizes, starts, tokens, state["items"])


def _finish(sizes: Sequence[int], starts: tuple[Tensor, ...], tokens: tuple[Tensor, ...], items_N: Tensor) -> Trie:
    """The table with what is derived from its offsets."""
    return Trie(tuple(int(size) for size in sizes), starts, tokens, items_N, tuple(int(start_P.diff().max()) for start_P in starts))


def _sorted(table_NS: Ints, sizes: Sequence[int]) -> tuple[Ints, list[Ints]]:
    """(rows in lexicographic order [N], the sorted column of every step); columns are read back from the sorted keys, which is cheaper than fetching rows."""
    groups = _groups(sizes)
    words = [_packed(table_NS[:, steps.start : steps.stop], sizes[steps.start : steps.stop]) for steps in groups]
    order_N = np.argsort(words[0]) if len(words) == 1 else np.lexsort(words[::-1])
    columns: list[Ints] = []
    for steps, word_N in zip(groups, words, strict=True):
        rest_N, found = word_N[order_N], []
        for step in reversed(steps):
            rest_N, column_N = np.divmod(rest_N, sizes[step])
            found.append(column_N)
        columns += reversed(found)
    return order_N, columns


def _groups(sizes: Sequence[int]) -> list[range]:
    """Consecutive steps whose tokens fit into one key together."""
    cuts, room = [0], WORD
    for step, size in enumerate(sizes):
        if room < size:
            cuts.append(step)
            room = WORD
        room //= size
    return [range(start, stop) for start, stop in itertools.pairwise([*cuts, len(sizes)])]


def _packed(table_NS: Ints, sizes: Sequence[int]) -> Ints:
    """One int64 key per row [N] whose order is the lexicographic one."""
    word_N = np.zeros(len(table_NS), dtype=np.int64)
    for column_N, size in zip(table_NS.T, sizes, strict=True):
        word_N *= size
        word_N += column_N
    return word_N
