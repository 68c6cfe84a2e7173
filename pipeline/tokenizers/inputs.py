"""Item vectors as a network reads them: centred, turned to their principal axes, one scale per modality; fixed with the generation.

Not here: ADA-SID's inputs, which leave behaviour as it is because its norm steers the router. Suffixes: N items, B batch, D width as it comes, W kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.tokenizers.base import MODALITIES, ItemBatch
from pipeline.tokenizers.quantize import principal_axes

AXES_ROWS = 262_144  # items that the axes are fitted on at most


class Inputs(nn.Module):
    """The normalisation of some modalities.

    Args:
        raw_widths: modality -> width of its vectors as they come; modalities not named are dropped.
        most: axes kept per modality at most.
    """

    def __init__(self, raw_widths: Mapping[str, int], most: int) -> None:
        super().__init__()
        self.raw_widths = {name: raw_widths[name] for name in MODALITIES if name in raw_widths}
        self.widths = {name: min(width, most) for name, width in self.raw_widths.items()}
        for name, width in self.raw_widths.items():
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"axes_{name}", torch.eye(width)[:, : self.widths[name]].contiguous())
            self.register_buffer(f"scale_{name}", torch.ones(()))

    @torch.no_grad()
    def fit(self, items: ItemBatch) -> None:
        """Freeze axes and scales on the items that have the modality; the mean variance of an input is then 1."""
        for name, width in self.widths.items():
            rows = torch.nonzero(items.mask(name)).flatten()
            sample_ND = items.known(name)[rows[:: max(1, -(-len(rows) // AXES_ROWS))]].float()
            mean_D, axes_DW = principal_axes(sample_ND, width)
            spread = ((sample_ND.cpu() - mean_D) @ axes_DW).double().var(0, correction=0).mean().clamp(min=1e-12)
            for part, value in (("mean", mean_D), ("axes", axes_DW), ("scale", spread.rsqrt().float())):
                self.get_buffer(f"{part}_{name}").copy_(value)

    @torch.no_grad()
    def prepare(self, items: ItemBatch) -> ItemBatch:
        """The items with normalised vectors, 0 where masked; what the items lack is masked, what is not known is dropped.

        Raises: ValueError for vectors of another width than they were fitted on.
        """
        changed: dict[str, Tensor | None] = {}
        nobody_N = torch.zeros_like(items.text_N)
        for name in MODALITIES:
            vectors = items.vectors(name)
            changed[f"{name}_N"] = items.mask(name) if name in self.widths and vectors is not None else nobody_N
            changed[f"{name}_ND"] = self._normalised(vectors, items.mask(name), name) if name in self.widths else None
        return items.changed(changed)

    def _normalised(self, vectors_ND: Tensor | None, mask_N: Tensor, name: str) -> Tensor:
        if vectors_ND is None:
            return torch.zeros(len(mask_N), self.widths[name], device=mask_N.device)
        if vectors_ND.shape[1] != (known := self.raw_widths[name]):
            raise ValueError(f"{name} vectors are {vectors_ND.shape[1]} wide, the tokenizer was fitted on {known}")
        turned_NW = (vectors_ND.float() - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"axes_{name}") * self.get_buffer(f"scale_{name}")
        return torch.where(mask_N[:, None], turned_NW, 0.0)


def side_by_side(items: ItemBatch, modalities: tuple[str, ...]) -> Tensor:
    """The modalities of prepared items in one vector, (B, sum of widths).

    Raises: ValueError if one of them is not there.
    """
    found = [vectors for name in modalities if (vectors := items.vectors(name)) is not None]
    if len(found) != len(modalities) or not found:
        raise ValueError(f"the items lack one of {modalities}")
    return torch.cat(found, 1)
