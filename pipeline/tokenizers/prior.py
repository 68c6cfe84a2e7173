"""What content says of an item's behaviour: the vector that poorly known behaviour is drawn towards, and that stands in where there is none.

Fitted once per generation, so that an item's vector depends on that item alone. Suffixes: N items, X content columns, D width of behaviour.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.tokenizers.base import ItemBatch, aligned, shows

CONTENT = ("text", "image")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # penalties tried, in units of the mean square of the content columns times the weight of the items
HELD = 10  # every tenth item judges the penalty
MOST_ERROR = 0.95  # content that explains less than a twentieth of the behaviour says nothing of it, and its guess would be one vector for all


def shrunk(behavior_ND: Tensor, guess_ND: Tensor, richness_N: Tensor) -> Tensor:
    """The behaviour vector as far as it is informative, the guess for the rest, (N, D).

    Args:
        richness_N: N in [0, 1]; 0 where there is no behaviour.
    Source: empirical Bayes (James and Stein 1961), a mean of evidence and prior weighted by the evidence's reliability; differs: not in the paper, where
    an item without behaviour has no behaviour codes and a poor one is coded as it is; the weight is the paper's N.
    """
    share_N1 = richness_N[:, None]
    return share_N1 * behavior_ND + (1.0 - share_N1) * guess_ND


def ridge(design_NX: Tensor, target_ND: Tensor, weight_N: Tensor, penalty: float) -> Tensor:
    """The map (X, D) with the smallest weighted squared error plus `penalty` times its squared norm, in float64."""
    weighted_NX = design_NX * weight_N[:, None]
    gram_XX = weighted_NX.T @ design_NX
    scale = penalty * gram_XX.diagonal().mean()
    return torch.linalg.solve(gram_XX + scale * torch.eye(len(gram_XX), dtype=gram_XX.dtype), weighted_NX.T @ target_ND)


class BehaviorPrior(nn.Module):
    """A linear guess of the behaviour vector from the content vectors an item has, used where content explains behaviour (`MOST_ERROR`).

    Args:
        widths: modality -> width of its vectors; needs `behavior` and some content.
    """

    map_DX: Tensor
    error: Tensor

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.content = tuple(name for name in CONTENT if name in widths)
        columns = sum(widths[name] + 1 for name in self.content) + 1
        self.register_buffer("map_DX", torch.zeros(widths["behavior"], columns + -columns % 4))
        self.register_buffer("error", torch.ones(()))

    def _design(self, items: ItemBatch) -> Tensor:
        """Content side by side, zero where masked, a column per modality that says whether it is there, a constant, and zeros up to X columns, (N, X)."""
        parts = []
        for name in self.content:
            vectors_ND, mask_N1 = items.known(name), items.mask(name)[:, None]
            parts += [torch.where(mask_N1, vectors_ND.float(), 0.0), mask_N1.float()]
        return aligned(torch.cat([*parts, torch.ones(len(items), 1, device=items.device)], 1))

    @torch.no_grad()
    def fit(self, items: ItemBatch) -> None:
        """Fit on items with behaviour and content, weighted by richness; `error` is the held-out share of variance that is not explained.

        The penalty is the one with the smallest error on every tenth item, the map is then fitted on all of them.
        """
        rows = torch.nonzero(items.behavior_N & shows(items, self.content) & (items.richness_N > 0)).flatten()
        if len(rows) < 2 * HELD:
            return  # too few to learn from: the guess stays the zero vector
        known = items.take(rows).map(lambda value: value.cpu())
        assert known.behavior_ND is not None
        design_NX, target_ND, weight_N = self._design(known).double(), known.behavior_ND.double(), known.richness_N.double()
        held_N = torch.arange(len(rows)) % HELD == 0
        errors = {penalty: _error(design_NX, target_ND, weight_N, held_N, penalty) for penalty in RIDGES}
        best = min(RIDGES, key=lambda penalty: errors[penalty])
        self.map_DX.copy_(ridge(design_NX, target_ND, weight_N, best).T.float())
        self.error.fill_(errors[best])

    def apply_to(self, items: ItemBatch, *, shrink: bool) -> ItemBatch:
        """The items, those with content alone with the guess as their behaviour; an item without content keeps what it has.

        Args:
            shrink: draw behaviour towards the guess as far as it is poor; else it stays as it comes.
        """
        guessed_N = shows(items, self.content) & (self.error <= MOST_ERROR)
        behavior_ND = items.behavior_ND
        assert behavior_ND is not None, "no behavior vectors"
        own_ND = torch.where(items.behavior_N[:, None], behavior_ND.float(), 0.0)
        trust_N = torch.where(items.behavior_N, items.richness_N if shrink else 1.0, 0.0)
        mixed_ND = torch.where(guessed_N[:, None], shrunk(own_ND, F.linear(self._design(items), self.map_DX), trust_N), own_ND)
        return replace(items, behavior_ND=mixed_ND, behavior_N=items.behavior_N | guessed_N)


def _error(design_NX: Tensor, target_ND: Tensor, weight_N: Tensor, held_N: Tensor, penalty: float) -> float:
    """Weighted squared error on the held-out items over their weighted variance, of a map fitted on the others."""
    map_XD = ridge(design_NX[~held_N], target_ND[~held_N], weight_N[~held_N], penalty)
    weight_H1, target_HD = weight_N[held_N, None], target_ND[held_N]
    mean_D = (weight_H1 * target_HD).sum(0) / weight_H1.sum()
    wrong, spread = ((weight_H1 * (target_HD - guess_HD).square()).sum() for guess_HD in (design_NX[held_N] @ map_XD, mean_D))
    return float(wrong / spread.clamp(min=1e-12))
