"""SAIL-Embedding's training recipe (`content_cre`): adapters over frozen text and image vectors, taught by item pairs, sequences and behaviour vectors.

Source: SAIL-Embedding (arXiv 2510.12709). differs: the base encoders stay frozen, so what is trained are adapters that begin as the vectors' principal axes
and a gate that fuses the modalities, not a language model; the recipe (pairs, negatives, weights, phases, distillation, nested widths) is the paper's, its
sizes and loss weights are not published and are ours. Audio and video branches are left out: no data set here has them. Behaviour is a teacher and never an
input, so an item without events has its vector on its first night and a vector depends on the item's content alone.

What is stored are the adapted text and image vectors, one space for both; the fused vector is what the recipe is judged by.
SIDs come from both: clustering (`rq_kmeans` with one level, several sizes) and quantisation (any tokenizer) read these vectors like any others.
Not here: making the pair sets (jobs), measuring (sail_report). Suffixes: N items, R rows, B batch, H hard negatives, T places, D base width, W width.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ContentCre
from pipeline.encoders import sail_pairs
from pipeline.encoders.sail_pairs import PairSet, Questions
from pipeline.tokenizers.base import Checkpoint, History, ProgressBar
from pipeline.tokenizers.fit import generator_for
from pipeline.tokenizers.quantize import principal_axes

logger = logging.getLogger(__name__)
MODALITIES = ("text", "image")
ENCODE_ROWS = 1024  # every encode runs at this height, so that the company an item keeps cannot move its vector
AXES_ROWS = 100_000  # items that the axes are fitted on at most
WARMUP_SHARE, FINAL_RATE = 0.05, 0.05  # of the steps, and of the learning rate that is left at the end
LEAST_TEMPERATURE = 0.01
HISTORY = "history"  # name of sequence-to-item among the temperatures
PHASES = ("all", "nearest", "hard", "sequence", "identity")


@dataclass(frozen=True, kw_only=True)
class Content:
    """Frozen base vectors of N items.

    Args:
        vectors: modality (text | image) -> (N, D) float32, anything finite where not shown. shown: modality -> bool (N,).
    """

    vectors: Mapping[str, Tensor]
    shown: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Number of items."""
        return len(next(iter(self.shown.values())))

    def take(self, rows: Tensor) -> Content:
        """The items of those rows."""
        return Content(vectors={name: value[rows] for name, value in self.vectors.items()}, shown={name: value[rows] for name, value in self.shown.items()})

    def to(self, device: str | torch.device) -> Content:
        """The same items on a device."""
        return Content(
            vectors={name: value.to(device) for name, value in self.vectors.items()}, shown={name: value.to(device) for name, value in self.shown.items()}
        )


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the network says of R items: side (text | image | fused) -> vectors (R, W), and which rows have it, bool (R,)."""

    vectors: Mapping[str, Tensor]
    shown: Mapping[str, Tensor]


# ---------------------------------------------------------------- equations


def info_nce(query_BW: Tensor, target_BW: Tensor, rival_BB: Tensor, hard_BHW: Tensor, shown_BH: Tensor, temperature: Tensor | float) -> Tensor:
    """-ln of the target's share among itself, the hard negatives and the rivals of the batch, exp(cosine / tau) each, nats (B,).

    Source: SAIL-Embedding (arXiv 2510.12709), L_nce: the denominator is positive + hard + in-batch.

    Args:
        rival_BB: True where target j is a negative of query i. hard_BHW / shown_BH: hard negatives and which of them there are.
    """
    query_BW, target_BW, hard_BHW = (F.normalize(part, dim=-1) for part in (query_BW, target_BW, hard_BHW))
    positive_B1 = (query_BW * target_BW).sum(1, keepdim=True)
    batch_BB = (query_BW @ target_BW.T / temperature).masked_fill(~rival_BB, -torch.inf)
    hard_BH = (torch.einsum("bw,bhw->bh", query_BW, hard_BHW) / temperature).masked_fill(~shown_BH, -torch.inf)
    return torch.logsumexp(torch.cat([positive_B1 / temperature, batch_BB, hard_BH], 1), 1) - positive_B1[:, 0] / temperature


def nested_nce(
    query_BW: Tensor, target_BW: Tensor, rival_BB: Tensor, hard_BHW: Tensor, shown_BH: Tensor, temperature: Tensor | float, widths: Sequence[int]
) -> Tensor:
    """`info_nce` summed over the leading `widths` of the vectors, nats (B,).

    Source: SAIL-Embedding (arXiv 2510.12709), L_nce-mrl = the sum over z_128, z_768 and z_1536.
    """
    parts = [info_nce(query_BW[:, :w], target_BW[:, :w], rival_BB, hard_BHW[..., :w], shown_BH, temperature) for w in widths]
    return torch.stack(parts).sum(0)


def cosent(cosine_B: Tensor, grade_B: Tensor, temperature: Tensor | float) -> Tensor:
    """ln(1 + sum of exp((cosine_k - cosine_i) / tau) over pairs of which i has the higher grade), nats, scalar.

    Source: SAIL-Embedding (arXiv 2510.12709), L_cosent.
    """
    above_BB = grade_B[:, None] > grade_B[None, :]
    gap_BB = ((cosine_B[None, :] - cosine_B[:, None]) / temperature).masked_fill(~above_BB, -torch.inf)
    return F.softplus(torch.logsumexp(gap_BB.flatten(), 0)) if bool(above_BB.any()) else cosine_B.sum() * 0.0


def fuse(image_RW: Tensor, text_RW: Tensor, gate_RW: Tensor, shown_image_R: Tensor, shown_text_R: Tensor) -> Tensor:
    """Gate * image + (1 - gate) * text (R, W), or the one of them that the item has; zeros without either.

    Source: SAIL-Embedding (arXiv 2510.12709), late fusion: fused = g * v + (1 - g) * n.
    """
    share_RW = torch.where((shown_image_R & shown_text_R)[:, None], gate_RW, shown_image_R[:, None].to(gate_RW))
    return torch.where(shown_image_R[:, None], share_RW * image_RW, 0.0) + torch.where(shown_text_R[:, None], (1 - share_RW) * text_RW, 0.0)


def mean_vector(items_BTW: Tensor, shown_BT: Tensor) -> Tensor:
    """Mean of the unit-length item vectors of a history (B, W): the query of sequence-to-item.

    Source: SAIL-Embedding (arXiv 2510.12709), sequence-to-item, the default query.
    """
    weight_BT1 = shown_BT[..., None].to(items_BTW)
    return (F.normalize(items_BTW, dim=-1) * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def identity_nce(vectors_BW: Tensor, map_WD: Tensor, teacher_BD: Tensor, rival_BB: Tensor, temperature: Tensor | float, widths: Sequence[int]) -> Tensor:
    """`info_nce` of mapped vectors against the recommender's own vectors of the same items, summed over the leading `widths`, nats (B,).

    Source: SAIL-Embedding (arXiv 2510.12709), ID-to-item distillation; differs: the paper prints no loss, and the map's leading rows serve the leading widths.
    """
    nobody = teacher_BD.new_zeros(len(teacher_BD), 0, teacher_BD.shape[1]), rival_BB[:, :0]
    return torch.stack([info_nce(vectors_BW[:, :w] @ map_WD[:w], teacher_BD, rival_BB, *nobody, temperature) for w in widths]).sum(0)


def learning_rate(settings: ContentCre, share: float) -> float:
    """Step size at a share of the whole run in [0, 1): linear warm-up, then a cosine down to `FINAL_RATE`."""
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * min(1.0, share / WARMUP_SHARE + 0.01) * cosine


# ---------------------------------------------------------------- network


class Adapter(nn.Module):
    """A modality's leading principal axes, turned, plus a perceptron that begins at nothing; unit length (R, W).

    Args:
        width: of the base vectors.
    """

    def __init__(self, width: int, settings: ContentCre) -> None:
        super().__init__()
        kept, out = min(width, settings.input_dim), settings.widths[-1]
        self.mean: Tensor
        self.axes: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("axes", torch.eye(width)[:, :kept].contiguous())
        self.turn = nn.Parameter(torch.eye(kept, out))
        last = nn.Linear(settings.hidden_dim, out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.change = nn.Sequential(nn.Linear(kept, settings.hidden_dim), nn.GELU(), last)

    @torch.no_grad()
    def begin(self, vectors_ND: Tensor) -> None:
        """Fix the principal axes of the vectors: the cosines of an untrained adapter are those of the centred base vectors, as far as the width goes."""
        unit_ND = F.normalize(vectors_ND[:: max(1, -(-len(vectors_ND) // AXES_ROWS))], dim=1)
        mean_D, axes_DK = principal_axes(unit_ND, self.axes.shape[1])
        self.mean.copy_(mean_D)
        self.axes.copy_(axes_DK)

    def reduce(self, vectors_RD: Tensor) -> Tensor:
        """The part that is never trained: base vectors along the axes, (R, K)."""
        return (F.normalize(vectors_RD, dim=1) - self.mean) @ self.axes

    def forward(self, reduced_RK: Tensor) -> Tensor:
        """The adapted vectors."""
        return F.normalize(reduced_RK @ self.turn + self.change(reduced_RK), dim=1)


class Network(nn.Module):
    """Adapters and the gate.

    Args:
        base_widths: modality -> width of its base vectors.
    """

    def __init__(self, base_widths: Mapping[str, int], settings: ContentCre) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({name: Adapter(base_widths[name], settings) for name in MODALITIES if name in base_widths})
        self.gate = nn.Linear(2 * settings.widths[-1], settings.widths[-1])
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def reduce(self, content: Content) -> Content:
        """The items along the axes of their modality, zeros where not shown: what `adapt` reads."""
        vectors = {}
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            vectors[name] = torch.where(content.shown[name][:, None], adapter.reduce(content.vectors[name]), 0.0)
        return Content(vectors=vectors, shown={name: content.shown[name] for name in vectors})

    def adapt(self, reduced: Content) -> Views:
        """Text, image and fused vectors of reduced items; a modality that the network does not know is not shown."""
        shown = dict(reduced.shown)
        made = {name: adapter(reduced.vectors[name]) for name, adapter in self.adapters.items()}
        if len(made) == 1:
            (only,) = made
            return Views(vectors=made | {"fused": made[only]}, shown=shown | {"fused": shown[only]})
        gate_RW = torch.sigmoid(self.gate(torch.cat([made["image"], made["text"]], 1)))
        fused_RW = F.normalize(fuse(made["image"], made["text"], gate_RW, shown["image"], shown["text"]), dim=1)
        return Views(vectors=made | {"fused": fused_RW}, shown=shown | {"fused": shown["image"] | shown["text"]})

    def forward(self, content: Content) -> Views:
        """Text, image and fused vectors of the items."""
        return self.adapt(self.reduce(content))


class Teaching(nn.Module):
    """What only training needs: a temperature per source and a map from the vectors to each teacher's."""

    def __init__(self, sources: Sequence[str], teachers: Mapping[str, int], settings: ContentCre) -> None:
        super().__init__()
        first = math.log(settings.temperature)
        self.log_tau = nn.ParameterDict({name: nn.Parameter(torch.tensor(first)) for name in (*sources, HISTORY, *teachers)})
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.randn(settings.widths[-1], width) / width**0.5) for name, width in teachers.items()})

    def temperature(self, name: str) -> Tensor:
        """The learned temperature of a source."""
        return self.log_tau[name].exp().clamp(min=LEAST_TEMPERATURE)


# ---------------------------------------------------------------- losses of a batch


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """B pairs as places in R distinct items.

    Args:
        rows_R: the items. left_B / right_B: places of both sides. hard_BH: places of hard negatives, -1 = none. rival_BB: in-batch negatives. grade_B: grades.
    """

    rows_R: Tensor
    left_B: Tensor
    right_B: Tensor
    hard_BH: Tensor
    rival_BB: Tensor
    grade_B: Tensor


def directed(pairs: PairSet, flip_B: Tensor) -> tuple[Tensor, Tensor]:
    """(items that ask, items that answer), (B,) each; where flipped the right item asks."""
    return torch.where(flip_B, pairs.right_P, pairs.left_P), torch.where(flip_B, pairs.left_P, pairs.right_P)


def pair_batch(asks_B: Tensor, answers_B: Tensor, grade_B: Tensor, keys: Tensor, hard_BH: Tensor, num_items: int) -> PairBatch:
    """The pairs as a batch; a known partner, the query itself and the same target are no negatives.

    Args:
        keys: known pairs (`PairSet.keys`). hard_BH: hard negatives as items, -1 = none.
    """
    rival_BB = ~sail_pairs.contains(keys, asks_B[:, None] * num_items + answers_B[None, :])
    rival_BB &= (asks_B[:, None] != answers_B[None, :]) & (answers_B[:, None] != answers_B[None, :])
    rows_R, place = torch.unique(torch.cat([asks_B, answers_B, hard_BH.clamp(min=0).flatten()]), return_inverse=True)
    left_B, right_B, hard = place.split([len(asks_B), len(asks_B), hard_BH.numel()])
    hard_BH = torch.where(hard_BH >= 0, hard.view(hard_BH.shape), -1)
    return PairBatch(rows_R=rows_R, left_B=left_B, right_B=right_B, hard_BH=hard_BH, rival_BB=rival_BB, grade_B=grade_B)


def pattern_weight(pattern: str, settings: ContentCre) -> float:
    """Weight of a pattern: 1 on fused vectors, `single` within a modality, `cross` across two."""
    query, target = pattern.split("-")
    return settings.cross if query != target else 1.0 if query == "fused" else settings.single


def pair_losses(views: Views, batch: PairBatch, temperature: Tensor, settings: ContentCre) -> dict[str, Tensor]:
    """Loss per pattern that at least two pairs have the vectors for, `cosent`, and `total`, nats.

    Source: SAIL-Embedding (arXiv 2510.12709), dataset-driven pattern matching: all feasible patterns in one pass, the others dropped; within one modality this
    is L_micl, on fused vectors L_nce-mrl and L_lf at once, because here the gate makes the output; differs: L_cosent is divided by the pairs of the batch.
    """
    losses: dict[str, Tensor] = {}
    for pattern in settings.patterns:
        query, target = pattern.split("-")
        if query not in views.vectors or target not in views.vectors:
            continue
        feasible = torch.nonzero(views.shown[query][batch.left_B] & views.shown[target][batch.right_B]).flatten()
        if len(feasible) < 2:
            continue
        hard_BH = batch.hard_BH[feasible]
        shown_BH = (hard_BH >= 0) & views.shown[target][hard_BH.clamp(min=0)]
        sides = views.vectors[query][batch.left_B[feasible]], views.vectors[target][batch.right_B[feasible]]
        rival_BB = batch.rival_BB[feasible][:, feasible]
        losses[pattern] = nested_nce(*sides, rival_BB, views.vectors[target][hard_BH.clamp(min=0)], shown_BH, temperature, settings.widths).mean()
    total = sum((pattern_weight(name, settings) * value for name, value in losses.items()), torch.zeros((), device=temperature.device))
    fused_RW = views.vectors["fused"]
    losses["cosent"] = cosent((fused_RW[batch.left_B] * fused_RW[batch.right_B]).sum(1), batch.grade_B, temperature) / len(batch.left_B)
    return losses | {"total": total + settings.cosent * losses["cosent"]}


def hide(content: Content, share: float, noise_R: Tensor) -> Content:
    """The items with their text hidden where the noise is lowest and their image where it is highest, each for `share`; an item keeps at least one of both."""
    if len(content.shown) < 2 or not share:
        return content
    both_R = content.shown["text"] & content.shown["image"]
    kept = {"text": content.shown["text"] & ~(both_R & (noise_R < share)), "image": content.shown["image"] & ~(both_R & (noise_R >= 1 - share))}
    return replace(content, shown=kept)


# ---------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Everything that is learned from; items are rows of the catalogue, none of them held.

    Args:
        usable_N: the items that may be trained on. train / valid: pair sets by source, of trained and of held items; the sources are weighed against the
            latter, which are what the report measures too. questions: by sampler.
        teachers: name -> ((N, D), shown (N,)).
    """

    usable_N: Tensor
    train: Mapping[str, PairSet]
    valid: Mapping[str, PairSet]
    questions: Mapping[str, Questions] = field(default_factory=dict)
    teachers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def lessons(
    content: Content,
    pairs: Sequence[PairSet],
    history: History | None,
    teachers: Mapping[str, tuple[Tensor, Tensor]],
    held_N: Tensor,
    settings: ContentCre,
    seed: int,
) -> Lessons:
    """What may be learned from: pairs of trained items, questions about trained items, teachers' vectors of trained items.

    Raises: ValueError when no source has two pairs of trained items.
    """
    known_N = torch.stack(list(content.shown.values())).any(0)
    usable_N = known_N & ~held_N
    wanted = [part for part in pairs if part.name in settings.sources]
    chosen = {part.name: sail_pairs.split(part, usable_N, known_N & held_N) for part in wanted}
    train = {name: parts[0] for name, parts in chosen.items() if len(parts[0]) > 1}
    if not train:
        raise ValueError("no source has pairs of trained items")
    shown = {name: (vectors_ND, shown_N & usable_N) for name, (vectors_ND, shown_N) in teachers.items() if int((shown_N & usable_N).sum()) > 1}
    found: dict[str, Questions] = {}
    if history is not None and settings.sequence_steps:
        asked = sail_pairs.questions(
            history, usable_N, length=settings.max_history, most=settings.max_questions, generator=generator_for(seed, "sail questions")
        )
        first = next(name for name in MODALITIES if name in content.vectors)
        spaces = {"content": content.vectors[first] * content.shown[first][:, None]}
        for vectors_ND, mask_N in list(shown.values())[:1]:
            spaces["collaborative"] = vectors_ND * mask_N[:, None]
        peaks: dict[str, Any] = {"quantile": settings.peak_quantile, "least": settings.min_peak, "share": settings.peak_share, "clusters": settings.clusters}
        found = sail_pairs.samplers(asked, spaces, seed=seed, **peaks) if len(asked) else {}
    return Lessons(usable_N=usable_N, train=train, valid={name: parts[1] for name, parts in chosen.items()}, questions=found, teachers=shown)


class Recipe:
    """A run of the recipe on a catalogue; all randomness is a function of (seed, purpose, step), so a resumed run goes on bit for bit.

    Args:
        checkpoint: where the state is kept after each round; None = nowhere. progress: makes the rounds visible.
    """

    def __init__(
        self,
        content: Content,
        given: Lessons,
        settings: ContentCre,
        *,
        seed: int,
        device: str = "cpu",
        checkpoint: Checkpoint | None = None,
        progress: ProgressBar | None = None,
    ) -> None:
        self.given, self.settings, self.seed, self.device = given, settings, seed, device
        self.checkpoint, self.progress = checkpoint, progress
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator_for(seed, "sail").initial_seed()) % (1 << 63))
            self.network = Network({name: value.shape[1] for name, value in content.vectors.items()}, settings)
            self.teaching = Teaching(list(given.train), {name: part[0].shape[1] for name, part in given.teachers.items()}, settings)
        for name, adapter in self.network.adapters.items():
            assert isinstance(adapter, Adapter)
            adapter.begin(content.vectors[name][content.shown[name]])
        with torch.no_grad():
            self.content = self.network.reduce(content).to(device)
        self.network.to(device)
        self.teaching.to(device)
        self.modules = nn.ModuleDict({"network": self.network, "teaching": self.teaching})
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.keys = {name: part.keys(len(content)) for name, part in given.train.items()}
        self.plan = self._plan()
        self.curves: dict[str, list[float]] = {}
        self.start = self._fingerprint() if checkpoint else ""

    def _plan(self) -> list[tuple[str, int, int]]:
        """(phase, first step, end) of every round; phases without lessons are left out."""
        settings = self.settings
        steps = dict.fromkeys(PHASES[:3], settings.steps) | {
            "sequence": settings.sequence_steps if self.given.questions else 0,
            "identity": settings.identity_steps if self.given.teachers else 0,
        }
        if settings.negatives == "off":
            steps["nearest"], steps["hard"] = steps["nearest"] + steps["hard"], 0
        rounds, done = [], 0
        for phase in PHASES:
            stop = done + steps[phase]
            rounds += [(phase, first, min(first + settings.round_steps, stop)) for first in range(done, stop, settings.round_steps)]
            done = stop
        return rounds

    def run(self) -> dict[str, list[float]]:
        """The curves, name -> one value per round; the network is left trained."""
        done = self._restore()
        rounds: Any = range(done, len(self.plan))
        for number in self.progress(rounds, "train content encoder", len(rounds)) if self.progress else rounds:
            self._round(number)
            self._save(number + 1)
        self.network.eval()
        return self.curves

    # ---- a round

    def _round(self, number: int) -> None:
        """The steps of one round with the weights and hard negatives of its beginning."""
        phase, first, stop = self.plan[number]
        views = self._views()
        weights_S = self._weights(phase, views, number)
        hard, noted = self._mined(phase, views, number)
        sums: dict[str, float] = {}
        for step in range(first, stop):
            for name, value in self._step(phase, weights_S, hard, step).items():
                sums[name] = sums.get(name, 0.0) + value / (stop - first)
        noted |= {f"weight/{name}": float(value) for name, value in zip(self.given.train, weights_S, strict=True)}
        for name, value in {**{f"loss/{name}": value for name, value in sums.items()}, **noted}.items():
            self.curves.setdefault(f"{phase}/{name}", []).append(value)

    @torch.no_grad()
    def _views(self) -> Tensor:
        """Fused vectors of the whole catalogue (N, W)."""
        return torch.cat([self.network.adapt(self.content.take(rows)).vectors["fused"] for rows in torch.arange(len(self.content)).split(ENCODE_ROWS)])

    def _weights(self, phase: str, fused_NW: Tensor, number: int) -> Tensor:
        """Weight of each source (S,): adaptive or equal; only the nearer half in the two phases after the first, only content in both distillations.

        differs: the paper weighs once by an early checkpoint, here every round weighs by the network as it stands.
        """
        train, valid = list(self.given.train.values()), self._targets()
        weights_S = torch.full((len(train),), 1.0 / len(train), dtype=torch.float64)
        if self.settings.weights == "adaptive" and valid:
            made = {"size": self.settings.clusters, "sample": self.settings.sample}
            parts = [
                [sail_pairs.centroids(fused_NW, part, generator=generator_for(self.seed, "weights", side, number, part.name), **made) for part in group]
                for side, group in (("train", train), ("valid", valid))
            ]
            weights_S = sail_pairs.source_weights(*parts, temperature=self.settings.weight_temperature)
        kept_S = torch.ones_like(weights_S, dtype=torch.bool)
        if phase in ("nearest", "hard"):
            kept_S = weights_S >= weights_S.sort(descending=True).values[(len(train) - 1) // 2]  # equal weights stay together
        elif phase in ("sequence", "identity") and not all(part.collaborative for part in train):
            kept_S = torch.tensor([not part.collaborative for part in train])
        return weights_S * kept_S / (weights_S * kept_S).sum()

    def _targets(self) -> list[PairSet]:
        """Held-out pair sets that the sources are weighed against."""
        wanted = self.settings.target == "collaborative"
        return [part for part in self.given.valid.values() if part.collaborative == wanted and len(part) > 1]

    def _mined(self, phase: str, fused_NW: Tensor, number: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(hard negatives by source, thresholds to note); nothing before the phase that uses them."""
        if phase != "hard":
            return {}, {}
        fixed = self.settings.fixed_threshold if self.settings.negatives == "fixed" else None
        hard, noted = {}, {}
        for name, part in self.given.train.items():
            generator = generator_for(self.seed, "hard", name, number)
            size = {"most": self.settings.num_hard, "sample": self.settings.sample}
            mined = sail_pairs.mine(fused_NW, self.given.usable_N, part, **size, fixed=fixed, generator=generator)
            hard[name], noted[f"threshold/{name}"] = mined[0].cpu(), mined[1]
        return hard, noted

    # ---- a step

    def _step(self, phase: str, weights_S: Tensor, hard: Mapping[str, Tensor], step: int) -> dict[str, float]:
        generator = generator_for(self.seed, "sail step", step)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.settings, step / self.plan[-1][2])
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._pairs(weights_S, hard, generator)
        if phase in ("sequence", "identity"):
            kept = self.settings.keep * losses["total"]
            main = self._sequence(generator) if phase == "sequence" else self._identity(generator)
            losses = {phase: main, "kept": losses["total"], "total": main + kept}
        losses["total"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _look(self, rows_R: Tensor, generator: torch.Generator) -> Views:
        """Views of some items, some of their modalities hidden."""
        noise_R = torch.rand(len(rows_R), generator=generator).to(self.device)
        return self.network.adapt(hide(self.content.take(rows_R.to(self.device)), self.settings.hidden_share, noise_R))

    def _pairs(self, weights_S: Tensor, hard: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of one batch of pairs: of one source, or (ablation) a part of every source side by side."""
        names, asks, answers, grades, mined = self._drawn(weights_S, generator), [], [], [], []
        for name, size in names:
            part = self.given.train[name].take(torch.randint(len(self.given.train[name]), (size,), generator=generator))
            left_B, right_B = directed(part, torch.rand(size, generator=generator) < 0.5)
            mined.append(hard[name][left_B] if hard else torch.full((size, 0), -1))
            asks.append(left_B)
            answers.append(right_B)
            grades.append(part.grade_P)
        keys = torch.cat([self.keys[name] for name, _ in names])
        keys = keys if len(names) == 1 else keys.unique()
        batch = pair_batch(torch.cat(asks), torch.cat(answers), torch.cat(grades), keys, torch.cat(mined), len(self.content))
        views = self._look(batch.rows_R, generator)
        moved = PairBatch(**{name: value.to(self.device) for name, value in vars(batch).items()})
        return pair_losses(views, moved, self.teaching.temperature(names[0][0]), self.settings)

    def _drawn(self, weights_S: Tensor, generator: torch.Generator) -> list[tuple[str, int]]:
        """(source, pairs of it) of a batch."""
        names, size = list(self.given.train), self.settings.batch_size
        if self.settings.specialised:
            return [(names[sail_pairs.draw_source(weights_S, float(torch.rand((), generator=generator)))], size)]
        sizes = (weights_S * size).round().long().tolist()
        return [(name, part) for name, part in zip(names, sizes, strict=True) if part > 1]

    def _sequence(self, generator: torch.Generator) -> Tensor:
        """Mean sequence-to-item loss of questions of one sampler, scalar."""
        names = list(self.given.questions)
        asked = self.given.questions[names[int(torch.randint(len(names), (), generator=generator))]]
        asked = asked.take(torch.randint(len(asked), (self.settings.batch_size,), generator=generator))
        rows_R, place = torch.unique(torch.cat([asked.rows_QT.flatten(), asked.target_Q]), return_inverse=True)
        fused_RW = self._look(rows_R, generator).vectors["fused"]
        history, target_B = place.to(self.device).split([asked.rows_QT.numel(), len(asked)])
        query_BW = mean_vector(fused_RW[history.view(asked.rows_QT.shape)], asked.shown_QT.to(self.device))
        rival_BB = (asked.target_Q[:, None] != asked.target_Q[None, :]) & ~((asked.rows_QT[:, :, None] == asked.target_Q) & asked.shown_QT[:, :, None]).any(1)
        none = fused_RW.new_zeros(len(asked), 0, fused_RW.shape[1]), torch.zeros(len(asked), 0, dtype=torch.bool, device=self.device)
        temperature = self.teaching.temperature(HISTORY)
        return nested_nce(query_BW, fused_RW[target_B], rival_BB.to(self.device), *none, temperature, self.settings.widths).mean()

    def _identity(self, generator: torch.Generator) -> Tensor:
        """Mean ID-to-item loss of a batch of items over the teachers, scalar; text and image vectors are taught beside the fused one."""
        losses = []
        for name, (teacher_ND, shown_N) in self.given.teachers.items():
            known = torch.nonzero(shown_N).flatten()
            rows_B = known[torch.randperm(len(known), generator=generator)[: self.settings.batch_size]]
            views, teacher_BD = self._look(rows_B, generator), teacher_ND[rows_B].to(self.device)
            rival_BB = ~torch.eye(len(rows_B), dtype=torch.bool, device=self.device)
            for side, vectors_BW in views.vectors.items():
                at = torch.nonzero(views.shown[side]).flatten()
                taught = identity_nce(
                    vectors_BW[at], self.teaching.maps[name], teacher_BD[at], rival_BB[at][:, at], self.teaching.temperature(name), self.settings.widths
                )
                losses.append((1.0 if side == "fused" else self.settings.single) * taught.sum() / max(len(at), 1))
        return torch.stack(losses).sum() / len(self.given.teachers)

    # ---- checkpoint

    def _fingerprint(self) -> str:
        """Digest of what the run starts from; a checkpoint of another start is not resumed."""
        digest = hashlib.sha256(f"{self.seed} {self.settings.model_dump_json()}".encode())
        pairs = [getattr(part, name) for part in self.given.train.values() for name in ("left_P", "right_P", "grade_P")]
        asked = [getattr(part, name) for part in self.given.questions.values() for name in ("rows_QT", "shown_QT", "target_Q")]
        taught = [tensor for part in self.given.teachers.values() for tensor in part]
        for tensor in (*self.content.vectors.values(), *self.content.shown.values(), *pairs, *asked, *taught):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _save(self, done: int) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for name, parameter in self.modules.named_parameters():
            tensors |= {f"optimizer.{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        self.checkpoint.save(kept, {"start": self.start, "done": done, "curves": self.curves})

    def _restore(self) -> int:
        """Rounds that a checkpoint of the same start has done already."""
        found = self.checkpoint.load() if self.checkpoint else None
        if found is None or found[1]["start"] != self.start:
            return 0
        tensors, document = found
        self.modules.load_state_dict({name.removeprefix("modules."): value for name, value in tensors.items() if name.startswith("modules.")})
        for name, parameter in self.modules.named_parameters():
            prefix = f"optimizer.{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {key: value if key == "step" else value.to(self.device) for key, value in state.items()}
        self.curves = {name: list(values) for name, values in document["curves"].items()}
        logger.info("resumed content encoder round=%d", document["done"])
        return int(document["done"])


# ---------------------------------------------------------------- the encoder


class Sail:
    """The trained adapters: base vectors in, vectors of the chosen width out; an item's vector depends on that item alone.

    Args:
        settings: the [content_cre] section. base_widths: modality -> width of its base vectors.
    """

    def __init__(self, settings: ContentCre, base_widths: Mapping[str, int]) -> None:
        self.settings, self.base_widths = settings, dict(base_widths)
        self.network = Network(base_widths, settings).eval()

    @torch.no_grad()
    def encode(self, content: Content, width: int | None = None) -> Views:
        """Text, image and fused vectors of unit length, (N, width) float32 on the CPU, zeros where not shown; the delivered width by default.

        Encoded in blocks of exactly `ENCODE_ROWS` rows, the last one filled up, because a matrix product may round differently at another height.
        Raises: ValueError for vectors of another width than it was trained on, or without items.
        """
        known = {name: content.vectors[name].shape[1] for name in self.base_widths if name in content.vectors}
        if known != self.base_widths or not len(content):
            raise ValueError(f"the content encoder was trained on vectors of widths {self.base_widths}, these are {known} of {len(content)} items")
        width = width or self.settings.delivered
        device = next(self.network.parameters()).device
        parts = []
        for start in range(0, len(content), ENCODE_ROWS):
            rows = torch.arange(start, start + ENCODE_ROWS).clamp(max=len(content) - 1)
            parts.append(self.network(content.take(rows).to(device)))
        shown = {side: torch.cat([part.shown[side] for part in parts])[: len(content)].cpu() for side in parts[0].shown}
        joined = {side: torch.cat([part.vectors[side] for part in parts])[: len(content), :width].cpu() for side in shown}
        return Views(vectors={side: F.normalize(value, dim=1) * shown[side][:, None] for side, value in joined.items()}, shown=shown)

    def identify(self) -> str:
        """The encoder's id: what it is, a digest of its weights, the width; as stable as they are."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return f"cre-{digest.hexdigest()[:12]}-w{self.settings.delivered}-l2"

    def state(self) -> dict[str, Tensor]:
        """Everything learned, as contiguous CPU tensors."""
        return {name: value.detach().cpu().clone().contiguous() for name, value in self.network.state_dict().items()}

    def config(self) -> dict[str, Any]:
        """Everything chosen, JSON."""
        return {"kind": "content_encoder", "encoder_id": self.identify(), "settings": self.settings.model_dump(mode="json"), "base_widths": self.base_widths}

    @classmethod
    def load(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Sail:
        """The encoder that gave `config` and `state`.

        Raises: RuntimeError if tensors and config do not belong together.
        """
        encoder = cls(ContentCre.model_validate(config["settings"]), {name: int(width) for name, width in config["base_widths"].items()})
        encoder.network.load_state_dict(dict(state), strict=True)
        return encoder

    @classmethod
    def fit(
        cls,
        content: Content,
        given: Lessons,
        settings: ContentCre,
        *,
        seed: int,
        device: str = "cpu",
        checkpoint: Checkpoint | None = None,
        progress: ProgressBar | None = None,
    ) -> tuple[Sail, dict[str, list[float]]]:
        """(the encoder on the CPU after the whole recipe, its curves); the same arguments give the same encoder."""
        recipe = Recipe(content, given, settings, seed=seed, device=device, checkpoint=checkpoint, progress=progress)
        curves = recipe.run()
        encoder = cls(settings, {name: value.shape[1] for name, value in content.vectors.items()})
        encoder.network.load_state_dict({name: value.cpu() for name, value in recipe.network.state_dict().items()})
        return encoder, curves
