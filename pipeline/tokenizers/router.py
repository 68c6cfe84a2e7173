"""The behavioural router and the controller of its sparsity (ADC-SID, router): how much each behaviour code counts for each item.

Not here: the experts behind the codes (ada_sid.py). Suffixes: B batch, E behaviour experts, Q richness buckets.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.tokenizers.world import World

Sparsity = Literal["bucket", "expert", "scalar", "off"]
LOG_LAMBDA_MIN = math.log(1e-10)
WAKE = 0.05  # pull on a closed gate that should be open
GAIN, GAIN_MOST = 20.0, 2.0  # 5 points off target change lambda e-fold at once, but never raise it by more than two e-folds
MEMORY = 0.9  # of the running average of active shares
MARGIN_RATE = 0.1  # step of the running quantile that says which gates should be open


def router_feature(richness_B: Tensor) -> Tensor:
    """Richness as the router's perceptron reads it beside e_b, (B, 1), in [-2, 2]."""
    return 4.0 * richness_B[:, None] - 2.0


def behavior_router(logit_BE: Tensor, richness_B: Tensor) -> Tensor:
    """Weight R of each behaviour expert per item, (B, E), in [0, 0.74): exactly 0 where an expert is off.

    Args:
        logit_BE: MLP_b(e_b, N) + b.
        richness_B: N in [0, 1].
    Source: ADC-SID eq. (22), sigmoid(N) relu(MLP); differs: relu(tanh(MLP)), because unbounded gates beside softmax gates grew to a mean of 14 and drowned
    the content codes; the perceptron reads N beside e_b, because norms of a SASRec table hardly tell rich from poor and no lambda could then hold
    the buckets at their targets.
    """
    return torch.sigmoid(richness_B)[:, None] * torch.relu(torch.tanh(logit_BE))


def sparsity_target(richness_B: Tensor, theta: float) -> Tensor:
    """Share of behaviour experts that shall be off, (B,): 0 for the richest items, `theta` for the poorest.

    Source: ADA-SID (V2) eq. (22); differs: N is in [0, 1] already and is not divided by its range again.
    """
    return theta * (1.0 - richness_B)


def load_factor(active_E: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Use of each behaviour expert over its fair use, (E,), 1 when balanced and on target; carries no gradient.

    Args:
        active_E: items that switch the expert on; items: items looked at; target: mean share of experts that shall be off.
    Source: ADA-SID (V2) eq. (23); differs: one factor per expert as in ReMoE's load balancing, the printed sum over experts is one number for all of them.
    """
    return active_E / (items.clamp(min=1) * (1.0 - target).clamp(min=1e-3))


def gate_penalty(weight_BE: Tensor, load_E: Tensor, lambda_B: Tensor, due_BE: Tensor) -> Tensor:
    """Sparsity loss per item, (B,): lambda times the load-weighted sum of the router weights that are due to close.

    Args:
        due_BE: True where the gate is among the share of its richness bucket that shall be off.
    Source: ADC-SID eq. (23), ADA-SID (V2) eq. (19); differs: lambda belongs to the item's richness bucket, and gates that shall stay open are left alone;
    pressed alike, all weights of a bucket shrank together and crossed zero together, far beyond the target.
    """
    return lambda_B * (weight_BE.abs() * load_E.detach() * due_BE).sum(1)


def wake_penalty(logit_BE: Tensor, due_BE: Tensor) -> Tensor:
    """Loss per item, (B,), that lifts the logits of closed gates that shall be open: `WAKE` times their mean depth below zero.

    Source: ADC-SID eq. (23); differs: not in the paper, where a closed gate gets no gradient and stays closed for good.
    """
    return WAKE * (torch.relu(-logit_BE) * ~due_BE).mean(1)


def lambda_step(log_lambda_Q: Tensor, target_Q: Tensor, current_Q: Tensor, *, step: float, most: float) -> Tensor:
    """The next log lambda per bucket: up while too few experts are off, down while too many are.

    Args:
        target_Q / current_Q: share of experts off, wanted and found.
        step: factor by which lambda moves at most per step, > 1.
        most: largest lambda.
    Source: ADA-SID (V2) eq. (20), ReMoE; differs: the step shrinks within .05 of the target (no sign function there), log lambda is clamped, the defaults
    are lambda_0 = 1e-3 and a = 1.02 (ReMoE: 1e-8 and 1.2), and `SparsityController.acting_lambda` adds a proportional term.
    """
    direction_Q = ((target_Q - current_Q) / 0.05).clamp(-1.0, 1.0)
    return (log_lambda_Q + math.log(step) * direction_Q).clamp(LOG_LAMBDA_MIN, math.log(most))


class SparsityController(nn.Module):
    """One lambda per richness bucket, steered by a moving average of the share of experts that are on, and one margin that says which gates shall be off.

    The margin is a running quantile of the bucket's logits at its target share: gates below it are pressed until they close, gates above it are lifted
    until they open. Buckets are quantiles of the catalogue's richness, frozen with the tokenizer; `scalar` is one bucket, as in the paper; `off` never
    penalises. With one margin for all experts the weakest expert takes all the closing; `expert` keeps a margin for each, so that all close alike often.
    """

    edge_Q: Tensor
    target_Q: Tensor
    active_Q: Tensor
    seen_Q: Tensor
    log_lambda_Q: Tensor
    margin_Q: Tensor  # (Q, E) under `expert`

    def __init__(self, kind: Sparsity, buckets: int, experts: int, *, theta: float, lambda_init: float, lambda_step: float, lambda_max: float) -> None:
        super().__init__()
        self.kind, self.theta, self.step, self.most = kind, theta, lambda_step, lambda_max
        self.buckets = buckets if kind in ("bucket", "expert") else 1
        self.register_buffer("edge_Q", torch.full((self.buckets - 1,), torch.inf))
        for name, value in (("target_Q", theta), ("active_Q", 0.0), ("seen_Q", 0.0), ("log_lambda_Q", math.log(lambda_init))):
            self.register_buffer(name, torch.full((self.buckets,), value))
        self.register_buffer("margin_Q", torch.zeros((self.buckets, experts) if kind == "expert" else (self.buckets,)))

    def fit_buckets(self, richness_N: Tensor) -> None:
        """Freeze bucket edges and targets on the richness of the items that have behaviour; ties stay in one bucket, so buckets may be empty."""
        share = torch.arange(1, self.buckets, dtype=torch.float64) / self.buckets
        ordered_N = richness_N.double().cpu().sort().values
        self.edge_Q.copy_(ordered_N[(share * len(ordered_N)).long()] if len(ordered_N) else self.edge_Q)
        bucket_N = self.bucket(richness_N)
        counts_Q = torch.bincount(bucket_N, minlength=self.buckets).clamp(min=1)
        mean_Q = torch.zeros_like(self.target_Q).index_add_(0, bucket_N, richness_N) / counts_Q
        self.target_Q.copy_(sparsity_target(mean_Q, self.theta))

    def bucket(self, richness_B: Tensor) -> Tensor:
        """Bucket of each item, (B,) int64."""
        return torch.bucketize(richness_B, self.edge_Q, right=True)

    def penalty(self, weight_BE: Tensor, logit_BE: Tensor, richness_B: Tensor, mask_B: Tensor, world: World) -> Tensor:
        """The share of this process in the mean sparsity loss over the items that show behaviour; also moves what the next lambdas and margins are set from."""
        if self.kind == "off":
            return weight_BE.sum() * 0.0
        bucket_B = self.bucket(richness_B)
        due_BE = logit_BE.detach() < self.margin_Q.view(self.buckets, -1)[bucket_B]
        active_E, items, seen_Q, on_Q, due_Q = self._count(weight_BE, due_BE, bucket_B, mask_B, world)
        target = (self.target_Q * seen_Q).sum() / seen_Q.sum().clamp(min=1)
        loss_B = gate_penalty(weight_BE, load_factor(active_E, items, target), self.acting_lambda()[bucket_B], due_BE)
        if self.training:
            self._observe(seen_Q, on_Q, due_Q)
        return world.mean(loss_B + wake_penalty(logit_BE, due_BE), mask_B)

    def acting_lambda(self) -> Tensor:
        """Lambda per bucket as it acts now, (Q,): the integrated lambda, raised or lowered at once by the distance to the target."""
        too_many_on_Q = torch.where(self.seen_Q > 0, self.target_Q - (1.0 - self.active_Q), 0.0)
        return (self.log_lambda_Q + (GAIN * too_many_on_Q).clamp(max=GAIN_MOST)).clamp(max=math.log(self.most)).exp()

    def _count(self, weight_BE: Tensor, due_BE: Tensor, bucket_B: Tensor, mask_B: Tensor, world: World) -> tuple[Tensor, ...]:
        """Over all processes: items per expert that switch it on, items shown, and per bucket items shown and the sums of their shares on and due to be off.

        Source: ADA-SID (V2) eq. (21); differs: the share that is on, summed by richness bucket.
        """
        shown_B1 = mask_B[:, None].to(weight_BE.dtype)
        on_BE = (weight_BE > 0) * shown_B1
        member_BQ = torch.nn.functional.one_hot(bucket_B, self.buckets).to(weight_BE.dtype) * shown_B1
        due_BE = due_BE.to(weight_BE.dtype)
        due_Q = member_BQ.T @ due_BE if self.kind == "expert" else due_BE.mean(1) @ member_BQ
        parts = [on_BE.sum(0), shown_B1.sum()[None], member_BQ.sum(0), on_BE.mean(1) @ member_BQ, due_Q.flatten()]
        active_E, items, seen_Q, on_Q, due_Q = world.total(torch.cat(parts)).split([len(part) for part in parts])
        return active_E, items[0], seen_Q, on_Q, due_Q.view_as(self.margin_Q)

    @torch.no_grad()
    def _observe(self, seen_Q: Tensor, on_Q: Tensor, due_Q: Tensor) -> None:
        """Move the margin and the average active share per bucket; the first sight of a bucket sets its average."""
        share_Q = on_Q / seen_Q.clamp(min=1)
        mixed_Q = torch.where(self.seen_Q > 0, MEMORY * self.active_Q + (1 - MEMORY) * share_Q, share_Q)
        self.active_Q.copy_(torch.where(seen_Q > 0, mixed_Q, self.active_Q))
        target_Q, known_Q = (each.view(-1, *[1] * (due_Q.dim() - 1)) for each in (self.target_Q, seen_Q))
        self.margin_Q.add_(torch.where(known_Q > 0, MARGIN_RATE * (target_Q - due_Q / known_Q.clamp(min=1)), 0.0))
        self.seen_Q.add_(seen_Q)

    @torch.no_grad()
    def advance(self) -> None:
        """Set the lambdas of the next step."""
        if self.kind != "off":
            moved_Q = lambda_step(self.log_lambda_Q, self.target_Q, 1.0 - self.active_Q, step=self.step, most=self.most)
            self.log_lambda_Q.copy_(torch.where(self.seen_Q > 0, moved_Q, self.log_lambda_Q))
