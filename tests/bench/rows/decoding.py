"""Which codes may come next for 640 beams: the release's sorted table against Python dictionaries of prefixes, asked beam by beam as decoders do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from bench import Case
from torch import Tensor

from pipeline.retrievers import trie

NUMBER, TITLE = 4, "constrained decoding"
COUNTS = {"quick": (12_000,), "normal": (12_000, 1_000_000), "full": (12_000, 1_000_000, 10_000_000)}
LEVELS, SIZE, BEAMS, STEP = 4, 256, 640, 2
DICTIONARY_MOST = 1_000_000  # tuples that a dictionary of Python objects is still built for
Nested = dict[int, Any]


def cases(scale: str) -> Iterator[Case]:
    for count in COUNTS[scale]:
        tokens_NS = tuples(count)
        yield build(tokens_NS)
        yield mask(tokens_NS)


def tuples(count: int) -> Tensor:
    """Different tuples of LEVELS codes (N, S), crowded as clusters make them."""
    generator = np.random.default_rng(0)
    first = (SIZE * generator.random(count + count // 8) ** 1.5).astype(np.int64)
    packed = np.unique(first * SIZE ** (LEVELS - 1) + generator.integers(0, SIZE ** (LEVELS - 1), first.size))
    packed = generator.permutation(packed)[:count]
    return torch.from_numpy(np.stack(np.unravel_index(packed, (SIZE,) * LEVELS), 1))


def nested(rows: list[list[int]]) -> Nested:
    """The tuples as dictionaries in dictionaries, the last one empty."""
    root: Nested = {}
    for row in rows:
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def prefix_children(rows: list[list[int]]) -> dict[tuple[int, ...], set[int]]:
    """The tuples as one dictionary: prefix -> tokens that may follow."""
    found: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for step, token in enumerate(row):
            found.setdefault(tuple(row[:step]), set()).add(token)
    return found


def build(tokens_NS: Tensor) -> Case:
    sizes = [SIZE] * LEVELS
    small = len(tokens_NS) < DICTIONARY_MOST
    peers = {"nested dictionaries": lambda: nested(tokens_NS.tolist()), "dictionary of prefixes": lambda: prefix_children(tokens_NS.tolist())}

    def same(ours: trie.Trie, theirs: Nested | dict[tuple[int, ...], set[int]]) -> str:
        """What is wrong with the first tokens, nothing when they are equal."""
        roots = [token for token in range(SIZE) if bool(ours.allowed(0, ours.root(1))[0, token])]
        return "" if roots == sorted(theirs.get((), theirs)) else "other first tokens"

    return Case(
        name=f"build, {len(tokens_NS):,} tuples of {LEVELS}",
        ours=partial(trie.build, tokens_NS, sizes),
        peers=peers if small else {},
        equal=same,
        units=len(tokens_NS),
        seconds=max(len(tokens_NS), 100_000) / 1_000_000,
        notices=() if small else ("dictionaries are not built again and again at this size; see the smaller one",),
    )


def mask(tokens_NS: Tensor) -> Case:
    """The mask of the third token, state known: what one step of a beam search asks."""
    table = trie.build(tokens_NS, [SIZE] * LEVELS)
    prefix_BS = tokens_NS[torch.randperm(len(tokens_NS), generator=torch.Generator().manual_seed(1))[:BEAMS], :STEP]
    node_B = table.root(BEAMS)
    for step in range(STEP):
        node_B = table.advance(step, node_B, prefix_BS[:, step])
    peers: dict[str, Any] = {}
    if len(tokens_NS) <= DICTIONARY_MOST:
        rows = tokens_NS.tolist()
        peers["nested dictionaries"] = partial(by_nested, nested(rows), prefix_BS)
        if len(tokens_NS) < DICTIONARY_MOST:
            peers["dictionary of prefixes"] = partial(by_prefix, prefix_children(rows), prefix_BS)
    return Case(
        name=f"mask of {BEAMS} beams, {len(tokens_NS):,} items",
        ours=lambda: table.allowed(STEP, node_B),
        peers=peers,
        equal=lambda ours, theirs: "" if torch.equal(ours, theirs) else "another mask",
        units=1,
        unit="steps",
        work=BEAMS * SIZE,
        limit="read",
        target=10.0,
        rounds=25,
        notices=("STATIC is a repository, not a package: not run here",),
    )


def by_nested(root: Nested, prefix_BS: Tensor) -> Tensor:
    """Walk the dictionaries for every beam and mark the children, as a `prefix_allowed_tokens_fn` is called."""
    mask_BK = torch.zeros(len(prefix_BS), SIZE, dtype=torch.bool)
    for beam, prefix in enumerate(prefix_BS.tolist()):
        node = root
        for token in prefix:
            node = node.get(token, {})
        mask_BK[beam, list(node)] = True
    return mask_BK


def by_prefix(children: dict[tuple[int, ...], set[int]], prefix_BS: Tensor) -> Tensor:
    mask_BK = torch.zeros(len(prefix_BS), SIZE, dtype=torch.bool)
    for beam, prefix in enumerate(prefix_BS.tolist()):
        mask_BK[beam, list(children.get(tuple(prefix), ()))] = True
    return mask_BK
