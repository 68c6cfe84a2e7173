"""LETTER (arXiv 2405.07314): an RQ-VAE of the content whose quantised latent agrees with behaviour and whose code rows spread evenly.

Source: the authors' program, L = L_sem + alpha L_CF + beta L_Div; differs: levels are added up, the program takes their mean; squared distances
of code rows are divided by the columns of the input as in rq_vae.py, there each is a mean over its own width, so codebook and commitment weigh columns /
(levels x width of the latent) times as much; the commitment of every level reaches the latent, there the residual of a straight-through code has no gradient.
Behaviour is a teacher, never an input: an item gets its codes from its content alone. Colliding items are told apart by assign_sid, not by reassignment here.
Not here: the autoencoder and Sinkhorn assignment (rq_vae.py). Suffixes: B batch, C candidates of all processes, D width, L levels, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers.alignment import inner_products
from pipeline.tokenizers.base import FitOptions, FitReport, ItemBatch, Keep, Networked, TokenizerOutput, shows
from pipeline.tokenizers.fit import NOISE_COLUMNS, Trainer, generator_for
from pipeline.tokenizers.inputs import Inputs
from pipeline.tokenizers.quantize import balanced_codes, kmeans, take_rows
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.rq_vae import Autoencoder
from pipeline.tokenizers.world import World

CLUSTER_STEPS = 64  # steps after which the code rows are clustered anew, about an epoch of a small catalogue
CLUSTER_ROUNDS = 30  # rounds of prices that even out the clusters
AMONG = 256  # items that an item's behaviour is picked out of when the alignment is measured


def collaborative_loss(quantized_BD: Tensor, behavior_CD: Tensor, positive_B: Tensor, known_C: Tensor) -> Tensor:
    """-log of the share the item's own behaviour vector takes of exp(inner product) over all behaviour vectors of the batch, (B,).

    Args:
        positive_B: row of the item among the candidates; known_C: False where a candidate has no behaviour vector.
    Source: LETTER (arXiv 2405.07314), L_CF; differs: behaviour is turned to its principal axes, as wide as the latent (the paper's vectors have that
    width), and centred and scaled to a mean variance of 1 by `Inputs`, which acts as a temperature; the paper has neither temperature nor normalisation.
    """
    logit_BC = inner_products(quantized_BD, behavior_CD)
    allowed_BC = known_C | F.one_hot(positive_B, len(known_C)).bool()
    return F.cross_entropy(logit_BC.masked_fill(~allowed_BC, -torch.inf), positive_B, reduction="none")


def diversity_loss(rows_BD: Tensor, codes_B: Tensor, partner_B: Tensor, codebook_KD: Tensor) -> Tensor:
    """-log of the share a partner from the same cluster takes of exp(inner product with the item's code row) over all other rows, (B,).

    Source: LETTER (arXiv 2405.07314), L_Div; as in the authors' program: inner products without a temperature, the item's own row left out.
    """
    own_BK = F.one_hot(codes_B, len(codebook_KD)).bool()
    return F.cross_entropy(inner_products(rows_BD, codebook_KD).masked_fill(own_BK, -torch.inf), partner_B, reduction="none")


def draw_partners(codes_B: Tensor, cluster_K: Tensor, noise_B: Tensor) -> tuple[Tensor, Tensor]:
    """Another code of the same cluster per item, each alike likely, (B,), and True where there is one; elsewhere just the next code.

    Args:
        cluster_K: cluster of each code; noise_B: uniform numbers in [0, 1).
    """
    order_K = cluster_K.argsort(stable=True)
    counts_G = torch.bincount(cluster_K)
    first_B = (counts_G.cumsum(0) - counts_G)[cluster_K[codes_B]]
    size_B = counts_G[cluster_K[codes_B]]
    place_B = order_K.argsort()[codes_B] - first_B
    step_B = 1 + (noise_B * (size_B - 1)).long().minimum((size_B - 2).clamp(min=0))
    partner_B = order_K[first_B + (place_B + step_B) % size_B]
    return torch.where(size_B > 1, partner_B, (codes_B + 1) % len(cluster_K)), size_B > 1


def even_clusters(codebook_KD: Tensor, count: int) -> Tensor:
    """Cluster per code row with about equally many rows each, (K,) int64; the same rows give the same clusters.

    Source: LETTER (arXiv 2405.07314), constrained k-means; differs: balanced by prices in place of hard bounds on the sizes, and done again every 64
    steps (`CLUSTER_STEPS`) in place of every epoch.
    """
    count = max(1, min(count, len(codebook_KD) // 2))
    centres_GD = kmeans(codebook_KD, count, generator=torch.Generator().manual_seed(0), iterations=10, balanced=True)
    return balanced_codes(codebook_KD, centres_GD, torch.zeros(count, device=codebook_KD.device), rounds=CLUSTER_ROUNDS)[0]


class Network(nn.Module):
    """The autoencoder of the content, how behaviour is read, and the clusters of code rows.

    Args:
        settings: the [train_tokenizer.letter] section.
        raw_widths: modality -> width of its vectors.
    """

    cluster_LK: Tensor  # noqa: N815 - tensor fields carry shape suffixes
    age: Tensor

    def __init__(self, settings: profile.Letter, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.raw_widths = {name: int(width) for name, width in raw_widths.items()}
        content = {name: width for name, width in self.raw_widths.items() if name != "behavior"}
        if not content:
            raise ValueError("LETTER codes an item's content and aligns it with behaviour: it needs text or image vectors")
        self.autoencoder = Autoencoder(settings, content)
        self.behavior = Inputs({name: width for name, width in self.raw_widths.items() if name == "behavior"}, settings.latent_dim)
        self.register_buffer("cluster_LK", torch.zeros(settings.num_levels, settings.codebook_size, dtype=torch.int64))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fit_inputs(self, items: ItemBatch) -> None:
        """Freeze how content and behaviour are read."""
        self.autoencoder.fit_inputs(items)
        self.behavior.fit(items)

    @torch.no_grad()
    def prepare(self, items: ItemBatch) -> ItemBatch:
        """The items as the network reads them: content on one scale, behaviour turned to its principal axes and as wide as the latent at most."""
        known = self.behavior.prepare(items)
        return replace(self.autoencoder.prepare(items), behavior_ND=known.behavior_ND, behavior_N=known.behavior_N)

    @torch.no_grad()
    def clusters(self) -> Tensor:
        """Clusters of the code rows, (L, K); found anew every `CLUSTER_STEPS` steps."""
        if int(self.age) % CLUSTER_STEPS == 0:
            rows_LKD = self.autoencoder.codebook_LKD.detach()
            with torch.autocast(rows_LKD.device.type, enabled=False):  # clusters are even by sums that bfloat16 would round
                self.cluster_LK.copy_(torch.stack([even_clusters(rows_KD, self.settings.num_clusters) for rows_KD in rows_LKD]))
        self.age += 1
        return self.cluster_LK


class Training:
    """LETTER as the training loop wants it (`fit.Trainable`)."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.settings = network.settings
        self.warmup_epochs = network.settings.warmup_epochs
        self.codebook_names = ("autoencoder.codebook_LKD",)
        self.recordable = False  # a step asks the device for its number: every so often it clusters the code rows anew

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """The autoencoder's terms, `collaborative`, `diversity`, and the weighted `total`; in the warm-up behaviour draws on the latent itself."""
        made, terms = self.network.autoencoder.losses(batch, quantise=quantise, world=world)
        total = terms.pop("total")
        if self.settings.collaborative_weight and batch.behavior_ND is not None:
            terms["collaborative"] = self._collaborative(batch, made.quantized_BD, world)
            total = total + self.settings.collaborative_weight * terms["collaborative"]
        if self.settings.diversity_weight:
            terms["diversity"] = self._diversity(made.rows_BLD, made.codes_BL, noise_BU, world) if quantise else torch.zeros_like(total)
            total = total + self.settings.diversity_weight * terms["diversity"]
        return {**terms, "total": total}

    def _collaborative(self, batch: ItemBatch, quantized_BD: Tensor, world: World) -> Tensor:
        assert batch.behavior_ND is not None
        first = world.first_row()
        known_B = self._known(batch)
        known_C = world.gather(known_B.float()[:, None])[:, 0] > 0
        behavior_CD = world.gather(batch.behavior_ND)
        positive_B = torch.arange(first, first + len(batch), device=known_C.device)
        return world.mean(collaborative_loss(quantized_BD[:, : behavior_CD.shape[1]], behavior_CD, positive_B, known_C), known_B)

    def _known(self, batch: ItemBatch) -> Tensor:
        """Items whose latent says something and whose behaviour is known; items without content share one latent, which must not be pulled about."""
        return batch.behavior_N & shows(batch, self.network.autoencoder.raw_widths)

    def _diversity(self, rows_BLD: Tensor, codes_BL: Tensor, noise_BU: Tensor, world: World) -> Tensor:
        """Summed over the levels; a level beyond the noise columns draws with a shifted column."""
        losses = []
        for level, cluster_K in enumerate(self.network.clusters()):
            noise_B = (noise_BU[:, level % NOISE_COLUMNS] + 0.618034 * (level // NOISE_COLUMNS)) % 1.0
            partner_B, paired_B = draw_partners(codes_BL[:, level], cluster_K, noise_B)
            loss_B = diversity_loss(rows_BLD[:, level], codes_BL[:, level], partner_B, self.network.autoencoder.codebook_LKD[level])
            losses.append(world.mean(loss_B, paired_B))
        return torch.stack(losses).sum()

    def after_step(self) -> None:
        """Nothing."""

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """K-means of the latents."""
        self.network.autoencoder.start_codes(items, generator)

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Dead codes moved onto badly coded rests."""
        return {self.codebook_names[0]: self.network.autoencoder.revive(items, generator, world)}

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """The autoencoder's numbers and, where items have behaviour, `collaborative`: the alignment loss, which counts in the `score` by its weight."""
        found = self.network.autoencoder.measure(items, quantise=quantise)
        if items.behavior_ND is not None and bool(items.behavior_N.any()):
            found["collaborative"] = self._agreement(items, items.behavior_ND, quantise)
            found["score"] += self.settings.collaborative_weight * found["collaborative"]
        return found

    def _agreement(self, items: ItemBatch, behavior_ND: Tensor, quantise: bool) -> float:
        """Mean alignment loss of the items that have content and behaviour, each among the next `AMONG` of them."""
        rows = torch.nonzero(self._known(items)).flatten()
        total = 0.0
        for block in rows.split(AMONG):
            batch = items.take(block).to(self.network.age.device)
            made = self.network.autoencoder(batch, quantise=quantise)
            behavior_CD, known_C = behavior_ND[block].to(self.network.age.device), batch.behavior_N
            place_B = torch.arange(len(block), device=known_C.device)
            total += float(collaborative_loss(made.quantized_BD[:, : behavior_CD.shape[1]], behavior_CD, place_B, known_C).sum())
        return total / max(1, len(rows))


def shuffled_behaviour(items: ItemBatch, seed: int) -> ItemBatch:
    """The items with the behaviour vectors dealt out anew among those that have one: a control that keeps the vectors and breaks their meaning."""
    if items.behavior_ND is None:
        return items
    rows = torch.nonzero(items.behavior_N).flatten()
    dealt_ND = items.behavior_ND.clone()
    dealt_ND[rows] = items.behavior_ND[rows[torch.randperm(len(rows), generator=generator_for(seed, "shuffled behaviour")).to(rows.device)]]
    return replace(items, behavior_ND=dealt_ND)


class Letter(Networked[profile.Letter, Network]):
    """The LETTER tokenizer (`base.Tokenizer`); its codes are ordered, level l refines the levels before it.

    Args:
        settings: the [train_tokenizer.letter] section.
    """

    name = "letter"
    section = profile.Letter
    build = Network

    @property
    def coder(self) -> Autoencoder:
        """The autoencoder of content, which has the code rows."""
        return self.fitted.autoencoder

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Train on a catalogue; curves per epoch and metrics of the final tokenizer on that catalogue.

        With `start` the network and the normalisation of its inputs begin as the champion's.
        Raises: ValueError if no item has content; ContractError if the champion reads other vectors or has other sizes.
        """
        network = begin(self, lambda network: network.fit_inputs(items), options, items.widths())
        prepared = network.prepare(items if self.settings.collaborative == "own" else shuffled_behaviour(items, options.seed))
        training = Training(network.to(best_device()))
        curves = Trainer(training, prepared, options).run()
        network.autoencoder.usage_LK.zero_()
        self.network = network.eval()
        return FitReport(curves=curves, metrics=training.evaluate(prepared, quantise=True))

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the residual walk, weights of one, and the sum of the code rows."""
        return self.coder.tokenise(items, keep)

    @torch.no_grad()
    def relabel(self, order: Sequence[Tensor]) -> None:
        """Rename codes, and whose clusters they are: code k of level l is what order[l][k] was."""
        super().relabel(order)
        self.fitted.cluster_LK.copy_(take_rows(self.fitted.cluster_LK, order))
