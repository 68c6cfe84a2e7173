"""What all ranker networks share: the item features of an arm, equal embedding budgets, item vectors, a history pooled for a target.

Not here: what an arm is and how its features are made from a release (pipeline/ranker.py), the layers above (din, ppnet, dcnv2).
Tensor suffixes: B batch, N item rows (row 0 = padding), T history, L positions, D width, U distinct items of a batch, F = 4 D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

ATTENTION_WIDTH = 36
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class ItemTable:
    """What the network is told about each item row; masked or absent features are zero rows.

    Args:
        id_row: (N,) row in the id table, 0 for items without a training row.
        tokens: (N, L) rows in the token table, 0 for masked slots; L = 0 for arms without codes.
        factors: (N, L) factor of each token's embedding.
        dense: (N, F) further numbers (router weights, log popularity).
        id_rows / token_rows: sizes of the two tables, row 0 included.
    """

    id_row: Ints
    tokens: Ints
    factors: Floats
    dense: Floats
    id_rows: int
    token_rows: int


@dataclass(frozen=True)
class Widths:
    """Widths of one arm's embedding tables."""

    id: int
    token: int


def equal_budget(table: ItemTable, *, budget: int, dim: int) -> Widths:
    """Widths so that the tables of an arm together hold at most `budget` numbers (at least one per row).

    `budget` is what the id arm spends, rows x dim. Tokens take up to `dim` per row and at most half of it beside ids; ids take the rest.
    """
    has_tokens, has_ids = table.tokens.shape[1] > 0, table.id_rows > 1
    for_tokens = budget // 2 if has_ids else budget
    token = min(dim, max(1, for_tokens // table.token_rows)) if has_tokens else 0
    left = budget - token * table.token_rows if has_tokens else budget
    return Widths(id=max(1, min(dim, left // table.id_rows)) if has_ids else 0, token=token)


class ItemEncoder(nn.Module):
    """Vector of width D per item row: id row, weighted code tokens and dense features, concatenated and projected.

    Args:
        pooling: concat = the tokens' rows side by side; sum = added up, as prefix n-grams are (arXiv 2504.02137).
    Source: ADA-SID (arXiv 2510.25622), ranking input: SIDs and router weights; differs: the paper does not say how they combine, rows times weights beside the
    item's own id row is ours.
    """

    id_row: Tensor
    tokens: Tensor
    factors: Tensor
    dense: Tensor

    def __init__(self, table: ItemTable, widths: Widths, dim: int, pooling: str = "concat") -> None:
        super().__init__()
        self.id_table = nn.Embedding(table.id_rows, widths.id, padding_idx=0) if widths.id else None
        self.token_table = nn.Embedding(table.token_rows, widths.token, padding_idx=0) if widths.token else None
        self.pooling, positions = pooling, table.tokens.shape[1]
        self.projection = nn.Linear(widths.id + widths.token * (positions if pooling == "concat" else 1) + table.dense.shape[1], dim)
        for name, values in (("id_row", table.id_row), ("tokens", table.tokens), ("factors", table.factors), ("dense", table.dense)):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)  # the release's, not the checkpoint's

    def forward(self, item_U: Tensor) -> Tensor:
        """Vectors (U, D) of item rows."""
        parts = [self.dense[item_U]]
        if self.id_table is not None:
            parts.append(self.id_table(self.id_row[item_U]))
        if self.token_table is not None:
            row_ULD = self.token_table(self.tokens[item_U]) * self.factors[item_U].unsqueeze(-1)
            parts.append(row_ULD.flatten(1) if self.pooling == "concat" else row_ULD.sum(1))
        return self.projection(torch.cat(parts, dim=1))


class Network(nn.Module):
    """Logit per (user, target, history): item vectors, the history pooled for the target, and a head on top of both.

    Source: Deep Interest Network (KDD 2018): attention unit on [h, t, h - t, h * t], weights not soft-maxed, sum pooling.
    differs: one hidden layer of PReLU in the unit, weights divided by the root of the history's length so that the sum does not grow
    with it, and the product target * pooled beside the two.

    Args:
        make_head: module from x (B, 4 D) = [target, pooled, target * pooled, user] to (B, 1).
    """

    def __init__(self, table: ItemTable, widths: Widths, *, num_users: int, dim: int, make_head: Callable[[], nn.Module], pooling: str = "concat") -> None:
        super().__init__()
        self.items = ItemEncoder(table, widths, dim, pooling)
        self.users = nn.Embedding(num_users + 1, dim, padding_idx=0)
        self.attention = nn.Sequential(nn.Linear(4 * dim, ATTENTION_WIDTH), nn.PReLU(), nn.Linear(ATTENTION_WIDTH, 1))
        self.head = make_head()
        for table_ in self.modules():
            if isinstance(table_, nn.Embedding):
                nn.init.normal_(table_.weight, std=EMBEDDING_STD)
                with torch.no_grad():
                    table_.weight[0] = 0

    def forward(self, user_B: Tensor, target_B: Tensor, history_BT: Tensor) -> Tensor:
        """Logits (B,); history rows of 0 are padding and weigh nothing."""
        item_U, row = torch.unique(torch.cat([target_B, history_BT.flatten()]), return_inverse=True)
        vector_UD = self.items(item_U)
        target_BD = vector_UD[row[: len(target_B)]]
        history_BTD = vector_UD[row[len(target_B) :]].view(*history_BT.shape, -1)
        pooled_BD = self.pool(target_BD, history_BTD, history_BT > 0)
        logit_B1: Tensor = self.head(torch.cat([target_BD, pooled_BD, target_BD * pooled_BD, self.users(user_B)], dim=1))
        return logit_B1.squeeze(1)

    def pool(self, target_BD: Tensor, history_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        """Attention-weighted sum (B, D) of the history."""
        target_BTD = target_BD.unsqueeze(1).expand_as(history_BTD)
        unit = torch.cat([history_BTD, target_BTD, history_BTD - target_BTD, history_BTD * target_BTD], dim=2)
        weight_BT = self.attention(unit).squeeze(2) * valid_BT / valid_BT.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
        return torch.einsum("bt,btd->bd", weight_BT, history_BTD)
