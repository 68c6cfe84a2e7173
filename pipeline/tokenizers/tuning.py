"""Tuning by users' histories through soft codes: MMQ's second stage, and a switch of ADA-SID.

A light next-item reader looks at an item's codes through a soft index, so that what users do next moves experts, gates and code books, while the first stage's
own terms go on beside it. Not here: the first stage (mmq.py, ada_sid.py), questions and reader (histories.py), the loop (fit.py).
Suffixes: B batch, R distinct items of a batch, D width, L positions, K codes.
"""

# ruff: noqa: N802 - tensor fields carry shape suffixes

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.context import derive_seed
from pipeline.tokenizers import histories
from pipeline.tokenizers.base import FitOptions, ItemBatch
from pipeline.tokenizers.fit import Trainable, Trainer
from pipeline.tokenizers.world import World


class Read(Protocol):
    """A pass of items as a reader sees it."""

    @property
    def z_BLD(self) -> Tensor:
        """Latents."""

    @property
    def read_BL(self) -> Tensor:
        """How much each position counts, 0 where it is masked."""


class Stage(Trainable, Protocol):
    """A first stage whose terms go on while histories tune its network."""

    def kept(self, batch: ItemBatch, noise_BU: Tensor, world: World) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, and their weighted sum."""


def soft_index(z_BLD: Tensor, codebook_LKD: Tensor, *, temperature: float) -> Tensor:
    """The one-hot nearest code with the gradient of the softmax of cosine / temperature over the codes, (B, L, K).

    Source: MMQ (arXiv 2508.15281), stage two, soft indices; differs: the temperature is not printed.
    """
    cosine_LBK = torch.bmm(F.normalize(z_BLD, dim=-1).transpose(0, 1), F.normalize(codebook_LKD, dim=-1).transpose(1, 2))
    soft_BLK = torch.softmax(cosine_LBK.transpose(0, 1) / temperature, dim=-1)
    hard_BLK = F.one_hot(cosine_LBK.transpose(0, 1).argmax(-1), soft_BLK.shape[2]).to(soft_BLK.dtype)
    return soft_BLK + (hard_BLK - soft_BLK).detach()


def soft_embedding(index_BLK: Tensor, table_LKD: Tensor, read_BL: Tensor) -> Tensor:
    """What a reader sees of an item: the weighted mean over its positions of index times embedding table, (B, D); 0 without positions.

    Source: MMQ (arXiv 2508.15281), stage two, the downstream model's input; differs: mean over positions, so that items with masked positions are no shorter.
    """
    row_BLD = torch.einsum("blk,lkd->bld", index_BLK, table_LKD)
    return histories.shown_mean(row_BLD, read_BL)


class Tuned(nn.Module):
    """A tokenizer's network with a next-item reader on top, whose item vectors are soft codes times an embedding table."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        settings = tokenizer.settings
        self.tokenizer = tokenizer
        self.reader = histories.Reader(settings.latent_dim, settings.max_history, settings.hidden_dim)
        self.table_LKD = nn.Parameter(torch.randn(tokenizer.codebook_LKD.shape) * settings.latent_dim**-0.5)

    def item_vectors(self, items: ItemBatch) -> Tensor:
        """What the reader sees of prepared items, (R, D)."""
        made: Read = self.tokenizer(items, quantise=True)
        with torch.autocast(made.z_BLD.device.type, enabled=False):
            index_RLK = soft_index(made.z_BLD, self.tokenizer.codebook_LKD, temperature=self.tokenizer.settings.soft_temperature)
        return soft_embedding(index_RLK, self.table_LKD, made.read_BL)


class Tuning:
    """The second stage as the training loop wants it (`fit.Trainable`)."""

    warmup_epochs = 0
    codebook_names = ("tokenizer.codebook_LKD",)
    recordable = False  # a step draws its questions on the host

    def __init__(self, first: Stage, network: Tuned, events: histories.Events, prepared: ItemBatch) -> None:
        self.first, self.network, self.events, self.prepared = first, network, events, prepared
        self.settings = network.tokenizer.settings

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Next-item loss of as many questions as there are items, what is kept of the first stage, and their sum `total`."""
        terms, kept = self.first.kept(batch, noise_BU, world)
        next_B = self._next(self.events.draw(noise_BU.cpu()), world)
        terms["next_item"] = world.mean(next_B, torch.ones_like(next_B, dtype=torch.bool))
        return {**terms, "total": terms["next_item"] + kept}

    def _next(self, at_B: Tensor, world: World) -> Tensor:
        """Loss of each question, (B,)."""
        device = self.network.table_LKD.device
        return histories.ask(
            self.events,
            at_B,
            lambda rows_R: self.network.item_vectors(self.prepared.take(rows_R).to(device)),
            self.network.reader,
            temperature=self.settings.temperature,
            world=world,
            popularity=self.settings.tune_popularity,
        )

    def after_step(self) -> None:
        """What the first stage does between steps."""
        self.first.after_step()

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """The code books of the first stage stay."""

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """No code is moved while histories move them."""
        return {}

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """The numbers of the first stage, and as `score` the next-item loss of the questions held out."""
        found = self.first.evaluate(items, quantise=True)
        losses = [self._next(at_B, histories.alone()) for at_B in self.events.held_P.split(histories.HELD_USERS)]
        return {**found, "score": float(torch.cat(losses).double().mean())}


def tune(first: Stage, events: histories.Events, prepared: ItemBatch, options: FitOptions) -> dict[str, list[float]]:
    """Tune the network of a first stage, in place; the curves, named `tune/...`. With `start` code rows are pulled towards where the first stage left them."""
    network: Any = first.network
    settings = options.settings.model_copy(
        update={"max_epochs": network.settings.tune_epochs, "learning_rate": network.settings.tune_rate * options.settings.learning_rate}
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(options.seed, "tune"))
        tuned = Tuned(network).to(network.codebook_LKD.device)
    trainer = Trainer(Tuning(first, tuned, events, prepared), prepared, replace(options, settings=settings))
    return {f"tune/{name}": values for name, values in trainer.run().items()}
