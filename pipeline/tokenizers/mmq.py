"""MMQ v1 (arXiv 2508.15281): shared and content-specific experts with a code book each, then tuning by users' histories through soft codes.

Stage one reconstructs all content from all experts and each modality from its own experts, and keeps experts of one group apart. Stage two lets a light
next-item reader look at the codes through a soft index (tuning.py), so that what users do next moves experts and code books. Behaviour vectors are not read.
Known here from third-party notes, not from the paper: parts of the method are named in place of equations.
Not here: experts, gate, fusion (ada_sid.py), losses and revival of code rows (parallel.py), stage two (tuning.py), the loop (fit.py).
Suffixes: B batch, N items, D width, L positions, E experts of one input, K codes.
"""

# ruff: noqa: N802, N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers import histories, metrics, parallel
from pipeline.tokenizers.ada_sid import Decoder, ExpertBank, Mlp, fuse, reconstruction_error, softmax_gate
from pipeline.tokenizers.base import (
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    Networked,
    TokenizerOutput,
    encode_in_chunks,
    masked_codes,
)
from pipeline.tokenizers.fit import Trainer
from pipeline.tokenizers.inputs import Inputs, side_by_side
from pipeline.tokenizers.quantize import gather_codes, held_codes, nearest_code, straight_through
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.tuning import tune
from pipeline.tokenizers.world import World

CONTENT = ("text", "image")


def orthogonality(maps: Sequence[Tensor]) -> Tensor:
    """How much the maps of a group of experts overlap: sum of squares of V V^T - I, V the maps as unit rows; a scalar, 0 when all are orthogonal.

    Source: MMQ (arXiv 2508.15281), stage one, orthogonality of the experts of one group;
    differs: an expert's map is its linear map, the perceptron beside it is left out.
    """
    unit_EV = F.normalize(torch.stack([each.flatten() for each in maps]), dim=1)
    return (unit_EV @ unit_EV.T - torch.eye(len(unit_EV), device=unit_EV.device)).square().sum()


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of items through the network.

    Args:
        z_BLD / zq_BLD: latents and their code rows, norm `latent_scale`; codes_BL: before masking.
        gate_BL: weights in the fused sum, 0 where masked; shown_BL: positions the item has.
        quantized_BD: fused code rows.
        estimate / own: reconstruction by modality, from all experts and from the modality's own.
    """

    z_BLD: Tensor
    zq_BLD: Tensor
    codes_BL: Tensor
    gate_BL: Tensor
    shown_BL: Tensor
    quantized_BD: Tensor
    estimate: dict[str, Tensor]
    own: dict[str, Tensor]

    @property
    def read_BL(self) -> Tensor:
        """How much a reader sees of each position: shown positions count alike."""
        return self.shown_BL


class Network(nn.Module):
    """The modules of stage one for the content a data set has.

    Args:
        settings: the [train_tokenizer.mmq] section.
        raw_widths: content modality -> width of its vectors as they come.
    Raises: ValueError if no expert is left.
    """

    usage_LK: Tensor

    def __init__(self, settings: profile.Mmq, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.inputs = Inputs(raw_widths, settings.input_dim)
        self.raw_widths = self.inputs.raw_widths
        self.modalities = tuple(self.inputs.widths)
        self.experts = _experts(settings, self.modalities)
        if not sum(self.experts.values()):
            raise ValueError("MMQ has no expert: no content modality is present or all expert counts are 0")
        widths, hidden, latent = self.inputs.widths, settings.hidden_dim, settings.latent_dim
        read = {"shared": sum(widths.values()), **widths}
        own = {name: count for name, count in self.experts.items() if count and name != "shared"}
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name, width in widths.items()})
        self.expert = nn.ModuleDict({name: ExpertBank(count, read[name], hidden, latent) for name, count in self.experts.items() if count})
        self.gate = nn.ModuleDict({name: Mlp(widths[name], max(1, hidden // 4), count) for name, count in own.items()})
        self.decoder = Decoder(latent, hidden, sum(widths.values()))
        self.own_decoder = nn.ModuleDict({name: Decoder(latent, hidden, widths[name]) for name in own})
        positions = sum(self.experts.values())
        self.codebook_LKD = nn.Parameter(F.normalize(torch.randn(positions, settings.codebook_size, latent), dim=-1))
        self.register_buffer("usage_LK", torch.zeros(positions, settings.codebook_size))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the positions, e.g. shared_0, shared_1, text_0."""
        return tuple(f"{name}_{index}" for name, count in self.experts.items() for index in range(count))

    def on_sphere(self, vector: Tensor) -> Tensor:
        """The vector with norm `latent_scale`.

        Source: MMQ (arXiv 2508.15281), stage one, latents and code rows; differs: their norm is fixed, free in what we read of the paper.
        """
        return self.settings.latent_scale * F.normalize(vector.float(), dim=-1)

    @torch.no_grad()
    def fit_inputs(self, items: ItemBatch) -> None:
        """Freeze the inputs' axes and scales; each expert starts on its own part of the axes of what it reads."""
        self.inputs.fit(items)
        prepared = self.inputs.prepare(items)
        for name, bank in self.expert.items():
            assert isinstance(bank, ExpertBank)
            read = self.modalities if name == "shared" else (name,)
            present_N = torch.stack([prepared.mask(each) for each in read]).all(0)
            rows = torch.nonzero(present_N if bool(present_N.any()) else ~present_N).flatten()
            bank.start_on(side_by_side(prepared.take(rows), read).cpu())

    def forward(self, batch: ItemBatch, *, quantise: bool, keep: Keep | None = None) -> Pass:
        """One pass over prepared items; without `quantise` latents stand where their code rows would (the warm-up)."""
        x = {name: torch.where(batch.mask(name)[:, None], batch.known(name), self.missing[name]) for name in self.modalities}
        read = {"shared": torch.cat(list(x.values()), 1), **x}
        z_BLD = self.on_sphere(torch.cat([bank(read[name]) for name, bank in self.expert.items()], 1))
        shown_BL, gate_BL = self._gates(batch, x)
        with torch.autocast(z_BLD.device.type, enabled=False):
            codes_BL = self._codes(z_BLD.detach(), keep)
            zq_BLD = gather_codes(codes_BL, self.on_sphere(self.codebook_LKD))
            through_BLD = straight_through(z_BLD, zq_BLD, code_gradient=self.settings.code_gradient) if quantise else z_BLD
            weighted = dict(zip(self.experts, (through_BLD * gate_BL[..., None]).split(list(self.experts.values()), 1), strict=True))
            fused_BD = fuse(through_BLD, gate_BL)
        estimates = self.decoder(fused_BD).split(list(self.inputs.widths.values()), 1)
        return Pass(
            z_BLD=z_BLD,
            zq_BLD=zq_BLD,
            codes_BL=codes_BL,
            gate_BL=gate_BL,
            shown_BL=shown_BL,
            quantized_BD=fused_BD,
            estimate={name: part.float() for name, part in zip(self.modalities, estimates, strict=True)},
            own={name: decoder(weighted[name].sum(1)).float() for name, decoder in self.own_decoder.items()},
        )

    def _codes(self, z_BLD: Tensor, keep: Keep | None) -> Tensor:
        rows_LKD = self.codebook_LKD.detach()
        return held_codes(z_BLD, rows_LKD, keep.codes_NL.to(z_BLD.device), keep.margin) if keep else nearest_code(z_BLD, rows_LKD)

    def _gates(self, batch: ItemBatch, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions shown and weight per position: 1 for shared experts, softmax within a modality, 0 where masked."""
        anything_B = torch.stack([batch.mask(name) for name in self.modalities]).any(0)
        shown, gates = [], []
        for name, count in self.experts.items():
            mask_B1 = (anything_B if name == "shared" else batch.mask(name))[:, None]
            weight_BE = softmax_gate(self.gate[name](x[name]).float()) if name in self.gate else torch.ones(1, count, device=mask_B1.device)
            shown.append(mask_B1.expand(-1, count))
            gates.append(weight_BE * mask_B1)
        return torch.cat(shown, 1), torch.cat(gates, 1)


def _experts(settings: profile.Mmq, modalities: tuple[str, ...]) -> dict[str, int]:
    """Number of experts by input, in the order of the positions; absent modalities have none."""
    counts = {"text": settings.num_text, "image": settings.num_image}
    return {"shared": settings.num_shared if modalities else 0, **{name: counts[name] for name in modalities}}


class Training(parallel.CodeBooks):
    """Stage one as the training loop wants it (`fit.Trainable`)."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.settings = network.settings
        self.warmup_epochs = network.settings.warmup_epochs
        self.codebook_names = ("codebook_LKD",)
        self.recordable = True

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Reconstruction, auxiliary, orthogonality, codebook and commitment terms, and their weighted `total`.

        Source: MMQ (arXiv 2508.15281), stage one, 12 L_recon + 10 L_aux + 0.005 L_ortho; differs: codebook and commitment terms, which no note mentions;
        the sum is divided by the two large weights, so that clipping and an anchored refit's pull weigh here what they weigh elsewhere.
        """
        made = self.network(batch, quantise=quantise)
        settings = self.settings
        terms = {**self.reconstruction(batch, made, world), "orthogonality": self._orthogonality() / world.size}
        terms |= parallel.code_terms(made, self.network.usage_LK, square=settings.latent_scale**2, world=world)
        total = settings.reconstruction * terms["reconstruction"] + settings.auxiliary * terms["auxiliary"] + settings.orthogonality * terms["orthogonality"]
        if quantise:
            total = total + settings.codebook_weight * terms["codebook"] + settings.commitment * terms["commitment"]
        return {**terms, "total": total / ((settings.reconstruction + settings.auxiliary) or 1.0)}

    def reconstruction(self, batch: ItemBatch, made: Pass, world: World) -> dict[str, Tensor]:
        """Terms `reconstruction` and `auxiliary`: mean over modalities of the mean error over the items that have the modality."""
        found = {}
        for term, estimates in (("reconstruction", made.estimate), ("auxiliary", made.own)):
            errors = [world.mean(reconstruction_error(batch.known(name), value), batch.mask(name)) for name, value in estimates.items()]
            found[term] = torch.stack(errors).mean() if errors else made.z_BLD.sum() * 0.0
        return found

    def kept(self, batch: ItemBatch, noise_BU: Tensor, world: World) -> tuple[dict[str, Tensor], Tensor]:
        """What stage two keeps: the reconstruction terms and their weighted sum.

        Source: MMQ (arXiv 2508.15281), stage two, L_downstream + 0.5 L_recon + 0.5 L_aux
        """
        terms = self.reconstruction(batch, self.network(batch, quantise=True), world)
        return terms, self.settings.tune_reconstruction * terms["reconstruction"] + self.settings.tune_auxiliary * terms["auxiliary"]

    def _orthogonality(self) -> Tensor:
        return torch.stack([orthogonality(bank.direct_EDD.unbind(0)) for bank in self.network.expert.values()]).sum()  # type: ignore[union-attr, operator]

    def after_step(self) -> None:
        """Nothing to do between steps."""

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Code use and NMSE per modality, from all experts and (`nmse_own`) from the modality's own; `score` = their weighted means."""
        network = self.network
        parts = [network(block.to(network.codebook_LKD.device), quantise=quantise) for block in parallel.blocks(items)]
        codes_NL = masked_codes(torch.cat([part.codes_BL for part in parts]), torch.cat([part.shown_BL for part in parts]), self.settings.codebook_size)
        found = metrics.code_use(codes_NL.cpu(), [self.settings.codebook_size] * codes_NL.shape[1], network.slots)
        for kind, estimates in (("nmse", [part.estimate for part in parts]), ("nmse_own", [part.own for part in parts])):
            for name in estimates[0]:
                estimate_ND = torch.cat([estimate[name] for estimate in estimates]).cpu()
                found[f"{kind}/{name}"] = metrics.nmse(items.known(name).cpu(), estimate_ND, items.mask(name).cpu())
        weights = {"nmse": self.settings.reconstruction, "nmse_own": self.settings.auxiliary}
        measured = {kind: [value for name, value in found.items() if name.startswith(f"{kind}/") and value == value] for kind in weights}
        means = [weights[kind] * sum(values) / max(1, len(values)) for kind, values in measured.items()]
        return {**found, "score": sum(means) / (sum(weights.values()) or 1.0)}


class Mmq(Networked[profile.Mmq, Network]):
    """The MMQ tokenizer (`base.Tokenizer`); reads text and image, and histories while it is tuned.

    Args:
        settings: the [train_tokenizer.mmq] section.
    """

    name = "mmq"
    section = profile.Mmq
    build = Network

    @property
    def needs_history(self) -> bool:
        """Only stage two reads histories."""
        return self.settings.tune_epochs > 0

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Stage one, then stage two unless `tune_epochs` is 0; curves of stage two are named `tune/...`.

        Raises: ValueError without content; ContractError if stage two lacks histories, or for a champion of other sizes.
        """
        events = histories.events(options.history, len(items), who="MMQ's tuning") if self.needs_history else None
        widths = {name: width for name, width in items.widths().items() if name in CONTENT}
        network = begin(self, lambda network: network.fit_inputs(items), options, widths)
        prepared = network.inputs.prepare(items)
        network.to(best_device())
        training, digest = Training(network), events.digest if events else ""
        curves = Trainer(training, prepared, histories.part(options, "content", digest)).run()
        if events is not None:
            curves |= tune(training, events, prepared, histories.part(options, "tuning", digest))
        self.network = network.eval()
        network.usage_LK.zero_()
        return FitReport(curves=curves, metrics=training.evaluate(prepared, quantise=True))

    @torch.no_grad()
    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes, weights of 1 (0 where masked) and the fused code rows of the items."""
        network = self.fitted

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of exactly `ENCODE_ROWS` items."""
            made: Pass = network(network.inputs.prepare(rows.to(network.codebook_LKD.device)), quantise=True, keep=keep)
            codes_BL = masked_codes(made.codes_BL, made.shown_BL, self.settings.codebook_size)
            return TokenizerOutput(codes_NL=codes_BL, weights_NL=made.shown_BL.float(), quantized_ND=made.quantized_BD)

        return encode_in_chunks(items, block, keep)

    @torch.no_grad()
    def codebooks(self) -> list[Tensor]:
        """Code rows per position, (K, D), on the sphere of radius `latent_scale`."""
        return [rows_KD.clone() for rows_KD in self.fitted.on_sphere(self.fitted.codebook_LKD).cpu()]
