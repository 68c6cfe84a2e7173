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


@dataclass(frozen=True)
class _State:
    """Beams so far: node of the trie, tokens, log-probability of each step, number and sum of the slots present; the sum of a dead beam is -inf for good."""

    node_BW: Tensor
    tokens_BWs: Tensor
    log_prob_BWs: Tensor
    count_BW: Tensor
    total_BW: Tensor


def beam_search(
    model: Generator,
    memory: Memory,
    table: Trie,
    beams: int,
    *,
    weights_NS: Tensor | None = None,
    gone_BT: Tensor | None = None,
    constrained: bool = True,
) -> Beams:
    """The best `beams` tuples after each history, without gradient.

    Args:
        weights_NS: weights of an item's slots for the final score; None = all present slots count alike. The search itself cannot know them.
        gone_BT: leaves that are no answer to their row (`Trie.emptied`); no beam goes where nothing else lies, so that none of the beams is spent on them.
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
    with torch.inference_mode():
        for step in range(len(table.sizes)):
            states_BWD = model.decode(memory, state.tokens_BWs)[:, :, -1]
            state = _step(state, model.log_probs(states_BWD.flatten(0, 1), step), table, step, beams, gone_BT, constrained=constrained)
        item_BW = table.items[state.node_BW] if constrained else table.find(state.tokens_BWs.flatten(0, 1)).view_as(state.node_BW)
        return _finish(state, item_BW, weights_NS)


def _step(state: _State, log_prob_QK: Tensor, table: Trie, step: int, beams: int, gone_BT: Tensor | None, *, constrained: bool) -> _State:
    """The best continuations by one token."""
    size, (batch, width), real = table.sizes[step], state.node_BW.shape, log_prob_QK.shape[1]
    child_QC, token_QC, closed_QC = table.children(step, state.node_BW.flatten()) if constrained else _any_token(log_prob_QK)
    if gone_BT is not None:
        closed_QC = closed_QC | table.emptied(step, child_QC.view(batch, -1), gone_BT).view_as(closed_QC)
    said_QC = log_prob_QK.gather(1, token_QC if real == size else token_QC.clamp(max=real - 1)).masked_fill_(closed_QC, -torch.inf)
    value_BWC = (state.total_BW[..., None] + said_QC.view(batch, width, -1)).div_(state.count_BW[..., None] + 1)
    if real < size:  # the reserved token has no term; where nothing is said yet it is no better than a guess
        reserved_QC = (token_QC >= real) & ~closed_QC
        said_QC.masked_fill_(reserved_QC, 0.0)
        silent_BW = torch.where(state.count_BW > 0, state.total_BW / state.count_BW.clamp(min=1), state.total_BW - math.log(size))
        value_BWC = torch.where(reserved_QC.view_as(value_BWC), silent_BW[..., None], value_BWC)
    at_BW = value_BWC.flatten(1).topk(min(beams, value_BWC[0].numel()), dim=1).indices
    parent_BW = at_BW // token_QC.shape[1]
    parent_BWs = parent_BW[..., None].expand(-1, -1, step)
    node_BW, token_BW, said_BW = (part_QC.reshape(batch, -1).gather(1, at_BW) for part_QC in (child_QC, token_QC, said_QC))
    return _State(
        node_BW,
        torch.cat([state.tokens_BWs.gather(1, parent_BWs), token_BW[..., None]], dim=2),
        torch.cat([state.log_prob_BWs.gather(1, parent_BWs), said_BW[..., None]], dim=2),
        state.count_BW.gather(1, parent_BW) + (token_BW < real),
        state.total_BW.gather(1, parent_BW) + said_BW,
    )


def _any_token(log_prob_QK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `Trie.children` answers, without a table: every token that can be written; nodes mean nothing then."""
    token_QK = torch.arange(log_prob_QK.shape[1], device=log_prob_QK.device).expand_as(log_prob_QK)
    return token_QK, token_QK, torch.zeros(1, 1, dtype=torch.bool, device=log_prob_QK.device)


def _finish(state: _State, item_BW: Tensor, weights_NS: Tensor | None) -> Beams:
    """Items and scores, best first; ties stay in the order the search left them."""
    item_BW = torch.where(state.total_BW > -torch.inf, item_BW, DEAD)
    score_BW = state.total_BW / state.count_BW.clamp(min=1)
    if weights_NS is not None:
        score_BW = weighted_mean(state.log_prob_BWs, weights_NS[item_BW.clamp(min=0)])
    score_BW = torch.where(item_BW >= 0, score_BW, -torch.inf)
    order_BW = torch.sort(score_BW, dim=1, descending=True, stable=True).indices
    return Beams(item_BW.gather(1, order_BW), score_BW.gather(1, order_BW), state.tokens_BWs.gather(1, order_BW[..., None].expand_as(state.tokens_BWs)))


def invalid_share(model: Generator, memory: Memory, table: Trie, beams: int) -> float:
    """Share of the beams of a search without the constraint that are no item, in [0, 1]."""
    found = beam_search(model, memory, table, beams, constrained=False)
    return float((found.items == DEAD).double().mean())
