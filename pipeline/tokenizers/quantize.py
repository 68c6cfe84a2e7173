"""Vectors to codes and back: nearest code, straight-through estimators, codebook losses, k-means, dead-code revival, PCA in front.

Pure functions on tensors, shared by all tokenizers; no module, no training loop (fit.py), no variant (one file each).
Suffixes: B batch, N items, D width, L positions, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tokenizers.residual import ResidualSearch, rounds

SEED_POINTS = 32  # points per seed that k-means++ draws from, at most
CHUNK = 1 << 24  # distances held in memory at once
EVEN_PART = 3  # balanced k-means assigns evenly in the last of so many parts of its iterations: clusters form as quickly where each point goes freely
MOST_GAIN = 1e36  # factor by which one call moves the share of a code at most: beyond it float32 would multiply zero and infinity


def hold_on(distance_NK: Tensor, keep_N: Tensor, margin: float) -> Tensor:
    """The nearest code per row, (N,) int64, or the kept one while it is not farther than (1 + margin) times the nearest.

    Args:
        distance_NK: non-negative distances.
        keep_N: codes to hold on to; K or above = none.
    """
    best = distance_NK.min(1)
    known_N = keep_N < distance_NK.shape[1]
    kept_N = torch.where(known_N, keep_N, best.indices)
    near_N = distance_NK.gather(1, kept_N[:, None])[:, 0] <= (1.0 + margin) * best.values
    return torch.where(known_N & near_N, kept_N, best.indices)


def held_codes(z_BLD: Tensor, codebook_LKD: Tensor, keep_BL: Tensor, margin: float) -> Tensor:
    """`nearest_code` that holds on to kept codes, (B, L) int64; the distance is one minus the cosine."""
    unit_LBD, unit_LKD = F.normalize(z_BLD, dim=-1).transpose(0, 1), F.normalize(codebook_LKD, dim=-1)
    distance_LBK = (1.0 - torch.bmm(unit_LBD, unit_LKD.transpose(1, 2))).clamp(min=0)
    return torch.stack([hold_on(distance_BK, keep_B, margin) for distance_BK, keep_B in zip(distance_LBK, keep_BL.T, strict=True)], 1)


def nearest_code(z_BLD: Tensor, codebook_LKD: Tensor) -> Tensor:
    """The code of largest cosine per item and position, (B, L) int64; lengths of latents and code rows do not matter.

    Source: ADC-SID eq. (5), (7), (8), (9); differs: (8) and (9) print the shared latent in the visual and behaviour arg-max, read here as their own.
    """
    unit_LBD = F.normalize(z_BLD, dim=-1).transpose(0, 1)
    unit_LDK = F.normalize(codebook_LKD, dim=-1).transpose(1, 2)
    return torch.bmm(unit_LBD, unit_LDK).argmax(-1).transpose(0, 1)


def nearest_centroid(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """The code of smallest Euclidean distance per point, (N,) int64; blocks of rows, so that memory stays bounded."""
    half_K = 0.5 * centroids_KD.square().sum(1)
    rows = max(1, CHUNK // len(centroids_KD))
    return torch.cat([(block_BD @ centroids_KD.T).sub_(half_K).max(1).indices for block_BD in points_ND.split(rows)])


def gather_codes(codes_BL: Tensor, codebook_LKD: Tensor) -> Tensor:
    """The code rows of the codes, (B, L, D), differentiable in the code book."""
    positions, size, width = codebook_LKD.shape
    offset_L = torch.arange(positions, device=codes_BL.device) * size
    return F.embedding(codes_BL + offset_L, codebook_LKD.reshape(positions * size, width))


def straight_through(z: Tensor, zq: Tensor, *, code_gradient: bool) -> Tensor:
    """The value of `zq` with a gradient of one into `z` and, with `code_gradient`, into the code rows too; any shape.

    Source: ADC-SID eq. (14), z + sg(zq - z); differs: applied per position before the sum of eq. (10)-(11), so that a gate sees the code it multiplies,
    and `code_gradient` lets the decoder move the code rows: as printed nothing in the paper does.
    """
    return zq + (z - z.detach()) if code_gradient else z + (zq - z).detach()


def codebook_loss(z_BLD: Tensor, zq_BLD: Tensor) -> Tensor:
    """Squared distance that pulls code rows to the latents they hold, per item and position, (B, L).

    Source: VQ-VAE eq. (3), second term; differs: absent from ADC-SID, without it (or `code_gradient`) code books never move.
    """
    return (z_BLD.detach() - zq_BLD).square().sum(-1)


def commitment_loss(z_BLD: Tensor, zq_BLD: Tensor) -> Tensor:
    """Squared distance that pulls latents to their code rows, per item and position, (B, L).

    Source: VQ-VAE eq. (3), third term; differs: absent from ADC-SID.
    """
    return (z_BLD - zq_BLD.detach()).square().sum(-1)


def balanced_codes(points_ND: Tensor, centroids_KD: Tensor, price_K: Tensor, *, rounds: int = 10, sharpness: float = 20.0) -> tuple[Tensor, Tensor]:
    """One code per point with about equally many points per code, (N,) int64, and the prices of the codes that make it so, (K,).

    Sinkhorn in the log domain: a crowded code becomes dearer until each attracts its share, then each point takes its cheapest code.

    Args:
        price_K: prices to start from, zeros at first; handing back the last ones makes a few rounds enough between two Lloyd iterations.
        rounds: of raising and lowering prices; one reads N x K shares twice, the product of points and centroids costs as much as twenty.
        sharpness: mean distance to the nearest code over the temperature; larger is closer to a hard assignment and slower to balance.
    Source: OneRec (arXiv 2502.18965), balanced k-means; differs: there the codes in turn take their N / K nearest points of those left, which makes the
    last codes take what nobody wanted; prices treat all codes alike and balance nearly, not exactly.
    """
    score_NK = torch.addmm(-0.5 * centroids_KD.square().sum(1), points_ND, centroids_KD.T)  # half of |point|^2 less the squared distance
    nearest = torch.linalg.vector_norm(points_ND).square() / len(points_ND) - 2 * score_NK.amax(1).mean()
    score_NK.mul_(2 * sharpness / nearest.clamp(min=1e-12)).sub_(price_K)
    share_NK = score_NK.sub_(score_NK.amax(1, keepdim=True)).exp_()  # once: a round is then two products with a vector
    gain_K = torch.ones_like(price_K)
    target = len(points_ND) / len(centroids_KD)
    for _ in range(rounds):
        held_K = gain_K * (share_NK.T @ (share_NK @ gain_K).reciprocal_())
        gain_K = (gain_K * target / held_K.clamp(min=1e-6)).clamp(1 / MOST_GAIN, MOST_GAIN)
    return share_NK.mul_(gain_K).max(1).indices, price_K - gain_K.log()


def sinkhorn(distance_NK: Tensor, *, epsilon: float, rounds: int) -> Tensor:
    """A plan that sends each point to the codes and fills the codes evenly, (N, K) float64: rows add up to 1, columns to about N / K.

    Args:
        distance_NK: any distances; they are brought to [-1, 1] first, so that `epsilon` means the same at every scale.
        epsilon: temperature; smaller is closer to one code per point and needs more rounds to be even.
    Source: Cuturi (2013) alg. 1, as LC-Rec (arXiv 2311.09049) and LETTER assign at their last level; differs: in the log domain, which cannot underflow.
    """
    distance_NK = distance_NK.double()
    low, high = distance_NK.min(), distance_NK.max()
    log_NK = -(distance_NK - (high + low) / 2) / ((high - low) / 2).clamp(min=1e-12) / epsilon
    share = math.log(len(log_NK) / log_NK.shape[1])
    for _ in range(rounds):
        log_NK = log_NK - log_NK.logsumexp(0, keepdim=True) + share
        log_NK = log_NK - log_NK.logsumexp(1, keepdim=True)
    return log_NK.exp()


def kmeans(
    points_ND: Tensor,
    size: int,
    *,
    generator: torch.Generator,
    iterations: int = 25,
    balanced: bool = False,
    spherical: bool = False,
    anchor: tuple[Tensor, float] | None = None,
) -> Tensor:
    """K centroids of the points, (K, D) float32: k-means++ seeding and Lloyd iterations, the same for the same generator state.

    Args:
        size: K; with fewer distinct points than K some centroids coincide.
        generator: CPU generator of the seeding.
        iterations: Lloyd iterations at most; ends earlier when no point moves.
        balanced: assign evenly (`balanced_codes`) in the last iterations, a third of them.
        spherical: keep centroids on the unit sphere.
        anchor: (rows (K, D), pull): begin there, and add to each centroid's mean `pull` times an equal share of the points at its old row.
    Raises: ValueError if there are no points.
    """
    if not len(points_ND):
        raise ValueError("k-means needs at least one point")
    points_ND = points_ND.to(torch.float32)
    centroids_KD = anchor[0].to(points_ND) if anchor else _plus_plus(points_ND, size, generator)
    weight = anchor[1] * len(points_ND) / size if anchor else 0.0
    codes_N = torch.full((len(points_ND),), -1, device=points_ND.device)
    price_K = torch.zeros(size, device=points_ND.device)
    even = -(-iterations // EVEN_PART) if balanced else 0
    left = iterations
    while left:
        left -= 1
        if left < even:
            nearest_N, price_K = balanced_codes(points_ND, centroids_KD, price_K)
        elif rounds(points_ND.shape[1], points_ND.device):
            nearest_N = ResidualSearch(centroids_KD[None]).codes(points_ND)[:, 0]
        else:
            nearest_N = nearest_centroid(points_ND, centroids_KD)
        if torch.equal(nearest_N, codes_N):
            left = min(left, even)
        codes_N = nearest_N
        centroids_KD = _means(points_ND, codes_N, centroids_KD if anchor is None else anchor[0].to(points_ND), weight)
        if spherical:
            centroids_KD = F.normalize(centroids_KD, dim=1)
    return centroids_KD


def _plus_plus(points_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Seeds drawn one by one with probability proportional to the squared distance to the seeds so far, from `SEED_POINTS` points per seed at most.

    Source: k-means++ (Arthur and Vassilvitskii 2007); differs: of a large set a sample is looked at, because every seed costs a pass over all points.
    """
    if len(points_ND) > SEED_POINTS * size:
        points_ND = points_ND[torch.randperm(len(points_ND), generator=generator)[: SEED_POINTS * size].sort().values.to(points_ND.device)]
    draws_K = torch.rand(size, generator=generator, dtype=torch.float64)
    rows = torch.zeros(size, dtype=torch.int64, device=points_ND.device)
    rows[0] = int(draws_K[0] * len(points_ND))
    square_N = points_ND.square().sum(1)
    distance_N = torch.full_like(square_N, torch.inf)
    for k in range(1, size):
        seed_D = points_ND[rows[k - 1]]
        distance_N = torch.minimum(distance_N, (square_N - 2 * points_ND @ seed_D + seed_D @ seed_D).clamp_(min=0))
        mass_N = distance_N.double().cpu().cumsum(0)  # an accelerator adds up in no fixed order
        rows[k] = torch.searchsorted(mass_N, draws_K[k] * mass_N[-1]).clamp_(max=len(points_ND) - 1)
    return points_ND[rows].clone()


def _means(points_ND: Tensor, codes_N: Tensor, old_KD: Tensor, weight: float) -> Tensor:
    """Mean of each code's points and of `weight` points at its old row; without the latter a code without points moves to a badly served point."""
    points_K = torch.bincount(codes_N, minlength=len(old_KD))
    order_N = codes_N.argsort(stable=True)  # adding up code by code needs a third of the time of adding point by point
    sums_KD = F.embedding_bag(order_N, points_ND, points_K.cumsum(0) - points_K, mode="sum") + weight * old_KD
    counts_K = points_K + weight
    means_KD = sums_KD / counts_K.clamp(min=1e-12)[:, None]
    empty_E = torch.nonzero(counts_K == 0).flatten()[: len(points_ND)]
    if len(empty_E):
        far_E = (points_ND - means_KD[codes_N]).square().sum(1).topk(len(empty_E)).indices
        means_KD[empty_E] = points_ND[far_E]
    return means_KD


def revive_codes(codebook_KD: Tensor, counts_K: Tensor, points_ND: Tensor, codes_N: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The code book with its dead codes (fewer than 2 items) moved onto badly served points, and which rows moved: (K, D), (K,) bool.

    Points are drawn without repetition, with probability proportional to their squared distance to their own code, so crowded wide codes are split first.
    """
    dead_K = counts_K < 2
    wanted = min(int(dead_K.sum()), len(points_ND))
    if not wanted:
        return codebook_KD, torch.zeros_like(dead_K)
    error_N = (points_ND - codebook_KD[codes_N]).square().sum(1).cpu() + 1e-12
    chosen = torch.multinomial(error_N / error_N.sum(), wanted, generator=generator).to(points_ND.device)
    rows = torch.nonzero(dead_K).flatten()[:wanted]
    revived_KD = codebook_KD.clone()
    revived_KD[rows] = points_ND[chosen].to(codebook_KD.dtype)
    moved_K = torch.zeros_like(dead_K)
    moved_K[rows] = True
    return revived_KD, moved_K


def residual_codes(points_ND: Tensor, codebook_LKD: Tensor, keep_NL: Tensor | None = None, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes of a residual walk and the sum of their rows, (N, L) int64 and (N, D): each level codes what the levels before left over.

    Args:
        keep_NL: codes to hold on to (`hold_on`, squared distance); a level is held only below held levels, because it codes another rest otherwise.
    Source: RQ-VAE (Lee et al. 2022), residual quantisation
    """
    rest_ND, codes = points_ND, []
    same_N = torch.ones(len(points_ND), dtype=torch.bool, device=points_ND.device)
    for level, codebook_KD in enumerate(codebook_LKD.unbind(0)):
        if keep_NL is None:
            codes.append(nearest_centroid(rest_ND, codebook_KD))
        else:
            wished_N = torch.where(same_N, keep_NL[:, level], len(codebook_KD))
            codes.append(hold_on(torch.cdist(rest_ND, codebook_KD).square(), wished_N, margin))
            same_N &= codes[-1] == keep_NL[:, level]
        rest_ND = rest_ND - codebook_KD[codes[-1]]
    return torch.stack(codes, 1), points_ND - rest_ND


def take_rows(codebook_LKD: Tensor, order: Sequence[Tensor]) -> Tensor:
    """The code rows in another order per position, (L, K, D): row k of position l is what row order[l][k] was."""
    return torch.stack([rows_KD[order_K.to(rows_KD.device)] for rows_KD, order_K in zip(codebook_LKD, order, strict=True)])


def deal_axes(variance_D: Tensor, parts: int) -> list[list[int]]:
    """The axes dealt to `parts` hands of about equal size and equal product of variances, most spread first (as optimised product quantisation does).

    Args:
        variance_D: variance along each principal axis, descending.
    """
    log_D = (variance_D.clamp(min=1e-12) / variance_D.clamp(min=1e-12).min()).log() + 1.0
    hands: list[list[int]] = [[] for _ in range(parts)]
    most = -(-len(variance_D) // parts)
    for axis in range(len(variance_D)):
        poorest = min((hand for hand in hands if len(hand) < most), key=lambda hand: float(log_D[hand].sum()))
        poorest.append(axis)
    return hands


def principal_axes(points_ND: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and the leading principal axes of the points, (D,) and (D, W), W = min(width, D), as float32.

    In float64 on the CPU, each axis signed so that its largest entry is positive: the same points give the same axes on every run.
    """
    points_ND = points_ND.detach().cpu().double()
    mean_D = points_ND.mean(0)
    centred_ND = points_ND - mean_D
    axes_DW = torch.linalg.eigh(centred_ND.T @ centred_ND).eigenvectors.flip(1)[:, : min(width, points_ND.shape[1])]
    largest_W = axes_DW.gather(0, axes_DW.abs().argmax(0, keepdim=True))
    return mean_D.float(), (axes_DW * largest_W.sign()).float().contiguous()
