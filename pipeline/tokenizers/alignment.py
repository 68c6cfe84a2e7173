"""Contrastive alignment of content with behaviour (ADC-SID, alignment): InfoNCE, the V3 and V2 sums, and the controls of the strength w.

Not here: the strength itself (eq. 15-17, pipeline/richness.py: it is a per-item input), the projections h (ada_sid.py).
Suffixes: B the rows of this process, C candidates (the rows of all processes), D width.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tokenizers.world import World

Strength = Literal["adaptive", "mean", "shuffled", "one", "zero", "inverted"]


@dataclass(frozen=True)
class View:
    """One modality's projection of the rows of this process and of all processes, with who has the modality.

    Args:
        own_BD / all_CD: projections h; own_B / all_C: True where the item shows the modality in this step.
        first: row of `all_CD` that is row 0 of `own_BD`.
    """

    own_BD: Tensor
    own_B: Tensor
    all_CD: Tensor
    all_C: Tensor
    first: int


def view(h_BD: Tensor, mask_B: Tensor, world: World) -> View:
    """A modality's projections, gathered from all processes with their gradient."""
    all_C = world.gather(mask_B.to(h_BD.dtype)[:, None])[:, 0] > 0
    return View(h_BD, mask_B, world.gather(h_BD), all_C, world.first_row())


def inner_products(a_BD: Tensor, b_CD: Tensor) -> Tensor:
    """Products of rows, a @ b.T, in float32, in a step of lower precision too: what is compared in a softmax must not be rounded to eight bits."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD.float() @ b_CD.float().T


def info_nce(anchor_BD: Tensor, candidate_CD: Tensor, positive_B: Tensor, candidate_C: Tensor, *, temperature: float) -> Tensor:
    """-log of the share the positive takes of exp(cosine / temperature) over all candidates, per anchor, (B,) >= 0.

    Args:
        positive_B: row of the anchor's positive among the candidates.
        candidate_C: False hides a candidate from all anchors but the one it is the positive of; (B, C) hides it per anchor.
    Source: ADC-SID eq. (18), A(x, y); differs: masked items are no negatives.
    """
    cosine_BC = inner_products(F.normalize(anchor_BD.float(), dim=-1), F.normalize(candidate_CD.float(), dim=-1))
    own_BC = positive_B[:, None] == torch.arange(len(candidate_CD), device=positive_B.device)
    allowed_BC = candidate_C | own_BC
    return F.cross_entropy((cosine_BC / temperature).masked_fill(~allowed_BC, -torch.inf), positive_B, reduction="none")


def _pair(x: View, y: View, temperature: float) -> tuple[Tensor, Tensor]:
    """A(x, y) per row and which rows have both sides."""
    positive_B = torch.arange(x.first, x.first + len(x.own_B), device=x.own_B.device)
    return info_nce(x.own_BD, y.all_CD, positive_B, y.all_C, temperature=temperature), x.own_B & y.own_B


def both_ways(x: View, y: View, *, temperature: float, world: World, rival_BC: Tensor | None = None) -> Tensor:
    """The share of this process in the mean of (A(x, y) + A(y, x)) / 2 over the rows that have both sides, a scalar.

    Args:
        rival_BC: False where a candidate is no negative of a row, because the two mean the same thing.
    """
    positive_B = torch.arange(x.first, x.first + len(x.own_B), device=x.own_B.device)
    shown_x, shown_y = (x.all_C, y.all_C) if rival_BC is None else (x.all_C & rival_BC, y.all_C & rival_BC)
    forth_B = info_nce(x.own_BD, y.all_CD, positive_B, shown_y, temperature=temperature)
    back_B = info_nce(y.own_BD, x.all_CD, positive_B, shown_x, temperature=temperature)
    return world.mean(0.5 * (forth_B + back_B), x.own_B & y.own_B)


def alignment_v3(views: Mapping[str, View], strength_B: Tensor, *, temperature: float, world: World) -> dict[str, Tensor]:
    """Terms `align_content`, `align_text`, `align_image` whose sum is L_align, each the mean over the items that have both sides.

    Text and image align with each other both ways; each content view (the anchor) aligns with behaviour, weighted by w per item.
    Source: ADC-SID eq. (18), (19), (20), (21); differs: mean over the items with both modalities in place of the whole batch.
    """
    terms = {}
    if "text" in views and "image" in views:
        forth_B, both_B = _pair(views["text"], views["image"], temperature)
        back_B, _ = _pair(views["image"], views["text"], temperature)
        terms["align_content"] = world.mean(forth_B + back_B, both_B)
    for name in ("text", "image"):
        if name in views and "behavior" in views:
            loss_B, both_B = _pair(views[name], views["behavior"], temperature)
            terms[f"align_{name}"] = world.mean(strength_B * loss_B, both_B)
    return terms


def alignment_v2(views: Mapping[str, View], strength_B: Tensor, *, temperature: float, world: World) -> dict[str, Tensor]:
    """Terms `align_content` and `align_behavior` of the two-stage form: text with image, then behaviour (the anchor) with their sum, weighted by w.

    Source: ADA-SID (V2) eq. (15), (16), (17); differs: mean over the items that have both sides; an item with one content modality uses it alone.
    """
    terms = {}
    if "text" in views and "image" in views:
        forth_B, both_B = _pair(views["text"], views["image"], temperature)
        back_B, _ = _pair(views["image"], views["text"], temperature)
        terms["align_content"] = world.mean(forth_B + back_B, both_B)
    content = [views[name] for name in ("text", "image") if name in views]
    if content and "behavior" in views:
        loss_B, both_B = _pair(views["behavior"], _sum_of_views(content), temperature)
        terms["align_behavior"] = world.mean(strength_B * loss_B, both_B)
    return terms


def _sum_of_views(content: list[View]) -> View:
    """h_c = h_t + h_v over the modalities an item shows."""
    own_BD = torch.stack([part.own_BD * part.own_B[:, None] for part in content]).sum(0)
    all_CD = torch.stack([part.all_CD * part.all_C[:, None] for part in content]).sum(0)
    own_B = torch.stack([part.own_B for part in content]).any(0)
    return View(own_BD, own_B, all_CD, torch.stack([part.all_C for part in content]).any(0), content[0].first)


def controlled_strength(strength_N: Tensor, mask_N: Tensor, kind: Strength, *, generator: torch.Generator) -> Tensor:
    """The alignment strength a run uses, (N,): `adaptive` is w itself, the other kinds are controls; items outside the mask keep their w.

    mean = the mean of w everywhere; shuffled = w dealt to other items; inverted = the same values in the opposite order; one, zero = constants.
    """
    rows = torch.nonzero(mask_N).flatten()
    w_R = strength_N[rows]
    if kind == "mean":
        w_R = w_R.mean().expand_as(w_R)
    elif kind == "shuffled":
        w_R = w_R[torch.randperm(len(w_R), generator=generator).to(w_R.device)]
    elif kind in ("one", "zero"):
        w_R = torch.full_like(w_R, 1.0 if kind == "one" else 0.0)
    elif kind == "inverted":
        order_R = w_R.argsort(stable=True)
        w_R = w_R.clone().scatter_(0, order_R, w_R[order_R].flip(0))
    return strength_N.index_copy(0, rows, w_R)
