"""`parallel`: one head per code position on the state of a causal transformer; every item is scored exactly from the heads' log-probabilities.

Source: RPG (arXiv 2506.05781), the form; ADA-SID (arXiv 2510.25622), the weights. differs: SASRec's block, whose feed-forward is as wide as `dim`, in place of
a GPT-2 with a feed-forward of 1024. Not here: the graph decoder that RPG needs at tens of millions of items.
Tensor suffixes: B rows, T history, P predicted positions, N items, L positions of codes, K codes, D width.
"""

# ruff: noqa: N815 - tensor fields carry shape suffixes

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Parallel as Params
from pipeline.config import SasRec
from pipeline.encoders.sasrec import Block
from pipeline.retrievers.base import INIT_STD, Catalogue, Prediction, code_table, slot_weights, weighted_mean

NOWHERE = -1e4  # score of an item without any code: below every log-probability, and finite


def item_scores(log_probs: Sequence[Tensor], codes_NL: Tensor, weights_NL: Tensor, *, total: bool = False) -> Tensor:
    """Score of every item (B, N): the weighted mean over its present slots of log p(code), or their weighted sum if `total`.

    Args:
        log_probs: per position (B, K).
        weights_NL: 0 for masked slots.
    Source: RPG (arXiv 2506.05781), mean of the tokens' log-probabilities; differs: weighted by ADA-SID's router weights, and masked slots are left out.
    """
    score_BN = torch.zeros(len(log_probs[0]), len(codes_NL), device=codes_NL.device)
    for log_prob_BK, code_N, weight_N in zip(log_probs, codes_NL.unbind(1), weights_NL.unbind(1), strict=True):  # over positions, never over items
        score_BN += F.pad(log_prob_BK, (0, 1))[:, code_N] * weight_N  # a masked slot reads the padding
    weight_N = weights_NL.sum(1)
    if not total:
        score_BN = score_BN / weight_N.clamp(min=1e-6)
    return score_BN.masked_fill(weight_N == 0, NOWHERE)


def marginal_scores(log_probs: Sequence[Tensor], prior_LK: Tensor, codes_NL: Tensor, weights_NL: Tensor) -> Tensor:
    """Score of every item (B, N): the mean over all slots of log p(code) as far as the slot counts, and of the log-probability of any code for the rest.

    A slot that an item lacks, or that its router closes, says then what a slot says whose code is not known; left out of the mean, it would make the item
    easier to reach than one that must have all its codes foretold.

    Args:
        log_probs: per position (B, K).
        prior_LK: log share of the training events per code, which an unknown code is drawn from.
        weights_NL: 0 for masked slots.
    Source: ADA-SID (arXiv 2510.25622), weights of the router; differs: what a weight takes off is marginalised, the paper says nothing of scoring.
    """
    score_BN = torch.zeros(len(log_probs[0]), len(codes_NL), device=codes_NL.device)
    for log_prob_BK, prior_K, code_N, weight_N in zip(log_probs, prior_LK, codes_NL.unbind(1), weights_NL.unbind(1), strict=True):
        any_B1 = (log_prob_BK + prior_K[: log_prob_BK.shape[1]]).logsumexp(1, keepdim=True)
        score_BN += F.pad(log_prob_BK, (0, 1))[:, code_N] * weight_N + any_B1 * (1.0 - weight_N).clamp(min=0.0)
    score_BN = score_BN / weights_NL.clamp(min=1.0).sum(1)
    return score_BN.masked_fill(weights_NL.sum(1) == 0, NOWHERE)


class Parallel(nn.Module):
    """The reader of a catalogue; item input = mean of its code rows.

    Args:
        length: events of a history at most.
        share: of the router weights in loss and score, 0 = all slots count alike.
        weighted: code rows of the input are multiplied by router weights.
    """

    every_position = True
    codes_NL: Tensor
    weights_NL: Tensor
    prior_LK: Tensor

    def __init__(self, catalogue: Catalogue, params: Params, *, length: int, share: float, weighted: bool) -> None:
        super().__init__()
        self.params, self.pad = params, len(catalogue)
        self.table = code_table(catalogue, params.dim, numbers=False, weighted=weighted)
        self.positions = nn.Parameter(torch.randn(length, params.dim) * INIT_STD)
        block = SasRec(dim=params.dim, num_heads=params.num_heads, dropout=params.dropout)
        self.blocks = nn.ModuleList(Block(block) for _ in range(params.num_blocks))
        self.norm, self.dropout = nn.LayerNorm(params.dim), nn.Dropout(params.dropout)
        heads = [nn.Linear(params.dim, params.dim) for _ in catalogue.codebook_sizes]
        for head in heads:  # every head begins as the state itself
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.register_buffer("codes_NL", catalogue.codes_NL.clone(), persistent=False)
        self.register_buffer("weights_NL", slot_weights(catalogue.weights_NL, catalogue.present_NL, share), persistent=False)
        self.register_buffer("prior_LK", torch.zeros(len(catalogue.codebook_sizes), max(catalogue.codebook_sizes)))

    def encode(self, inputs_BT: Tensor) -> Tensor:
        """State after each event (B, T, D)."""
        x_BTD = self.table.items(inputs_BT).mean(dim=2) * self.params.dim**0.5 + self.positions[: inputs_BT.shape[1]]
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        normed: Tensor = self.norm(x_BTD)
        return normed

    def log_probs(self, state_PD: Tensor) -> list[Tensor]:
        """Log-probabilities (P, K) per position: cosine of h + SiLU(head h) and the code rows, over a temperature.

        Source: RPG (arXiv 2506.05781), heads and logits.
        """
        found = []
        for position, head in enumerate(self.heads):
            query_PD = F.normalize(state_PD + F.silu(head(state_PD)), dim=1)
            rows_KD = F.normalize(self.table.predicted(position), dim=1)
            found.append(F.log_softmax(query_PD @ rows_KD.T / self.params.temperature, dim=1))
        return found

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Prediction:
        """The prediction of the item after every event."""
        real_P = torch.nonzero(targets_BT.flatten() != self.pad).flatten()  # the one thing in a step that an accelerator is asked for
        state_PD, item_P = self.encode(inputs_BT).flatten(0, 1)[real_P], targets_BT.flatten()[real_P]
        code_PL = self.codes_NL[item_P]
        said = [F.pad(row_PK, (0, 1)).gather(1, code_P[:, None]).squeeze(1) for row_PK, code_P in zip(self.log_probs(state_PD), code_PL.unbind(1), strict=True)]
        return Prediction(-weighted_mean(torch.stack(said, dim=1), self.weights_NL[item_P]), item_P, state_PD)

    def scores(self, history_BT: Tensor) -> Tensor:
        """Scores of all items (B, N) after histories of at least one event."""
        last_B = (history_BT != self.pad).sum(1) - 1
        state_BD = self.encode(history_BT)[torch.arange(len(history_BT), device=history_BT.device), last_B]
        log_probs = self.log_probs(state_BD)
        if self.params.scoring == "marginal":
            return marginal_scores(log_probs, self.prior_LK, self.codes_NL, self.weights_NL)
        if self.params.scoring == "prior":
            log_probs = [row_BK - prior_K[: row_BK.shape[1]] for row_BK, prior_K in zip(log_probs, self.prior_LK, strict=True)]
        return item_scores(log_probs, self.codes_NL, self.weights_NL, total=self.params.scoring != "mean")

    def count(self, events_N: Tensor) -> None:
        """Learn what `prior` scoring subtracts and `marginal` scoring averages over: the log share of the training events per code of each position.

        A reader that knows nothing of its user predicts these shares, so that each slot then says nothing, whether it is there or not.

        Args:
            events_N: training events of each item.
        """
        for prior_K, code_N, size in zip(self.prior_LK, self.codes_NL.unbind(1), self.table.real, strict=True):
            count_K = torch.bincount(code_N.cpu(), weights=events_N.cpu().double(), minlength=size + 1)[:size] + 1
            prior_K[:size] = (count_K / count_K.sum()).log().float()
