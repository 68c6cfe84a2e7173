"""`sequential`: items as one vector each, a shallow decoder that writes the next item's codes slot by slot, a head per slot.

Source: the plain generative part of REG4Rec (arXiv 2508.15308) as far as it is public; differs: no mixture of code books, no reward stages, learned places,
a disambiguator as the last slot.
Tensor suffixes: B rows, T history, S tokens of an item, W beams, s tokens so far, Q states, K codes, D width.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Sequential as Params
from pipeline.retrievers.base import (
    INIT_STD,
    Catalogue,
    DecoderBlock,
    Memory,
    Prediction,
    TokenDecoder,
    code_table,
    encoder,
    generated,
    last_targets,
    recency,
)
from pipeline.retrievers.tiger import step_weights


class Sequential(nn.Module):
    """The generator.

    Args:
        length: events of a history at most.
        share: of the router weights in the loss.
        weighted: code rows of the history are multiplied by router weights.
    """

    every_position = False
    weights_NS: Tensor

    def __init__(self, catalogue: Catalogue, params: Params, *, length: int, share: float, weighted: bool) -> None:
        super().__init__()
        self.temperature, self.pad, dim = params.temperature, len(catalogue), params.dim
        self.table = code_table(catalogue, dim, numbers=True, weighted=weighted)
        self.item = nn.Sequential(nn.Linear(catalogue.steps * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.ages = nn.Parameter(torch.randn(length, dim) * INIT_STD)
        self.scale, self.dropout = dim**0.5, nn.Dropout(params.dropout)
        self.encoder = encoder(dim, params.num_heads, params.feed_dim, params.encoder_layers, params.dropout)
        blocks = [DecoderBlock(dim, params.num_heads, params.feed_dim, params.dropout) for _ in range(params.decoder_layers)]
        self.decoder = TokenDecoder(catalogue.steps, dim, blocks)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(catalogue.steps))
        self.register_buffer("weights_NS", step_weights(catalogue, share), persistent=False)

    def memory(self, history_BT: Tensor) -> Memory:
        """State of every item of the history (B, T, D)."""
        padding_BT = history_BT == self.pad
        x_BTD = self.item((self.table.items(history_BT) * self.scale).flatten(2)) + self.ages[recency(history_BT, self.pad)]
        return Memory(self.encoder(self.dropout(x_BTD), src_key_padding_mask=padding_BT), padding_BT)

    def decode(self, memory: Memory, tokens_BWs: Tensor) -> Tensor:
        """States (B, W, s + 1, D)."""
        states: Tensor = self.decoder(memory, tokens_BWs, self.table)
        return states

    def log_probs(self, states_QD: Tensor, step: int) -> Tensor:
        """Log-probabilities (Q, K): cosine of the slot's head and its code rows, over a temperature."""
        query_QD = F.normalize(self.heads[step](states_QD), dim=1)
        return F.log_softmax(query_QD @ F.normalize(self.table.predicted(step), dim=1).T / self.temperature, dim=1)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Prediction:
        """The prediction of the item after the last event."""
        return generated(self, self.table, self.weights_NS, inputs_BT, last_targets(targets_BT, self.pad))
