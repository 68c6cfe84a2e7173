"""UNGER, first called PRORec (arXiv 2502.06269): content and behaviour become one vector before anything is quantised.

An adapter maps content to behaviour's width, a contrastive term aligns the two, and a next-item loss over users' histories moves both; the integrated
vector, both halves at unit length, then gets residual k-means codes. Known here from its abstract and summaries: parts are named in place of equations.
Not here: residual k-means (rq_kmeans.py), questions and reader (histories.py), the loop (fit.py), a generator (retrievers).
Suffixes: B batch, N items, R distinct items of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers import histories, metrics, parallel
from pipeline.tokenizers.alignment import both_ways, view
from pipeline.tokenizers.base import (
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    Networked,
    Tokenizer,
    TokenizerOutput,
    encode_in_chunks,
    shows,
    unweighted,
)
from pipeline.tokenizers.fit import Trainer
from pipeline.tokenizers.inputs import Inputs, side_by_side
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.rq_kmeans import RqKmeans, concatenate
from pipeline.tokenizers.world import World

CONTENT = ("text", "image")
EVALUATED = 1024  # items in one contrastive comparison outside training


def adapted(hidden_BD: Tensor, gain_BD: Tensor, shift_BD: Tensor) -> Tensor:
    """Content on behaviour's width, E_T, (B, D): (1 + gain) times the layer-normalised hidden row, plus shift.

    Args:
        hidden_BD: W E_S + b; gain_BD / shift_BD: linear in the content E_S as well.
    Source: UNGER (arXiv 2502.06269), stage one, modality adaption layer; differs: that it is an adaptive layer norm is a third party's reading of it.
    """
    return (1.0 + gain_BD) * F.layer_norm(hidden_BD, hidden_BD.shape[1:]) + shift_BD


def integrate(behavior_BD: Tensor, content_BD: Tensor, behavior_B: Tensor, content_B: Tensor) -> Tensor:
    """The integrated vector E_I, (B, 2 D): content and behaviour at unit length beside each other; 0 for an item that has neither.

    Args:
        behavior_B / content_B: True where the item has that side; the other one stands in where it has not.
    Source: UNGER (arXiv 2502.06269), stage one, concat(l2(E_C), l2(E_T)) as a third party has it;
    differs: standing in, possible because the sides are aligned; the paper's items have both.
    """
    behavior_BD, content_BD = F.normalize(behavior_BD.float(), dim=1), F.normalize(content_BD.float(), dim=1)
    left_BD = torch.where(content_B[:, None], content_BD, behavior_BD)
    right_BD = torch.where(behavior_B[:, None], behavior_BD, content_BD)
    return torch.cat([left_BD, right_BD], 1) * (behavior_B | content_B)[:, None]


def alignment_loss(behavior_BD: Tensor, content_BD: Tensor, both_B: Tensor, *, temperature: float, world: World) -> Tensor:
    """The share of this process in the mean contrastive loss of both directions over the items that have both sides, a scalar.

    Source: UNGER (arXiv 2502.06269), stage one, cross-modality alignment: InfoNCE of E_C with E_T, in-batch negatives
    """
    return both_ways(view(behavior_BD, both_B, world), view(content_BD, both_B, world), temperature=temperature, world=world)


def teacher_vectors(tokenizer: Tokenizer, items: ItemBatch) -> Tensor:
    """What a generator's summary of the user is distilled from, (N, D): E_I where the codes are UNGER's, else the unit-norm modalities side by side.

    An item that shows nothing the tokenizer reads is zero. The loss is `retrievers.base.distillation`.
    Source: UNGER (arXiv 2502.06269), stage two; differs: other tokenizers have no integrated vector and take what their codes are made from.
    """
    if isinstance(tokenizer, Unger):
        return tokenizer.integrated(items) * tokenizer.shown(items)[:, None]
    return concatenate(items, items.widths()).float()


class Network(nn.Module):
    """Adapter of content, linear map of behaviour and the next-item reader.

    Args:
        settings: the [train_tokenizer.unger] section.
        raw_widths: modality -> width of its vectors as they come.
    Raises: ValueError unless behaviour and some content are there.
    """

    def __init__(self, settings: profile.Unger, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.inputs = Inputs(raw_widths, settings.input_dim)
        self.raw_widths = self.inputs.raw_widths
        self.content = tuple(name for name in CONTENT if name in self.inputs.widths)
        if not self.content or "behavior" not in self.inputs.widths:
            raise ValueError(f"UNGER joins content with behaviour and got only {sorted(raw_widths)}")
        width, latent = sum(self.inputs.widths[name] for name in self.content), settings.latent_dim
        self.hidden, self.modulate = nn.Linear(width, latent), nn.Linear(width, 2 * latent)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        self.behavior_WD = nn.Parameter(torch.eye(self.inputs.widths["behavior"], latent))
        self.reader = histories.Reader(2 * latent, settings.max_history, settings.hidden_dim)

    def sides(self, batch: ItemBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E_C and E_T of prepared items, (B, D) each, and who has behaviour and content."""
        content_BD, map_WD = side_by_side(batch, self.content), self.behavior_WD
        gain_BD, shift_BD = self.modulate(content_BD).chunk(2, 1)
        text_BD = adapted(self.hidden(content_BD), gain_BD, shift_BD)
        behavior_BD = side_by_side(batch, ("behavior",)) @ (map_WD.detach() if self.settings.freeze_behavior else map_WD)
        return behavior_BD, text_BD, batch.behavior_N, torch.stack([batch.mask(name) for name in self.content]).any(0)

    def forward(self, batch: ItemBatch) -> Tensor:
        """E_I of prepared items, (B, 2 D).

        Source: UNGER (arXiv 2502.06269), stage one, E_I; differs: E_C is a trained map of the night's behaviour vector in place of a trained row per
        item, so that a new item needs no training; before the maps both E_S and that vector are centred, turned and cut to their `input_dim` leading
        principal axes and brought to one scale.
        """
        return integrate(*self.sides(batch))


class Training:
    """Stage one of UNGER as the training loop wants it (`fit.Trainable`); there are no code books in it."""

    warmup_epochs = 0
    codebook_names = ()
    recordable = False  # a step draws its questions on the host

    def __init__(self, network: Network, events: histories.Events, prepared: ItemBatch) -> None:
        self.network, self.events, self.prepared = network, events, prepared
        self.settings = network.settings

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Alignment of the items, next-item loss of as many questions, and their weighted `total`.

        Source: UNGER (arXiv 2502.06269), stage one, L_seq + alpha L_align
        """
        next_B = self._next(self.events.draw(noise_BU.cpu()), world)
        terms = {"alignment": self._align(batch, world), "next_item": world.mean(next_B, torch.ones_like(next_B, dtype=torch.bool))}
        return {**terms, "total": self.settings.next_item * terms["next_item"] + self.settings.alignment * terms["alignment"]}

    def _align(self, batch: ItemBatch, world: World) -> Tensor:
        behavior_BD, content_BD, behavior_B, content_B = self.network.sides(batch)
        return alignment_loss(behavior_BD, content_BD, behavior_B & content_B, temperature=self.settings.temperature, world=world)

    def _next(self, at_B: Tensor, world: World) -> Tensor:
        """Loss of each question, (B,)."""
        device = self.network.behavior_WD.device
        return histories.ask(
            self.events,
            at_B,
            lambda rows_R: self.network(self.prepared.take(rows_R).to(device)),
            self.network.reader,
            temperature=self.settings.next_temperature,
            world=world,
        )

    def after_step(self) -> None:
        """Nothing to do between steps."""

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """Codes come after training."""

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Codes come after training."""
        return {}

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Alignment of those items and next-item loss of the questions held out; `score` = their weighted sum."""
        device = self.network.behavior_WD.device
        aligned = [float(self._align(block.to(device), histories.alone())) for block in parallel.blocks(items, EVALUATED)]
        asked = torch.cat([self._next(at_B, histories.alone()) for at_B in self.events.held_P.split(histories.HELD_USERS)])
        found = {"alignment": sum(aligned) / len(aligned), "next_item": float(asked.double().mean())}
        return {**found, "score": self.settings.next_item * found["next_item"] + self.settings.alignment * found["alignment"]}


class Unger(Networked[profile.Unger, Network]):
    """The UNGER tokenizer (`base.Tokenizer`); its codes are ordered, level l refines the levels before it.

    Args:
        settings: the [train_tokenizer.unger] section.
    """

    name = "unger"
    section = profile.Unger
    build = Network

    @property
    def needs_history(self) -> bool:
        """Histories are half of what it learns from."""
        return True

    def __init__(self, settings: profile.Unger) -> None:
        super().__init__(settings)
        shared = set(profile.RqKmeans.model_fields)
        self.quantiser = RqKmeans(profile.RqKmeans(**settings.model_dump(include=shared)))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the levels."""
        return self.quantiser.slots

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K per level."""
        return self.quantiser.codebook_sizes

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Train the integrated vector, then code it by residual k-means; with `start` both begin at the champion's.

        Raises: ValueError without content or behaviour; ContractError without enough history or for a champion of other sizes.
        """
        events = histories.events(options.history, len(items), who="UNGER")
        network = begin(self, lambda network: network.inputs.fit(items), options, items.widths())
        prepared = network.inputs.prepare(items)
        training = Training(network.to(best_device()), events, prepared)
        curves = Trainer(training, prepared, histories.part(options, "integration", events.digest)).run()
        self.network = network.eval()
        self._quantise(items.take(self.shown(items)), options)
        return FitReport(curves=curves, metrics=training.evaluate(prepared, quantise=True) | self._measure(items))

    def _quantise(self, items: ItemBatch, options: FitOptions) -> None:
        """Fit the residual k-means of E_I; a champion's begins at its own."""
        start = options.start
        if start is not None:
            assert isinstance(start.tokenizer, Unger), "`begin` has looked"
            start = replace(start, tokenizer=start.tokenizer.quantiser)
        self.quantiser.fit(self._halves(items), FitOptions(seed=options.seed, settings=options.settings, start=start))

    def shown(self, items: ItemBatch) -> Tensor:
        """True for items that show anything UNGER reads, (N,)."""
        return shows(items, self.fitted.inputs.widths).cpu()

    def _measure(self, items: ItemBatch) -> dict[str, float]:
        made = self.encode(items)
        found = metrics.code_use(made.codes_NL, self.codebook_sizes, self.slots)
        return {**found, "nmse/integrated": metrics.nmse(self.integrated(items), made.quantized_ND, self.shown(items))}

    @torch.no_grad()
    def integrated(self, items: ItemBatch) -> Tensor:
        """E_I, the integrated vectors before quantisation, (N, 2 D) on the CPU: what a generator can be taught by."""
        network = self.fitted
        device = network.behavior_WD.device
        return torch.cat([network(network.inputs.prepare(block.to(device))).cpu() for block in parallel.blocks(items)])

    def _halves(self, items: ItemBatch) -> ItemBatch:
        """The halves of E_I as the two modalities that residual k-means puts beside each other again."""
        content_ND, behavior_ND = self.integrated(items).chunk(2, 1)
        everyone_N = torch.ones(len(items), dtype=torch.bool)
        halves = {"text_ND": content_ND, "text_N": everyone_N, "behavior_ND": behavior_ND, "behavior_N": everyone_N}
        return items.to(torch.device("cpu")).changed({**halves, "image_ND": None, "image_N": ~everyone_N})

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the residual walk over E_I, weights of one, and the sum of the code rows; an item with nothing to read is masked everywhere."""

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of exactly `ENCODE_ROWS` items."""
            made = self.quantiser.encode(self._halves(rows), keep)
            return unweighted(made.codes_NL, made.quantized_ND, self.shown(rows), self.settings.codebook_size)

        return encode_in_chunks(items, block, keep)

    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes: code k of level l is what order[l][k] was."""
        self.quantiser.relabel(order)

    def codebooks(self) -> list[Tensor]:
        """Code rows per level, (K, 2 D), content before behaviour."""
        return self.quantiser.codebooks()

    def state(self) -> dict[str, Tensor]:
        """The network's tensors and, under `quantiser.`, the code rows; contiguous, on the CPU."""
        return super().state() | {f"quantiser.{name}": value for name, value in self.quantiser.state().items()}

    @classmethod
    def load(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Self:
        """The tokenizer that gave `config` and `state`.

        Raises: RuntimeError if the tensors do not fit the configuration.
        """
        tokenizer = super().load(config, {name: value for name, value in state.items() if not name.startswith("quantiser.")})
        half = tokenizer.settings.latent_dim
        inner = {"settings": tokenizer.quantiser.settings.model_dump(), "raw_widths": {"text": half, "behavior": half}}
        tokenizer.quantiser = RqKmeans.load(inner, {"codebook_LKD": state["quantiser.codebook_LKD"]})
        return tokenizer
