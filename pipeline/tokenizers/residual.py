"""Codes of a residual walk from one matrix product: the fast form of `quantize.residual_codes`, for code books that stay as they are.

The product of a point with the rest of level l is the product with the point itself less the products of the code rows taken before, and those are a table.
On a CPU with bfloat16 instructions the product runs in bfloat16. Its error has a bound (Cauchy-Schwarz on what rounding took away); a point whose best two
codes are closer than the bound is scored again in float32, on the codes within it and on itself alone. So the codes are those of float32 arithmetic.
Suffixes: B points of a block, D width, L levels, K codes, S = L * K, F points in doubt, P pairs (point in doubt, code).
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.device import has_bfloat16

BLOCK = 2048  # points whose scores are held at once
BLOCK_THERE = 65_536  # the same on an accelerator, which is not busy with fewer
NARROW = 128  # points narrower than this gain nothing from bfloat16
UNIT = 2.0**-8  # half a step of bfloat16, relative
SLACK = 1.05  # on the bound, for what float32 loses while the bound itself is computed


def rounds(width: int, device: torch.device) -> bool:
    """Whether the search for points of that width on that device runs in bfloat16."""
    return width >= NARROW and device.type == "cpu" and has_bfloat16()


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one level adds to the products.

    Args:
        rows_KD: code rows less their mean, which moves all scores of a point alike.
        price_K: half the squared length of the code rows, less its mean.
        taken: per level before, (K, K): what a code taken there adds to the price of each code here.
        spread / lost_spread: largest distance between two rounded rows, and between what rounding took from two rows.
        radius: longest of `rows_KD`.
    """

    rows_KD: Tensor
    price_K: Tensor
    taken: tuple[Tensor, ...]
    spread: float
    lost_spread: float
    radius: float

    def prices(self, codes: Sequence[Tensor]) -> Tensor:
        """Price of each code given the codes taken before, (B, K), or (1, K) at the first level."""
        if not codes:
            return self.price_K[None]
        price_BK = F.embedding(codes[0], self.taken[0])
        for codes_B, table_KK in zip(codes[1:], self.taken[1:], strict=True):
            price_BK += F.embedding(codes_B, table_KK)
        return price_BK


class ResidualSearch:
    """Nearest codes level by level, ready for many points.

    Args:
        codebook_LKD: float32 code rows; they are read once, later changes of the tensor are not seen.
        bfloat16: None = where the CPU has it and the points are wide enough.
    """

    def __init__(self, codebook_LKD: Tensor, *, bfloat16: bool | None = None) -> None:
        rows_LKD = codebook_LKD.detach().float()
        centred_LKD = rows_LKD - rows_LKD.mean(1, keepdim=True)
        self.bfloat16 = rounds(rows_LKD.shape[2], rows_LKD.device) if bfloat16 is None else bfloat16
        self.levels = [_level(rows_LKD, centred_LKD, level) for level in range(len(rows_LKD))]
        self.rows_SD = centred_LKD.flatten(0, 1).to(torch.bfloat16 if self.bfloat16 else torch.float32)
        self.in_doubt = 0  # points scored again so far, one for each level; to be looked at, nothing depends on it

    def codes(self, points_ND: Tensor) -> Tensor:
        """Codes of the points, (N, L) int64; ties go to the lower code."""
        if not len(points_ND):
            return torch.zeros(0, len(self.levels), dtype=torch.int64, device=points_ND.device)
        return torch.cat(
            _each_block(self._rounded if self.bfloat16 else self._plain, points_ND.split(BLOCK if points_ND.device.type == "cpu" else BLOCK_THERE))
        )

    def _plain(self, points_BD: Tensor) -> Tensor:
        """The walk in float32."""
        codes: list[Tensor] = []
        for level, product_BK in zip(self.levels, (points_BD @ self.rows_SD.T).chunk(len(self.levels), 1), strict=True):
            codes.append((product_BK - level.prices(codes)).max(1).indices)
        return torch.stack(codes, 1)

    def _rounded(self, points_BD: Tensor) -> Tensor:
        """The walk in bfloat16, points in doubt scored again."""
        rounded_BD = points_BD.to(torch.bfloat16)
        length_B = torch.linalg.vector_norm(points_BD, dim=1)
        lost_B = torch.linalg.vector_norm(rounded_BD.float().sub_(points_BD), dim=1)
        codes: list[Tensor] = []
        for level, product_BK in zip(self.levels, F.linear(rounded_BD, self.rows_SD).chunk(len(self.levels), 1), strict=True):
            price_BK = level.prices(codes)
            dearest_B = price_BK.abs().amax(1)
            score_BK = product_BK.float().sub_(price_BK)
            best_B, code_B = score_BK.max(1)
            next_B = score_BK.scatter_(1, code_B[:, None], -torch.inf).amax(1)
            score_BK.scatter_(1, code_B[:, None], best_B[:, None])
            error_B = lost_B * level.spread + length_B * (level.lost_spread + 2.0**-15 * level.radius)
            margin_B = SLACK * (error_B + 2 * UNIT * (best_B.abs() + error_B + dearest_B))
            doubt_F = (best_B - next_B <= margin_B).nonzero()[:, 0]
            if len(doubt_F):
                near_FK = score_BK[doubt_F] >= (best_B - margin_B)[doubt_F, None]
                code_B[doubt_F] = _scored_again(points_BD[doubt_F], level.rows_KD, price_BK[doubt_F] if codes else price_BK, near_FK)
                self.in_doubt += len(doubt_F)
            codes.append(code_B)
        return torch.stack(codes, 1)


def sum_of_rows(codes_BL: Tensor, codebook_LKD: Tensor) -> Tensor:
    """The sum of each point's code rows, (B, D), without a copy of them."""
    positions, size, _ = codebook_LKD.shape
    offset_L = torch.arange(positions, device=codes_BL.device) * size
    return F.embedding_bag(codes_BL + offset_L, codebook_LKD.flatten(0, 1), mode="sum")


def _each_block(walk: Callable[[Tensor], Tensor], blocks: Sequence[Tensor]) -> list[Tensor]:
    """The walk of every block, one block a thread: threads that meet after each small step would wait for each other most of the time."""
    threads = torch.get_num_threads()
    if threads == 1 or len(blocks) == 1 or blocks[0].device.type != "cpu":
        return [walk(block_BD) for block_BD in blocks]
    try:
        with ThreadPoolExecutor(min(threads, len(blocks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(walk, blocks))
    finally:
        torch.set_num_threads(threads)


def _level(rows_LKD: Tensor, centred_LKD: Tensor, at: int) -> Level:
    """The level's tables; products are summed in float64, so that a table adds no error of its own."""
    here_KD, rounded_KD = centred_LKD[at], centred_LKD[at].to(torch.bfloat16).float()
    half_K = 0.5 * rows_LKD[at].double().square().sum(1)
    price_K = half_K - half_K.mean()
    taken = [rows_LKD[before].double() @ here_KD.double().T for before in range(at)]
    if taken:
        taken[0] = taken[0] + price_K
    return Level(
        rows_KD=here_KD.contiguous(),
        price_K=price_K.float(),
        taken=tuple(table_KK.float() for table_KK in taken),
        spread=float(torch.cdist(rounded_KD, rounded_KD).max()),
        lost_spread=float(torch.cdist(here_KD - rounded_KD, here_KD - rounded_KD).max()),
        radius=float(torch.linalg.vector_norm(here_KD, dim=1).max()),
    )


def _scored_again(points_FD: Tensor, rows_KD: Tensor, price_FK: Tensor, near_FK: Tensor) -> Tensor:
    """The best of the codes marked in `near_FK`, (F,), by float32 products of single pairs: no pair's score knows of another pair."""
    row_P, code_P = near_FK.nonzero().unbind(1)
    product_P = _pairs(points_FD, rows_KD, row_P, code_P)
    score_P = product_P - price_FK.expand_as(near_FK)[row_P, code_P]
    best_F = torch.full((len(points_FD),), -torch.inf).scatter_reduce_(0, row_P, score_P, "amax")
    won_P = score_P == best_F[row_P]
    return torch.full((len(points_FD),), len(rows_KD)).scatter_reduce_(0, row_P[won_P], code_P[won_P], "amin")


def _pairs(points_FD: Tensor, rows_KD: Tensor, row_P: Tensor, code_P: Tensor) -> Tensor:
    """Inner products of single pairs, (P,), without a copy of their rows; pairs are sorted by row."""
    offset_F = torch.zeros(len(points_FD) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row_P, minlength=len(points_FD)), 0, out=offset_F[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        wanted = torch.sparse_csr_tensor(offset_F, code_P, points_FD.new_zeros(len(code_P)), size=(len(points_FD), len(rows_KD)), check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, points_FD, rows_KD.T, beta=0.0).values()
