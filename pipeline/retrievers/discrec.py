"""`discrec`: the token rows of `tiger` pass a second branch that looks inside the item, and a gate mixes the two.

Source: DiscRec (arXiv 2506.15576). The item's length is the release's; an item's tokens are one row of the attention, so histories of any length need no mask
and no padding is ever looked at. Tensor suffixes: B rows, T history, S tokens of an item, D width, X blocks of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import DiscRec as Params
from pipeline.retrievers.base import INIT_STD, Catalogue
from pipeline.retrievers.tiger import Tiger, TigerSettings


class Branch(nn.Module):
    """Token rows (*X, Q, D) mixed with what attention among the Q tokens of a block adds.

    c0 = LN(s + P); c1 = c0 + attention(c0); c = c1 + FFN(LN(c1)); out = a_s s + a_c c with (a_s, a_c) = softmax(w_s . s, w_c . c).
    Source: DiscRec (arXiv 2506.15576), dual-branch module, checked against the authors' program; differs: no end token after the history, so no block has
    to stand beside it, and the attention ends in a linear map, which theirs has not.

    Args:
        length: tokens of a block at most.
        causal: a token sees only earlier ones (decoder).
    """

    def __init__(self, length: int, dim: int, params: Params, *, causal: bool) -> None:
        super().__init__()
        self.params, self.causal = params, causal
        self.places = nn.Parameter(torch.randn(length, dim) * INIT_STD)
        self.attention = nn.MultiheadAttention(dim, params.num_heads, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(dim, params.feed_dim), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(params.feed_dim, dim))
        self.gates = nn.Parameter(torch.randn(2, dim) * INIT_STD)

    def forward(self, rows_XQD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """The mixed rows, shape as given.

        Args:
            padding_BT: events that are padding; read only by the ablation without blocks, where all tokens of a history see each other.
        """
        length = rows_XQD.shape[-2]
        c_XQD = self.norms[0](rows_XQD + self.places[:length])
        c_XQD = c_XQD + (self._inside(c_XQD) if self.params.local or padding_BT is None else self._across(c_XQD, padding_BT))
        c_XQD = c_XQD + self.feed(self.norms[1](c_XQD))
        if not self.params.gate:
            return rows_XQD + c_XQD
        share_XQ2 = torch.stack([rows_XQD @ self.gates[0], c_XQD @ self.gates[1]], dim=-1).softmax(dim=-1)
        return share_XQ2[..., :1] * rows_XQD + share_XQ2[..., 1:] * c_XQD

    def _inside(self, c_XQD: Tensor) -> Tensor:
        block_XQD = c_XQD.flatten(0, -3)
        length = block_XQD.shape[1]
        later_QQ = torch.ones(length, length, dtype=torch.bool, device=c_XQD.device).triu(1) if self.causal else None
        mixed, _ = self.attention(block_XQD, block_XQD, block_XQD, attn_mask=later_QQ, need_weights=False)
        return mixed.view_as(c_XQD)

    def _across(self, c_BTSD: Tensor, padding_BT: Tensor) -> Tensor:
        all_BXD = c_BTSD.flatten(1, 2)
        padding_BX = padding_BT.repeat_interleave(c_BTSD.shape[2], dim=1)
        mixed, _ = self.attention(all_BXD, all_BXD, all_BXD, key_padding_mask=padding_BX, need_weights=False)
        return mixed.view_as(c_BTSD)


def discrec(catalogue: Catalogue, settings: TigerSettings, params: Params) -> Tiger:
    """`tiger` with a branch before its encoder and another before its decoder."""
    dim = settings.params.dim
    return Tiger(
        catalogue,
        settings,
        encoder_branch=Branch(catalogue.steps, dim, params, causal=False),
        decoder_branch=Branch(catalogue.steps + 1, dim, params, causal=True),
    )
