"""`tiger`: a small encoder-decoder that reads a history token by token and writes the next item's tokens, disambiguator last.

Source: TIGER (arXiv 2305.05065). differs: learned places (slot in the item, events ago) instead of T5's relative buckets, no user token, pre-norm blocks,
heads that divide the width (6 of 64 at width 128 in its reruns), the reserved code of a masked slot has a row of its own and no term in the loss.
Tensor suffixes: B rows, T history, S tokens of an item, W beams, s tokens so far, Q states, K codes, D width, M = T * S.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Tiger as Params
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
    slot_weights,
)


@dataclass(frozen=True)
class TigerSettings:
    """What a generator is built with.

    Args:
        length: events of a history at most.
        share: of the router weights in the loss; the disambiguator always counts 1.
        weighted: code rows of the history are multiplied by router weights.
    """

    params: Params
    length: int
    share: float
    weighted: bool


class Tiger(nn.Module):
    """The generator; branches replace the plain token rows before the encoder and the decoder if given."""

    every_position = False
    weights_NS: Tensor

    def __init__(
        self, catalogue: Catalogue, settings: TigerSettings, *, encoder_branch: nn.Module | None = None, decoder_branch: nn.Module | None = None
    ) -> None:
        super().__init__()
        params, self.pad = settings.params, len(catalogue)
        self.table = code_table(catalogue, params.dim, numbers=True, weighted=settings.weighted)
        self.slots = nn.Parameter(torch.randn(catalogue.steps, params.dim) * INIT_STD)
        self.ages = nn.Parameter(torch.randn(settings.length, 1, params.dim) * INIT_STD)
        self.branch, self.dropout, self.scale = encoder_branch, nn.Dropout(params.dropout), params.dim**0.5
        self.encoder = encoder(params.dim, params.num_heads, params.feed_dim, params.encoder_layers, params.dropout)
        blocks = [DecoderBlock(params.dim, params.num_heads, params.feed_dim, params.dropout) for _ in range(params.decoder_layers)]
        self.decoder = TokenDecoder(catalogue.steps, params.dim, blocks, decoder_branch)
        self.register_buffer("weights_NS", step_weights(catalogue, settings.share), persistent=False)

    def memory(self, history_BT: Tensor) -> Memory:
        """States of every token of the history (B, T * S, D)."""
        padding_BT = history_BT == self.pad
        x_BTSD = self.table.items(history_BT) * self.scale
        if self.branch is not None:
            x_BTSD = self.branch(x_BTSD, padding_BT)
        x_BTSD = self.dropout(x_BTSD + self.slots + self.ages[recency(history_BT, self.pad)])
        padding_BM = padding_BT.repeat_interleave(x_BTSD.shape[2], dim=1)
        return Memory(self.encoder(x_BTSD.flatten(1, 2), src_key_padding_mask=padding_BM), padding_BM)

    def decode(self, memory: Memory, tokens_BWs: Tensor) -> Tensor:
        """States (B, W, s + 1, D)."""
        states: Tensor = self.decoder(memory, tokens_BWs, self.table)
        return states

    def log_probs(self, states_QD: Tensor, step: int) -> Tensor:
        """Log-probabilities (Q, K): product with the step's token rows, tied to the input."""
        return F.log_softmax(states_QD @ self.table.predicted(step).T, dim=1)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Prediction:
        """The prediction of the item after the last event."""
        return generated(self, self.table, self.weights_NS, inputs_BT, last_targets(targets_BT, self.pad))


def step_weights(catalogue: Catalogue, share: float) -> Tensor:
    """Weights of an item's tokens, the disambiguator's last and 1, (N, S)."""
    return torch.cat([slot_weights(catalogue.weights_NL, catalogue.present_NL, share), torch.ones(len(catalogue), 1)], dim=1)
