"""RQ-VAE in TIGER's form, trained by this package's loop: an encoder, residual levels of code rows, a decoder.

Source: TIGER (arXiv 2305.05065). differs: AdamW with a cosine, 60 epochs at most by default and a warm-up without quantisation, there (as it is retold, not
checked against the paper) Adagrad at 0.4 for 20,000 epochs.
`Autoencoder` is LETTER's too. Not here: k-means, revival and Sinkhorn (quantize.py), the training loop (fit.py).
Suffixes: B batch, N items, D width, L levels, K codes.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers import metrics
from pipeline.tokenizers.base import (
    MODALITIES,
    FitOptions,
    FitReport,
    ItemBatch,
    Keep,
    Networked,
    TokenizerOutput,
    encode_in_chunks,
    masked_codes,
    shows,
    unweighted,
)
from pipeline.tokenizers.fit import Trainer
from pipeline.tokenizers.quantize import (
    codebook_loss,
    commitment_loss,
    kmeans,
    nearest_centroid,
    residual_codes,
    revive_codes,
    sinkhorn,
    straight_through,
)
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.rq_kmeans import column_means, concatenate, shown_columns
from pipeline.tokenizers.world import World

POINTS_PER_CODE = 256  # latents per code that k-means and revival look at, at most
BLOCK_ROWS = 8192  # items of one pass when nothing is learned
Assign = Callable[[Tensor, Tensor], Tensor]  # points (N, D), code rows (K, D) -> codes (N,)


def residual_walk(z_BD: Tensor, codebook_LKD: Tensor, last: Assign = nearest_centroid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, L), what each level had left to code (B, L, D) and the code rows taken (B, L, D); gradients reach the latent through every level.

    Args:
        last: assigns the codes of the last level, in training perhaps evenly; all others take the nearest.
    Source: RQ-VAE (Lee et al. 2022) and TIGER (arXiv 2305.05065), residual quantisation
    """
    rest_BD, codes, rests, rows = z_BD, [], [], []
    for level, codebook_KD in enumerate(codebook_LKD.unbind(0)):
        assign = last if level == len(codebook_LKD) - 1 else nearest_centroid
        codes.append(assign(rest_BD.detach(), codebook_KD.detach()))
        rests.append(rest_BD)
        rows.append(F.embedding(codes[-1], codebook_KD))
        rest_BD = rest_BD - rows[-1].detach()
    return torch.stack(codes, 1), torch.stack(rests, 1), torch.stack(rows, 1)


def reconstruction_loss(x_BD: Tensor, estimate_BD: Tensor, shown_BD: Tensor) -> Tensor:
    """Squared error per item over the columns it has, divided by the number of all columns, (B,).

    Source: TIGER (arXiv 2305.05065), L_recon; differs: a mean in place of the sum, and a masked modality asks for nothing.
    """
    return ((x_BD - estimate_BD).square() * shown_BD).mean(1)


def even_codes(points_BD: Tensor, codebook_KD: Tensor, *, epsilon: float, rounds: int, world: World) -> Tensor:
    """One code per point under the even plan of the whole batch, (B,) int64.

    Source: LC-Rec (arXiv 2311.09049), uniform semantic mapping
    """
    everyone_CD = world.gather(points_BD)
    plan_CK = sinkhorn(torch.cdist(everyone_CD, codebook_KD).square(), epsilon=epsilon, rounds=rounds)
    first = world.first_row()
    return plan_CK.argmax(1)[first : first + len(points_BD)]


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear maps between consecutive widths with a ReLU between two of them, (B, widths[0]) -> (B, widths[-1])."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of items through the autoencoder.

    Args:
        x_BD / shown_BD: what is reconstructed, and which columns the item has.
        codes_BL / rest_BLD / rows_BLD: the residual walk.
        quantized_BD: sum of the code rows with the latent's gradient; the latent itself in the warm-up.
        estimate_BD: reconstruction.
    """

    x_BD: Tensor
    shown_BD: Tensor
    codes_BL: Tensor
    rest_BLD: Tensor
    rows_BLD: Tensor
    quantized_BD: Tensor
    estimate_BD: Tensor


class Autoencoder(nn.Module):
    """Encoder, code books and decoder on the unit-norm modalities side by side, centred and on one scale.

    Args:
        settings: sizes and weights.
        raw_widths: modality -> width of its vectors; modalities not named are not read.
    """

    mean_D: Tensor
    scale: Tensor
    usage_LK: Tensor

    def __init__(self, settings: profile.RqVae, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.raw_widths = {name: int(raw_widths[name]) for name in MODALITIES if name in raw_widths}
        if not self.raw_widths:
            raise ValueError("an RQ-VAE needs at least one modality")
        inside = [sum(self.raw_widths.values()), *settings.hidden_dims, settings.latent_dim]
        self.encoder, self.decoder = perceptron(inside), perceptron(inside[::-1])
        self.codebook_LKD = nn.Parameter(torch.randn(settings.num_levels, settings.codebook_size, settings.latent_dim))
        self.register_buffer("mean_D", torch.zeros(inside[0]))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("usage_LK", torch.zeros(settings.num_levels, settings.codebook_size))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the levels."""
        return tuple(f"level_{level}" for level in range(self.settings.num_levels))

    @property
    def sizes(self) -> tuple[int, ...]:
        """K per level."""
        return (self.settings.codebook_size,) * self.settings.num_levels

    @torch.no_grad()
    def fit_inputs(self, items: ItemBatch) -> None:
        """Freeze the columns' means and one scale, chosen so that a column's mean variance is 1; the modalities' shares in it stay those of unit vectors."""
        self.mean_D.copy_(column_means(items, self.raw_widths))
        shown_ND = shown_columns(items, self.raw_widths)
        spread = ((concatenate(items, self.raw_widths) - self.mean_D).double().square() * shown_ND).sum() / shown_ND.sum().clamp(min=1)
        self.scale.copy_(spread.clamp(min=1e-12).rsqrt())

    @torch.no_grad()
    def prepare(self, items: ItemBatch) -> ItemBatch:
        """The items as the network reads them, masked modalities 0; modalities it does not know are dropped.

        Raises: ValueError for vectors of another width than the tokenizer was fitted on.
        """
        points_ND = torch.where(shown_columns(items, self.raw_widths), (concatenate(items, self.raw_widths) - self.mean_D) * self.scale, 0.0)
        blocks = dict(zip(self.raw_widths, points_ND.split(list(self.raw_widths.values()), 1), strict=True))
        known = {f"{name}_N": items.mask(name) & (name in blocks and items.vectors(name) is not None) for name in MODALITIES}
        return items.changed({**known, **{f"{name}_ND": blocks.get(name) for name in MODALITIES}})

    def latent(self, batch: ItemBatch) -> Tensor:
        """Latents of prepared items, (B, D) float32."""
        z_BD: Tensor = self.encoder(self.columns(batch)).float()
        return z_BD

    def columns(self, batch: ItemBatch) -> Tensor:
        """The modalities of prepared items side by side, (B, D)."""
        return torch.cat([batch.known(name) for name in self.raw_widths], 1)

    def forward(self, batch: ItemBatch, *, quantise: bool, world: World | None = None) -> Pass:
        """One pass; without `quantise` the latent stands where its code rows would (the warm-up), with `world` the last level is assigned evenly."""
        z_BD = self.latent(batch)
        with torch.autocast(z_BD.device.type, enabled=False):
            codes_BL, rest_BLD, rows_BLD = residual_walk(z_BD, self.codebook_LKD, nearest_centroid if world is None else self._evenly(world))
            quantized_BD = straight_through(z_BD, rows_BLD.sum(1), code_gradient=False) if quantise else z_BD
        return Pass(
            x_BD=self.columns(batch),
            shown_BD=shown_columns(batch, self.raw_widths),
            codes_BL=codes_BL,
            rest_BLD=rest_BLD,
            rows_BLD=rows_BLD,
            quantized_BD=quantized_BD,
            estimate_BD=self.decoder(quantized_BD).float(),
        )

    def _evenly(self, world: World) -> Assign:
        settings = self.settings
        return lambda points_BD, codebook_KD: even_codes(
            points_BD, codebook_KD, epsilon=settings.sinkhorn_epsilon, rounds=settings.sinkhorn_rounds, world=world
        )

    def losses(self, batch: ItemBatch, *, quantise: bool, world: World) -> tuple[Pass, dict[str, Tensor]]:
        """The pass of a training step and its terms reconstruction, codebook, commitment and `total`; counts which codes are used.

        All terms are squared distances over the number of input columns, so they weigh against each other as the paper's sums do.
        """
        made: Pass = self(batch, quantise=quantise, world=world if quantise and self.settings.sinkhorn else None)
        shown_B = shows(batch, self.raw_widths)
        pairs = {"codebook": codebook_loss(made.rest_BLD, made.rows_BLD), "commitment": commitment_loss(made.rest_BLD, made.rows_BLD)}
        terms = {"reconstruction": world.mean(reconstruction_loss(made.x_BD, made.estimate_BD, made.shown_BD), shown_B)}
        terms |= {name: world.mean(loss_BL.sum(1) / len(self.mean_D), shown_B) for name, loss_BL in pairs.items()}
        self.usage_LK += (F.one_hot(made.codes_BL, self.settings.codebook_size) * shown_B[:, None, None]).sum(0)  # no row is left out: nobody need count them
        total = terms["reconstruction"]
        if quantise:
            total = total + self.settings.codebook_weight * terms["codebook"] + self.settings.commitment * terms["commitment"]
        return made, {**terms, "total": total}

    @torch.no_grad()
    def _sample(self, items: ItemBatch, generator: torch.Generator) -> Tensor:
        """Latents of as many items that show something, drawn at random, as k-means needs."""
        shown = torch.nonzero(shows(items, self.raw_widths).cpu()).flatten()
        rows = shown[torch.randperm(len(shown), generator=generator)[: POINTS_PER_CODE * self.settings.codebook_size]]
        return self.latent(items.take(rows).to(self.codebook_LKD.device))

    @torch.no_grad()
    def start_codes(self, items: ItemBatch, generator: torch.Generator) -> None:
        """K-means of the latents, level by level on what the levels before left over; even where assignment will be."""
        self.usage_LK.zero_()  # what the warm-up counted concerns other codes
        rest_ND = self._sample(items, generator)
        for codebook_KD in self.codebook_LKD:
            codebook_KD.copy_(kmeans(rest_ND, self.settings.codebook_size, generator=generator, balanced=self.settings.sinkhorn))
            rest_ND = rest_ND - codebook_KD[nearest_centroid(rest_ND, codebook_KD)]

    @torch.no_grad()
    def revive(self, items: ItemBatch, generator: torch.Generator, world: World) -> Tensor:
        """Move codes with fewer than 2 items since the last call onto badly coded rests, level by level; which rows moved, (L, K) bool."""
        usage_LK = world.total(self.usage_LK)
        self.usage_LK.zero_()
        moved_LK = torch.zeros_like(usage_LK, dtype=torch.bool)
        if not bool((usage_LK < 2).any()):
            return moved_LK
        rest_ND = self._sample(items, generator)
        for level, codebook_KD in enumerate(self.codebook_LKD):
            codes_N = nearest_centroid(rest_ND, codebook_KD)
            revived_KD, moved_LK[level] = revive_codes(codebook_KD.detach(), usage_LK[level], rest_ND, codes_N, generator=generator)
            codebook_KD.copy_(revived_KD)
            rest_ND = rest_ND - codebook_KD[nearest_centroid(rest_ND, codebook_KD)]
        return moved_LK

    @torch.no_grad()
    def measure(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Code use, NMSE per modality and what share of the latents' variance each level leaves over; `score` = mean NMSE."""
        blocks = [items.take(slice(start, start + BLOCK_ROWS)).to(self.codebook_LKD.device) for start in range(0, len(items), BLOCK_ROWS)]
        passes: list[Pass] = [self(block, quantise=quantise) for block in blocks]
        codes_NL, shown_N1 = torch.cat([made.codes_BL for made in passes]).cpu(), shows(items, self.raw_widths).cpu()[:, None]
        found = metrics.code_use(masked_codes(codes_NL, shown_N1, self.settings.codebook_size), self.sizes, self.slots)
        widths = list(self.raw_widths.values())
        estimates, targets = (torch.cat(parts).cpu().split(widths, 1) for parts in zip(*((made.estimate_BD, made.x_BD) for made in passes), strict=True))
        nmse = {f"nmse/{name}": metrics.nmse(targets[at], estimates[at], items.mask(name).cpu()) for at, name in enumerate(self.raw_widths)}
        z_ND, left_NLD = torch.cat([made.rest_BLD[:, 0] for made in passes]), torch.cat([made.rest_BLD - made.rows_BLD for made in passes])
        left_L = left_NLD.double().square().sum((0, 2)) / (z_ND - z_ND.mean(0)).double().square().sum().clamp(min=1e-12)
        measured = [value for value in nmse.values() if value == value]
        rests = {f"left_over/{slot}": float(left) for slot, left in zip(self.slots, left_L, strict=True)}
        return {**found, **nmse, **rests, "score": sum(measured) / max(1, len(measured))}

    @torch.no_grad()
    def tokenise(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the residual walk with the nearest code at every level, weights of one, and the sum of the code rows.

        An item with nothing to read is masked everywhere.
        """

        def block(rows: ItemBatch, keep: Keep | None) -> TokenizerOutput:
            """One block of exactly `ENCODE_ROWS` items."""
            z_BD = self.latent(self.prepare(rows.to(self.codebook_LKD.device)))
            held = (keep.codes_NL.to(z_BD.device), keep.margin) if keep else (None, 0.0)
            codes_BL, quantized_BD = residual_codes(z_BD, self.codebook_LKD, *held)
            return unweighted(codes_BL, quantized_BD, shows(rows, self.raw_widths), self.settings.codebook_size)

        return encode_in_chunks(items, block, keep)


class Training:
    """RQ-VAE as the training loop wants it (`fit.Trainable`)."""

    def __init__(self, network: Autoencoder) -> None:
        self.network = network
        self.warmup_epochs = network.settings.warmup_epochs
        self.codebook_names = ("codebook_LKD",)
        self.recordable = True

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Reconstruction, codebook and commitment terms, and their weighted `total`."""
        return self.network.losses(batch, quantise=quantise, world=world)[1]

    def after_step(self) -> None:
        """Nothing."""

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """K-means of the latents."""
        self.network.start_codes(items, generator)

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Dead codes moved onto badly coded rests."""
        return {"codebook_LKD": self.network.revive(items, generator, world)}

    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Code use, NMSE per modality, and the `score`."""
        return self.network.measure(items, quantise=quantise)


class RqVae(Networked[profile.RqVae, Autoencoder]):
    """The RQ-VAE tokenizer (`base.Tokenizer`); its codes are ordered, level l refines the levels before it.

    Args:
        settings: the [train_tokenizer.rq_vae] section.
    """

    name = "rq_vae"
    section = profile.RqVae
    build = Autoencoder

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Train on a catalogue; curves per epoch and metrics of the final tokenizer on that catalogue.

        With `start` the network and the normalisation of its inputs begin as the champion's.
        Raises: ValueError if no modality is present; ContractError if the champion reads other vectors or has other sizes.
        """
        network = begin(self, lambda network: network.fit_inputs(items), options, items.widths())
        prepared = network.prepare(items)
        training = Training(network.to(best_device()))
        curves = Trainer(training, prepared, options).run()
        network.usage_LK.zero_()
        self.network = network.eval()
        return FitReport(curves=curves, metrics=network.measure(prepared, quantise=True))

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the residual walk, weights of one, and the sum of the code rows."""
        return self.fitted.tokenise(items, keep)
