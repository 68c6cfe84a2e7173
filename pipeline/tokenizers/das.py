"""DAS (arXiv 2508.10584): semantic ids of items and of users, aligned with a debiased collaborative model while they are learnt.

Three parts in one training: an RQ-VAE of item content and one of users (a user is the mean of the content taken), a collaborative model on behaviour
vectors whose score has popularity taken out, and contrastive terms between the two. Known here from its abstract and from notes by readers, not from the
paper: parts are named in place of equations. There L = L_sem + L_CF + 0.5 times the six terms, and a user is what a language model says of it.
Not here: the autoencoder (rq_vae.py), contrastive terms (alignment.py), questions of the histories (histories.py), the loop (fit.py).
Suffixes: B batch, C candidates of all processes, N items, U users, T places of a context, D width, L levels.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config as profile
from pipeline.device import best_device
from pipeline.tokenizers import histories
from pipeline.tokenizers.alignment import View, both_ways, view
from pipeline.tokenizers.base import ENCODE_ROWS, FitOptions, FitReport, History, ItemBatch, Keep, Networked, TokenizerOutput, shows
from pipeline.tokenizers.fit import Trainer, generator_for
from pipeline.tokenizers.inputs import Inputs
from pipeline.tokenizers.refresh import begin
from pipeline.tokenizers.rq_vae import Autoencoder, perceptron
from pipeline.tokenizers.world import World

CONTENT = ("text", "image")
PEOPLE = 16_384  # users that the user side's inputs and code books are started on, at most


def popularity_bias(conformity_B: Tensor, popularity_C: Tensor) -> Tensor:
    """What popularity adds to the score of each user and item, (B, C): the user's conformity times the item's learnt popularity.

    Source: DAS (arXiv 2508.10584), debias module: interest and conformity of users, content and popularity of items are told apart, and only the unbiased
    parts are aligned; differs: a term of the score explains popularity and is thrown away, there each vector is split in two that are kept orthogonal.
    """
    return F.softplus(conformity_B)[:, None] * popularity_C


def pooled(source: ItemBatch, rows_BT: Tensor, shown_BT: Tensor) -> ItemBatch:
    """Users as if they were items: each modality the mean over the taken items that have it, masked where none has.

    Args:
        source: items, as the means shall see them; rows_BT / shown_BT: what a user took, and which places are filled.
    """
    changed: dict[str, Tensor | None] = {"popularity_N": None}
    for name in ("text", "image", "behavior"):
        vectors = source.vectors(name)
        had_BT = shown_BT & source.mask(name)[rows_BT]
        changed[f"{name}_N"] = had_BT.any(1)
        changed[f"{name}_ND"] = None if vectors is None else histories.shown_mean(F.embedding(rows_BT, vectors), had_BT)
    nothing_B = torch.zeros(len(rows_BT), device=rows_BT.device)
    return source.changed({**changed, "richness_N": nothing_B, "strength_N": nothing_B})


def dual_alignment(made: Mapping[str, View], pairs: Mapping[str, Tensor], *, temperature: float, world: World) -> dict[str, Tensor]:
    """The six terms, each both ways and a mean over the rows that have both sides: codes against collaborative vectors, and (`co_`) codes against codes.

    Args:
        made: views `code_item`, `code_user` (quantised), `item`, `user` (collaborative) of the questions' answers and askers, `next_item`, `next_user`
            (quantised) of their company: next_item stands beside the answer in the history, next_user took the answer too.
        pairs: `item` and `user`: False where two rows have the same answer or asker; `next_item`: False where they have the same neighbour;
            `next_user`: False where the askers or those who took the answer too are one person, in either place.
    Source: DAS (arXiv 2508.10584), multi-view dual alignment: u2i, i2u, i2i, u2u, and co-occurring i2i and u2u of codes with codes
    """
    views = {
        "u2i": ("code_user", "item", pairs["item"] & pairs["user"]),
        "i2u": ("code_item", "user", pairs["item"] & pairs["user"]),
        "i2i": ("code_item", "item", pairs["item"]),
        "u2u": ("code_user", "user", pairs["user"]),
        "co_i2i": ("code_item", "next_item", pairs["item"] & pairs["next_item"]),
        "co_u2u": ("code_user", "next_user", pairs["item"] & pairs["user"] & pairs["next_user"]),
    }

    def both(code: str, other: str, rival_BC: Tensor) -> Tensor:
        """The term of two sides."""
        return both_ways(made[code], made[other], temperature=temperature, world=world, rival_BC=rival_BC)

    return {name: both(*each) for name, each in views.items()}


class Network(nn.Module):
    """The item and the user autoencoder, and the towers of the collaborative model.

    Args:
        settings: the [train_tokenizer.das] section.
        raw_widths: modality -> width of its vectors as they come.
    Raises: ValueError unless behaviour and some content are there.
    """

    def __init__(self, settings: profile.Das, raw_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.settings, self.raw_widths = settings, dict(raw_widths)
        content = {name: raw_widths[name] for name in CONTENT if name in raw_widths}
        if not content or "behavior" not in raw_widths:
            raise ValueError(f"DAS aligns content with behaviour and got only {sorted(raw_widths)}")
        self.item, self.user = Autoencoder(settings, content), Autoencoder(settings, content)
        self.inputs = Inputs({"behavior": raw_widths["behavior"]}, settings.input_dim)
        tower = [self.inputs.widths["behavior"], settings.tower_dim, settings.latent_dim]
        self.item_tower, self.user_tower = perceptron(tower), perceptron(tower)
        self.popularity, self.conformity = perceptron([1, 16, 1]), perceptron([1, 16, 1])

    def source(self, items: ItemBatch) -> ItemBatch:
        """Items as users' means see them: content at unit length, behaviour normalised."""
        units = {f"{name}_ND": F.normalize(vectors.float(), dim=1) for name in CONTENT if (vectors := items.vectors(name)) is not None}
        return items.changed({**units, **_behavior(self.inputs.prepare(items))})

    def prepare(self, side: Autoencoder, source: ItemBatch) -> ItemBatch:
        """Items or users of `source` form as that side's autoencoder reads them, behaviour kept beside it."""
        return side.prepare(source).changed(_behavior(source))

    @torch.no_grad()
    def fit_inputs(self, items: ItemBatch, taken: tuple[Tensor, Tensor]) -> None:
        """Freeze the normalisation of items and of users."""
        self.inputs.fit(items)
        source = self.source(items)
        self.item.fit_inputs(source)
        self.user.fit_inputs(pooled(source, *taken))


def _behavior(items: ItemBatch) -> dict[str, Tensor | None]:
    return {"behavior_ND": items.behavior_ND, "behavior_N": items.behavior_N}


@dataclass(frozen=True)
class Catalogue:
    """What a step draws from, on one device.

    Args:
        source: items as users' means see them; items: as the item side reads them; people: some users as the user side reads them.
        popular_N: log popularity, standardised.
    """

    source: ItemBatch
    items: ItemBatch
    people: ItemBatch
    popular_N: Tensor


class Training:
    """DAS as the training loop wants it (`fit.Trainable`)."""

    def __init__(self, network: Network, events: histories.Events, catalogue: Catalogue) -> None:
        self.network, self.events, self.catalogue = network, events, catalogue
        self.settings = network.settings
        self.warmup_epochs = network.settings.warmup_epochs
        self.codebook_names = ("item.codebook_LKD", "user.codebook_LKD")
        self.recordable = False  # a step draws its questions on the host
        self.done = False  # nothing but the code books is left to make

    def losses(self, batch: ItemBatch, noise_BU: Tensor, *, quantise: bool, world: World) -> dict[str, Tensor]:
        """Autoencoder terms of the items and of as many users, collaborative loss, alignment terms, and their weighted `total`."""
        quantise = quantise and self.settings.joint
        _, items = self.network.item.losses(batch, quantise=quantise, world=world)
        at_B = self.events.draw(noise_BU.cpu())
        terms, users = self._questions(at_B, self.events.twins(at_B, noise_BU[:, 2].cpu()), quantise, world)
        found = {f"item/{name}": value for name, value in items.items()} | {f"user/{name}": value for name, value in users.items()}
        return {**found, **terms, "total": items["total"] + users["total"] + self._weighted(terms)}

    def _weights(self) -> dict[str, float]:
        """Weight of each term of the questions."""
        settings = self.settings
        pairs = {"u2i": settings.align_user_item, "i2u": settings.align_user_item, "i2i": settings.align_items, "u2u": settings.align_users}
        return {"collaborative": settings.collaborative, **pairs, "co_i2i": settings.align_neighbours, "co_u2u": settings.align_neighbours}

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([weight * terms[name] for name, weight in self._weights().items()]).sum()

    def _questions(self, at_B: Tensor, twin_B: Tensor, quantise: bool, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Collaborative and alignment terms of the questions, and the autoencoder terms of who asks them."""
        network, events, device = self.network, self.events, self.network.item.codebook_LKD.device
        answer_B, neighbour_B = events.item_T[at_B].to(device), events.item_T[at_B - 1].to(device)
        asker_B, twin_user_B = events.user_T[at_B].to(device), events.user_T[twin_B].to(device)
        asker, twin = self._askers(at_B), self._askers(twin_B)
        answer, neighbour = self.catalogue.items.take(answer_B), self.catalogue.items.take(neighbour_B)
        user_pass, user_terms = network.user.losses(asker, quantise=quantise, world=world)
        sides = {
            "code_item": (network.item(answer, quantise=quantise).quantized_BD, shows(answer, CONTENT)),
            "code_user": (user_pass.quantized_BD, shows(asker, CONTENT)),
            "item": (network.item_tower(answer.behavior_ND), answer.behavior_N),
            "user": (network.user_tower(asker.behavior_ND), asker.behavior_N),
            "next_item": (network.item(neighbour, quantise=quantise).quantized_BD, shows(neighbour, CONTENT)),
            "next_user": (network.user(twin, quantise=quantise).quantized_BD, shows(twin, CONTENT) & (asker_B != twin_user_B)),  # not company to himself
        }
        views = {name: view(vectors_BD, mask_B, world) for name, (vectors_BD, mask_B) in sides.items()}
        keys = {"item": answer_B, "user": asker_B, "next_item": neighbour_B, "next_user": twin_user_B}
        asked = {name: histories.candidates(key_B, world) for name, key_B in keys.items()}
        pairs = {name: each.rival_BC for name, each in asked.items()}
        pairs["next_user"] &= (asker_B[:, None] != asked["next_user"].key_C) & (twin_user_B[:, None] != asked["user"].key_C)
        terms = dual_alignment(views, pairs, temperature=self.settings.temperature, world=world)
        terms["collaborative"] = self._collaborative(views["user"], views["item"], asker, asked["item"], world)
        return terms, user_terms

    def _askers(self, at_B: Tensor) -> ItemBatch:
        """The users of those events as they were before them; popularity = mean log popularity of what they took."""
        device = self.network.item.codebook_LKD.device
        rows_BT, shown_BT = (each.to(device) for each in self.events.context(at_B, self.settings.max_history))
        users = self.network.prepare(self.network.user, pooled(self.catalogue.source, rows_BT, shown_BT))
        return replace(users, popularity_N=histories.shown_mean(self.catalogue.popular_N[rows_BT][..., None], shown_BT)[:, 0])

    def _collaborative(self, user: View, item: View, asker: ItemBatch, asked: histories.Candidates, world: World) -> Tensor:
        """The next-item loss of the towers, with what popularity explains apart from them."""
        bias_BC: Tensor | float = 0.0
        if self.settings.debias:
            assert asker.popularity_N is not None, "askers carry the popularity of what they took"
            popular_C1 = self.catalogue.popular_N[asked.key_C][:, None]
            bias_BC = popularity_bias(self.network.conformity(asker.popularity_N[:, None])[:, 0], self.network.popularity(popular_C1)[:, 0])
        log_share_C = self.events.share_N.to(user.own_BD.device)[asked.key_C].log()
        loss_B = histories.next_item_loss(user.own_BD, item.all_CD, asked, log_share_C, temperature=self.settings.temperature, bias_BC=bias_BC)
        return world.mean(loss_B, user.own_B & item.own_B)

    def after_step(self) -> None:
        """Nothing to do between steps."""

    def start_codes(self, items: ItemBatch, *, generator: torch.Generator) -> None:
        """K-means of the latents of items and of users, level by level."""
        self.network.item.start_codes(items, generator)
        self.network.user.start_codes(self.catalogue.people, generator)

    def revive(self, items: ItemBatch, *, generator: torch.Generator, world: World) -> dict[str, Tensor]:
        """Dead codes of items and of users moved onto badly coded rests."""
        moved = {"item.codebook_LKD": self.network.item.revive(items, generator, world)}
        return moved | {"user.codebook_LKD": self.network.user.revive(self.catalogue.people, generator, world)}

    @torch.no_grad()
    def evaluate(self, items: ItemBatch, *, quantise: bool) -> dict[str, float]:
        """Code use and NMSE of items and (`user/...`) of users, and the terms of the held-out questions.

        `score` = both mean NMSE + the weighted terms in units of what guessing costs.
        """
        quantise = quantise and (self.settings.joint or self.done)
        found = self.network.item.measure(items, quantise=quantise)
        people = self.network.user.measure(self.catalogue.people, quantise=quantise)
        usage_LK = self.network.user.usage_LK.clone()
        at_P = self.events.held_P[: histories.HELD_USERS]
        terms, _ = self._questions(at_P, self._held_twins(at_P), quantise, histories.alone())
        self.network.user.usage_LK.copy_(usage_LK)  # a look at held-out users is no use of their codes
        chance = max(1.0, math.log(len(at_P)) * sum(self._weights().values()))
        score = found.pop("score") + people["score"] + float(self._weighted(terms)) / chance
        asked = {f"held_out/{name}": float(value) for name, value in terms.items()}
        return {**found, **{f"user/{name}": people[name] for name in ("score", "collision_rate", "perplexity")}, **asked, "score": score}

    def _held_twins(self, at_P: Tensor) -> Tensor:
        """For held-out questions the question trained on with the same answer that comes first, or themselves where there is none."""
        first_P, past_P = self.events.from_N[self.events.item_T[at_P]], self.events.from_N[self.events.item_T[at_P] + 1]
        found_P = self.events.by_item_P[first_P.clamp(max=len(self.events.by_item_P) - 1)]
        return torch.where(past_P > first_P, found_P, at_P)


def _log_popularity(items: ItemBatch, events: histories.Events) -> Tensor:
    """Log of the decayed events, or of the events in the histories where nobody counted, with mean 0 and variance 1, (N,)."""
    counts_N = torch.bincount(events.item_T, minlength=len(items)) if items.popularity_N is None else items.popularity_N
    logs_N = counts_N.double().clamp(min=0).log1p()
    return ((logs_N - logs_N.mean()) / logs_N.std(correction=0).clamp(min=1e-6)).float()


class Das(Networked[profile.Das, Network]):
    """The DAS tokenizer (`base.Tokenizer`): `encode` codes items, `encode_users` users; codes are ordered, level l refines the levels before it.

    Args:
        settings: the [train_tokenizer.das] section.
    """

    name = "das"
    section = profile.Das
    build = Network

    @property
    def needs_history(self) -> bool:
        """Histories are half of what it learns from."""
        return True

    @property
    def coder(self) -> Autoencoder:
        """The items' autoencoder: users' codes are a vocabulary of their own, which no refit renames."""
        return self.fitted.item

    def fit(self, items: ItemBatch, options: FitOptions) -> FitReport:
        """Train on a catalogue and its users.

        With `start` the network and the normalisation of its inputs begin as the champion's.
        Raises: ValueError without content or behaviour; ContractError without enough history or for a champion of other sizes.
        """
        history = histories.check(options.history, len(items), who="DAS")
        events = histories.events(history, len(items), who="DAS")
        taken = self._taken(history, most=PEOPLE)
        network = begin(self, lambda network: network.fit_inputs(items, taken), options, items.widths())
        source = network.source(items)
        device = torch.device(best_device())
        people = network.prepare(network.user, pooled(source, *taken)).to(device)
        catalogue = Catalogue(source.to(device), network.prepare(network.item, source).to(device), people, _log_popularity(items, events).to(device))
        training = Training(network.to(device), events, catalogue)
        curves = Trainer(training, catalogue.items, histories.part(options, "dual", events.digest)).run()
        training.done = True
        if not self.settings.joint:
            training.start_codes(catalogue.items, generator=generator_for(options.seed, "codes after alignment"))
        for side in (network.item, network.user):
            side.usage_LK.zero_()
        self.network = network.eval()
        return FitReport(curves=curves, metrics=training.evaluate(catalogue.items, quantise=True))

    def _taken(self, history: History, most: int | None = None) -> tuple[Tensor, Tensor]:
        """The latest items of users, and which places are filled; with `most` of so many users at most, evenly spread over those with events."""
        stop_U, first_U = history.offset_U[1:], history.offset_U[:-1]
        if most is not None:
            seen = torch.nonzero(stop_U > first_U).flatten()
            seen = seen[:: max(1, -(-len(seen) // most))]
            stop_U, first_U = stop_U[seen], first_U[seen]
        return histories.context(history.index_T, stop_U, first_U, self.settings.max_history)

    def encode(self, items: ItemBatch, keep: Keep | None = None) -> TokenizerOutput:
        """Codes of the items' residual walk, weights of one, and the sum of the code rows; an item without content is masked everywhere."""
        return self.coder.tokenise(self._source(items), keep)

    @torch.no_grad()
    def _source(self, items: ItemBatch) -> ItemBatch:
        return self.fitted.source(items.to(self.coder.codebook_LKD.device))

    @torch.no_grad()
    def encode_users(self, items: ItemBatch, history: History) -> TokenizerOutput:
        """Codes of the users of a history as they are at its end, (U, L); a user who took nothing with content is masked everywhere.

        Raises: ContractError if the history names other items.
        """
        history = histories.check(history, len(items), who="DAS")
        source = self._source(items)
        device = source.richness_N.device
        blocks = zip(*(each.split(ENCODE_ROWS) for each in self._taken(history)), strict=True)
        parts = [self.fitted.user.tokenise(pooled(source, rows_BT.to(device), shown_BT.to(device))) for rows_BT, shown_BT in blocks if len(rows_BT)]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("codes_NL", "weights_NL", "quantized_ND")} if parts else None
        empty = torch.zeros(0, self.settings.num_levels)
        return TokenizerOutput(**joined) if joined else TokenizerOutput(codes_NL=empty.long(), weights_NL=empty, quantized_ND=empty)

    def config(self) -> dict[str, Any]:
        """Settings and input widths, JSON; `user_codebook_sizes` says that users have codes too."""
        return super().config() | {"user_codebook_sizes": list(self.fitted.user.sizes)}
