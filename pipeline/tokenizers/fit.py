"""The one training loop of all gradient tokenizers: seeds, schedule, early stopping, exact resume, several processes, curves.

All randomness is a function of (seed, purpose, epoch, step), so a resumed run needs no generator state to continue bit for bit.
Not here: what a step's loss is (each tokenizer's `Trainable`), where a checkpoint is kept (`base.Checkpoint`), setting up process groups.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import TrainTokenizer
from pipeline.context import derive_seed
from pipeline.device import deterministic, sent, side_stream
from pipeline.tokenizers.base import FitOptions, ItemBatch
from pipeline.tokenizers.world import World

logger = logging.getLogger(__name__)
NOISE_COLUMNS = 8  # uniform numbers per item and step a model may use, drawn for the whole batch whatever the number of processes
MONITOR_ITEMS = 65_536  # items of the catalogue that an epoch's code metrics are taken on
STEPS_LEAST, ITEMS_LEAST = 16, 64  # a small catalogue takes at least 16 steps an epoch, as long as a step has 64 items
HOLD_OUT_FROM = 2_000  # catalogues below this size train on every item and stop early on them
FINAL_RATE = 0.05  # share of the learning rate left at the end of the cosine schedule
STEPS_BEFORE = 3  # steps taken as they come before one is recorded: the first ones allocate what later ones reuse


class Trainable(Protocol):
    """What the loop needs from a tokenizer."""

    @property
    def network(self) -> nn.Module:
        """What is trained."""

    @property
    def warmup_epochs(self) -> int:
        """Epochs without quantisation."""

    @property
    def codebook_names(self) -> tuple[str, ...]:
        """Names of the network's parameters that hold code rows."""

    @property
    def recordable(self) -> bool:
        """Whether a step asks the device for nothing and sends it nothing, so that an accelerator can record it."""

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Loss terms of this process's rows, parts of sums over all processes; `total` is descended."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """Initialise the code books from trained latents, at the end of the warm-up."""

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Move dead codes; the parameters touched, by name, with the rows that moved (bool)."""

    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Numbers about those items; `score` is what early stopping watches, lower is better."""


@dataclass
class Run:
    """Where a training run stands; everything here and the tensors are in the checkpoint."""

    epoch: int = 0
    best_epoch: int = -1
    best_score: float = math.inf
    finished: bool = False
    curves: dict[str, list[float]] = field(default_factory=dict)


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator that depends on its parts alone."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def hold_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, both ascending; small catalogues hold out none and are judged on what they train on."""
    if count < HOLD_OUT_FROM or share == 0.0:
        rows = torch.arange(count)
        return rows, rows
    order = torch.randperm(count, generator=generator_for(seed, "hold_out"))
    held = int(count * share)
    return order[held:].sort().values, order[:held].sort().values


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps that `count` items are split into: by the batch size, but not fewer than a small catalogue needs to learn anything in an epoch."""
    return max(1, round(count / batch_size), min(STEPS_LEAST, count // ITEMS_LEAST))


def learning_rate(settings: TrainTokenizer, progress: float) -> float:
    """Step size at a share of the run in [0, 1]: cosine from the set rate down to `FINAL_RATE` of it."""
    return settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


def fingerprint(items: ItemBatch, network: nn.Module, *parts: str) -> str:
    """Digest of what a run starts from; a checkpoint of another start is not resumed."""
    digest = hashlib.sha256(json.dumps(parts).encode())
    for tensor in [*(value for value in vars(items).values() if value is not None), *network.state_dict().values()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def optimizer_of(network: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; on an accelerator in one kernel, with its step number and its rate there, so that a recorded step reads the rate of the day."""
    device = next(network.parameters()).device
    if device.type == "cpu":
        return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    return torch.optim.AdamW(network.parameters(), lr=torch.tensor(rate, device=device), weight_decay=0.0, fused=True)


Step = Callable[[ItemBatch, Tensor, bool], dict[str, Tensor]]  # items, noise, whether codes are used -> loss terms


class Replay:
    """A step that an accelerator has recorded; a call copies its inputs to where the recording reads them and plays it.

    Args:
        step: asks nothing of the device and launches the same kernels each time; recording it does not run it.
    """

    def __init__(self, step: Step, batch: ItemBatch, noise_BU: Tensor, quantise: bool) -> None:
        self.batch, self.noise_BU = batch.map(torch.clone), noise_BU.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.seen = step(self.batch, self.noise_BU, quantise)

    def __call__(self, batch: ItemBatch, noise_BU: Tensor) -> dict[str, Tensor]:
        """The loss terms; the next call overwrites them."""
        for name, value in vars(self.batch).items():
            if value is not None:
                value.copy_(getattr(batch, name))
        self.noise_BU.copy_(noise_BU)
        self.graph.replay()
        return self.seen


class Trainer:
    """A run of `Trainable` on a catalogue.

    Args:
        model: what is trained, already initialised from the seed.
        items: the catalogue as the model wants it.
        options: steps, rates, precision, patience and the rest. With `start` the network holds the champion's state already: no warm-up, codes stay, and
            their rows are pulled towards where they are now.
    """

    def __init__(self, model: Trainable, items: ItemBatch, options: FitOptions) -> None:
        settings, start = options.settings, options.start
        self.model, self.seed, self.settings, self.checkpoint, self.progress = model, options.seed, settings, options.checkpoint, options.progress
        self.world = World()
        self.device = next(model.network.parameters()).device
        self.items = items
        self.rows, self.held = hold_out(len(items), settings.valid_share, self.seed)
        self.monitor = torch.arange(0, len(items), max(1, math.ceil(len(items) / MONITOR_ITEMS)))
        self.warmup = min(model.warmup_epochs, settings.max_epochs // 2) if start is None else -1  # a short run must still reach its codes
        self.rate = settings.refit_rate if start else 1.0
        self.pull = start.pull if start else 0.0
        named = dict(model.network.named_parameters())
        self.anchors = {name: named[name].detach().clone() for name in model.codebook_names} if self.pull else {}
        self.steps = steps_per_epoch(len(self.rows), settings.batch_size)
        self.recording = settings.cuda_graph and self.device.type != "cpu" and model.recordable
        self.optimizer = optimizer_of(model.network, settings.learning_rate)
        if settings.cuda_graph and not self.recording:
            logger.info("steps run as they come: %s", "there is no accelerator" if self.device.type == "cpu" else "this tokenizer's cannot be recorded")
        if self.recording and self.world.size > 1:
            raise ValueError("a step of several processes cannot be recorded: set train_tokenizer.cuda_graph to false")
        self.taken: dict[tuple[bool, int], int] = {}
        self.replays: dict[tuple[bool, int], Replay] = {}
        self.best: dict[str, Tensor] = {}
        self.state = Run()
        self.start = fingerprint(items, model.network, settings.model_dump_json(), str(self.seed), str(self.pull)) if self.checkpoint else ""

    def run(self) -> dict[str, list[float]]:
        """The curves, name -> one value per epoch; the network is left at its best epoch."""
        self._restore()
        with deterministic(self.seed), side_stream(self.device):
            for _ in self._visible(range(self.state.epoch, self.settings.max_epochs)):
                if self.state.finished:
                    break
                self._epoch(self.state.epoch)
                self._save()
        if self.best:
            self.model.network.load_state_dict(self.best)
        logger.info("trained tokenizer epochs=%d best_epoch=%d score=%.4f", self.state.epoch, self.state.best_epoch, self.state.best_score)
        return self.state.curves

    def _visible(self, epochs: range) -> Iterator[Any] | Iterable[Any]:
        return self.progress(epochs, "train tokenizer", len(epochs)) if self.progress and self.world.rank == 0 else epochs

    def _epoch(self, epoch: int) -> None:
        quantise = epoch >= self.warmup
        if epoch == self.warmup:
            self.model.start_codes(self.items.take(self.rows), generator=generator_for(self.seed, "codes"))
            self.world.same(self.model.network.state_dict().values())
        order = self.rows[torch.randperm(len(self.rows), generator=generator_for(self.seed, "order", epoch))].to(self.items.device)
        seen: dict[str, Tensor] = {}
        sums_T = torch.zeros(())
        for step, batch in enumerate(order.tensor_split(self.steps)):
            seen = self._step(batch, epoch, step, quantise)
            sums_T = sums_T + torch.stack(list(seen.values())) / self.steps
        losses = dict(zip(seen, self.world.total(sums_T).tolist(), strict=True))
        if quantise and not self.anchors and epoch < self.settings.revive_until * self.settings.max_epochs:  # an anchored word is not given to others
            self._revive(epoch)
        self._judge(epoch, losses, quantise)

    def _step(self, batch: Tensor, epoch: int, step: int, quantise: bool) -> dict[str, Tensor]:
        noise = torch.rand(len(batch), NOISE_COLUMNS, generator=generator_for(self.seed, "noise", epoch, step))
        rows, noise_BU = self.world.shard(batch), sent(self.world.shard(noise), self.device)
        self._set_rate(self.rate * learning_rate(self.settings, (epoch * self.steps + step) / (self.settings.max_epochs * self.steps)))
        items = self.items.take(rows).to(self.device)
        return self._replayed(items, noise_BU, quantise) if self.recording else self._learn(items, noise_BU, quantise)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _replayed(self, batch: ItemBatch, noise_BU: Tensor, quantise: bool) -> dict[str, Tensor]:
        """`_learn`, from the fourth step of this kind and size on by the recording of it."""
        kind = (quantise, len(batch))
        self.taken[kind] = self.taken.get(kind, 0) + 1
        if self.taken[kind] <= STEPS_BEFORE:
            return self._learn(batch, noise_BU, quantise)
        if kind not in self.replays:
            self._capturable(True)
            self.replays[kind] = Replay(self._learn, batch, noise_BU, quantise)
            self._capturable(False)
        return self.replays[kind](batch, noise_BU)

    def _capturable(self, now: bool) -> None:
        """Tell the optimizer that it is being recorded, which it refuses otherwise; told so while it is not, it warns."""
        for group in self.optimizer.param_groups:
            group["capturable"] = now

    def _learn(self, batch: ItemBatch, noise_BU: Tensor, quantise: bool) -> dict[str, Tensor]:
        """One optimizer step; nothing in it waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            losses = self.model.losses(batch, noise_BU, quantise=quantise, world=self.world)
        if self.anchors:
            losses["pull"] = self._pull()
            losses["total"] = losses["total"] + self.pull * losses["pull"]
        losses["total"].backward()
        self.world.add_gradients(self.model.network.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.network.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.model.after_step()
        return {**{f"loss/{name}": value.detach().float() for name, value in losses.items()}, "gradient_norm": norm.detach().float() / self.world.size}

    def _pull(self) -> Tensor:
        """Mean squared way of the code rows from their anchors in units of the anchors' mean square; this process's part of it."""
        named = dict(self.model.network.named_parameters())
        ways = [(named[name] - anchor).square().mean() / anchor.square().mean() for name, anchor in self.anchors.items()]
        return torch.stack(ways).mean() / self.world.size

    def _revive(self, epoch: int) -> None:
        """Move dead codes and forget what the optimizer knew about their rows."""
        moved = self.model.revive(self.items.take(self.rows), generator=generator_for(self.seed, "revive", epoch), world=self.world)
        named = dict(self.model.network.named_parameters())
        for name, rows in moved.items():
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[named[name]][key][rows] = 0.0
        self.world.same(named[name].data for name in moved)

    def _judge(self, epoch: int, losses: dict[str, float], quantise: bool) -> None:
        """Log the epoch, keep the best state after the warm-up, decide whether to go on."""
        seen = self.model.evaluate(self.items.take(self.monitor), quantise=quantise)
        held = self.model.evaluate(self.items.take(self.held), quantise=quantise)
        score = held["score"]
        numbers = {**losses, **seen, **{f"held_out/{name}": value for name, value in held.items() if name.startswith(("nmse", "score"))}}
        for name, value in numbers.items():
            self.state.curves.setdefault(name, []).append(value)
        self.state.epoch = epoch + 1
        if quantise and score < self.state.best_score:
            self.state.best_score, self.state.best_epoch = score, epoch
            self.best = {name: value.detach().clone() for name, value in self.model.network.state_dict().items()}
        waited = epoch - self.state.best_epoch
        self.state.finished = epoch + 1 >= self.settings.max_epochs or (self.state.best_epoch >= 0 and waited >= self.settings.patience)

    def _save(self) -> None:
        if self.checkpoint is None or self.world.rank:
            return
        tensors = {f"network.{name}": value for name, value in self.model.network.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.model.network.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        self.checkpoint.save(kept, {"start": self.start, **vars(self.state)})

    def _restore(self) -> None:
        """Continue where the checkpoint stands; one of another start is left alone and the run begins anew."""
        found = self.checkpoint.load() if self.checkpoint else None
        if found is None:
            return
        tensors, document = found
        if document.pop("start") != self.start:
            logger.warning("checkpoint belongs to other data, settings or seed: starting anew")
            return
        self.state = Run(**document)
        self.model.network.load_state_dict(_part(tensors, "network."))
        self.best = {name: value.to(self.device) for name, value in _part(tensors, "best.").items()}
        for name, parameter in self.model.network.named_parameters():
            self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in _part(tensors, f"optimizer.{name}.").items() if "." not in key}
        logger.info("resumed tokenizer training epoch=%d", self.state.epoch)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
