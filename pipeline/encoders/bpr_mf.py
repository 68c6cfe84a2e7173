"""BPR-MF: a row per user and per item, trained to rank a user's items above others; the floor of the graph encoders.

Source: BPR, Rendle et al. 2009. Tensor suffixes: U users, N items, B batch, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.config import BprMf as Params
from pipeline.encoders import graph

INIT_STD = 0.1


class Network(graph.GraphNetwork):
    """Two tables; nothing is propagated."""

    def __init__(self, num_users: int, num_items: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.users, self.items = nn.Embedding(num_users, params.dim), nn.Embedding(num_items, params.dim)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=INIT_STD)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The rows of users [U, D] and items [N, D]."""
        return self.users.weight, self.items.weight

    def loss(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """BPR with decay on the rows of the batch, scalar."""
        return self.pairwise(self(), self(), users_B, items_B, self.params.decay)


class BprMf(graph.RowEncoder):
    """BPR-MF as a behaviour encoder: an item's vector is its row."""

    network = Network
