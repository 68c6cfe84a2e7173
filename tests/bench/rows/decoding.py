"""Which codes may come next for 640 beams, and a whole beam search: the release's sorted table against STATIC and Python dictionaries of prefixes.

STATIC is a repository (youtube/static-constraint-decoding): STATIC_CHECKOUT names a checkout of it. A mask is compared as what the next step adds up:
log-probabilities with minus infinity where no item continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from bench import Case, repository
from torch import Tensor
from torch.nn import functional as F

from pipeline.retrievers import trie
from pipeline.retrievers.base import Memory
from pipeline.retrievers.search import beam_search

NUMBER, TITLE = 4, "constrained decoding"
COUNTS = {"quick": (12_000,), "normal": (12_000, 1_000_000), "full": (12_000, 1_000_000, 10_000_000)}
LEVELS, SIZE, BEAMS, STEP = 4, 256, 640, 2
ROWS, WIDTH = 32, 20  # of the whole search: histories and beams of each
STATIC = "STATIC_CHECKOUT"
DICTIONARY_MOST = 1_000_000  # tuples that a dictionary of Python objects is still built for
Nested = dict[int, Any]
Said = tuple[Tensor, Tensor, Tensor]  # of each beam's candidates: log-probabilities, tokens, next states (B, C)


def cases(scale: str) -> Iterator[Case]:
    for count in COUNTS[scale]:
        tokens_NS = tuples(count)
        yield build(tokens_NS)
        yield mask(tokens_NS)
        if static() is not None:
            yield search(tokens_NS)


def static() -> tuple[ModuleType, ...] | None:
    """STATIC's modules for the index and for decoding, None without a checkout."""
    return repository(STATIC, "static_decoding.csr_utils", "static_decoding.decoding_pt")


def static_index(tokens_NS: Tensor) -> tuple[Any, ...]:
    """STATIC's index as tensors: transitions, offsets, branching, first mask, dense mask, dense states; the rows come sorted, as it asks for."""
    made = static()[0].build_static_index(tokens_NS.numpy(), SIZE, 2)
    return tuple(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in made)


def in_order(tokens_NS: Tensor) -> Tensor:
    """The tuples in lexicographic order."""
    table_NS = tokens_NS.numpy()
    return torch.from_numpy(table_NS[np.lexsort(table_NS.T[::-1])])


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

    def same(ours: trie.Trie, theirs: Any) -> str:
        """What is wrong with the first tokens, nothing when they are equal."""
        roots = ours.children(0, ours.root(1))[1][0].tolist()
        other = theirs[3].nonzero()[:, 0].tolist() if isinstance(theirs, tuple) else sorted(theirs.get((), theirs))
        return "" if roots == other else "other first tokens"

    return Case(
        name=f"build, {len(tokens_NS):,} tuples of {LEVELS}",
        ours=partial(trie.build, tokens_NS, sizes),
        peers=(peers if small else {}) | ({"STATIC, rows sorted first": lambda: static_index(in_order(tokens_NS))} if static() else {}),
        equal=same,
        units=len(tokens_NS),
        rounds=3,
        series="building the index over items",
        size=len(tokens_NS),
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
    said_BK = torch.randn(BEAMS, SIZE, generator=torch.Generator().manual_seed(2)).log_softmax(1)

    def ours() -> Said:
        """The candidates of each beam as the search asks for them."""
        child_BC, token_BC, closed_BC = table.children(STEP, node_B)
        return said_BK.gather(1, token_BC).masked_fill_(closed_BC, -torch.inf), token_BC, child_BC

    peers: dict[str, Any] = {}
    if static() is not None:
        peers["STATIC"] = by_static(tokens_NS, prefix_BS, said_BK)
    if len(tokens_NS) < DICTIONARY_MOST:
        rows = tokens_NS.tolist()
        for name, work in {
            "nested dictionaries": partial(by_nested, nested(rows)),
            "dictionary of prefixes": partial(by_prefix, prefix_children(rows)),
        }.items():
            peers[name] = lambda work=work: said_BK.masked_fill(~work(prefix_BS), -torch.inf)
    return Case(
        name=f"mask of {BEAMS} beams, {len(tokens_NS):,} items",
        ours=ours,
        peers=peers,
        equal=same_mask,
        units=1,
        unit="steps",
        work=BEAMS * table.widest[STEP] * (table.tokens[STEP].element_size() + said_BK.element_size()),
        limit="read",
        target=1.0,
        judged=("STATIC",),
        rounds=50,
        notices=() if static() else (f"STATIC was not run: {STATIC} names no checkout that loads",),
    )


def same_mask(ours: Said, theirs: Tensor | Said) -> str:
    """Whether the masked log-probabilities are the same; candidates are put into their places first."""
    return "" if torch.equal(whole(ours), whole(theirs) if isinstance(theirs, tuple) else theirs) else "another mask"


def whole(said: Said) -> Tensor:
    """Log-probabilities of all tokens, minus infinity where no candidate is (B, K)."""
    said_BC, token_BC, _ = said
    whole_BK = torch.full((len(said_BC), SIZE + 1), -torch.inf)
    return whole_BK.scatter_(1, torch.where(said_BC > -torch.inf, token_BC.long(), SIZE), said_BC)[:, :SIZE]


def by_static(tokens_NS: Tensor, prefix_BS: Tensor, said_BK: Tensor) -> Callable[[], Said]:
    """STATIC's step at the same beams: candidates of each, what was said of them, their next states."""
    csr, offsets, branches, *_, states_KK = static_index(in_order(tokens_NS))
    state_B = states_KK[prefix_BS[:, 0], prefix_BS[:, 1]]
    device = torch.device("cpu")
    return lambda: static()[1].generate_and_apply_logprobs_mask(said_BK, state_B, csr, offsets, branches[STEP], SIZE, device)


class Chain(torch.nn.Module):
    """A decoder that costs nothing: what comes next depends on the last token alone. Ours asks `decode` and `log_probs`, STATIC calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.said_KK = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(3)).log_softmax(1)
        self.weights_NS = torch.empty(0)

    def forward(self, token_B1: Tensor) -> Tensor:
        return self.said_KK[token_B1]

    def decode(self, memory: Memory, tokens_BWs: Tensor) -> Tensor:
        return F.pad(tokens_BWs, (1, 0))[..., None]  # token 0 is the start

    def log_probs(self, states_QD: Tensor, step: int) -> Tensor:
        return self.said_KK[states_QD[:, 0]]


def search(tokens_NS: Tensor) -> Case:
    """A whole beam search over the index, the network left out."""
    table, chain, memory = trie.build(tokens_NS, [SIZE] * LEVELS), Chain(), Memory(torch.zeros(ROWS, 1, 1), torch.zeros(ROWS, 1, dtype=torch.bool))
    csr, offsets, branches, *dense = static_index(in_order(tokens_NS))
    known = static()[1]

    def theirs() -> Tensor:
        """The tokens of STATIC's beams."""
        found: Tensor = known.sparse_transition_torch(chain, ROWS, WIDTH, WIDTH, 0, LEVELS, SIZE, branches, csr, offsets, *dense, torch.device("cpu"))
        return found

    return Case(
        name=f"beam search, {ROWS} x {WIDTH} beams, {LEVELS} steps, {len(tokens_NS):,} items",
        ours=lambda: beam_search(chain, memory, table, WIDTH).tokens,
        peers={"STATIC": theirs},
        equal=lambda ours, other: "" if torch.equal(ours, other.long()) else "other beams",
        units=ROWS,
        unit="histories",
        target=1.0,
        rounds=25,
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
