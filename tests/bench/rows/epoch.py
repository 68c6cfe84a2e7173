"""An epoch of SASRec with the full softmax at Beauty's size against RecBole's SASRec (CE) and the plain loop.

The plain loop scores every position of a padded batch and ignores padding in the loss: its loss is ours. RecBole makes every event after a user's first an
example of its own, with the events before as history; its epoch has the same targets, and about as many a step. Its first weights differ, so its loss is
shown, not compared, and equal R@10 takes whole trainings, which this row does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from bench import Case, peer
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

    peers, losses = {"plain padded loop": plain}, {}
    recbole = peer("recbole.model.sequential_recommender.sasrec")
    if recbole is not None:
        work = recbole_epoch(recbole, items_T, offsets, num_items, params)
        peers["RecBole SASRec, CE"] = lambda: losses.setdefault("RecBole's loss", round(work(), 3))

    def alike(mine: float, theirs: float) -> str:
        """Equal losses of the same network; RecBole's network is another."""
        losses["ours"] = round(mine, 3)
        return "" if theirs == losses.get("RecBole's loss") or abs(mine - theirs) <= LOSS_APART * theirs else f"losses {mine:.4f} and {theirs:.4f}"

    yield Case(
        name=f"{users:,} users, {len(items_T):,} events, {num_items:,} items",
        ours=ours,
        peers=peers,
        equal=alike,
        units=len(items_T),
        unit="events",
        target=2.0,
        judged=("RecBole SASRec, CE",),
        rounds=3,
        notices=() if recbole else ("recbole is not installed",),
        facts=lambda: losses,
    )


def recbole_epoch(module: ModuleType, items_T: Tensor, offsets: Tensor, num_items: int, params: config.SasRec) -> Callable[[], float]:
    """An epoch of RecBole's model on its own augmented examples, in tensors: its data loader is left out of the clock."""
    first = offsets[:-1].repeat_interleave(offsets.diff())
    target_E = torch.arange(len(items_T))
    target_E, first_E = (part[target_E > first] for part in (target_E, first))
    length_E = (target_E - first_E).clamp(max=params.max_length)
    place_EL = torch.arange(params.max_length)
    history_EL = torch.where(place_EL < length_E[:, None], 1 + items_T[(target_E - length_E)[:, None] + place_EL.minimum(length_E[:, None] - 1)], 0)
    settings = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length", "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": params.max_length, "device": torch.device("cpu"), "n_layers": params.num_blocks, "n_heads": params.num_heads,
        "hidden_size": params.dim, "inner_size": 4 * params.dim, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE",
    }  # fmt: skip
    size = params.batch_size * len(target_E) // (len(offsets) - 1)

    def work() -> float:
        """Mean loss of the epoch."""
        torch.manual_seed(0)
        model = module.SASRec(settings, SimpleNamespace(num=lambda field: num_items + 1)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate)
        losses = []
        for rows in torch.randperm(len(target_E)).split(size):
            loss = model.calculate_loss({"item_list": history_EL[rows], "item_length": length_E[rows], "item": 1 + items_T[target_E[rows]]})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)

    return work


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
