"""SASRec: each user's events in order in, one behaviour vector per item out, NOT normalised (its length may carry information).

Source: Kang and McAuley 2018. differs: cross-entropy over the whole catalogue (sampled above a size) instead of one negative per positive; windows are
padded at the end, so causal attention needs no mask. The behaviour vector is the item's INPUT row; one table for input and output is the default, two
(`tied = false`) keep its norm apart from how the item is scored, which one table lets fall with the item's count.

Order inside a basket: events of one basket have none; they arrive in an order that a hash deals out and any of them may be the next target, so no id order
is learnt.
Bit-deterministic for a seed on one machine and one number of threads.
Tensor suffixes: B windows, T events end to end, L positions, D width, N items, P predicted positions, S sampled negatives or contexts, M moved items, U users,
C columns, E own events that were drawn, K steps, W draws of an item and step.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import evaluation
from pipeline.config import SasRec as Params
from pipeline.device import deterministic, sent
from pipeline.errors import ContractError
from pipeline.log import progress
from pipeline.tokenizers.base import basket_begins

TABLES = ("input_rows.weight", "output_rows.weight")  # one row per item
CONTEXT = "context."  # what `Contexts` are named by in a state
INIT_STD = 0.02  # small, so that rare rows stay short
CELLS = 16_000_000  # logits held at once while rows are trained
ROW_WINDOWS = 4  # windows per moved item and step
ROW_LENGTH = 12  # events that a window predicts at most: many short windows tell a row more than few long ones (docs/log.md)
ROW_NEGATIVES = 256  # competitors of a step, the same for all rows; a smaller catalogue competes whole
NEIGHBOURS = 5  # events on either side that a new row starts from
ROW_CONTEXTS = 4096  # places of the base's windows where a moved row competes to come next
STEP_CONTEXTS = 1024  # of them in a step, by turns
CONTEXT_WINDOWS = 1024  # windows that these places are drawn from
ROW_RATE = 3.0  # first step size of a row, in units of learning_rate; it falls to nothing over row_steps


@dataclass(frozen=True)
class Sequences:
    """Users' events end to end, oldest first: user u has items[offsets[u] : offsets[u + 1]].

    Args:
        offsets: int64 [U + 1].
        items: int64 item_index [T].
        baskets: int64 [T], equal = no order between the events; None = every event stands alone.
    """

    offsets: Tensor
    items: Tensor
    baskets: Tensor | None = None

    def users(self, rows: Tensor) -> Sequences:
        """The sequences of some users, in the order of `rows`."""
        length = self.offsets.diff()[rows]
        offsets = F.pad(length.cumsum(0), (1, 0))
        take = torch.arange(int(offsets[-1])) + torch.repeat_interleave(self.offsets[rows] - offsets[:-1], length)
        return Sequences(offsets, self.items[take], None if self.baskets is None else self.baskets[take])


@dataclass(frozen=True)
class TrainedEncoder:
    """What training leaves.

    Args:
        item_vectors: behaviour vectors [N, D], the input rows.
        state: the network's tensors, by name.
        curves: per epoch: loss (nats), valid_ndcg@10.
        metrics: epochs, best_epoch, valid_* of the best epoch, valid_users.
    """

    item_vectors: Tensor
    state: dict[str, Tensor]
    curves: dict[str, list[float]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Holdout:
    """Next-item questions: what came before (a window of events) and the item that followed."""

    users: Tensor
    start: Tensor
    stop: Tensor
    targets: Tensor


# ---------------------------------------------------------------- network


class Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward, both pre-norm and residual, [B, L, D] -> [B, L, D]."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.num_heads, self.dropout = params.num_heads, params.dropout
        self.norm_attention, self.norm_feed = nn.LayerNorm(params.dim), nn.LayerNorm(params.dim)
        self.qkv, self.mix = nn.Linear(params.dim, 3 * params.dim), nn.Linear(params.dim, params.dim)
        self.feed = nn.Sequential(nn.Linear(params.dim, params.dim), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(params.dim, params.dim))

    def forward(self, x_BLD: Tensor, at_P: tuple[Tensor, ...] | None = None) -> Tensor:
        """The block's output [B, L, D], or at some (window, position) alone [P, D]."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_attention(x_BLD)).chunk(3, dim=-1))
        mixed_BLD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if at_P is not None:
            x_BLD, mixed_BLD = x_BLD[at_P], mixed_BLD[at_P]
        x_BLD = x_BLD + F.dropout(self.mix(mixed_BLD), self.dropout, self.training)
        return x_BLD + F.dropout(self.feed(self.norm_feed(x_BLD)), self.dropout, self.training)


class SasRec(nn.Module):
    """Item rows, positions and attention blocks; the row after the last item is padding and stays zero."""

    def __init__(self, num_items: int, params: Params) -> None:
        super().__init__()
        self.num_items, self.dropout, self.scale = num_items, params.dropout, params.dim**0.5
        self.input_rows = nn.Embedding(num_items + 1, params.dim, padding_idx=num_items)
        self.output_rows = None if params.tied else nn.Embedding(num_items, params.dim)
        self.positions = nn.Embedding(params.max_length, params.dim)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.num_blocks))
        self.norm = nn.LayerNorm(params.dim)
        self.apply(_initialise)
        with torch.no_grad():
            self.input_rows.weight[num_items].zero_()

    def forward(self, inputs_BL: Tensor) -> Tensor:
        """Hidden state after each event [B, L, D]; its product with an output row is that item's logit of coming next."""
        return self.encode(self.input_rows(inputs_BL))

    def encode(self, rows_BLD: Tensor, at_P: tuple[Tensor, ...] | None = None) -> Tensor:
        """Hidden states [B, L, D] from item rows [B, L, D] instead of item indices, or at some (window, position) alone [P, D]."""
        x_BLD = rows_BLD * self.scale + self.positions.weight[: rows_BLD.shape[1]]
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = block(x_BLD)
        return self.norm(last(x_BLD, at_P))

    def output_table(self) -> Tensor:
        """Output rows [N, D]; with tied tables the input rows without padding."""
        return self.input_rows.weight[: self.num_items] if self.output_rows is None else self.output_rows.weight

    def input_table(self) -> Tensor:
        """Input rows [N, D] without padding: the behaviour vectors."""
        return self.input_rows.weight[: self.num_items]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def restore(state: Mapping[str, Tensor], params: Params) -> SasRec:
    """The network of a state, strict but for the contexts that may lie beside it, ready to be read: no dropout, no gradient."""
    model = SasRec(state["input_rows.weight"].shape[0] - 1, params)
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(CONTEXT)}, strict=True)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- losses


def full_softmax(hidden_PD: Tensor, targets_P: Tensor, table_ND: Tensor) -> Tensor:
    """Mean cross-entropy of the target among all items, nats, scalar."""
    return F.cross_entropy(hidden_PD @ table_ND.T, targets_P)


def sampled_softmax(hidden_PD: Tensor, targets_P: Tensor, table_ND: Tensor, negatives_S: Tensor) -> Tensor:
    """Mean cross-entropy of the target among itself and shared uniform negatives, each standing for (N - 1) / S items; nats, scalar.

    A negative that is the target itself is left out. With every item drawn once and the target left out this is the full softmax.
    """
    positive_P1 = (hidden_PD * table_ND[targets_P]).sum(1, keepdim=True)
    negative_PS = hidden_PD @ table_ND[negatives_S].T
    hit_PS = negatives_S[None, :] == targets_P[:, None]
    stands_for_P1 = ((table_ND.shape[0] - 1) / (~hit_PS).sum(1, keepdim=True).clamp(min=1)).log()
    logits = torch.cat([positive_P1, (negative_PS + stands_for_P1).masked_fill(hit_PS, -torch.inf)], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets_P))


# ---------------------------------------------------------------- windows


def window_bounds(offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(start, stop) of the training windows over (event, next event) pairs, int64 [B] each, cut from each user's latest pair backwards.

    Every pair lies in exactly one window; a user with fewer than two events has none.
    """
    pairs_U = (offsets.diff() - 1).clamp(min=0)
    windows_U = (pairs_U + length - 1) // length
    user_B = torch.repeat_interleave(torch.arange(windows_U.numel()), windows_U)
    back_B = torch.arange(user_B.numel()) - (windows_U.cumsum(0) - windows_U)[user_B]
    stop_B = pairs_U[user_B] - back_B * length
    return offsets[:-1][user_B] + (stop_B - length).clamp(min=0), offsets[:-1][user_B] + stop_B


def next_baskets(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(where the user's next basket begins, how many events it has) of every event, int64 [T] each; it has none after the user's last one.

    Without baskets every event is one, so that this is the next event.
    """
    total = sequences.items.numel()
    user_T = torch.repeat_interleave(torch.arange(sequences.offsets.numel() - 1), sequences.offsets.diff())
    begins_T = basket_begins(user_T, sequences.baskets)
    start_K = torch.nonzero(begins_T).flatten()
    size_K = F.pad(start_K, (0, 1), value=total).diff()
    next_T = begins_T.cumsum(0).clamp(max=max(start_K.numel() - 1, 0))  # counted from 1: the number of the basket after an event's own
    after_T = start_K[next_T]
    own_T = (after_T > torch.arange(total)) & (user_T[after_T] == user_T)
    return after_T, torch.where(own_T, size_K[next_T], 0)


def gather(items_T: Tensor, start_B: Tensor, stop_B: Tensor, length: int, pad: int) -> Tensor:
    """Events start .. stop - 1 of each window [B, length], padded at the end."""
    at_BL = start_B[:, None] + torch.arange(length, device=start_B.device)
    return torch.where(at_BL < stop_B[:, None], items_T[at_BL.clamp(max=max(items_T.numel() - 1, 0))], pad)


def places(length_B: Tensor, total: int, width: int) -> Tensor:
    """Where the events of padded windows stand in the flattened [B, width], int64 [P], ascending.

    Args:
        total: P, the sum of the lengths; whoever made the windows knows it, so an accelerator need not be waited for.
    """
    row_P = torch.repeat_interleave(torch.arange(length_B.numel(), device=length_B.device), length_B, output_size=total)
    first_B = length_B.cumsum(0) - length_B
    return row_P * width + torch.arange(total, device=length_B.device) - first_B[row_P]


def holdout(sequences: Sequences, max_users: int, length: int, seed: int, *, new: bool = False) -> tuple[Sequences, Holdout]:
    """(sequences without the last basket of some users, the questions that these baskets answer).

    A question's context is every earlier event (the latest `length`), its target the first event of the last basket: baskets are shuffled, so this is any of
    them. Only users with at least two earlier events are asked; at most `max_users`, drawn by the seed.

    Args:
        new: ask only for items that the user has not had; for rankings that the history leaves, where an item out of it would tell itself.
    """
    last_U = _last_basket_start(sequences)
    able_U = last_U - sequences.offsets[:-1] >= 2
    able = torch.nonzero(able_U & ~_had(sequences, last_U) if new else able_U).flatten()
    asked = able[torch.randperm(able.numel(), generator=_generator(seed))[:max_users]].sort().values
    stop_U = sequences.offsets[1:].clone()
    stop_U[asked] = last_U[asked]
    user_T = torch.repeat_interleave(torch.arange(stop_U.numel()), sequences.offsets.diff())
    kept_T = torch.arange(sequences.items.numel()) < stop_U[user_T]
    offsets = F.pad((stop_U - sequences.offsets[:-1]).cumsum(0), (1, 0))
    rest = Sequences(offsets, sequences.items[kept_T], None if sequences.baskets is None else sequences.baskets[kept_T])
    stop = offsets[1:][asked]
    return rest, Holdout(asked, torch.maximum(stop - length, offsets[:-1][asked]), stop, sequences.items[last_U[asked]])


def _had(sequences: Sequences, at_U: Tensor) -> Tensor:
    """Whether each user had the item of the event `at_U` before it, bool [U]."""
    user_T = torch.repeat_interleave(torch.arange(at_U.numel()), sequences.offsets.diff())
    place_T = at_U[user_T]
    again_T = (sequences.items == sequences.items[place_T]) & (torch.arange(user_T.numel()) < place_T)
    return torch.bincount(user_T[again_T], minlength=at_U.numel()) > 0


def _last_basket_start(sequences: Sequences) -> Tensor:
    """Where each user's last basket begins, int64 [U]; the end of the user for one without events."""
    stop_U = sequences.offsets[1:]
    if sequences.baskets is None:
        return torch.maximum(stop_U - 1, sequences.offsets[:-1])
    user_T = torch.repeat_interleave(torch.arange(stop_U.numel()), sequences.offsets.diff())
    in_last_T = sequences.baskets == sequences.baskets[stop_U - 1][user_T]
    return stop_U - torch.bincount(user_T[in_last_T], minlength=stop_U.numel())


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Champion:
    """An encoder that training may begin at.

    Args:
        state: its network.
        place_N: row of each item in its tables, int64 [N]; -1 for an item that it does not know.
    """

    state: Mapping[str, Tensor]
    place_N: Tensor


def lay(champion: Champion, model: SasRec) -> None:
    """Put the champion's blocks, and the rows of the items it knows, into a fresh network; other items keep their random rows.

    Raises: ContractError if the champion's network has other sizes.
    """
    fresh = model.state_dict()
    known_N = champion.place_N >= 0
    for name, tensor in fresh.items():
        old = champion.state.get(name)
        table = name in TABLES
        if old is None or old.shape[table:] != tensor.shape[table:]:
            raise ContractError(
                "training cannot begin at this champion",
                expected=f"{name} of shape {tuple(tensor.shape)}",
                found="none" if old is None else f"shape {tuple(old.shape)}",
                where="the parent's behaviour encoder",
                next_command="sid run refresh --date D --set plan_night.policy=cold",
            )
        if table:
            tensor[: len(known_N)][known_N] = old[champion.place_N[known_N]].to(tensor.device)
        else:
            tensor.copy_(old)


def train(
    sequences: Sequences, num_items: int, params: Params, *, seed: int, device: str = "cpu", what: str = "sasrec", champion: Champion | None = None
) -> TrainedEncoder:
    """The trained encoder at its best epoch by validation NDCG@10 (full ranking, history not masked).

    The last basket of up to `valid_users` users is held out for that; without such users all epochs are run and the last one stays.
    Raises: ValueError when no user has two events.
    """
    rest, questions = holdout(sequences, params.valid_users, params.max_length, seed)
    start_B, stop_B = window_bounds(rest.offsets, params.max_length)
    if not start_B.numel():
        raise ValueError("no user has two events: there is no order to learn from")
    with deterministic(seed):
        model = SasRec(num_items, params).to(device)
        if champion is not None:
            lay(champion, model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=0.0, fused=device != "cpu" or None)
        best = Best(model, params.patience)
        curves: dict[str, list[float]] = {"loss": [], "valid_ndcg@10": []}
        for _ in progress(range(params.max_epochs), what, params.max_epochs):
            curves["loss"].append(_epoch(model, optimizer, rest.items, start_B, stop_B, params))
            metrics = evaluation.ranking_metrics(answer(model, rest, questions), (10, 50)) if questions.users.numel() else {}
            curves["valid_ndcg@10"].append(metrics.get("ndcg@10", float("nan")))
            if best.stop(metrics):
                break
    model.load_state_dict(best.state)
    found = {"epochs": float(len(curves["loss"])), "best_epoch": float(best.epoch), "valid_users": float(questions.users.numel())}
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if params.tied:
        state |= Contexts.drawn(model.eval(), rest, params.max_length, seed, events=sequences.items.numel()).state()
    vectors = state["input_rows.weight"][:num_items].clone()
    return TrainedEncoder(vectors, state, curves, found | {f"valid_{name}": value for name, value in best.metrics.items()})


def answer(model: SasRec, sequences: Sequences, questions: Holdout, *, mask_history: bool = False) -> NDArray[np.float64]:
    """Rank of every question's target over the full catalogue, float64 [B].

    Args:
        mask_history: the user's earlier events leave the ranking.
    """
    device = model.positions.weight.device
    length = model.positions.num_embeddings

    def score(rows: slice) -> Tensor:
        """Score of every item for these questions [B, N]."""
        start, stop = questions.start[rows], questions.stop[rows]
        hidden_BLD = model(gather(sequences.items, start, stop, length, model.num_items).to(device))
        last_BD = hidden_BLD[torch.arange(start.numel(), device=device), (stop - start - 1).to(device)]
        return (last_BD @ model.output_table().T).cpu()

    asked = sequences.users(questions.users)
    history = evaluation.Packed(asked.offsets.numpy(), asked.items.numpy())
    model.eval()
    with torch.no_grad():
        return evaluation.ranks_in_chunks(score, questions.targets.numpy(), model.num_items, history if mask_history else None)


class Best:
    """Remembers the best epoch and says when to stop."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.epoch, self.seen, self.score = 0, 0, -1.0
        self.metrics: dict[str, float] = {}
        self.state: dict[str, Tensor] = {}

    def stop(self, metrics: dict[str, float]) -> bool:
        """Whether `patience` epochs brought nothing better; without metrics every epoch is the best so far."""
        self.seen += 1
        score = metrics.get("ndcg@10", float(self.seen))
        if score > self.score:
            self.epoch, self.score, self.metrics = self.seen, score, metrics
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return self.seen - self.epoch >= self.patience


def _epoch(model: SasRec, optimizer: torch.optim.Optimizer, items_T: Tensor, start_B: Tensor, stop_B: Tensor, params: Params) -> float:
    """Mean loss of one pass over all windows, in a new random order."""
    model.train()
    device = model.positions.weight.device
    order = torch.randperm(start_B.numel())
    events = [int(part_B.sum()) for part_B in (stop_B - start_B)[order].split(params.batch_size)]
    items_T, *bounds = items_T.to(device), *(bound_B[order].to(device).split(params.batch_size) for bound_B in (start_B, stop_B))
    losses = []
    for total, first_B, last_B in zip(events, *bounds, strict=True):
        inputs_BL = gather(items_T, first_B, last_B, params.max_length, model.num_items)
        targets_BL = gather(items_T, first_B + 1, last_B + 1, params.max_length, model.num_items)
        real_P = places(last_B - first_B, total, params.max_length)
        hidden_PD = model(inputs_BL).flatten(0, 1)[real_P]
        loss = _loss(hidden_PD, targets_BL.flatten()[real_P], model.output_table(), params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _loss(hidden_PD: Tensor, targets_P: Tensor, table_ND: Tensor, params: Params) -> Tensor:
    if table_ND.shape[0] <= params.sampled_above:
        return full_softmax(hidden_PD, targets_P, table_ND)
    negatives_S = sent(torch.randint(table_ND.shape[0], (params.num_negatives,)), table_ND.device)
    return sampled_softmax(hidden_PD, targets_P, table_ND, negatives_S)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- rows of a frozen generation


@dataclass(frozen=True)
class Rows:
    """Input and output rows of moved items, [M, D] each."""

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Contexts:
    """Where a row competes to come next: a sample of what the base has read, drawn when it was trained, so that a frozen night needs no other user's events.

    Args:
        hidden_SD: hidden states at random places of the training windows.
        log_total_S: log of the sum over the base's items of exp(score) there.
        events: events of the sequences, the held-out ones among them, as an item's own are counted on a frozen night.
    """

    hidden_SD: Tensor
    log_total_S: Tensor
    events: int

    @classmethod
    @torch.no_grad()
    def drawn(cls, model: SasRec, sequences: Sequences, length: int, seed: int, *, events: int) -> Contexts:
        """A sample of the training events of a trained network."""
        start_B, stop_B = window_bounds(sequences.offsets, length)
        some = torch.randperm(start_B.numel(), generator=_generator(seed))[:CONTEXT_WINDOWS]
        start_B, stop_B = start_B[some], stop_B[some]
        device, table_ND = model.positions.weight.device, model.output_table()
        tokens_BL = gather(sequences.items, start_B, stop_B, length, model.num_items).to(device)
        at_P = places(stop_B - start_B, int((stop_B - start_B).sum()), length)
        at_S = at_P[torch.randperm(at_P.numel(), generator=_generator(seed))[:ROW_CONTEXTS]].to(device)
        hidden_SD = model(tokens_BL).flatten(0, 1)[at_S]
        log_total_S = torch.cat([torch.logsumexp(part @ table_ND.T, 1) for part in hidden_SD.split(max(1, CELLS // model.num_items))])
        return cls(hidden_SD.cpu(), log_total_S.cpu(), events)

    def state(self) -> dict[str, Tensor]:
        """The sample as named tensors."""
        return {
            f"{CONTEXT}hidden_SD": self.hidden_SD,
            f"{CONTEXT}log_total_S": self.log_total_S,
            f"{CONTEXT}events": torch.tensor([self.events]),
        }

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Contexts | None:
        """The sample of a state; None for two tables, and for an encoder from before there was one."""
        if f"{CONTEXT}events" not in state:
            return None
        return cls(state[f"{CONTEXT}hidden_SD"], state[f"{CONTEXT}log_total_S"], int(state[f"{CONTEXT}events"]))

    def to(self, device: torch.device) -> Contexts:
        """On a device."""
        return replace(self, hidden_SD=self.hidden_SD.to(device), log_total_S=self.log_total_S.to(device))


def initial_rows(model: SasRec, sequences: Sequences, moved_M: Tensor) -> tuple[Rows, Tensor]:
    """(where moved items' rows start, whether any base item stands near them, bool [M]).

    An item of the base starts from its base row. A new one starts from the mean of the base rows within NEIGHBOURS events of its own.

    Args:
        sequences: item_index >= N marks items that the base does not have.
        moved_M: item_index of the moved items, distinct.
    """
    near_O, slot_O = _neighbours(sequences, moved_M, model.num_items)
    count_M = torch.bincount(slot_O, minlength=moved_M.numel())
    is_base_M1 = (moved_M < model.num_items)[:, None]
    own_M = moved_M.clamp(max=model.num_items - 1)

    def start(table_ND: Tensor) -> Tensor:
        """First rows in the space of this table [M, D]."""
        total_MD = torch.zeros(moved_M.numel(), table_ND.shape[1]).index_add_(0, slot_O, table_ND[near_O])
        return torch.where(is_base_M1, table_ND[own_M], total_MD / count_M.clamp(min=1)[:, None])

    return Rows(start(model.input_table().cpu()), start(model.output_table().cpu())), count_M > 0


def _neighbours(sequences: Sequences, moved_M: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """(base item, slot of the moved item it stands near) for every pair of events at most NEIGHBOURS apart in one sequence."""
    user_T = torch.repeat_interleave(torch.arange(sequences.offsets.numel() - 1), sequences.offsets.diff())
    slot_T = _slots(sequences.items, moved_M)
    at_O1 = torch.nonzero(slot_T >= 0)
    near_OK = at_O1 + torch.tensor([step for step in range(-NEIGHBOURS, NEIGHBOURS + 1) if step])
    inside_OK = (near_OK >= 0) & (near_OK < sequences.items.numel())
    near_OK = near_OK.clamp(0, max(sequences.items.numel() - 1, 0))
    good_OK = inside_OK & (user_T[near_OK] == user_T[at_O1]) & (sequences.items[near_OK] < num_items)
    return sequences.items[near_OK[good_OK]], slot_T[at_O1].expand_as(near_OK)[good_OK]


def _slots(items_T: Tensor, moved_M: Tensor) -> Tensor:
    """Position of every event's item among the moved items, -1 for the others, int64 [T]."""
    lookup = torch.full((int(max(items_T.max(), moved_M.max())) + 1,), -1)
    lookup[moved_M] = torch.arange(moved_M.numel())
    return lookup[items_T]


def train_rows(
    model: SasRec, sequences: Sequences, moved_M: Tensor, start: Rows, seeds_M: Tensor, params: Params, contexts: Contexts | None = None
) -> tuple[Tensor, list[float]]:
    """(trained input rows of the moved items [M, D], mean loss per step): everything but these rows is held at the base.

    What is exact: an item's row is a function of the base, of the windows around its own events and of its own seed. Other moved items stand at their BASE row
    in its windows, items without a base row drop out of them, the competitors are base items drawn by the step alone, and Adam works on each element by
    itself. So the row does not depend on which other items moved, up to the rounding of batched products.
    differs from training everything: the loss is taken where the row can be read, from the item's first event in a window on. These windows hold their item
    far oftener than others do, so as a next item the row does not learn from them: with one table it learns from the base's contexts (`_RowTask.as_next`),
    with two, or without contexts, it stays where it starts.

    Args:
        model: the base network, as from `restore`.
        sequences: item_index >= N marks items that the base does not have.
        seeds_M: int64, one per moved item; decides which of its windows each step sees.
        contexts: of a base with one table.
    """
    if not moved_M.numel():
        return start.inputs, []
    events = OwnEvents.of(sequences, moved_M)
    size = max(1, CELLS // (ROW_WINDOWS * ROW_LENGTH * min(model.num_items, ROW_NEGATIVES)))
    chunks = torch.arange(moved_M.numel()).split(size)
    rows, losses = [], []
    with deterministic(0):
        for chunk in progress(chunks, "behaviour rows", len(chunks)):
            task = _RowTask(model, sequences, moved_M[chunk], events.part(chunk), seeds_M[chunk], params, contexts)
            trained_MD, loss = task.fit(Rows(start.inputs[chunk], start.outputs[chunk]))
            rows.append(trained_MD)
            losses.append(torch.tensor(loss) * chunk.numel())
    curve = (torch.stack(losses).sum(0) / moved_M.numel()).tolist()
    return torch.cat(rows), curve


@dataclass(frozen=True)
class OwnEvents:
    """Event numbers of each moved item in order, end to end: those of item m are at_O[offsets_M[m] : offsets_M[m + 1]]."""

    at_O: Tensor
    offsets_M: Tensor

    @classmethod
    def of(cls, sequences: Sequences, moved_M: Tensor) -> OwnEvents:
        """Found in one look at all events, however many chunks the items are trained in."""
        slot_T = _slots(sequences.items, moved_M)
        at_O = torch.nonzero(slot_T >= 0).flatten()
        order = slot_T[at_O].sort(stable=True).indices
        return cls(at_O[order], F.pad(torch.bincount(slot_T[at_O], minlength=moved_M.numel()).cumsum(0), (1, 0)))

    def part(self, chunk: Tensor) -> OwnEvents:
        """Those of some moved items that stand beside each other."""
        offsets_M = self.offsets_M[int(chunk[0]) : int(chunk[-1]) + 2]
        return OwnEvents(self.at_O[int(offsets_M[0]) : int(offsets_M[-1])], offsets_M - offsets_M[0])

    def drawn(self, seeds_M: Tensor, count: int) -> Tensor:
        """Event numbers [M, count], drawn with replacement from each item's own events by its own seed.

        Raises: ValueError when a moved item has no event.
        """
        events_M = self.offsets_M.diff()
        if not bool((events_M > 0).all()):
            raise ValueError(f"{int((events_M == 0).sum())} moved items have no event")
        pick_MC = (torch.from_numpy(uniform(seeds_M.numpy(), count)) * events_M[:, None]).long()
        return self.at_O[self.offsets_M[:-1, None] + pick_MC]


class _RowTask:
    """Moved items that are trained side by side; `M` counts this chunk only."""

    def __init__(
        self, model: SasRec, sequences: Sequences, moved_M: Tensor, events: OwnEvents, seeds_M: Tensor, params: Params, contexts: Contexts | None = None
    ) -> None:
        self.model, self.sequences, self.params = model, sequences, params
        self.device = model.positions.weight.device
        self.moved_M = moved_M.to(self.device)
        self.contexts = None if contexts is None else contexts.to(self.device)
        self.pad, self.own = model.num_items, model.num_items + 1
        at_E, pick_MC = torch.unique(events.drawn(seeds_M, params.row_steps * ROW_WINDOWS), return_inverse=True)
        self.tokens_EL = self.tokens(at_E, sequences.items[at_E]).to(self.device)
        self.pick_MKW = pick_MC.unflatten(1, (params.row_steps, ROW_WINDOWS)).sort(2).values.to(self.device)
        if self.contexts is not None:
            self.others_SM, self.rarity_M = self.rivals(self.contexts, events.offsets_M.diff())
            self.parts = max(1, len(self.others_SM) // STEP_CONTEXTS)

    def fit(self, start: Rows) -> tuple[Tensor, list[float]]:
        """(trained input rows [M, D], mean loss per step); the step size falls linearly to nothing."""
        inputs_MD = start.inputs.to(self.device).clone().requires_grad_()
        outputs_MD = start.outputs.to(self.device)
        optimizer = torch.optim.Adam([inputs_MD], lr=self.params.learning_rate)
        curve = []
        for step in range(self.params.row_steps):
            optimizer.param_groups[0]["lr"] = self.params.learning_rate * ROW_RATE * (1 - step / self.params.row_steps)
            loss_M = self.loss(step, inputs_MD, outputs_MD if self.contexts is None else inputs_MD.detach())
            optimizer.zero_grad()
            loss_M.sum().backward()
            optimizer.step()
            curve.append(loss_M.detach().mean())
        return inputs_MD.detach().cpu(), torch.stack(curve).tolist()

    def windows(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [B, L + 1], whose they are, how often the step drew them) of the different windows of a step: rare items have few."""
        pick_MW = self.pick_MKW[:, step]
        first_MW = F.pad(pick_MW.diff(dim=1) != 0, (1, 0), value=True)
        at_B = torch.nonzero(first_MW.flatten()).flatten()
        times_B = F.pad(at_B, (0, 1), value=first_MW.numel()).diff()
        return self.tokens_EL[pick_MW[first_MW]], at_B // ROW_WINDOWS, times_B

    def loss(self, step: int, inputs_MD: Tensor, outputs_MD: Tensor) -> Tensor:
        """Mean cross-entropy over the positions of each item's windows of this step, and `as_next` with contexts, nats [M]; 0 for an item without positions."""
        tokens_BL, slot_B, times_B = self.windows(step)
        before_BL, after_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
        own_BL = before_BL == self.own
        reads_BL = own_BL.cumsum(1) > 0  # attention is causal: nothing before reads the row
        at_P = torch.nonzero((reads_BL & (after_BL != self.pad)) | (after_BL == self.own), as_tuple=True)
        after_P, slot_P, times_P = after_BL[at_P], slot_B[at_P[0]], times_B[at_P[0]]
        counts_P = times_P * reads_BL[at_P]
        base_BLD = self.model.input_rows(before_BL.clamp(max=self.pad))
        hidden_PD = self.model.encode(torch.where(own_BL[:, :, None], inputs_MD[slot_B][:, None, :], base_BLD), at_P)
        zeros_M = torch.zeros(self.moved_M.numel(), device=self.device)
        total_M = zeros_M.index_add(0, slot_P, counts_P * self.cross_entropy(hidden_PD, after_P, slot_P, outputs_MD, step))
        if self.contexts is not None:
            is_next_P = after_P == self.own
            total_M = total_M + self.as_next(self.contexts, step, hidden_PD[is_next_P].detach(), slot_P[is_next_P], times_P[is_next_P], inputs_MD)
        return total_M / zeros_M.index_add(0, slot_P, counts_P.float()).clamp(min=1)

    def as_next(self, contexts: Contexts, step: int, hidden_OD: Tensor, slot_O: Tensor, times_O: Tensor, rows_MD: Tensor) -> Tensor:
        """What the moved rows add to the full softmax as next items, for as many events as these windows show of each, nats [M].

        Over all T places of the training a row r of an item with n events adds sum_t log(1 + exp(h_t r - log Z_t)) - sum_own h_t r, where Z_t is the base's sum
        without the item: it is pulled where it came next and pushed everywhere. Here the first sum is T times its mean over the step's contexts; both count per
        own event.

        Args:
            hidden_OD, slot_O, times_O: hidden states before the own events of the windows, whose they are, and how often each counts.
        """
        zeros_M = torch.zeros(len(rows_MD), device=self.device)
        pull_M = zeros_M.index_add(0, slot_O, times_O * (hidden_OD * rows_MD[slot_O]).sum(1))
        part = slice(step % self.parts, None, self.parts)
        push_M = self.rarity_M * F.softplus(contexts.hidden_SD[part] @ rows_MD.T - self.others_SM[part]).mean(0)
        return zeros_M.index_add(0, slot_O, times_O.float()) * push_M - pull_M

    def rivals(self, contexts: Contexts, count_M: Tensor) -> tuple[Tensor, Tensor]:
        """(log Z without the moved item at each context [S, M], events of the training per event of the item [M])."""
        base_row_MD = self.model.output_table()[self.moved_M.clamp(max=self.pad - 1)]
        share_SM = (contexts.hidden_SD @ base_row_MD.T - contexts.log_total_S[:, None]).exp() * (self.moved_M < self.pad)
        others_SM = contexts.log_total_S[:, None] + torch.log1p(-share_SM.clamp(max=1 - 1e-6))
        return others_SM, (contexts.events / count_M.clamp(min=1)).to(self.device)

    def tokens(self, at_B: Tensor, item_B: Tensor) -> Tensor:
        """The window around each event [B, L + 1]: base items, `own` for the moved item itself, others dropped, padding at the end."""
        offsets, length = self.sequences.offsets, min(ROW_LENGTH, self.params.max_length)
        user_B = torch.searchsorted(offsets, at_B, right=True) - 1
        last_start_B = torch.maximum(offsets[user_B], offsets[user_B + 1] - length - 1)
        start_B = torch.minimum(torch.maximum(at_B - length // 2, offsets[user_B]), last_start_B)
        stop_B = torch.minimum(start_B + length + 1, offsets[user_B + 1])
        items_BL = gather(self.sequences.items, start_B, stop_B, length + 1, -1)
        own_BL = items_BL == item_B[:, None]
        tokens_BL = torch.where(own_BL, self.own, torch.where((items_BL >= 0) & (items_BL < self.pad), items_BL, self.pad))
        order_BL = (tokens_BL == self.pad).to(torch.uint8).sort(dim=1, stable=True).indices
        return tokens_BL.gather(1, order_BL)

    def cross_entropy(self, hidden_PD: Tensor, after_P: Tensor, slot_P: Tensor, outputs_MD: Tensor, step: int) -> Tensor:
        """Negative log-likelihood of each next item, nats [P]; the moved item competes with its own row, the base items with theirs."""
        table_ND, is_own_P = self.model.output_table(), after_P == self.own
        item_S, weight_S = self.competitors(step)
        hits = _found(item_S, torch.stack([after_P, self.moved_M[slot_P]]))  # the target competes once, the moved item not with its base row
        others_P = _LogTotal.apply(hidden_PD, table_ND[item_S], weight_S, hits)
        own_P = (hidden_PD * outputs_MD[slot_P]).sum(1)
        target_P = (hidden_PD * table_ND[after_P.clamp(max=self.pad - 1)]).sum(1)
        total_P = torch.logaddexp(torch.logaddexp(others_P, own_P), target_P.masked_fill(is_own_P, -torch.inf))
        return total_P - torch.where(is_own_P, own_P, target_P)

    def competitors(self, step: int) -> tuple[Tensor, Tensor]:
        """(base items that a step's targets compete with, log of how many items each stands for) [S], ascending: a small catalogue, or a sample by the step."""
        if self.pad <= ROW_NEGATIVES:
            return torch.arange(self.pad, device=self.device), torch.zeros(self.pad, device=self.device)
        item_S, times_S = torch.randint(self.pad, (ROW_NEGATIVES,), generator=_generator(step)).unique(return_counts=True)
        return item_S.to(self.device), (times_S * (self.pad / ROW_NEGATIVES)).log().to(self.device)


def _found(item_S: Tensor, wanted_KP: Tensor) -> tuple[Tensor, Tensor]:
    """(places p, their s) of all k with item_S[s] = wanted_KP[k, p]; `item_S` ascends."""
    at_KP = torch.searchsorted(item_S, wanted_KP).clamp(max=item_S.numel() - 1)
    found_KP = item_S[at_KP] == wanted_KP
    return torch.nonzero(found_KP)[:, 1], at_KP[found_KP]


class _LogTotal(torch.autograd.Function):
    """log sum_s exp(h_p t_s + w_s) without some pairs (p, s) [P].

    Its gradient to h is the mean of the rows t by their shares of the sum, made of the same exponentials, so that only [P, D] is kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, table_SD: Tensor, weight_S: Tensor, without: tuple[Tensor, Tensor]) -> Tensor:
        """The sum's log [P]; where every pair is taken out, the lowest number there is."""
        score_PS = torch.addmm(weight_S, hidden_PD, table_SD.T)
        score_PS[without] = -torch.inf
        top_P1 = score_PS.amax(1, keepdim=True).clamp(min=torch.finfo(score_PS.dtype).min)
        share_PS = score_PS.sub_(top_P1).exp_()
        total_P1 = share_PS.sum(1, keepdim=True).clamp(min=1)  # the highest alone is 1
        ctx.mean_PD = share_PS @ table_SD / total_P1
        return (top_P1 + total_P1.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the hidden states; the base's rows have none."""
        return gradients[0][:, None] * ctx.mean_PD, None, None, None


def uniform(seeds_M: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) as [M, count], row m from seed m alone (a counter hashed by splitmix64)."""
    state = seeds_M.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


# ---------------------------------------------------------------- bringing a new space back


def procrustes(source_ND: Tensor, target_ND: Tensor) -> Tensor:
    """The orthogonal map [D, D] that brings source nearest to target, source @ map ~ target; norms and angles within source stay.

    Source: Schoenemann 1966, orthogonal Procrustes.
    """
    u, _, vt = torch.linalg.svd(source_ND.double().T @ target_ND.double())
    return (u @ vt).to(source_ND.dtype)
