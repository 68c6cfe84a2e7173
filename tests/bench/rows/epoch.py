"""An epoch of SASRec with the full softmax at Beauty's size against the plain loop: every position of a padded batch scored, padding ignored in the loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from bench import Case
from torch import Tensor

from pipeline import config
from pipeline.encoders import sasrec

NUMBER, TITLE = 10, "SASRec epoch, full softmax"
SIZES = {"quick": (1_000, 2_000), "normal": (4_000, 12_101), "full": (22_363, 12_101)}
MEAN_LENGTH = 8.9  # events of a user of Beauty
LOSS_APART = 1e-3


def cases(scale: str) -> Iterator[Case]:
    users, num_items = SIZES[scale]
    generator = np.random.default_rng(0)
    lengths = 5 + generator.geometric(1 / (MEAN_LENGTH - 4), users) - 1
    items_T = torch.from_numpy((num_items * generator.random(int(lengths.sum())) ** 2).astype(np.int64))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    params = config.SasRec(dropout=0.0)  # without it both ways see the same numbers, so that their losses can be compared
    start_B, stop_B = sasrec.window_bounds(offsets, params.max_length)

    def fresh() -> tuple[sasrec.SasRec, torch.optim.Optimizer]:
        """The same first weights for both."""
        torch.manual_seed(0)
        model = sasrec.SasRec(num_items, params)
        return model, torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=0.0)

    def ours() -> float:
        """Loss of an epoch of ours."""
        model, optimizer = fresh()
        torch.manual_seed(1)
        return sasrec._epoch(model, optimizer, items_T, start_B, stop_B, params)

    def plain() -> float:
        """Loss of an epoch of the peer."""
        model, optimizer = fresh()
        torch.manual_seed(1)
        return plain_epoch(model, optimizer, items_T, start_B, stop_B, params)

    yield Case(
        name=f"{users:,} users, {len(items_T):,} events, {num_items:,} items",
        ours=ours,
        peers={"plain padded loop": plain},
        equal=lambda mine, theirs: "" if abs(mine - theirs) <= LOSS_APART * theirs else f"losses {mine:.4f} and {theirs:.4f}",
        units=len(items_T),
        unit="events",
        target=2.0,
        rounds=5,
        notices=("the peer is the plain way to write it, not RecBole itself: that pins an older torch",),
    )


def plain_epoch(model: sasrec.SasRec, optimizer: torch.optim.Optimizer, items_T: Tensor, start_B: Tensor, stop_B: Tensor, params: config.SasRec) -> float:
    """The same windows in the same order; logits of all positions, ignored where padded."""
    model.train()
    losses = []
    for rows in torch.randperm(start_B.numel()).split(params.batch_size):
        inputs_BL, targets_BL = (sasrec.gather(items_T, start_B[rows] + shift, stop_B[rows] + shift, params.max_length, model.num_items) for shift in (0, 1))
        logits_BLN = model(inputs_BL) @ model.output_table().T
        loss = F.cross_entropy(logits_BLN.flatten(0, 1), targets_BL.flatten(), ignore_index=model.num_items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)
