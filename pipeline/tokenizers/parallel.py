"""What tokenizers with one independent code book per position share: losses of code rows, their k-means start, their revival.

Not here: experts and gates (one file per variant), the lookup itself (quantize.py). Suffixes: B batch, N items, D width, L positions, K codes.
"""

# ruff: noqa: N802 - tensor fields carry shape suffixes

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tokenizers.base import ItemBatch
from pipeline.tokenizers.quantize import codebook_loss, commitment_loss, kmeans, revive_codes
from pipeline.tokenizers.world import World

POINTS_PER_CODE = 256  # latents per code that k-means and revival look at, at most
BLOCK_ROWS = 8192  # items in one pass outside training
BLOCK_ROWS_THERE = 65_536  # the same on an accelerator, which is not busy with fewer


class Coded(Protocol):
    """A pass of items through experts and code books."""

    @property
    def z_BLD(self) -> Tensor:
        """Latents."""

    @property
    def zq_BLD(self) -> Tensor:
        """Their code rows."""

    @property
    def codes_BL(self) -> Tensor:
        """Their codes."""

    @property
    def gate_BL(self) -> Tensor:
        """Weights in the fused sum, 0 where a position is masked or off."""


def blocks(items: ItemBatch, rows: int = 0) -> list[ItemBatch]:
    """The items in consecutive blocks of at most `rows`; 0 = as suits where they are."""
    rows = rows or (BLOCK_ROWS if items.device.type == "cpu" else BLOCK_ROWS_THERE)
    return [items.take(slice(start, start + rows)) for start in range(0, len(items), rows)]


def code_terms(made: Coded, usage_LK: Tensor, *, square: float, world: World) -> dict[str, Tensor]:
    """Terms `codebook` and `commitment` on the unit sphere, summed over positions; each position's mean is over the items that show it.

    Args:
        usage_LK: counts the items per code, in place.
        square: squared norm of latents and code rows.
    """
    on_BL = made.gate_BL.detach() > 0
    with torch.no_grad():
        used_BLK = F.one_hot(made.codes_BL, usage_LK.shape[1]).to(torch.float32) * on_BL[..., None]
        usage_LK += used_BLK.sum(0)
    pairs = {"codebook": codebook_loss(made.z_BLD, made.zq_BLD), "commitment": commitment_loss(made.z_BLD, made.zq_BLD)}
    columns = range(on_BL.shape[1])
    return {name: torch.stack([world.mean(loss_BL[:, at] / square, on_BL[:, at]) for at in columns]).sum() for name, loss_BL in pairs.items()}


class CodeBooks:
    """What the training loop asks of the code books of ADA-SID and MMQ alike (`fit.Trainable`): their k-means start and their revival.

    Attributes:
        network: prepared items -> `Coded`, with codebook_LKD (L, K, D) and usage_LK, the items per code since the last revival.
    """

    network: Any

    @torch.no_grad()
    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """K-means of the latents per position; items that mask a position or switch it off are left out of it."""
        made, codebook_LKD = self._look(items, generator), self.network.codebook_LKD.data
        self.network.usage_LK.zero_()  # what the warm-up counted concerns other codes
        for at, codebook_KD in enumerate(codebook_LKD):
            on_B = made.gate_BL[:, at] > 0
            points_BD = F.normalize(made.z_BLD[:, at][on_B if bool(on_B.any()) else slice(None)], dim=1)
            codebook_KD.copy_(kmeans(points_BD, codebook_LKD.shape[1], generator=generator, spherical=True))

    @torch.no_grad()
    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Codes with fewer than 2 items since the last call moved onto badly coded latents; which rows moved, (L, K)."""
        codebook_LKD, seen_LK = self.network.codebook_LKD.data, world.total(self.network.usage_LK)
        self.network.usage_LK.zero_()
        moved_LK = torch.zeros_like(seen_LK, dtype=torch.bool)
        dead_L = (seen_LK < 2).any(1)
        if not bool(dead_L.any()):
            return {"codebook_LKD": moved_LK}
        made = self._look(items, generator)
        for at in torch.nonzero(dead_L).flatten().tolist():
            on_B = made.gate_BL[:, at] > 0
            if not bool(on_B.any()):
                continue
            rows_KD, points_BD = F.normalize(codebook_LKD[at], dim=1), F.normalize(made.z_BLD[:, at][on_B], dim=1)
            revived_KD, moved_LK[at] = revive_codes(rows_KD, seen_LK[at], points_BD, made.codes_BL[:, at][on_B], generator=generator)
            codebook_LKD[at].copy_(revived_KD)
        return {"codebook_LKD": moved_LK}

    def _look(self, items: ItemBatch, generator: torch.Generator) -> Coded:
        """A pass over as many items, drawn at random, as k-means needs."""
        codebook_LKD = self.network.codebook_LKD
        drawn = torch.randperm(len(items), generator=generator)[: POINTS_PER_CODE * codebook_LKD.shape[1]]
        made: Coded = self.network(items.take(drawn).to(codebook_LKD.device), quantise=True)
        return made
