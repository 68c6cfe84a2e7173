"""`din`: a plain stack of layers on the pooled history."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def din(dim: int, hidden_dims: Sequence[int]) -> nn.Sequential:
    """Head (B, 4 D) -> (B, 1) of PReLU layers.

    Source: Deep Interest Network (KDD 2018), layers above the pooling.
    """
    sizes = [4 * dim, *hidden_dims]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.PReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
