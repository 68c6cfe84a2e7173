"""An epoch of SASRec with the full softmax at Beauty's size against RecBole's SASRec (CE) and the plain loop, and what whole trainings come to.

The plain loop scores every position of a padded batch and ignores padding in the loss: its loss is ours. RecBole makes every event after a user's first an
example of its own, with the events before as history; its epoch has the same targets, and about as many a step. Its first weights differ, so the loss of one
epoch is shown, not compared; after equally many epochs both are asked for the last event of every user, and R@10 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench import Case, peer
from numpy.typing import NDArray
from torch import Tensor

from pipeline import config, evaluation
from pipeline.encoders import sasrec

NUMBER, TITLE = 10, "SASRec epoch, full softmax"
SIZES = {"quick": (1_000, 2_000), "normal": (4_000, 12_101), "full": (22_363, 12_101)}
MEAN_LENGTH = 8.9  # events of a user of Beauty
LOSS_APART = 1e-3
WHOLE = {"quick": (1_000, 1_000), "normal": (2_000, 2_000), "full": (8_000, 4_000)}  # users, items of the whole trainings
EPOCHS = 15
ROW = 20  # items that follow each other in a stroll
RECBOLE = "RecBole SASRec, CE"
FloatArray = NDArray[np.float64]


def cases(scale: str) -> Iterator[Case]:
    users, num_items = SIZES[scale]
    generator = np.random.default_rng(0)
    lengths, offsets = histories(users, generator)
    items_T = torch.from_numpy((num_items * generator.random(int(lengths.sum())) ** 2).astype(np.int64))
    params = config.SasRec(dropout=0.0)  # without it both ways see the same numbers, so that their losses can be compared
    start_B, stop_B = sasrec.window_bounds(offsets, params.max_length)

    def ours() -> float:
        """Loss of an epoch of ours."""
        model, optimizer = fresh(num_items, params)
        torch.manual_seed(1)
        return sasrec._epoch(model, optimizer, items_T, start_B, stop_B, params)

    def plain() -> float:
        """Loss of an epoch of the peer."""
        model, optimizer = fresh(num_items, params)
        torch.manual_seed(1)
        return plain_epoch(model, optimizer, items_T, start_B, stop_B, params)

    peers, losses = {"plain padded loop": plain}, {}
    recbole = peer("recbole.model.sequential_recommender.sasrec")
    if recbole is not None:
        theirs = RecBole(recbole, sasrec.Sequences(offsets, items_T), num_items, params)
        peers[RECBOLE] = lambda: losses.setdefault("RecBole's loss", round(theirs.epoch(*theirs.fresh()), 3))

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
        judged=(RECBOLE,),
        rounds=3,
        notices=() if recbole else ("recbole is not installed",),
        facts=lambda: losses,
    )
    if recbole is not None:
        yield trained(recbole, *WHOLE[scale])


def histories(users: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], Tensor]:
    """(events, where they begin) of users as long as Beauty's."""
    lengths = 5 + generator.geometric(1 / (MEAN_LENGTH - 4), users) - 1
    return lengths, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def fresh(num_items: int, params: config.SasRec) -> tuple[sasrec.SasRec, torch.optim.Optimizer]:
    """A network with its first weights, the same at every call."""
    torch.manual_seed(0)
    model = sasrec.SasRec(num_items, params)
    return model, torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=0.0)


def trained(recbole: ModuleType, users: int, num_items: int) -> Case:
    """Equally many epochs of both on strolls, then the last event of every user."""
    params = config.SasRec(max_length=20, tied=True)  # as RecBole's
    sequences, questions = sasrec.holdout(strolls(users, num_items), users, params.max_length, seed=0)
    start_B, stop_B = sasrec.window_bounds(sequences.offsets, params.max_length)
    theirs, found = RecBole(recbole, sequences, num_items, params), {}

    def ours() -> FloatArray:
        """Hits among ten of our network."""
        model, optimizer = fresh(num_items, params)
        for _ in range(EPOCHS):
            sasrec._epoch(model, optimizer, sequences.items, start_B, stop_B, params)
        return evaluation.recall_at(sasrec.answer(model, sequences, questions), 10)

    def recboles() -> FloatArray:
        """Hits among ten of RecBole's."""
        model, optimizer = theirs.fresh()
        for _ in range(EPOCHS):
            theirs.epoch(model, optimizer)
        return evaluation.recall_at(theirs.ranks(model, questions), 10)

    def level(mine_Q: FloatArray, theirs_Q: FloatArray) -> str:
        """Ours is not below theirs by more than two standard errors."""
        gain_Q = mine_Q - theirs_Q
        spread = gain_Q.std() / len(gain_Q) ** 0.5
        found.update({"R@10 ours": mine_Q.mean(), "RecBole's": theirs_Q.mean(), "standard error": spread})
        return f"R@10 {mine_Q.mean():.4f} and {theirs_Q.mean():.4f}" if gain_Q.mean() < -2 * spread else ""

    return Case(
        name=f"{EPOCHS} epochs, {users:,} users, {num_items:,} items, then R@10",
        ours=ours,
        peers={RECBOLE: recboles},
        equal=level,
        target=2.0,
        rounds=0,
        facts=lambda: {key: round(float(value), 4) for key, value in found.items()},
    )


def strolls(users: int, num_items: int) -> sasrec.Sequences:
    """Users who walk through two rows of twenty items, mostly one step at a time, so that there is an order to learn."""
    generator = np.random.default_rng(0)
    lengths, offsets = histories(users, generator)
    user_T = np.repeat(np.arange(users), lengths)
    row_UR, start_U = generator.integers(num_items // ROW, size=(users, 2)), generator.integers(ROW, size=users)
    step_T = np.where(generator.random(len(user_T)) < 0.7, 1, generator.integers(ROW, size=len(user_T)))
    row_T = row_UR[user_T, (generator.random(len(user_T)) < 0.2).astype(int)]
    items_T = ROW * row_T + (start_U[user_T] + np.cumsum(step_T)) % ROW
    return sasrec.Sequences(offsets, torch.from_numpy(items_T))


@dataclass(frozen=True)
class RecBole:
    """RecBole's SASRec on its own augmented examples, in tensors: its data loader is left out of the clock."""

    module: ModuleType
    sequences: sasrec.Sequences
    num_items: int
    params: config.SasRec

    def fresh(self) -> tuple[Any, torch.optim.Optimizer]:
        """A network with its first weights."""
        params = self.params
        settings = {
            "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length", "NEG_PREFIX": "neg_",
            "MAX_ITEM_LIST_LENGTH": params.max_length, "device": torch.device("cpu"), "n_layers": params.num_blocks, "n_heads": params.num_heads,
            "hidden_size": params.dim, "inner_size": 4 * params.dim, "hidden_dropout_prob": params.dropout, "attn_dropout_prob": params.dropout,
            "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE",
        }  # fmt: skip
        torch.manual_seed(0)
        model = self.module.SASRec(settings, SimpleNamespace(num=lambda field: self.num_items + 1))
        return model, torch.optim.Adam(model.parameters(), lr=params.learning_rate)

    def asked(self, target_E: Tensor, first_E: Tensor) -> dict[str, Tensor]:
        """The events before each target, at most `max_length`, 0 = none."""
        length_E = (target_E - first_E).clamp(max=self.params.max_length)
        place_EL = torch.arange(self.params.max_length)
        event_EL = (target_E - length_E)[:, None] + place_EL.minimum(length_E[:, None] - 1)
        history_EL = torch.where(place_EL < length_E[:, None], 1 + self.sequences.items[event_EL], 0)
        return {"item_list": history_EL, "item_length": length_E}

    @cached_property
    def examples(self) -> dict[str, Tensor]:
        """Every event after a user's first."""
        offsets = self.sequences.offsets
        first, target_E = offsets[:-1].repeat_interleave(offsets.diff()), torch.arange(len(self.sequences.items))
        target_E, first_E = (part[target_E > first] for part in (target_E, first))
        return {**self.asked(target_E, first_E), "item": 1 + self.sequences.items[target_E]}

    def epoch(self, model: Any, optimizer: torch.optim.Optimizer) -> float:
        """Mean loss of an epoch."""
        count, losses = len(self.examples["item"]), []
        model.train()
        for rows in torch.randperm(count).split(self.params.batch_size * count // (len(self.sequences.offsets) - 1)):
            loss = model.calculate_loss({name: column[rows] for name, column in self.examples.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)

    @torch.no_grad()
    def ranks(self, model: Any, questions: sasrec.Holdout) -> FloatArray:
        """Rank of every question's target over the catalogue."""
        model.eval()
        asked = self.asked(questions.stop, questions.start)

        def score(rows: slice) -> Tensor:
            """Scores without RecBole's padding item."""
            return model.full_sort_predict({name: column[rows] for name, column in asked.items()})[:, 1:]

        return evaluation.ranks_in_chunks(score, questions.targets.numpy(), self.num_items, None)


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
