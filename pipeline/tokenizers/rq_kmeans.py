"""Residual k-means on the concatenated modalities: the cheap deterministic baseline, and the fallback a profile can choose.

Not here: k-means itself and the residual walk (quantize.py). Suffixes: N items, B batch, D width, L levels, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import config as profile
from pipeline.device import best_device, deterministic
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
from pipeline.tokenizers.quantize import kmeans, nearest_centroid, residual_codes, take_rows
from pipeline.tokenizers.refresh import champion
from pipeline.tokenizers.residual import ResidualSearch, sum_of_rows

POINTS_PER_CODE = 1024  # items per code that a level is fitted on, at most


def concatenate(items: ItemBatch, widths: dict[str, int]) -> Tensor:
    """The item's unit-norm modalities side by side, (N, D); a masked modality is zero in its block: it then says nothing about direction.

    Args:
        widths: modality -> width; modalities not named are left out.
    Raises: ValueError for vectors of another width.
    """
    blocks = []
    for name, width in widths.items():
        vectors = items.vectors(name)
        if vectors is not None and vectors.shape[1] != width:
            raise ValueError(f"{name} vectors are {vectors.shape[1]} wide, the tokenizer was fitted on {width}")
        if vectors is None:
            blocks.append(torch.zeros(len(items), width, device=items.richness_N.device))
        else:
            blocks.append(F.normalize(vectors.float(), dim=1) * items.mask(name)[:, None])
    return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]


def shown_columns(items: ItemBatch, widths: dict[str, int]) -> Tensor:
    """True in the columns of `concatenate` that the item has, (N, D)."""
    return torch.cat([items.mask(name)[:, None].expand(-1, width) for name, width in widths.items()], 1)


def column_means(items: ItemBatch, widths: dict[str, int]) -> Tensor:
    """Mean of each column of `concatenate` over the items that have it, (D,) float32."""
    return (concatenate(items, widths).double().sum(0) / shown_columns(items, widths).sum(0).clamp(min=1)).float()


class RqKmeans:
    """The residual k-means tokenizer (`base.Tokenizer`); its codes are ordered, level l refines the levels before it.

    Args:
        settings: the [train_tokenizer.rq_kmeans] section.
    Source: OneRec (arXiv 2502.18965), residual balanced k-means; differs: of the modalities at unit length side by side, there of one vector that was aligned
    with behaviour first; even in the last third of the iterations alone (`quantize.balanced_codes`).
    """

    needs_history: ClassVar[bool] = False

    def __init__(self, settings: profile.RqKmeans) -> None:
        self.settings = settings
        self.widths: dict[str, int] = {}
        self.codebook_LKD = torch.zeros(settings.num_levels, settings.codebook_size, 0)
        self._searched: tuple[Tensor, ResidualSearch] | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the levels."""
        return tuple(f"level_{level}" for level in range(self.settings.num_levels))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per level."""
        return (self.settings.codebook_size,) * self.settings.num_levels

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """K-means level by level on what the levels before left over; `checkpoint` is not used, a fit takes seconds.

        With `start` each level begins at the champion's rows, and a row is the mean of its points and of `pull` times as many points at the old row.
        Raises: ValueError if no modality is present; ContractError if the champion reads other vectors.
        """
        self.widths, start, progress = items.widths(), options.start, options.progress
        old_LKD = champion(start, RqKmeans, self.settings, self.widths).codebook_LKD if start else None
        if not self.widths:
            raise ValueError("residual k-means needs at least one modality")
        items = items.settle(best_device())
        items = items.take(shows(items, self.widths))  # nothing to read is no point
        rest_ND = concatenate(items.take(sample_rows(len(items), POINTS_PER_CODE * self.settings.codebook_size, options.seed)), self.widths)
        rows, lost = [], []
        levels = range(self.settings.num_levels)
        with deterministic(options.seed):
            for level in progress(levels, "fit residual k-means", len(levels)) if progress else levels:
                anchor = None if old_LKD is None or start is None else (old_LKD[level], start.pull)
                rows.append(self._level(rest_ND, generator_for(options.seed, "level", level), anchor))
                rest_ND = rest_ND - rows[-1][nearest_centroid(rest_ND, rows[-1])]
                lost.append(float(rest_ND.square().sum(1).mean()))
        self.codebook_LKD = torch.stack(rows)
        return FitReport(curves={"loss/reconstruction": lost}, metrics=self._measure(items))

    def _level(self, rest_ND: Tensor, generator: torch.Generator, anchor: tuple[Tensor, float] | None) -> Tensor:
        settings = self.settings
        return kmeans(rest_ND, settings.codebook_size, generator=generator, iterations=settings.iterations, balanced=settings.balanced, anchor=anchor)

    def _measure(self, items: ItemBatch) -> dict[str, float]:
        """Code use, and NMSE per modality of the sum of code rows against the unit-norm vectors."""

        def only_codes(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block without the sums, which are as large as the catalogue."""
            made = self._block(rows, keep)
            return replace(made, quantized_ND=made.quantized_ND[:, :0])

        codes_NL = encode_in_chunks(items, only_codes, device=self.codebook_LKD.device).codes_NL.to(self.codebook_LKD.device)
        found = metrics.code_use(codes_NL, self.codebook_sizes, self.slots)
        codebooks = dict(zip(self.widths, self.codebook_LKD.split(list(self.widths.values()), 2), strict=True))

        def pairs(name: str) -> Iterator[tuple[Tensor, Tensor]]:
            """The modality's unit-norm vectors and their estimates in blocks."""
            for start in range(0, len(items), metrics.BLOCK):
                rows = items.take(slice(start, start + metrics.BLOCK)).to(self.codebook_LKD.device)
                estimate_BD = sum_of_rows(codes_NL[start : start + metrics.BLOCK], codebooks[name])
                yield concatenate(rows, {name: self.widths[name]})[rows.mask(name)], estimate_BD[rows.mask(name)]

        return found | {f"nmse/{name}": metrics.nmse_of(partial(pairs, name)) for name in self.widths}

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the residual walk, weights of one, and the sum of the code rows; an item with nothing to read is masked everywhere."""
        if not self.widths:
            raise ValueError("the tokenizer is not fitted: call fit or load")
        return encode_in_chunks(items, self._block, keep, device=self.codebook_LKD.device)

    def _block(self, rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
        """`encode` of one block."""
        rows = rows.to(self.codebook_LKD.device)
        points_BD = concatenate(rows, self.widths)
        if keep is None:
            codes_BL = self._search.codes(points_BD)
            quantized_BD = sum_of_rows(codes_BL, self.codebook_LKD)
        else:
            codes_BL, quantized_BD = residual_codes(points_BD, self.codebook_LKD, keep.codes_NL.to(points_BD.device), keep.margin)
        return unweighted(codes_BL, quantized_BD, shows(rows, self.widths), self.settings.codebook_size)

    @property
    def _search(self) -> ResidualSearch:
        """The search for the code rows of now; its tables cost as much as some thousand items, so they are kept."""
        if self._searched is None or self._searched[0] is not self.codebook_LKD:
            self._searched = (self.codebook_LKD, ResidualSearch(self.codebook_LKD))
        return self._searched[1]

    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of level l is what order[l][k] was."""
        self.codebook_LKD = take_rows(self.codebook_LKD, order)

    def codebooks(self) -> list[Tensor]:
        """Code rows per level, (K, D)."""
        return [rows_KD.clone() for rows_KD in self.codebook_LKD.cpu()]

    def state(self) -> dict[str, Tensor]:
        """The code rows."""
        return {"codebook_LKD": self.codebook_LKD.cpu().contiguous()}

    def config(self) -> dict[str, Any]:
        """Settings and input widths, JSON."""
        return {"tokenizer": "rq_kmeans", "settings": self.settings.model_dump(), "raw_widths": self.widths}

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> RqKmeans:
        """The tokenizer that gave `config` and `state`.

        Raises: RuntimeError if the code rows do not fit the configuration.
        """
        tokenizer = cls(profile.RqKmeans(**config["settings"]))
        tokenizer.widths = {name: int(width) for name, width in config["raw_widths"].items()}
        expected = (*tokenizer.codebook_LKD.shape[:2], sum(tokenizer.widths.values()))
        if tuple(state["codebook_LKD"].shape) != expected:
            raise RuntimeError(f"code rows have shape {tuple(state['codebook_LKD'].shape)}, the configuration says {expected}")
        tokenizer.codebook_LKD = state["codebook_LKD"].clone()
        return tokenizer


def sample_rows(count: int, most: int, seed: int) -> Tensor:
    """At most `most` rows of `count`, ascending; all of them when they are few enough."""
    return torch.arange(count) if count <= most else torch.randperm(count, generator=generator_for(seed, "sample"))[:most].sort().values
