"""ADA-SID / ADC-SID (arXiv 2510.25622): parallel shared and modality experts, one code book each, and a router for behaviour codes.

The order is the paper's: projections (eq. 2), experts (3-4, 6), lookup (5, 7-9), fusion (10-13), reconstruction (14), alignment (17-21), router (22-23).
Not here: the terms themselves (quantize.py, alignment.py, router.py), the training loop (fit.py), richness and strength (pipeline/richness.py).
Suffixes: B batch, N items, D width, L positions, E experts of one input, K codes.
"""

# ruff: noqa: N802, N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers import histories, metrics, parallel
from pipeline.tokenizers.alignment import alignment_v2, alignment_v3, controlled_strength, view
from pipeline.tokenizers.base import (
    MODALITIES,
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    Networked,
    TokenizerOutput,
    aligned,
    encode_in_chunks,
    masked_codes,
)
from pipeline.tokenizers.fit import Trainer, generator_for
from pipeline.tokenizers.prior import CONTENT, BehaviorPrior
from pipeline.tokenizers.quantize import deal_axes, gather_codes, held_codes, nearest_code, principal_axes, straight_through
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.router import SparsityController, behavior_router, router_feature
from pipeline.tokenizers.tuning import tune
from pipeline.tokenizers.world import World

AXES_ROWS = 262_144  # items that axes, scales and prior are fitted on at most
WEIGHT_MAX = 2.0  # largest exported router weight, in units of the generation's mean active weight


def softmax_gate(logit_BE: Tensor) -> Tensor:
    """Weights of a content modality's experts per item, (B, E), positive, summing to 1.

    Source: ADC-SID eq. (12), (13)
    """
    return torch.softmax(logit_BE, dim=-1)


def fuse(vector_BLD: Tensor, gate_BL: Tensor) -> Tensor:
    """The gated sum over positions, (B, D): gate 1 for shared, softmax for content, R for behaviour, 0 for masked positions.

    Source: ADC-SID eq. (10), (11); differs: a masked position adds nothing, and what is summed has norm `latent_scale`, free in the paper.
    """
    return (gate_BL[..., None] * vector_BLD).sum(1)


def reconstruction_error(target_BD: Tensor, estimate_BD: Tensor) -> Tensor:
    """Mean squared error of one modality per item, (B,).

    Source: ADC-SID eq. (14); differs: mean over the width, so that the widest modality does not rule the sum, and only modalities the item has.
    """
    return (target_BD - estimate_BD).square().mean(1)


def export_weight(weight_BE: Tensor, mean_active: Tensor) -> Tensor:
    """Router weights as released, (B, E) in [0, 2]: R over the generation's mean active R, clamped, 0 where the expert is off.

    Source: ADC-SID, router, "importance weights"; differs: scaled and clamped, the paper prints no range.
    """
    return (weight_BE / mean_active).clamp(0.0, WEIGHT_MAX)


class Mlp(nn.Sequential):
    """A two-layer perceptron, (B, D_in) -> (B, D_out)."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in + -width_in % 4, hidden), nn.ReLU(), nn.Linear(hidden, width_out))

    def forward(self, x_BD: Tensor) -> Tensor:
        """The output, for `width_in` columns."""
        made: Tensor = super().forward(aligned(x_BD))
        return made


class ExpertBank(nn.Module):
    """E experts that read the same input, each a linear map plus a two-layer perceptron: (B, D_in) -> (B, E, D).

    Source: ADC-SID eq. (4), (6); differs: (6) prints the text expert for behaviour, read here as the behaviour expert; the linear map lets experts of
    one modality start on different axes of it (`start_on`), without it their code books say much the same.
    """

    def __init__(self, experts: int, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.experts = experts
        self.first = nn.Linear(width_in, experts * hidden)
        self.direct_EDD = nn.Parameter(torch.zeros(experts, width_in, width_out))
        self.second_EHD = nn.Parameter(torch.empty(experts, hidden, width_out).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.second_ED = nn.Parameter(torch.zeros(experts, width_out))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Latents of the experts, before they are put on the sphere."""
        hidden_EBH = torch.relu(self.first(x_BD)).unflatten(1, (self.experts, -1)).transpose(0, 1)
        latents_EBD = torch.bmm(hidden_EBH, self.second_EHD) + torch.matmul(x_BD, self.direct_EDD)
        return latents_EBD.transpose(0, 1) + self.second_ED

    @torch.no_grad()
    def start_on(self, points_ND: Tensor, *, whole: bool = False) -> None:
        """Begin as a linear read-out of the inputs' principal axes, randomly turned into the latent space: each expert of its own part of them, or of all."""
        mean_D, axes_DD = principal_axes(points_ND, points_ND.shape[1])
        variance_D = ((points_ND.cpu() - mean_D) @ axes_DD).var(0, correction=0)
        width = self.direct_EDD.shape[2]
        parts = [list(range(len(variance_D)))] * self.experts if whole else deal_axes(variance_D, self.experts)
        for direct_DD, part in zip(self.direct_EDD, parts, strict=True):
            turn_DD = torch.linalg.qr(torch.randn(width, width)).Q[: len(part)]
            direct_DD.copy_(axes_DD[:, part[:width]] @ turn_DD)
        self.second_EHD.mul_(0.1)


class Decoder(nn.Module):
    """The reconstruction of all modalities from the fused vector: a linear map plus a two-layer perceptron, (B, D) -> (B, sum of widths)."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.direct = nn.Linear(width_in, width_out, bias=False)
        self.bent = Mlp(width_in, hidden, width_out)

    def forward(self, fused_BD: Tensor) -> Tensor:
        """Estimates of the modalities side by side."""
        estimate: Tensor = self.direct(fused_BD) + self.bent(fused_BD)
        return estimate


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of items through the network.

    Args:
        h: projections by modality, (B, d_h).
        z_BLD / zq_BLD: latents and their code rows, norm `latent_scale`.
        codes_BL: nearest codes, before masking.
        gate_BL: weights in the fused sum, 0 where masked; shown_BL: positions the item has.
        router_BE: R of eq. (22), masked rows 0; logit_BE: what it was made of.
        quantized_BD: fused code rows, eq. (11).
        estimate: reconstruction by modality.
    """

    h: dict[str, Tensor]
    z_BLD: Tensor
    zq_BLD: Tensor
    codes_BL: Tensor
    gate_BL: Tensor
    shown_BL: Tensor
    router_BE: Tensor
    logit_BE: Tensor
    quantized_BD: Tensor
    estimate: dict[str, Tensor]

    @property
    def read_BL(self) -> Tensor:
        """How much a reader sees of each position: all of one the item shows, R of a behaviour position, nothing of a masked one."""
        positions = self.shown_BL.shape[1] - self.router_BE.shape[1]
        return torch.cat([self.shown_BL[:, :positions].to(self.router_BE.dtype), self.router_BE], 1)


class Network(nn.Module):
    """The modules of ADA-SID for the modalities a data set has.

    Args:
        settings: the [train_tokenizer.ada_sid] section.
        raw_widths: modality -> width of its vectors as they come; modalities not named are absent, with their experts and positions.

    Source: ADC-SID eq. (2), (3), (6), (12)-(14), what the modules read and the decoder gives back; differs: text and image are centred, turned to their
    principal axes and cut (`text_dim`, `image_dim`), every modality is brought to one scale, and a learned vector stands in where an item lacks one; the
    paper reads raw vectors that all items have. The error of text and image that a fit reports is that of the cut vectors.
    """

    codebook_LKD: nn.Parameter
    mean_active: Tensor
    usage_LK: Tensor

    def __init__(self, settings: profile.AdaSid, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.raw_widths = {name: int(raw_widths[name]) for name in MODALITIES if name in raw_widths}
        self.modalities = tuple(self.raw_widths)
        reduced = {"text": settings.text_dim, "image": settings.image_dim}
        self.widths = {name: min(raw_widths[name], reduced.get(name, raw_widths[name])) for name in self.modalities}
        self.experts = _experts(settings, self.modalities)
        if not sum(self.experts.values()):
            raise ValueError("ADA-SID has no expert: no modality is present or all expert counts are 0")
        hidden, latent = settings.hidden_dim, settings.latent_dim
        for name in self.modalities:
            self.register_buffer(f"mean_{name}", torch.zeros(raw_widths[name]))
            self.register_buffer(f"axes_{name}", torch.eye(raw_widths[name])[:, : self.widths[name]].contiguous())
            self.register_buffer(f"scale_{name}", torch.ones(()))
        known = settings.behavior_prior != "none" and "behavior" in self.widths and any(name in self.widths for name in CONTENT)
        self.prior = BehaviorPrior(self.widths) if known else None
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name, width in self.widths.items()})
        self.project = nn.ModuleDict({name: Mlp(width, hidden, settings.projection_dim) for name, width in self.widths.items()})
        inputs = {"shared": settings.projection_dim * len(self.modalities), **self.widths}
        self.expert = nn.ModuleDict({name: ExpertBank(count, inputs[name], hidden, latent) for name, count in self.experts.items() if count})
        self.gate = nn.ModuleDict(
            {name: Mlp(inputs[name] + (name == "behavior"), max(1, hidden // 4), count) for name, count in self.experts.items() if count and name != "shared"}
        )
        self.decoder = Decoder(latent, hidden, sum(self.widths.values()))
        if "behavior" in self.gate:
            nn.init.ones_(list(self.gate["behavior"].parameters())[-1])  # open at first: an expert that is off for everybody gets no gradient and stays off
        self.controller = SparsityController(
            settings.sparsity if settings.router == "adaptive" else "off",
            settings.sparsity_buckets,
            self.experts.get("behavior", 0),
            theta=1.0 - settings.active_share,
            lambda_init=settings.lambda_init,
            lambda_step=settings.lambda_step,
            lambda_max=settings.lambda_max,
        )
        positions = sum(self.experts.values())
        self.codebook_LKD = nn.Parameter(F.normalize(torch.randn(positions, settings.codebook_size, latent), dim=-1))
        self.register_buffer("usage_LK", torch.zeros(positions, settings.codebook_size))
        self.register_buffer("mean_active", torch.ones(()))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the positions, e.g. shared_0, text_0, image_0, behavior_0."""
        return tuple(f"{name}_{index}" for name, count in self.experts.items() for index in range(count))

    @property
    def code_rows(self) -> Tensor:
        """Code rows on the sphere of radius `latent_scale`."""
        return self._on_sphere(self.codebook_LKD)

    def _on_sphere(self, vector: Tensor) -> Tensor:
        """The vector with norm `latent_scale`.

        Source: ADC-SID eq. (10), (11), latents and code rows; differs: their norm is `latent_scale`; the paper's is free, and free lengths drifted apart under
        a cosine lookup.
        """
        return self.settings.latent_scale * F.normalize(vector.float(), dim=-1)

    @torch.no_grad()
    def fit_inputs(self, items: ItemBatch) -> None:
        """Freeze the inputs' axes and one scale per modality, chosen so that an input's mean variance is 1, and what content says of behaviour; start the
        experts there; cut the richness buckets.

        Content is centred and turned to its principal axes; behaviour is neither, because its norm carries meaning.
        """
        samples = {name: _sample(items, name) for name in self.modalities}
        for name, sample in samples.items():
            sample_ND = sample.known(name)
            if name != "behavior":
                mean_D, axes_DW = principal_axes(sample_ND, self.widths[name])
                self.get_buffer(f"mean_{name}").copy_(mean_D)
                self.get_buffer(f"axes_{name}").copy_(axes_DW)
            spread = self._input(sample_ND.float(), name).double().var(0, correction=0).mean()
            self.get_buffer(f"scale_{name}").copy_(torch.where(spread > 1e-12, spread, 1.0).rsqrt().float())  # vectors that are all alike stay as they are
        if self.prior is not None:
            self.prior.fit(self._turned(samples["behavior"]))
        for name, bank in self.expert.items():
            if name != "shared" and isinstance(bank, ExpertBank):
                bank.start_on(self.prepare(samples[name]).known(name), whole=self.settings.expert_start == "whole")
        self.controller.fit_buckets(items.richness_N[items.behavior_N].cpu())

    def _input(self, vectors_ND: Tensor, name: str) -> Tensor:
        if vectors_ND.shape[1] != (known := len(self.get_buffer(f"mean_{name}"))):
            raise ValueError(f"{name} vectors are {vectors_ND.shape[1]} wide, the tokenizer was fitted on {known}")
        centred_ND, axes_DW = vectors_ND - self.get_buffer(f"mean_{name}"), self.get_buffer(f"axes_{name}")
        return aligned(centred_ND) @ aligned(axes_DW.T).T * self.get_buffer(f"scale_{name}")

    @torch.no_grad()
    def prepare(self, items: ItemBatch) -> ItemBatch:
        """The items as the network reads them: a modality that it does not know is dropped, one that the items lack is masked; with a prior, what
        content says of behaviour takes the place of absent or poor behaviour.

        Raises: ValueError for vectors of another width than the tokenizer was fitted on.
        """
        turned = self._turned(items)
        return turned if self.prior is None else self.prior.apply_to(turned, shrink=self.settings.behavior_prior == "poor")

    def _turned(self, items: ItemBatch) -> ItemBatch:
        """The items with their vectors in the network's axes and scales, 0 where masked."""
        changed: dict[str, Tensor | None] = {}
        nobody = torch.zeros_like(items.text_N)
        for name in MODALITIES:
            vectors, known = items.vectors(name), name in self.modalities
            changed[f"{name}_N"] = items.mask(name) if known and vectors is not None else nobody
            if not known:
                changed[f"{name}_ND"] = None
            elif vectors is None:
                changed[f"{name}_ND"] = torch.zeros(len(items), self.widths[name], device=nobody.device)
            else:
                changed[f"{name}_ND"] = torch.where(items.mask(name)[:, None], self._input(vectors.float(), name), 0.0)
        return items.changed(changed)

    def forward(self, batch: ItemBatch, *, quantise: bool) -> Pass:
        """One pass; without `quantise` latents stand where their code rows would (the warm-up)."""
        x = {name: torch.where(batch.mask(name)[:, None], batch.known(name), self.missing[name]) for name in self.modalities}
        h = {name: self.project[name](x[name]) for name in self.modalities}
        inputs = {"shared": torch.cat(list(h.values()), 1), **x}
        z_BLD = self._on_sphere(torch.cat([bank(inputs[name]) for name, bank in self.expert.items()], 1))
        shown_BL, gate_BL, router_BE, logit_BE = self._gates(batch, x)
        with torch.autocast(z_BLD.device.type, enabled=False):
            codes_BL = nearest_code(z_BLD.detach(), self.codebook_LKD.detach())
            zq_BLD = gather_codes(codes_BL, self.code_rows)
            through_BLD = straight_through(z_BLD, zq_BLD, code_gradient=self.settings.code_gradient) if quantise else z_BLD
            fused_BD = fuse(through_BLD, gate_BL)
        estimates = self.decoder(fused_BD).split(list(self.widths.values()), 1)
        return Pass(
            h=h,
            z_BLD=z_BLD,
            zq_BLD=zq_BLD,
            codes_BL=codes_BL,
            gate_BL=gate_BL,
            shown_BL=shown_BL,
            router_BE=router_BE,
            logit_BE=logit_BE,
            quantized_BD=fused_BD,
            estimate=dict(zip(self.widths, (part.float() for part in estimates), strict=True)),
        )

    def _gates(self, batch: ItemBatch, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions shown, gate per position, R and its logits."""
        anything_B = torch.stack([batch.mask(name) for name in self.modalities]).any(0)
        shown, gates = [], []
        router_BE = logit_BE = torch.zeros(len(batch), 0, device=anything_B.device)
        for name, count in self.experts.items():
            mask_B1 = (anything_B if name == "shared" else batch.mask(name))[:, None]
            gate_BE = torch.ones(len(batch), count, device=mask_B1.device)
            if name in ("text", "image") and count:
                gate_BE = softmax_gate(self.gate[name](x[name]).float())
            elif name == "behavior" and count:
                if self.settings.router == "adaptive":
                    logit_BE = self.gate[name](torch.cat([x[name], router_feature(batch.richness_N)], 1)).float()
                    gate_BE = behavior_router(logit_BE, batch.richness_N)
                router_BE = gate_BE * mask_B1
            shown.append(mask_B1.expand(-1, count))
            gates.append(gate_BE * mask_B1)
        return torch.cat(shown, 1), torch.cat(gates, 1), router_BE, logit_BE


def _sample(items: ItemBatch, name: str) -> ItemBatch:
    """At most `AXES_ROWS` of the items that have the modality, evenly spread, on the CPU."""
    rows = torch.nonzero(items.mask(name)).flatten()
    return items.take(rows[:: max(1, -(-len(rows) // AXES_ROWS))]).to(torch.device("cpu"))


def _experts(settings: profile.AdaSid, modalities: tuple[str, ...]) -> dict[str, int]:
    """Number of experts by input, in the order of the positions; absent modalities have none."""
    counts = {"text": settings.num_text, "image": settings.num_image, "behavior": settings.num_behavior}
    return {"shared": settings.num_shared if modalities else 0, **{name: counts[name] for name in modalities}}


class Training(parallel.CodeBooks):
    """ADA-SID as the training loop wants it (`fit.Trainable`).

    Source: ADC-SID section 3, the sum of its losses; differs: the paper prints neither the sum nor its weights; a share of the items hides a modality from
    the network in every step (`behavior_dropout`, `content_dropout`) and is reconstructed whole; with `behavior_prior = "poor"` behaviour is
    reconstructed as N e_b + (1 - N) times what content says of it.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.settings = network.settings
        self.warmup_epochs = network.settings.warmup_epochs
        self.codebook_names = ("codebook_LKD",)
        self.recordable = True

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Reconstruction, codebook, commitment, alignment and gate terms, and their weighted `total`."""
        shown = self._hide(batch, noise_BU)
        made = self.network(shown, quantise=quantise)
        coded = parallel.code_terms(made, self.network.usage_LK, square=self.settings.latent_scale**2, world=world)
        terms = {"reconstruction": self._reconstruction(batch, made, world), **coded}
        total = terms["reconstruction"]
        if quantise:
            total = total + self.settings.codebook_weight * terms["codebook"] + self.settings.commitment * terms["commitment"]
        align = self._alignment(shown, made, world)
        if align and self.settings.align_weight:
            total = total + self.settings.align_weight * torch.stack(list(align.values())).sum()
        if made.router_BE.shape[1]:
            terms["gate"] = self.network.controller.penalty(made.router_BE, made.logit_BE, shown.richness_N, shown.behavior_N, world)
            total = total + terms["gate"]
        return {**terms, **align, "total": total}

    def kept(self, batch: ItemBatch, noise_BU: Tensor, world: World) -> tuple[dict[str, Tensor], Tensor]:
        """The training's own terms while histories tune, and their weighted sum; the first noise columns are the questions'."""
        terms = self.losses(batch, noise_BU.flip(1), quantise=True, world=world)
        return terms, self.settings.tune_keep * terms["total"]

    def _hide(self, batch: ItemBatch, noise_BU: Tensor) -> ItemBatch:
        """The batch with some modalities of some items hidden (modality dropout); an item that would lose all of them loses none."""
        share = {"text": self.settings.content_dropout, "image": self.settings.content_dropout, "behavior": self.settings.behavior_dropout}
        kept = {name: batch.mask(name) & (noise_BU[:, index] >= share[name]) for index, name in enumerate(MODALITIES)}
        empty_B = ~torch.stack(list(kept.values())).any(0)
        return replace(batch, **{f"{name}_N": mask_B | (empty_B & batch.mask(name)) for name, mask_B in kept.items()})

    def _reconstruction(self, batch: ItemBatch, made: Pass, world: World) -> Tensor:
        """Mean over modalities of the mean error over the items that have the modality, hidden in this step or not."""
        errors = []
        for name in self.network.modalities:
            target_BD = batch.vectors(name)
            assert target_BD is not None
            errors.append(world.mean(reconstruction_error(target_BD, made.estimate[name]), batch.mask(name)))
        return torch.stack(errors).mean()

    def _alignment(self, shown: ItemBatch, made: Pass, world: World) -> dict[str, Tensor]:
        h = dict(made.h)
        if self.settings.detach_behavior and "behavior" in h:
            h["behavior"] = h["behavior"].detach()
        views = {name: view(value, shown.mask(name), world) for name, value in h.items()}
        align = alignment_v3 if self.settings.form == "v3" else alignment_v2
        return align(views, shown.strength_N, temperature=self.settings.temperature, world=world)

    def after_step(self) -> None:
        """Advance the sparsity controller."""
        self.network.controller.advance()

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Code use, NMSE per modality, router and strength by richness bucket; `score` = mean NMSE + mean distance to the sparsity targets."""
        mode = self.network.training
        self.network.eval()
        codes_NL, router_NE, estimate = self._read(items, quantise=quantise)
        self.network.train(mode)
        found = metrics.code_use(codes_NL, [self.settings.codebook_size] * codes_NL.shape[1], self.network.slots)
        for name, estimate_ND in estimate.items():
            found[f"nmse/{name}"] = metrics.nmse(items.known(name), estimate_ND, items.mask(name))
        router = self.by_bucket(items, router_NE)
        gaps = [abs(value - router[name.replace("share", "target")]) for name, value in router.items() if name.startswith("active_share/")]
        measured = [value for name, value in found.items() if name.startswith("nmse/") and value == value]
        found["score"] = sum(measured) / max(1, len(measured)) + sum(gaps) / max(1, len(gaps))
        return {**found, **router}

    def _read(self, items: ItemBatch, *, quantise: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Masked codes, R and reconstructions of the items, where the items are; latents and code rows are dropped block by block."""
        network, codes, router, estimates = self.network, [], [], []
        for block in parallel.blocks(items):
            made: Pass = network(block.to(network.codebook_LKD.device), quantise=quantise)
            codes.append(masked_codes(made.codes_BL, made.shown_BL, self.settings.codebook_size).to(items.device))
            router.append(made.router_BE.to(items.device))
            estimates.append({name: part.to(items.device) for name, part in made.estimate.items()})
        return torch.cat(codes), torch.cat(router), {name: torch.cat([part[name] for part in estimates]) for name in network.modalities}

    def by_bucket(self, items: ItemBatch, router_NE: Tensor) -> dict[str, float]:
        """Active share of behaviour experts, its target, mean R, mean w and lambda per richness bucket, for buckets with items."""
        controller = self.network.controller
        if not router_NE.shape[1] or controller.kind == "off":
            return {}
        bucket_N = controller.bucket(items.richness_N.to(controller.edge_Q.device)).to(items.device)
        seen_N = items.behavior_N
        found = {}
        for bucket in torch.unique(bucket_N[seen_N]).tolist():
            rows = (bucket_N == bucket) & seen_N
            found[f"active_share/bucket_{bucket}"] = float((router_NE[rows] > 0).double().mean())
            found[f"active_target/bucket_{bucket}"] = 1.0 - float(controller.target_Q[bucket])
            found[f"router_weight/bucket_{bucket}"] = float(router_NE[rows].mean())
            found[f"strength/bucket_{bucket}"] = float(items.strength_N[rows].mean())
            found[f"lambda/bucket_{bucket}"] = float(controller.log_lambda_Q[bucket].exp())
        return found


def held(made: Pass, network: Network, keep: Keep) -> Pass:
    """The pass with codes that hold on to the kept ones, and the fused vector of those codes."""
    codes_BL = held_codes(made.z_BLD, network.codebook_LKD, keep.codes_NL.to(made.codes_BL.device), keep.margin)
    zq_BLD = gather_codes(codes_BL, network.code_rows)
    return replace(made, codes_BL=codes_BL, zq_BLD=zq_BLD, quantized_BD=fuse(zq_BLD, made.gate_BL))


class AdaSid(Networked[profile.AdaSid, Network]):
    """The ADA-SID tokenizer (`base.Tokenizer`).

    Args:
        settings: the [train_tokenizer.ada_sid] section.
    """

    name = "ada_sid"
    section = profile.AdaSid
    build = Network

    @property
    def needs_history(self) -> bool:
        """Only tuning reads histories."""
        return self.settings.tune_epochs > 0

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Train on a catalogue; curves per epoch and metrics of the final tokenizer on that catalogue.

        With `start` the network, the axes of its inputs and its richness buckets begin as the champion's; with `tune_epochs` users' histories have the last
        word (curves `tune/...`).
        Raises: ValueError if no modality is present; ContractError if the champion reads other vectors or has other sizes, or tuning lacks histories.
        """
        events = histories.events(options.history, len(items), who="ADA-SID's tuning") if self.needs_history else None
        items = items.settle(best_device())
        network = begin(self, lambda network: network.fit_inputs(items), options, items.widths())
        prepared = network.to(items.device).prepare(items).settle(best_device())
        known_N = items.behavior_N.to(prepared.device)
        strength_N = controlled_strength(prepared.strength_N, known_N, self.settings.strength, generator=generator_for(options.seed, "strength"))
        prepared = replace(prepared, strength_N=strength_N)
        network.to(best_device())
        training = Training(network)
        if events is None:
            curves = Trainer(training, prepared, options).run()
        else:
            curves = Trainer(training, prepared, histories.part(options, "training", events.digest)).run()
            curves |= tune(training, events, prepared, histories.part(options, "tuning", events.digest))
        self.network = network.eval()
        self._freeze_export(prepared)
        guess = {} if network.prior is None else {"prior_error": float(network.prior.error)}
        return FitReport(curves=curves, metrics=training.evaluate(prepared, quantise=True) | guess)

    @torch.no_grad()
    def _freeze_export(self, prepared: ItemBatch) -> None:
        """Fix the mean active router weight of the generation, the unit of exported weights."""
        network = self.fitted
        device = network.codebook_LKD.device
        router_NE = torch.cat([network(block.to(device), quantise=True).router_BE for block in parallel.blocks(prepared)])
        active = router_NE[router_NE > 0]
        network.mean_active.fill_(float(active.double().mean()) if len(active) else 1.0)
        network.usage_LK.zero_()

    @torch.no_grad()
    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes, exported weights and the fused code rows (eq. 11) of the items."""
        network = self.fitted

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of the one height."""
            made: Pass = network(network.prepare(rows.to(network.codebook_LKD.device)), quantise=True)
            if keep is not None:
                made = held(made, network, keep)
            weights_BL = made.shown_BL.float()
            if experts := made.router_BE.shape[1]:
                weights_BL[:, -experts:] = export_weight(made.router_BE, network.mean_active)
            codes_BL = masked_codes(made.codes_BL, made.shown_BL, self.settings.codebook_size)
            return TokenizerOutput(codes_NL=codes_BL, weights_NL=weights_BL, quantized_ND=made.quantized_BD)

        return encode_in_chunks(items, block, keep, device=network.codebook_LKD.device)

    @torch.no_grad()
    def codebooks(self) -> list[Tensor]:
        """Code rows per position, (K, D), on the sphere of radius `latent_scale`."""
        return [rows_KD.clone() for rows_KD in self.fitted.code_rows.cpu()]
