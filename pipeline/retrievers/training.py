"""The one training loop of all retrievers, and the rank of every question's target under a trained one.

What is learnt is what is asked: an item of the user's next basket, because inside a basket there is no order. Without baskets that is the next event.
Bit-deterministic for a seed on one machine and one number of threads. Test questions are never seen here before they are ranked.
Tensor suffixes: B rows, T history, U distinct histories, W beams, N items, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import evaluation
from pipeline.config import TrainRetriever
from pipeline.device import deterministic, sent
from pipeline.encoders.sasrec import Holdout, Sequences, gather, holdout, next_baskets, window_bounds
from pipeline.errors import ContractError, VersionMismatch
from pipeline.evaluation import Packed
from pipeline.log import progress
from pipeline.retrievers import AnyRetriever, build
from pipeline.retrievers.base import Catalogue, Prediction, distillation, padded, prefix_bounds
from pipeline.retrievers.parallel import Parallel
from pipeline.retrievers.search import beam_search, invalid_share
from pipeline.retrievers.trie import Trie

Floats = NDArray[np.float64]
FINAL_RATE = 0.05  # share of the learning rate left at the end of the cosine schedule
CLIP_NORM = 1.0
SEARCHES = {"cpu": 32, "cuda": 512}  # histories of one beam search: as many as a cache holds, or enough to keep an accelerator busy
STOP_AT = 50  # NDCG@50 decides the best epoch, as the study does
POOL = 32  # steps whose histories are dealt out by length: beyond that the order is random


@dataclass(frozen=True)
class Fitted:
    """A trained retriever with its table of allowed tokens, curves per epoch (loss, valid_*) and metrics (epochs, best_epoch, valid_*)."""

    model: AnyRetriever
    table: Trie
    settings: TrainRetriever
    curves: Mapping[str, list[float]]
    metrics: Mapping[str, float]

    def state(self) -> dict[str, Tensor]:
        """The network's tensors by name, on the CPU; codes belong to the release and are not among them."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def fit(
    catalogue: Catalogue, sequences: Sequences, settings: TrainRetriever, *, seed: int, teacher_ND: Tensor | None = None, device: str = "cpu", what: str = ""
) -> Fitted:
    """The configured retriever at its best epoch on the last baskets of some users, which it does not train on.

    Args:
        sequences: users' events by item number, oldest first, all before the cutoff.
        teacher_ND: vectors the distillation pulls the item's summary to; needed when `distill_weight` > 0.
        what: name of the progress bar.
    Raises: ContractError when no user has two baskets; ValueError without a teacher that is asked for.
    """
    if settings.distill_weight and teacher_ND is None:
        raise ValueError("distillation needs the items' vectors")
    rest, questions = holdout(sequences, settings.valid_users, settings.max_history, seed, new=settings.mask_history)
    with deterministic(seed):
        model, table = build(catalogue, settings).to(device), catalogue.constraint().to(device)
        if isinstance(model, Parallel):
            model.count(torch.bincount(rest.items, minlength=len(catalogue)))
        learner = _Learner(model, rest, settings, None if not settings.distill_weight else teacher_ND, device)
        best = _Best(model)
        curves: dict[str, list[float]] = {"loss": []}
        for epoch in progress(range(settings.max_epochs), what or settings.retriever, settings.max_epochs):
            curves["loss"].append(learner.epoch(epoch))
            found = _validate(model, rest, questions, settings, table)
            for name, value in found.items():
                curves.setdefault(f"valid_{name}", []).append(value)
            if best.stop(epoch, found, settings):
                break
    model.load_state_dict(best.state)
    metrics = {"epochs": float(len(curves["loss"])), "best_epoch": float(best.epoch + 1), "valid_users": float(questions.users.numel())}
    return Fitted(model.eval(), table, settings, curves, metrics | {f"valid_{name}": value for name, value in best.found.items()})


def load(config: Mapping[str, Any], state: Mapping[str, Tensor], catalogue: Catalogue, *, codebook_digest: str, allow_foreign_codebook: bool = False) -> Fitted:
    """The retriever of a checkpoint reading a catalogue, which may be that of a later release of the same codebook; its table is made from that catalogue.

    Args:
        config: of the model bundle; needs settings and codebook_digest.
        state: the network's tensors; those of the table it was shipped with are not read.
        allow_foreign_codebook: for studies that measure what a changed vocabulary costs.
    Raises: VersionMismatch for another codebook, RuntimeError when state and catalogue do not fit.
    """
    if config["codebook_digest"] != codebook_digest and not allow_foreign_codebook:
        raise VersionMismatch(
            "the retriever was trained on another codebook: its code rows would mean other items",
            expected=f"codebook_digest {config['codebook_digest']} (release {config['sid_version']})",
            found=f"codebook_digest {codebook_digest}",
            where="checkpoint sid_retriever",
            next_command="sid run consumers --date D, to train a retriever on the release that is read",
        )
    settings = TrainRetriever(**config["settings"])
    model = build(catalogue, settings)
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("trie.")}, strict=True)
    return Fitted(model.eval(), catalogue.constraint(), settings, {}, {})


class _Learner:
    """Optimiser and batches of one training run."""

    def __init__(self, model: AnyRetriever, sequences: Sequences, settings: TrainRetriever, teacher_ND: Tensor | None, device: str) -> None:
        self.model, self.settings, self.items_T = model, settings, sequences.items.to(device)
        self.in_baskets = sequences.baskets is not None
        after_T, size_T = next_baskets(sequences)
        start_B, stop_B = (window_bounds if model.every_position else prefix_bounds)(sequences.offsets, settings.max_history)
        said_T = nn.functional.pad((size_T > 0).cumsum(0), (1, 0))
        asked_B = said_T[stop_B] - said_T[start_B if model.every_position else stop_B - 1]
        rows = torch.nonzero(asked_B).flatten()
        if not rows.numel():
            raise ContractError("no user has two baskets to learn from", expected="users with two baskets", found="none", where="feature.user_sequence")
        self.asked_B, self.length_B = asked_B[rows], (stop_B - start_B)[rows]
        self.start_B, self.stop_B, self.after_T, self.size_T = (each.to(device) for each in (start_B[rows], stop_B[rows], after_T, size_T))
        self.teacher_ND = None if teacher_ND is None else teacher_ND.to(device)
        width = model.table.rows.embedding_dim
        self.student = nn.Linear(width, 0 if self.teacher_ND is None else self.teacher_ND.shape[1]).to(device) if self.teacher_ND is not None else None
        parameters = [*model.parameters(), *(self.student.parameters() if self.student is not None else ())]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=device != "cpu" or None)
        self.parameters = parameters

    def epoch(self, number: int) -> float:
        """Mean loss of one pass in a new random order."""
        self.model.train()
        losses = []
        batches = dealt(self.length_B, self.asked_B, self.settings.batch_size)
        for step, rows in enumerate(batches):
            self.optimizer.param_groups[0]["lr"] = _rate(self.settings, number + step / len(batches))
            loss = self.loss(*self.batch(rows))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Histories (B, T), and after each of their events an item of the next basket (B, T), drawn anew each time; padding where there is none."""
        pad, device = self.model.pad, self.items_T.device
        start_B, stop_B = self.start_B[rows.to(device)], self.stop_B[rows.to(device)]
        inputs_BT = gather(self.items_T, start_B, stop_B, int(self.length_B[rows].max()), pad)
        at_BT = (start_B[:, None] + torch.arange(inputs_BT.shape[1], device=device)).minimum(stop_B[:, None] - 1)
        after_BT, size_BT = self.after_T[at_BT], self.size_T[at_BT]
        if self.in_baskets:
            after_BT = after_BT + (sent(torch.rand(at_BT.shape), device) * size_BT).long()
        return inputs_BT, torch.where((inputs_BT != pad) & (size_BT > 0), self.items_T[after_BT], pad)

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean negative log-likelihood, with the distillation where it is on."""
        prediction: Prediction = self.model(inputs_BT, targets_BT)
        loss = prediction.nll_P.mean()
        if self.student is None or self.teacher_ND is None:
            return loss
        rows = slice(0, self.settings.batch_size)  # a window holds many predictions: as many as one batch are compared with each other
        item_B = prediction.items_P[rows]
        student_BD = self.student(prediction.summary_PD[rows])
        return loss + self.settings.distill_weight * distillation(student_BD, self.teacher_ND[item_B], item_B, self.settings.distill_temperature)


def dealt(length_B: Tensor, asked_B: Tensor, batch_size: int) -> list[Tensor]:
    """The histories of each step of one pass, in a new random order: those of a step are about as long, so that little of a step is padding.

    Args:
        length_B: events per history; asked_B: predictions, of which steps have about as many each, so that every prediction weighs the same.
        batch_size: histories per step, on average.
    """
    pools = torch.randperm(len(length_B)).split(POOL * batch_size)  # up and down by turns, so that a step across two pools is of one length, too
    order_B = torch.cat([pool_B[length_B[pool_B].argsort(stable=True, descending=at % 2 == 1)] for at, pool_B in enumerate(pools)])
    last_B, steps = asked_B[order_B].cumsum(0), -(-len(length_B) // batch_size)
    taken_S = torch.bincount((last_B - 1) * steps // last_B[-1], minlength=steps)
    parts = [part_B for part_B in order_B.split(taken_S.tolist()) if len(part_B)]
    return [parts[at] for at in torch.randperm(len(parts)).tolist()]


def _rate(settings: TrainRetriever, epochs: float) -> float:
    """Step size after a number of epochs: cosine from the set rate down to FINAL_RATE of it."""
    return settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * epochs / settings.max_epochs)))


class _Best:
    """Remembers the best epoch and says when to stop; without validation the last epoch stays."""

    def __init__(self, model: AnyRetriever) -> None:
        self.model, self.epoch, self.score = model, -1, -math.inf
        self.found: Mapping[str, float] = {}
        self.state: dict[str, Tensor] = {}

    def stop(self, epoch: int, found: Mapping[str, float], settings: TrainRetriever) -> bool:
        """Whether `patience` epochs brought nothing better."""
        score = float(epoch) if not found else -found["loss"] if settings.stop_on == "loss" else found[f"ndcg@{STOP_AT}"]
        if score > self.score:
            self.epoch, self.score, self.found = epoch, score, found
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return epoch - self.epoch >= settings.patience


def _validate(model: AnyRetriever, sequences: Sequences, questions: Holdout, settings: TrainRetriever, table: Trie) -> dict[str, float]:
    """Loss, and NDCG where it decides, on the held-out baskets; empty without any."""
    if not questions.users.numel():
        return {}
    histories = Packed(np.append(0, np.cumsum((questions.stop - questions.start).numpy())), _joined(sequences, questions))
    model.eval()
    device = next(model.parameters()).device
    history_BT = padded(histories, settings.max_history, model.pad).to(device)
    targets_BT = torch.full_like(history_BT, model.pad).scatter_(1, (history_BT != model.pad).sum(1, keepdim=True) - 1, questions.targets[:, None].to(device))
    losses = []
    with torch.no_grad():
        for rows in torch.arange(len(histories)).split(settings.batch_size):
            losses.append(_last_nll(model, history_BT[rows], targets_BT[rows]))
    found = {"loss": float(torch.cat(losses).mean())}
    if settings.stop_on == "ndcg":
        whole = sequences.users(questions.users)  # all of it leaves the ranking, as in the test, not only what is read
        seen = Packed(whole.offsets.numpy(), whole.items.numpy()) if settings.mask_history else None
        rank_B = ranks(model, table, histories, questions.targets.numpy(), settings, seen)
        found |= evaluation.ranking_metrics(rank_B, (10, STOP_AT))
    return found


def _last_nll(model: AnyRetriever, history_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the item after the last event of each history, nats (B,)."""
    prediction: Prediction = model(history_BT, targets_BT)
    return prediction.nll_P


def _joined(sequences: Sequences, questions: Holdout) -> NDArray[np.int64]:
    """Events start .. stop - 1 of every question end to end."""
    length_B = questions.stop - questions.start
    first_B = length_B.cumsum(0) - length_B
    at_T = torch.arange(int(length_B.sum())) + torch.repeat_interleave(questions.start - first_B, length_B)
    return sequences.items[at_T].numpy()


# ---------------------------------------------------------------- ranks


def ranks(model: AnyRetriever, table: Trie, histories: Packed, targets_B: NDArray[np.int64], settings: TrainRetriever, seen: Packed | None = None) -> Floats:
    """Rank of each target, 1 = best, float64 [B]; exact over the catalogue, or by beam search, where targets beyond the beams share the middle of the rest.

    Args:
        histories: at least one event each.
        seen: items that leave the ranking of their row; None masks nothing.
    Raises: ValueError for an empty history.
    """
    if len(histories) and not histories.lengths().all():
        raise ValueError("a history is empty: there is nothing to read")
    model.eval()
    device = next(model.parameters()).device
    history_BT = padded(histories, settings.max_history, model.pad)
    if isinstance(model, Parallel):
        parallel = model
        with torch.no_grad():
            return evaluation.ranks_in_chunks(lambda rows: parallel.scores(history_BT[rows].to(device)).cpu(), targets_B, model.pad, seen)
    gone_BT = gone_leaves(table, evaluation.leaving(seen, targets_B, model.pad)) if seen is not None else torch.empty(len(histories), 0, dtype=torch.int64)
    asked_UT, row_B = torch.unique(torch.cat([history_BT, gone_BT], dim=1), dim=0, return_inverse=True)  # a basket's items share one search
    items, scores = [], []
    with torch.no_grad():
        for asked_BT in asked_UT.split(SEARCHES[device.type]):
            history_BT, gone_BT = asked_BT.to(device).split([history_BT.shape[1], gone_BT.shape[1]], dim=1)
            memory, gone = model.memory(history_BT), gone_BT.contiguous() if seen is not None else None
            found = beam_search(model, memory, table, settings.beams, weights_NS=model.weights_NS, gone_BT=gone)
            items.append(found.items.cpu())
            scores.append(found.scores.cpu())
    if not items:
        return np.empty(0)
    return evaluation.listed_ranks(_level(items, -1)[row_B], _level(scores, -math.inf)[row_B], targets_B, model.pad, seen)


def gone_leaves(table: Trie, gone: Packed) -> Tensor:
    """Leaves of those items, ascending, int64 [B, longest]; filled up with the number of leaves, which also stands for an item without a tuple."""
    place_N, leaves = table.places.cpu(), len(table.items)
    item_T = torch.from_numpy(gone.items)
    place_T = torch.where(item_T < len(place_N), place_N[item_T.clamp(max=len(place_N) - 1)], leaves)
    gone_BT = torch.full((len(gone), int(gone.lengths().max(initial=0))), leaves)
    at_T = torch.arange(len(item_T)) - torch.from_numpy(gone.offsets[:-1])[torch.from_numpy(gone.rows())]
    gone_BT[torch.from_numpy(gone.rows()), at_T] = place_T
    return gone_BT.sort(dim=1).values


def _level(parts: list[Tensor], fill: float) -> Tensor:
    """The parts as one matrix of their largest width."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def invalid_beams(model: AnyRetriever, table: Trie, histories: Packed, settings: TrainRetriever) -> float:
    """Share of beams that are no item when the search is not constrained, in [0, 1]; NaN for a retriever that does not search."""
    if isinstance(model, Parallel) or not len(histories):
        return float("nan")
    device = next(model.parameters()).device
    history_BT = padded(histories, settings.max_history, model.pad).to(device)
    parts = history_BT.split(SEARCHES[device.type])
    with torch.no_grad():
        shares = [invalid_share(model, model.memory(part_BT), table, settings.beams) for part_BT in parts]
    return float(np.average(shares, weights=[len(part_BT) for part_BT in parts]))
