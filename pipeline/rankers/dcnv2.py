"""`dcnv2`: explicit crosses of the features beside a stack of layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Cross(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l, W = U V of a rank or full.

    Source: DCN V2 (arXiv 2008.13535), cross layer, low rank.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width)) if rank else nn.Linear(width, width)

    def forward(self, first_BF: Tensor, x_BF: Tensor) -> Tensor:
        """The crossed features (B, F)."""
        crossed: Tensor = first_BF * self.layer(x_BF) + x_BF
        return crossed


class DcnV2(nn.Module):
    """Head (B, 4 D) -> (B, 1): crosses and layers side by side, one linear map on both.

    Source: DCN V2 (arXiv 2008.13535), parallel structure.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int], num_layers: int, rank: int) -> None:
        super().__init__()
        sizes = [4 * dim, *hidden_dims]
        self.crosses = nn.ModuleList(Cross(4 * dim, rank) for _ in range(num_layers))
        self.layers = nn.Sequential(*(layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.out = nn.Linear(4 * dim + sizes[-1], 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits (B, 1)."""
        crossed_BF = x_BF
        for cross in self.crosses:
            crossed_BF = cross(x_BF, crossed_BF)
        logit_B1: Tensor = self.out(torch.cat([crossed_BF, self.layers(x_BF)], dim=1))
        return logit_B1
