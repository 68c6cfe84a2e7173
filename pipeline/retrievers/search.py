"""Beam search over the code tuples of a release: every beam of a constrained search is an item.

Beams are compared by the mean log-probability of the slots present so far: a masked slot neither costs nor gains, as in scoring.
Tensor suffixes: B rows, W beams, S steps, K tokens of a step, N items, Q = B * W.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.retrievers.base import Generator, Memory, weighted_mean
from pipeline.retrievers.trie import DEAD, Trie


@dataclass(frozen=True)
class Beams:
    """Beams (B, W), best first: item (DEAD where the tuple is no item or fewer beams than asked exist), score (-inf there), tokens (B, W, S)."""

    items: Tensor
    scores: Tensor
    tokens: Tensor


@dataclass
class _State:
    """Beams so far: node of the trie, tokens, log-probability of each step, number and sum of the slots present."""

    node_BW: Tensor
    tokens_BWs: Tensor
    log_prob_BWs: Tensor
    count_BW: Tensor
    total_BW: Tensor

    def take(self, parent_BW: Tensor) -> _State:
        """The chosen beams, with repetition."""
        wide = parent_BW[..., None].expand(*parent_BW.shape, self.tokens_BWs.shape[2])
        return _State(
            self.node_BW.gather(1, parent_BW),
            self.tokens_BWs.gather(1, wide),
            self.log_prob_BWs.gather(1, wide),
            self.count_BW.gather(1, parent_BW),
            self.total_BW.gather(1, parent_BW),
        )


def beam_search(model: Generator, memory: Memory, table: Trie, beams: int, *, weights_NS: Tensor | None = None, constrained: bool = True) -> Beams:
    """The best `beams` tuples after each history, without gradient.

    Args:
        weights_NS: weights of an item's slots for the final score; None = all present slots count alike. The search itself cannot know them.
        constrained: False lets beams leave the table, to measure how often they would; masked slots cannot be written then.
    """
    batch, device = len(memory.states_BMD), memory.states_BMD.device
    state = _State(
        table.root(batch)[:, None],
        torch.zeros(batch, 1, 0, dtype=torch.int64, device=device),
        torch.zeros(batch, 1, 0, device=device),
        torch.zeros(batch, 1, device=device),
        torch.zeros(batch, 1, device=device),
    )
    with torch.no_grad():
        for step in range(len(table.sizes)):
            states_BWD = model.decode(memory, state.tokens_BWs)[:, :, -1]
            state = _step(state, model.log_probs(states_BWD.flatten(0, 1), step), table, step, beams, constrained=constrained)
    return _finish(state, table, weights_NS)


def _step(state: _State, log_prob_QK: Tensor, table: Trie, step: int, beams: int, *, constrained: bool) -> _State:
    """The best continuations by one token."""
    size, (batch, width) = table.sizes[step], state.node_BW.shape
    real = log_prob_QK.shape[1]
    value_BWK = (state.total_BW[..., None] + log_prob_QK.view(batch, width, real)).div_(state.count_BW[..., None] + 1)
    if real < size:  # the reserved token has no term; where nothing is said yet it is no better than a guess
        silent_BW = torch.where(state.count_BW > 0, state.total_BW / state.count_BW.clamp(min=1), -math.log(size))
        value_BWK = torch.cat([value_BWK, silent_BW[..., None].expand(batch, width, size - real)], dim=2)
    if constrained:
        allowed_BWK = table.allowed(step, state.node_BW.flatten()).view(batch, width, size)
    else:
        allowed_BWK = (torch.arange(size, device=value_BWK.device) < real) & (state.total_BW > -torch.inf)[..., None]
    value_BX = value_BWK.masked_fill_(~allowed_BWK, -torch.inf).flatten(1)
    best_BW, at_BW = value_BX.topk(min(beams, value_BX.shape[1]), dim=1)
    parent_BW, token_BW = at_BW // size, at_BW % size
    kept = state.take(parent_BW)
    spoken_BW = token_BW < real
    said_BW = log_prob_QK.view(batch, width * real).gather(1, parent_BW * real + token_BW.clamp(max=real - 1)).where(spoken_BW, 0.0)
    node_BW = table.advance(step, kept.node_BW.flatten(), token_BW.flatten()).view_as(token_BW)
    return _State(
        torch.where(best_BW > -torch.inf, node_BW, DEAD),
        torch.cat([kept.tokens_BWs, token_BW[..., None]], dim=2),
        torch.cat([kept.log_prob_BWs, said_BW[..., None]], dim=2),
        kept.count_BW + spoken_BW,
        torch.where(best_BW > -torch.inf, kept.total_BW + said_BW, -torch.inf),
    )


def _finish(state: _State, table: Trie, weights_NS: Tensor | None) -> Beams:
    """Items and scores, best first; ties stay in the order the search left them."""
    found_BW = state.node_BW >= 0
    item_BW = torch.where(found_BW, table.items[state.node_BW.clamp(min=0)], DEAD)
    score_BW = state.total_BW / state.count_BW.clamp(min=1)
    if weights_NS is not None:
        score_BW = weighted_mean(state.log_prob_BWs, weights_NS[item_BW.clamp(min=0)])
    order_BW = torch.sort(torch.where(found_BW, score_BW, -torch.inf), dim=1, descending=True, stable=True).indices
    wide = order_BW[..., None].expand_as(state.tokens_BWs)
    scores = torch.where(found_BW, score_BW, -torch.inf).gather(1, order_BW)
    return Beams(item_BW.gather(1, order_BW), scores, state.tokens_BWs.gather(1, wide))


def invalid_share(model: Generator, memory: Memory, table: Trie, beams: int) -> float:
    """Share of the beams of a search without the constraint that are no item, in [0, 1]."""
    found = beam_search(model, memory, table, beams, constrained=False)
    return float((found.items == DEAD).double().mean())
