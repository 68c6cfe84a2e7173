"""Users' histories for tokenizers that learn from them: next-item questions, their contexts, a light reader and its loss, and a checkpoint that knows them.

A question is an event with an earlier basket of the same user; its context is the latest `length` events before its own basket, newest first, so nothing
looks ahead. The last event of a tenth of the users is never trained on: early stopping asks it.
Not here: where histories come from (feature.user_sequence), the variants that use them.
Suffixes: T events end to end or places of a context, U users, P questions, B batch, C candidates, N items, D width.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ContractError
from pipeline.tokenizers.alignment import inner_products
from pipeline.tokenizers.base import Checkpoint, FitOptions, History, basket_begins
from pipeline.tokenizers.world import World

LEAST_QUESTIONS = 16  # questions below which there is nothing to learn from
HELD_USERS = 1024  # users at most whose last event is held out
HELD_EVERY = 10  # one user in so many


@dataclass(frozen=True)
class Events:
    """A history as questions.

    Args:
        item_T / user_T: row of the item and number of the user per event; first_T / stop_T: where the user's events and the event's own basket begin.
        train_P / held_P: positions of the events that are questions to train on, and to stop early by.
        share_N: share of events per item, each counted once more than seen, so that none is 0.
        by_item_P: the training questions in the order of their item; from_N: where an item's begin (one longer than there are items).
        digest: names the history.
    """

    item_T: Tensor
    user_T: Tensor
    first_T: Tensor
    stop_T: Tensor
    train_P: Tensor
    held_P: Tensor
    share_N: Tensor
    by_item_P: Tensor
    from_N: Tensor
    digest: str

    def draw(self, noise_BU: Tensor) -> Tensor:
        """A training question per row of two uniform numbers, (B,): positions, every question alike likely."""
        uniform_B = noise_BU[:, 0].double() + noise_BU[:, 1].double() * 2.0**-24  # float32 alone tells only 2^24 questions apart
        return self.train_P[(uniform_B * len(self.train_P)).long().clamp(max=len(self.train_P) - 1)]

    def twins(self, at_B: Tensor, noise_B: Tensor) -> Tensor:
        """For each training question one with the same answer, drawn by a uniform number, (B,): positions; an answer given once is its own twin."""
        item_B = self.item_T[at_B]
        count_B = self.from_N[item_B + 1] - self.from_N[item_B]
        return self.by_item_P[self.from_N[item_B] + (noise_B.double() * count_B).long().minimum(count_B - 1)]

    def context(self, at_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Item rows before each event's basket, newest first, and which places are filled, (B, length) each."""
        return context(self.item_T, self.stop_T[at_B], self.first_T[at_B], length)


def context(item_T: Tensor, stop_B: Tensor, first_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The latest `length` items of [first, stop), newest first, and which places are filled, (B, length) each; an empty place shows row 0."""
    at_BT = stop_B[:, None] - 1 - torch.arange(length, device=stop_B.device)
    shown_BT = at_BT >= first_B[:, None]
    if not len(item_T):
        return torch.zeros_like(at_BT), shown_BT
    return torch.where(shown_BT, item_T[at_BT.clamp(min=0)], 0), shown_BT


def check(history: History | None, num_items: int, *, who: str) -> History:
    """The history, if there is one and it fits the catalogue.

    Raises: ContractError without a history or with rows outside the catalogue.
    """
    if history is None:
        raise _refusal(f"{who} learns from users' histories and got none", "sequences before the cutoff", "none")
    offset_U, index_T = history.offset_U, history.index_T
    if not len(offset_U) or int(offset_U[0]) != 0 or int(offset_U[-1]) != len(index_T) or bool((offset_U.diff() < 0).any()):
        raise _refusal("a history whose offsets do not fit its events", f"ascending offsets from 0 to {len(index_T)}", "others")
    if len(index_T) and not 0 <= int(index_T.min()) <= int(index_T.max()) < num_items:
        raise _refusal("a history names items outside the catalogue", f"rows in [0, {num_items})", f"[{int(index_T.min())}, {int(index_T.max())}]")
    return history


def _refusal(headline: str, expected: str, found: str) -> ContractError:
    return ContractError(headline, expected=expected, found=found, where="feature.user_sequence", next_command="sid run user_sequence --date D")


def events(history: History | None, num_items: int, *, who: str) -> Events:
    """The history as questions.

    Raises: ContractError without a history, with too few events in order, or with rows outside the catalogue.
    """
    history = check(history, num_items, who=who)
    index_T, offset_U = history.index_T, history.offset_U
    user_T = torch.repeat_interleave(torch.arange(len(offset_U) - 1), offset_U.diff())
    first_T = offset_U[:-1][user_T]
    stop_T = torch.where(basket_begins(user_T, history.basket_T), torch.arange(len(user_T)), 0).cummax(0).values
    asked_T = stop_T > first_T
    asked_P = torch.nonzero(asked_T).flatten()
    if len(asked_P) < LEAST_QUESTIONS:
        raise _refusal(f"the histories are too short for {who}", f"{LEAST_QUESTIONS} events with an earlier basket of the same user", str(len(asked_P)))
    held_P = _held(offset_U, asked_T)
    train_P = asked_P[~torch.isin(asked_P, held_P)]
    order_P = index_T[train_P].argsort(stable=True)
    count_N = torch.bincount(index_T, minlength=num_items).double() + 1.0
    return Events(
        item_T=index_T,
        user_T=user_T,
        first_T=first_T,
        stop_T=stop_T,
        train_P=train_P,
        held_P=held_P if len(held_P) else train_P[:HELD_USERS],
        share_N=(count_N / count_N.sum()).float(),
        by_item_P=train_P[order_P],
        from_N=F.pad(torch.bincount(index_T[train_P], minlength=num_items).cumsum(0), (1, 0)),
        digest=hashlib.sha256(b"".join(each.numpy().tobytes() for each in (index_T, offset_U, history.basket_T) if each is not None)).hexdigest(),
    )


def _held(offset_U: Tensor, asked_T: Tensor) -> Tensor:
    """The last events of users, spread evenly over those with three events or more, as far as they are questions."""
    last_U = (offset_U[1:] - 1)[offset_U.diff() >= 3]
    last_U = last_U[asked_T[last_U]]
    return last_U[HELD_EVERY - 1 :: max(HELD_EVERY, -(-len(last_U) // HELD_USERS))]


def shown_mean(x_BTD: Tensor, shown_BT: Tensor) -> Tensor:
    """Mean over the filled places, weighted where `shown` is not boolean, (B, D); 0 where none is."""
    weight_BT1 = shown_BT[..., None].to(x_BTD.dtype)
    return (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1e-6)


class Reader(nn.Module):
    """What a user wants next, from the vectors of the latest items: attention asked by the newest one, then a perceptron; (B, T, D) -> (B, D).

    Args:
        width: of the item vectors; length: places of a context; hidden: width inside.
    """

    def __init__(self, width: int, length: int, hidden: int) -> None:
        super().__init__()
        self.place_TD = nn.Parameter(torch.zeros(length, width))
        self.each, self.newest = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.weigh = nn.Linear(hidden, 1, bias=False)
        self.mix = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x_BTD: Tensor, shown_BT: Tensor) -> Tensor:
        """The next item's expected vector; at least one place of each row is filled."""
        asked_BTH = torch.tanh(self.each(x_BTD + self.place_TD) + self.newest(x_BTD[:, :1]))
        weight_BT = torch.softmax(self.weigh(asked_BTH)[..., 0].float().masked_fill(~shown_BT, -torch.inf), 1)
        pooled_BD = (weight_BT[..., None] * x_BTD).sum(1)
        wanted_BD: Tensor = pooled_BD + self.mix(torch.cat([pooled_BD, x_BTD[:, 0]], 1))
        return wanted_BD


def alone() -> World:
    """A world of this process only: in evaluation every process looks at the same rows."""
    world = World()
    world.size, world.rank = 1, 0
    return world


@dataclass(frozen=True)
class Candidates:
    """Which rows of all processes a row of this one is compared with.

    Args:
        positive_B: the row's own place among them; rival_BC: True where a candidate has another key; key_C: their keys.
    """

    positive_B: Tensor
    rival_BC: Tensor
    key_C: Tensor


def candidates(key_B: Tensor, world: World) -> Candidates:
    """The rows of all processes as candidates; two rows of one key are no negatives of each other."""
    first = world.first_row()
    key_C = world.gather(key_B.double()[:, None])[:, 0].long()
    return Candidates(torch.arange(first, first + len(key_B), device=key_B.device), key_B[:, None] != key_C, key_C)


def next_item_loss(
    wanted_BD: Tensor, answer_CD: Tensor, asked: Candidates, log_share_C: Tensor, *, temperature: float, bias_BC: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of each question's answer among the answers of the batch, nats, (B,).

    Args:
        asked: the answers' items as candidates: the same answer to another question is no negative.
        log_share_C: log of how often the candidate is asked for; taken off, because a batch shows popular answers more often.
        bias_BC: added to cosine / temperature.
    Source: sampling-bias-corrected softmax (Yi et al. 2019), batch softmax with log-frequency correction
    """
    cosine_BC = inner_products(F.normalize(wanted_BD.float(), dim=-1), F.normalize(answer_CD.float(), dim=-1))
    logit_BC = cosine_BC / temperature + bias_BC - log_share_C
    allowed_BC = asked.rival_BC | F.one_hot(asked.positive_B, len(asked.key_C)).bool()
    return F.cross_entropy(logit_BC.masked_fill(~allowed_BC, -torch.inf), asked.positive_B, reduction="none")


def ask(events: Events, at_B: Tensor, look: Callable[[Tensor], Tensor], reader: Reader, *, temperature: float, world: World, popularity: float = 1.0) -> Tensor:
    """Next-item loss of each question, nats, (B,); the distinct items of contexts and answers are looked at once.

    Args:
        look: item rows (R,) -> their vectors (R, D), with gradient.
        popularity: the part of log-frequency that is taken off: with 1 scores learn log p(item | user), with 0 log p(item | user) / p(item).
    """
    rows_BT, shown_BT = events.context(at_B, len(reader.place_TD))
    answer_B = events.item_T[at_B]
    rows_R, back = torch.unique(torch.cat([rows_BT.flatten(), answer_B]), return_inverse=True)
    vectors_RD = look(rows_R)
    device = vectors_RD.device
    seen_XD, answer_BD = (F.embedding(at.to(device), vectors_RD) for at in back.split([rows_BT.numel(), len(at_B)]))
    wanted_BD = reader(seen_XD.unflatten(0, rows_BT.shape), shown_BT.to(device))
    asked = candidates(answer_B.to(device), world)
    log_share_C = popularity * events.share_N.to(device)[asked.key_C].log()
    return next_item_loss(wanted_BD, world.gather(answer_BD), asked, log_share_C, temperature=temperature)


@dataclass(frozen=True)
class Part:
    """One named part of a run in a checkpoint that may hold several, tied to the history it learnt from (`base.Checkpoint`).

    Args:
        whole: where everything is kept; name: of this part; digest: of the history: a state of another history is not resumed.
    """

    whole: Checkpoint
    name: str
    digest: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The part's last state; None before its first save or when it belongs to another history."""
        tensors, parts = self._everything()
        if parts.get(self.name, {}).get("history") != self.digest:
            return None
        prefix = f"{self.name}/"
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, dict(parts[self.name]["run"])

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Keep the part beside the others."""
        kept, parts = self._everything()
        others = {name: value for name, value in kept.items() if not name.startswith(f"{self.name}/")}
        mine = {f"{self.name}/{name}": value for name, value in tensors.items()}
        self.whole.save({**others, **mine}, {"parts": {**parts, self.name: {"history": self.digest, "run": document}}})

    def _everything(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = self.whole.load()
        if found is None or "parts" not in found[1]:
            return {}, {}
        return found[0], found[1]["parts"]


def part(options: FitOptions, name: str, digest: str) -> FitOptions:
    """The options of one named run of a fit: its checkpoint is a part of the whole one, if there is one."""
    return replace(options, checkpoint=Part(options.checkpoint, name, digest)) if options.checkpoint is not None else options
