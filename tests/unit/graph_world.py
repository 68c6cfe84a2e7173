"""A small world of two tastes for the behaviour encoders."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.encoders.behavior import Sequences

USERS, ITEMS, LENGTH = 40, 20, 8


def sequences(lists: list[list[int]], baskets: list[list[int]] | None = None) -> Sequences:
    """One user's events per list, with the numbers of their baskets where they are given."""
    offsets = torch.tensor(np.cumsum([0] + [len(part) for part in lists]))
    flat = torch.tensor([item for part in lists for item in part], dtype=torch.int64)
    return Sequences(offsets, flat, None if baskets is None else torch.tensor([number for part in baskets for number in part]))


def lists(seed: int = 0, users: int = USERS) -> list[list[int]]:
    """Even users like the first half of the items, odd users the second half; half of the catalogue's halves are met by each."""
    rng = np.random.default_rng(seed)
    return [(rng.permutation(ITEMS // 2)[:LENGTH] + (user % 2) * ITEMS // 2).tolist() for user in range(users)]


def texts(seed: int = 0, width: int = 6) -> torch.Tensor:
    """Text vectors that tell the halves apart, with noise, for the items and three more of the first half."""
    rng = np.random.default_rng(seed)
    halves = np.r_[np.zeros(ITEMS // 2), np.ones(ITEMS // 2), np.zeros(3)]
    return torch.from_numpy((rng.normal(size=(halves.size, width)) * 0.3 + np.outer(halves - 0.5, np.ones(width))).astype(np.float32))


def separation(items_NF: torch.Tensor) -> float:
    """Mean cosine within the halves less mean cosine across them."""
    unit = torch.nn.functional.normalize(items_NF[:ITEMS], dim=1)
    cosine, half = unit @ unit.T, torch.arange(ITEMS) < ITEMS // 2
    same = half[:, None] == half[None, :]
    return float(cosine[same & ~torch.eye(ITEMS, dtype=torch.bool)].mean() - cosine[~same].mean())
