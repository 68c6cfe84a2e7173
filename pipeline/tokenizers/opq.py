"""Optimised product quantisation as RPG uses it (arXiv 2506.05781): PCA, a learned rotation, and a code for each sub-space of it, all in parallel.

Not here: k-means of one space (quantize.py). Suffixes: N items, B batch, D width of the vectors, W of the rotated ones, L sub-spaces, d width of one, K codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import config as profile
from pipeline.tokenizers import metrics
from pipeline.tokenizers.base import (
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    TokenizerOutput,
    encode_in_chunks,
    shows,
    unweighted,
)
from pipeline.tokenizers.fit import generator_for
from pipeline.tokenizers.quantize import CHUNK, deal_axes, gather_codes, hold_on, principal_axes, take_rows
from pipeline.tokenizers.refresh import champion
from pipeline.tokenizers.rq_kmeans import column_means, concatenate, sample_rows, shown_columns

POINTS_PER_CODE = 256  # items per code that the fit looks at, at most
LAST_ROUNDS = 10  # Lloyd iterations under the final rotation
FLAT = 1e-6  # share of the largest variance below which an axis carries nothing


def procrustes(points_NW: Tensor, target_NW: Tensor) -> Tensor:
    """The rotation that brings the points closest to the targets in squared distance, (W, W) float32, orthogonal.

    Source: OPQ (Ge et al. 2013), non-parametric solution, rotation: R = U V^T of the singular value decomposition of X^T Y
    """
    turned = torch.linalg.svd(points_NW.double().T @ target_NW.double())
    return (turned.U @ turned.Vh).float()


def nearest_by_space(points_LNd: Tensor, codebook_LKd: Tensor) -> Tensor:
    """The code of smallest Euclidean distance per point and sub-space, (N, L) int64; blocks of rows, so that memory stays bounded.

    Source: product quantisation (Jegou et al. 2011), the nearest row of each sub-space; RPG's index searches by inner product, but codes its vectors so, too.
    """
    half_L1K = 0.5 * codebook_LKd.square().sum(2)[:, None]
    rows = max(1, CHUNK // (codebook_LKd.shape[0] * codebook_LKd.shape[1]))
    turned_LdK = codebook_LKd.transpose(1, 2)
    return torch.cat([(torch.bmm(block_LBd, turned_LdK) - half_L1K).argmax(2) for block_LBd in points_LNd.split(rows, 1)], 1).T


def means_by_space(points_LNd: Tensor, codes_NL: Tensor, old_LKd: Tensor, pull: float) -> Tensor:
    """Mean of each code's points per sub-space, (L, K, d), and of `pull` equal shares of the points at its old row.

    Without a pull, codes nobody has move to the worst served points of their sub-space, the worst first.
    """
    spaces, size, width = old_LKd.shape
    count = len(codes_NL)
    weight = pull * count / size
    flat = (codes_NL + torch.arange(spaces) * size).T.reshape(-1)
    sums = (weight * old_LKd).reshape(-1, width).index_add(0, flat, points_LNd.reshape(-1, width))
    counts_LK = torch.bincount(flat, minlength=spaces * size).view(spaces, size) + weight
    means_LKd = sums.view(old_LKd.shape) / counts_LK.clamp(min=1e-12)[..., None]
    empty_LK = counts_LK == 0
    if bool(empty_LK.any()):
        error_LN = (points_LNd - gather_codes(codes_NL, means_LKd).transpose(0, 1)).square().sum(2)
        worst_LN = error_LN.argsort(dim=1, descending=True, stable=True)
        turn_LK = (empty_LK.cumsum(1) - 1).clamp(0, count - 1)
        replaced_LKd = points_LNd.gather(1, worst_LN.gather(1, turn_LK)[..., None].expand(-1, -1, width))
        means_LKd = torch.where(empty_LK[..., None], replaced_LKd, means_LKd)
    return means_LKd


def seeds_by_space(points_LNd: Tensor, size: int, *, generator: torch.Generator) -> Tensor:
    """K seeds per sub-space, (L, K, d), drawn one by one with probability proportional to the squared distance to the seeds so far.

    Source: k-means++ (Arthur, Vassilvitskii 2007)
    """
    spaces, count, width = points_LNd.shape
    draws_KL = torch.rand(size, spaces, generator=generator, dtype=torch.float64)
    rows_KL = torch.zeros(size, spaces, dtype=torch.int64)
    rows_KL[0] = (draws_KL[0] * count).long()
    distance_LN = torch.full((spaces, count), torch.inf)
    for k in range(1, size):
        seed_L1d = points_LNd.gather(1, rows_KL[k - 1][:, None, None].expand(-1, 1, width))
        distance_LN = torch.minimum(distance_LN, (points_LNd - seed_L1d).square().sum(2))
        mass_LN = distance_LN.double().cumsum(1)
        rows_KL[k] = torch.searchsorted(mass_LN, (draws_KL[k] * mass_LN[:, -1])[:, None])[:, 0].clamp_(max=count - 1)
    return points_LNd.gather(1, rows_KL.T[..., None].expand(-1, -1, width))


def dealt_rotation(variance_W: Tensor, spaces: int) -> Tensor:
    """The permutation that gives each sub-space axes of about the same product of variances, (W, W): where the alternation begins.

    Source: OPQ (Ge et al. 2013), parametric solution
    """
    order_W = torch.tensor([axis for hand in deal_axes(variance_W, spaces) for axis in hand])
    return torch.eye(len(variance_W))[:, order_W]


class Opq:
    """The OPQ tokenizer (`base.Tokenizer`); its codes have no order, each describes another part of the item.

    Args:
        settings: the [train_tokenizer.opq] section.
    Source: RPG (arXiv 2506.05781), quantiser; differs: RPG learns it from the items of its training sequences alone, here every item of the night counts, and
    the night's cutoff is what keeps later items out.
    """

    needs_history: ClassVar[bool] = False

    def __init__(self, settings: profile.Opq) -> None:
        self.settings = settings
        self.widths: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the sub-spaces."""
        return tuple(f"space_{position}" for position in range(self.settings.num_positions))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per sub-space."""
        return (self.settings.codebook_size,) * self.settings.num_positions

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Alternate code rows and rotation; `checkpoint` is not used, a fit takes seconds.

        With `start` axes, rotation and rows begin as the champion's, and a row is the mean of its points and of `pull` equal shares of them at its old row.
        Raises: ValueError if no modality is present; ContractError if the champion reads other vectors or has other sizes.
        """
        self.widths, seed, start, progress = items.widths(), options.seed, options.start, options.progress
        if not self.widths:
            raise ValueError("product quantisation needs at least one modality")
        items = items.take(shows(items, self.widths))  # nothing to read is no point
        if start is None:
            self._fit_axes(items)
        else:
            self.tensors = champion(start, Opq, self.settings, self.widths).state()
        points_NW = self._inputs(items)
        sample_NW = points_NW[sample_rows(len(points_NW), POINTS_PER_CODE * self.settings.codebook_size, seed)]
        if start is None:
            self.tensors["rotation_WW"] = dealt_rotation(sample_NW.var(0, correction=0), self.settings.num_positions)
            self.tensors["codebook_LKd"] = seeds_by_space(self._spaces(sample_NW), self.settings.codebook_size, generator=generator_for(seed, "seeds"))
        rounds = range(self.settings.iterations + LAST_ROUNDS)
        lost = self._alternate(sample_NW, start.pull if start else 0.0, progress(rounds, "fit product quantisation", len(rounds)) if progress else rounds)
        return FitReport(curves={"loss/reconstruction": lost}, metrics=self._measure(items))

    def _alternate(self, points_NW: Tensor, pull: float, rounds: Iterable[int]) -> list[float]:
        """Mean squared error after each round: codes, then rows, then (but for the last rounds) the rotation, each the best given the others."""
        old_LKd, lost = self.tensors["codebook_LKd"], []
        for at in rounds:
            spaces_LNd = self._spaces(points_NW)
            codes_NL = nearest_by_space(spaces_LNd, self.tensors["codebook_LKd"])
            self.tensors["codebook_LKd"] = means_by_space(spaces_LNd, codes_NL, old_LKd, pull)
            rebuilt_NW = gather_codes(codes_NL, self.tensors["codebook_LKd"]).flatten(1)
            if at < self.settings.iterations:
                self.tensors["rotation_WW"] = procrustes(points_NW, rebuilt_NW)
            lost.append(float((points_NW @ self.tensors["rotation_WW"] - rebuilt_NW).square().sum(1).mean()))
        return lost

    def _fit_axes(self, items: ItemBatch) -> None:
        """Means, principal axes and the scale along each; an axis without variance counts nothing."""
        mean_D = column_means(items, self.widths)
        self.tensors = {"mean_D": mean_D}
        axes_DW = principal_axes(self._centred(items), self.settings.pca_dim)[1]
        variance_W = (self._centred(items) @ axes_DW).double().var(0, correction=0)
        scale_W = torch.where(variance_W > FLAT * variance_W.max(), variance_W.clamp(min=1e-30).rsqrt(), 0.0)
        self.tensors |= {"axes_DW": axes_DW, "scale_W": scale_W.float() if self.settings.whiten else torch.ones(len(scale_W))}

    def _centred(self, items: ItemBatch) -> Tensor:
        """Unit-norm modalities side by side minus their means, (N, D); a masked modality stands at its mean."""
        return torch.where(shown_columns(items, self.widths), concatenate(items, self.widths) - self.tensors["mean_D"], 0.0)

    def _inputs(self, items: ItemBatch) -> Tensor:
        """What is rotated, (N, W): along the principal axes, filled up with zeros to a multiple of the positions."""
        reduced_NW = self._centred(items) @ self.tensors["axes_DW"] * self.tensors["scale_W"]
        return F.pad(reduced_NW, (0, -reduced_NW.shape[1] % self.settings.num_positions))

    def _spaces(self, points_NW: Tensor) -> Tensor:
        """The rotated points by sub-space, (L, N, d)."""
        return (points_NW @ self.tensors["rotation_WW"]).unflatten(1, (self.settings.num_positions, -1)).transpose(0, 1).contiguous()

    def _measure(self, items: ItemBatch) -> dict[str, float]:
        """Code use, and NMSE per modality of what the code rows stand for, brought back to the unit-norm vectors."""
        made = self.encode(items)
        found = metrics.code_use(made.codes_NL, self.codebook_sizes, self.slots)
        axes_DW, scale_W = self.tensors["axes_DW"], self.tensors["scale_W"]
        back_NW = (made.quantized_ND @ self.tensors["rotation_WW"].T)[:, : len(scale_W)]
        estimate_ND = (back_NW * torch.where(scale_W > 0, 1 / scale_W.clamp(min=1e-30), 0.0)) @ axes_DW.T
        widths = list(self.widths.values())
        blocks = zip(self.widths, self._centred(items).split(widths, 1), estimate_ND.split(widths, 1), strict=True)
        return found | {f"nmse/{name}": metrics.nmse(block_ND, part_ND, items.mask(name)) for name, block_ND, part_ND in blocks}

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes per sub-space, weights of one, and the code rows side by side in the rotated space; an item with nothing to read is masked everywhere."""

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of exactly `ENCODE_ROWS` items."""
            spaces_LBd, codebook_LKd = self._spaces(self._inputs(rows)), self.tensors["codebook_LKd"]
            codes_BL = nearest_by_space(spaces_LBd, codebook_LKd)
            if keep is not None:
                distance_LBK = torch.cdist(spaces_LBd, codebook_LKd).square()
                codes_BL = torch.stack([hold_on(far_BK, kept_B, keep.margin) for far_BK, kept_B in zip(distance_LBK, keep.codes_NL.T, strict=True)], 1)
            quantized_BD = gather_codes(codes_BL, codebook_LKd).flatten(1)
            return unweighted(codes_BL, quantized_BD, shows(rows, self.widths), self.settings.codebook_size)

        if not self.tensors:
            raise ValueError("the tokenizer is not fitted: call fit or load")
        return encode_in_chunks(items, block, keep)

    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of sub-space l is what order[l][k] was."""
        self.tensors["codebook_LKd"] = take_rows(self.tensors["codebook_LKd"], order)

    def codebooks(self) -> list[Tensor]:
        """Code rows per sub-space, (K, d), in rotated coordinates."""
        return [rows_Kd.clone() for rows_Kd in self.tensors["codebook_LKd"]]

    def state(self) -> dict[str, Tensor]:
        """Means, axes, scales, rotation and code rows."""
        return {name: value.contiguous().clone() for name, value in self.tensors.items()}

    def config(self) -> dict[str, Any]:
        """Settings and input widths, JSON."""
        return {"tokenizer": "opq", "settings": self.settings.model_dump(), "raw_widths": self.widths}

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Opq:
        """The tokenizer that gave `config` and `state`.

        Raises: RuntimeError if the tensors do not fit the configuration.
        """
        tokenizer = cls(profile.Opq(**config["settings"]))
        tokenizer.widths = {name: int(width) for name, width in config["raw_widths"].items()}
        columns, spaces = sum(tokenizer.widths.values()), tokenizer.settings.num_positions
        axes = min(columns, tokenizer.settings.pca_dim)
        width = axes + -axes % spaces
        expected = {
            "mean_D": (columns,),
            "axes_DW": (columns, axes),
            "scale_W": (axes,),
            "rotation_WW": (width, width),
            "codebook_LKd": (spaces, tokenizer.settings.codebook_size, width // spaces),
        }
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            raise RuntimeError(f"tensors have shapes {found}, the configuration says {expected}")
        tokenizer.tensors = {name: value.clone() for name, value in state.items()}
        return tokenizer
