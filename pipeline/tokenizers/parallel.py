"""What tokenizers with one independent code book per position share: losses of code rows, their k-means start, their revival.

Not here: experts and gates (one file per variant), the lookup itself (quantize.py). Suffixes: B batch, N items, D width, L positions, K codes.
"""

# ruff: noqa: N802 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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


def sample(items: ItemBatch, size: int, *, generator: torch.Generator) -> ItemBatch:
    """As many items, drawn at random, as k-means of `size` codes needs."""
    return items.take(torch.randperm(len(items), generator=generator)[: POINTS_PER_CODE * size])


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


@torch.no_grad()
def start_codes(codebook_LKD: Tensor, usage_LK: Tensor, made: Coded, *, generator: torch.Generator) -> None:
    """K-means of the latents per position, in place; items that mask a position or switch it off are left out of it."""
    usage_LK.zero_()  # what the warm-up counted concerns other codes
    for at, codebook_KD in enumerate(codebook_LKD):
        on_B = made.gate_BL[:, at] > 0
        points_BD = F.normalize(made.z_BLD[:, at][on_B if bool(on_B.any()) else slice(None)], dim=1)
        codebook_KD.copy_(kmeans(points_BD, codebook_LKD.shape[1], generator=generator, spherical=True))


@torch.no_grad()
def revive(codebook_LKD: Tensor, usage_LK: Tensor, look: Callable[[], Coded], *, generator: torch.Generator, world: World) -> Tensor:
    """Codes with fewer than 2 items since the last call moved onto badly coded latents, in place; which rows moved, (L, K).

    Args:
        look: a pass over a sample of items, asked for only when some code is dead.
    """
    seen_LK = world.total(usage_LK)
    usage_LK.zero_()
    moved_LK = torch.zeros_like(seen_LK, dtype=torch.bool)
    if not bool((seen_LK < 2).any()):
        return moved_LK
    made = look()
    for at in torch.nonzero((seen_LK < 2).any(1)).flatten().tolist():
        on_B = made.gate_BL[:, at] > 0
        if not bool(on_B.any()):
            continue
        rows_KD, points_BD = F.normalize(codebook_LKD[at], dim=1), F.normalize(made.z_BLD[:, at][on_B], dim=1)
        revived_KD, moved_LK[at] = revive_codes(rows_KD, seen_LK[at], points_BD, made.codes_BL[:, at][on_B], generator=generator)
        codebook_LKD[at].copy_(revived_KD)
    return moved_LK
