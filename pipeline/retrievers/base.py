"""What every retriever needs: a catalogue as code tuples, embedding rows of tokens, a decoder block, the losses, and histories as padded rows.

A tuple is the item's codes and, last, its disambiguator. A masked slot holds the reserved code K: it has an embedding row of its own, is never predicted and
never scored. Histories are padded at the end with the number of items N.
Tensor suffixes: B rows, T history, N items, L positions of codes, S steps = L and the disambiguator, K codes, D width, M memory, W beams, Q queries.
"""

# ruff: noqa: N802, N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluation import Packed
from pipeline.retrievers import trie
from pipeline.tokenizers import collisions

INIT_STD = 0.05


@dataclass(frozen=True)
class Catalogue:
    """Items as code tuples.

    Args:
        codes_NL: int64, K of its position = masked slot.
        weights_NL: float32 router weights, 0 for masked slots.
        number_N: int64 disambiguator within the items of one tuple of codes.
        codebook_sizes: K per position.
        numbers: how many disambiguators there may be.
    """

    codes_NL: Tensor
    weights_NL: Tensor
    number_N: Tensor
    codebook_sizes: tuple[int, ...]
    numbers: int

    def __len__(self) -> int:
        """Number of items N."""
        return len(self.codes_NL)

    @property
    def steps(self) -> int:
        """Tokens of an item, S = L + 1."""
        return len(self.codebook_sizes) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per step: K and the reserved code at each position, then the disambiguators."""
        return (*(size + 1 for size in self.codebook_sizes), self.numbers)

    @property
    def present_NL(self) -> Tensor:
        """Whether a slot holds a code, bool (N, L)."""
        return self.codes_NL != torch.tensor(self.codebook_sizes)

    @property
    def usable_N(self) -> Tensor:
        """Whether an item has any code at all, bool (N,): one without cannot be found by codes."""
        return self.present_NL.any(1)

    @property
    def tokens_NS(self) -> Tensor:
        """Codes and disambiguator, int64 (N, S)."""
        return torch.cat([self.codes_NL, self.number_N[:, None]], dim=1)

    def constraint(self) -> trie.Trie:
        """The tuples of the usable items as a table of what may come next.

        Raises: ValueError without a usable item, or for two items of one tuple.
        """
        rows = torch.nonzero(self.usable_N).flatten()
        return trie.build(self.tokens_NS[rows], self.sizes, rows)

    def rearranged(self, source_N: Tensor) -> Catalogue:
        """Codes, weights and disambiguator moved together: item n gets those of item source[n]."""
        return replace(self, codes_NL=self.codes_NL[source_N], weights_NL=self.weights_NL[source_N], number_N=self.number_N[source_N])


def numbered(codes_NL: Tensor) -> Tensor:
    """Number of each item among those of its tuple, in item order, int64 (N,)."""
    return torch.from_numpy(collisions.numbered(codes_NL.numpy()))


def random_codes(catalogue: Catalogue, seed: int) -> Catalogue:
    """The control without any structure: uniform codes in the slots that are present, their weights as they were."""
    generator = torch.Generator().manual_seed(seed)
    sizes_L = torch.tensor(catalogue.codebook_sizes)
    drawn_NL = (torch.rand(catalogue.codes_NL.shape, generator=generator, dtype=torch.float64) * sizes_L).long()
    codes_NL = torch.where(catalogue.present_NL, drawn_NL, sizes_L)
    number_N = numbered(codes_NL)
    return replace(catalogue, codes_NL=codes_NL, number_N=number_N, numbers=max(catalogue.numbers, int(number_N.max()) + 1))


# ---------------------------------------------------------------- weights and losses


def slot_weights(weights_NL: Tensor, present_NL: Tensor, share: float) -> Tensor:
    """A = (1 - share) + share * router weight, 0 where a slot is masked, (N, L).

    Source: ADA-SID (arXiv 2510.25622), router weights as loss weights of generation; differs: `share` below 1 moves them towards equal weights.
    """
    return ((1 - share) + share * weights_NL) * present_NL


def weighted_mean(log_prob_BS: Tensor, weight_BS: Tensor) -> Tensor:
    """sum_s a_s log p_s / sum_s a_s, (B,); 0 where all weights are 0. Its negative is the loss, the score of beams, and `parallel`'s where scoring = mean.

    Source: ADA-SID (arXiv 2510.25622), generation loss; differs: divided by the item's own sum of weights instead of a constant, because sums favour
    items with few or light slots where items are scored so. As a loss that gives the codes of an item with light gates more weight each than those of an
    item with heavy ones, which is part of what a router changes.
    """
    return (log_prob_BS * weight_BS).sum(-1) / weight_BS.sum(-1).clamp(min=1e-6)


def distillation(summary_BD: Tensor, teacher_BD: Tensor, item_B: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each row's own teacher among those of the batch by cosine, nats, scalar; 0 without teachers.

    Other rows of the same item are left out, and so are rows whose item has no teacher (a zero vector): nobody is taught by nothing.
    Source: UNGER (arXiv 2502.06269), intra-modality distillation; differs: InfoNCE over the batch, the exact form is not published in what we read; the
    summary is the last state instead of an appended token's.
    """
    known_B = teacher_BD.any(1)
    summary_BD, teacher_BD, item_B = summary_BD[known_B], teacher_BD[known_B], item_B[known_B]
    if not len(item_B):
        return summary_BD.sum()
    cosine_BB = F.normalize(summary_BD, dim=1) @ F.normalize(teacher_BD, dim=1).T / temperature
    same_BB = (item_B[:, None] == item_B[None, :]) & ~torch.eye(len(item_B), dtype=torch.bool, device=item_B.device)
    return F.cross_entropy(cosine_BB.masked_fill(same_BB, -torch.inf), torch.arange(len(item_B), device=item_B.device))


# ---------------------------------------------------------------- what a retriever is


@dataclass(frozen=True)
class Prediction:
    """Of every predicted item P: its negative log-likelihood per unit of weight (nats), its number, and the state that is distilled (P, D)."""

    nll_P: Tensor
    items_P: Tensor
    summary_PD: Tensor


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: states (B, M, D), and True where one is padding (B, M)."""

    states_BMD: Tensor
    padding_BM: Tensor


class Generator(Protocol):
    """A retriever that writes an item token by token.

    Args:
        weights_NS: weight of each token of an item, 0 for masked slots.
    """

    weights_NS: Tensor

    def memory(self, history_BT: Tensor) -> Memory:
        """The encoded histories."""

    def decode(self, memory: Memory, tokens_BWs: Tensor) -> Tensor:
        """States (B, W, s + 1, D) after the start and after each of the s tokens of every beam."""

    def log_probs(self, states_QD: Tensor, step: int) -> Tensor:
        """Log-probabilities (Q, K) of the tokens of a step, the reserved one left out."""


# ---------------------------------------------------------------- parts of networks


class CodeTable(nn.Module):
    """Embedding rows of the tokens of some steps, and which tokens each item has; item N is padding and all zero.

    Args:
        tokens_NS: int64 tokens per step.
        factors_NS: float32 factor of each token's row when it stands for an item.
        sizes: tokens per step; real: tokens per step that can be predicted.
    """

    tokens_NS: Tensor
    factors_NS: Tensor

    def __init__(self, tokens_NS: Tensor, factors_NS: Tensor, sizes: Sequence[int], real: Sequence[int], dim: int) -> None:
        super().__init__()
        self.starts = [int(start) for start in np.concatenate([[0], np.cumsum(sizes)[:-1]])]
        self.real = tuple(real)
        self.rows = nn.Embedding(int(sum(sizes)), dim)
        nn.init.normal_(self.rows.weight, std=INIT_STD)
        placed_NS = tokens_NS + torch.tensor(self.starts)
        self.register_buffer("tokens_NS", torch.cat([placed_NS, torch.zeros_like(placed_NS[:1])]), persistent=False)  # the release's, not the checkpoint's
        self.register_buffer("factors_NS", torch.cat([factors_NS, torch.zeros_like(factors_NS[:1])]), persistent=False)

    def items(self, item_B: Tensor) -> Tensor:
        """Rows (*B, S, D) of items of any leading shape."""
        return self.rows(self.tokens_NS[item_B]) * self.factors_NS[item_B].unsqueeze(-1)

    def tokens(self, step: int, token_B: Tensor) -> Tensor:
        """Rows (*B, D) of tokens of one step."""
        return self.rows(token_B + self.starts[step])

    def predicted(self, step: int) -> Tensor:
        """Rows (K, D) of the tokens of a step that can be predicted."""
        return self.rows.weight[self.starts[step] : self.starts[step] + self.real[step]]


def code_table(catalogue: Catalogue, dim: int, *, numbers: bool, weighted: bool) -> CodeTable:
    """The rows of a catalogue's codes, with its disambiguators as a last step if `numbers`.

    Args:
        weighted: an item's rows are multiplied by its router weights; a masked slot's own row is not.
    """
    factors_NL = torch.where(catalogue.present_NL & weighted, catalogue.weights_NL, 1.0)
    if not numbers:
        return CodeTable(catalogue.codes_NL, factors_NL, catalogue.sizes[:-1], catalogue.codebook_sizes, dim)
    factors_NS = torch.cat([factors_NL, torch.ones(len(catalogue), 1)], dim=1)
    return CodeTable(catalogue.tokens_NS, factors_NS, catalogue.sizes, (*catalogue.codebook_sizes, catalogue.numbers), dim)


class DecoderBlock(nn.Module):
    """Causal self-attention over each beam's tokens, attention to the history, and a feed-forward, pre-norm and residual.

    All beams of a row look at one memory, which is projected once.
    """

    def __init__(self, dim: int, num_heads: int, feed_dim: int, dropout: float) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, feed_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feed_dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BWQD: Tensor, memory: Memory) -> Tensor:
        """The block's output (B, W, Q, D)."""
        batch, beams, length, dim = x_BWQD.shape
        x_RQD = x_BWQD.reshape(batch * beams, length, dim)
        later_QQ = torch.ones(length, length, dtype=torch.bool, device=x_RQD.device).triu(1)
        normed = self.norms[0](x_RQD)
        x_RQD = x_RQD + self.dropout(self.own(normed, normed, normed, attn_mask=later_QQ, need_weights=False)[0])
        x_BXD = x_RQD.reshape(batch, beams * length, dim)
        seen, _ = self.cross(self.norms[1](x_BXD), memory.states_BMD, memory.states_BMD, key_padding_mask=memory.padding_BM, need_weights=False)
        x_BXD = x_BXD + self.dropout(seen)
        x_BXD = x_BXD + self.dropout(self.feed(self.norms[2](x_BXD)))
        return x_BXD.reshape(batch, beams, length, dim)


class TokenDecoder(nn.Module):
    """Start, tokens and their places through decoder blocks; `branch` replaces the plain token rows (B, W, Q, D) if given."""

    def __init__(self, steps: int, dim: int, blocks: Sequence[DecoderBlock], branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.places = nn.Parameter(torch.randn(steps + 1, dim) * INIT_STD)
        self.start = nn.Parameter(torch.randn(dim) * INIT_STD)
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim)

    def forward(self, memory: Memory, tokens_BWs: Tensor, table: CodeTable) -> Tensor:
        """States (B, W, s + 1, D)."""
        rows = [self.start.expand(*tokens_BWs.shape[:2], -1)]
        rows += [table.tokens(step, token_BW) for step, token_BW in enumerate(tokens_BWs.unbind(2))]
        x_BWQD = torch.stack(rows, dim=2)
        if self.branch is not None:
            x_BWQD = self.branch(x_BWQD)
        x_BWQD = x_BWQD + self.places[: len(rows)]
        for block in self.blocks:
            x_BWQD = block(x_BWQD, memory)
        normed: Tensor = self.norm(x_BWQD)
        return normed


def encoder(dim: int, num_heads: int, feed_dim: int, num_layers: int, dropout: float) -> nn.TransformerEncoder:
    """A pre-norm transformer encoder over (B, M, D) with a final norm."""
    layer = nn.TransformerEncoderLayer(dim, num_heads, feed_dim, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)


def recency(history_BT: Tensor, pad: int) -> Tensor:
    """How many events ago each event was, int64 (B, T), 0 = the last one and padding."""
    return ((history_BT != pad).sum(1, keepdim=True) - 1 - torch.arange(history_BT.shape[1], device=history_BT.device)).clamp(min=0)


def last_targets(targets_BT: Tensor, pad: int) -> Tensor:
    """The last item that is not padding, int64 (B,)."""
    places_T = torch.arange(targets_BT.shape[1], device=targets_BT.device)
    return targets_BT.gather(1, torch.where(targets_BT != pad, places_T, 0).max(1, keepdim=True).values).squeeze(1)


def generated(model: Generator, table: CodeTable, weights_NS: Tensor, history_BT: Tensor, items_B: Tensor) -> Prediction:
    """Teacher-forced prediction of items by a generator; the state after the last token, which has a place of its own, is the summary."""
    placed_BS = table.tokens_NS[items_B] - torch.tensor(table.starts, device=items_B.device)
    states_BQD = model.decode(model.memory(history_BT), placed_BS[:, None, :])[:, 0]
    found = []
    for step, token_B in enumerate(placed_BS.unbind(1)):
        log_prob_BK = F.pad(model.log_probs(states_BQD[:, step], step), (0, 1))  # the reserved token: no term
        found.append(log_prob_BK.gather(1, token_B[:, None]).squeeze(1))
    return Prediction(-weighted_mean(torch.stack(found, dim=1), weights_NS[items_B]), items_B, states_BQD[:, -1])


# ---------------------------------------------------------------- histories


def padded(histories: Packed, length: int, pad: int) -> Tensor:
    """The latest `length` items of each history (B, T), padded at the end; at least one column."""
    stop_B = torch.from_numpy(histories.offsets[1:])
    start_B = torch.maximum(torch.from_numpy(histories.offsets[:-1]), stop_B - length)
    width = max(1, int((stop_B - start_B).max())) if len(histories) else 1
    at_BT = start_B[:, None] + torch.arange(width)
    items_T = torch.from_numpy(np.append(histories.items, pad))  # one more, so that an index beyond the end can be read
    return torch.where(at_BT < stop_B[:, None], items_T[at_BT.clamp(max=len(items_T) - 1)], pad)


def prefix_bounds(offsets_U: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(start, stop) of the histories up to every event but a user's last, at most `length` events each, int64 [B]."""
    user_T = torch.repeat_interleave(torch.arange(len(offsets_U) - 1), offsets_U.diff())
    after_T = torch.arange(1, int(offsets_U[-1]) + 1)
    stop_B = after_T[after_T < offsets_U[user_T + 1]]
    return torch.maximum(stop_B - length, offsets_U[user_T[stop_B - 1]]), stop_B
