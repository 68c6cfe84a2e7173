"""`ppnet`: every layer of the stack is scaled, unit by unit, by a gate that knows the user and the target."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Factors in (0, 2) per unit: 2 sigmoid(W' relu(W [prior, input] + b) + b').

    Source: PEPNet (arXiv 2302.01115), gate unit with gamma = 2.
    """

    def __init__(self, prior: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, out)
        nn.init.zeros_(last.weight)  # every factor begins at 1
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(prior + width, hidden), nn.ReLU(), last)

    def forward(self, prior_BP: Tensor, x_BF: Tensor) -> Tensor:
        """Factors (B, out)."""
        return 2 * torch.sigmoid(self.layers(torch.cat([prior_BP, x_BF], dim=1)))


class PpNet(nn.Module):
    """Head (B, 4 D) -> (B, 1): h_{l+1} = relu(W_l (gate_l * h_l)), the gates read the priors and the head's input, which gets no gradient from them.

    Source: PEPNet (arXiv 2302.01115), PPNet; differs: one task, priors are the user's and the target's vectors, gates sit on the inputs of the layers.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int], gate_dim: int) -> None:
        super().__init__()
        sizes = [4 * dim, *hidden_dims]
        self.dim = dim
        self.gates = nn.ModuleList(Gate(2 * dim, 4 * dim, gate_dim, size) for size in sizes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([*sizes, 1]))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits (B, 1)."""
        prior_BP = torch.cat([x_BF[:, : self.dim], x_BF[:, 3 * self.dim :]], dim=1)
        frozen_BF, hidden = x_BF.detach(), x_BF
        for number, (gate, layer) in enumerate(zip(self.gates, self.layers, strict=True)):
            hidden = layer(gate(prior_BP, frozen_BF) * hidden)
            if number < len(self.layers) - 1:
                hidden = torch.relu(hidden)
        return hidden
