"""LightGCN: rows of users and items smoothed over the graph, no weights, no activation; an item's vector is the mean of layers 0 .. K.

Source: LightGCN, He et al. 2020. Tensor suffixes: U users, N items, B batch, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.config import LightGcn as Params
from pipeline.encoders import graph

INIT_STD = 0.1


class Network(graph.GraphNetwork):
    """One table of users and items, propagated by the symmetric adjacency."""

    def __init__(self, num_users: int, num_items: int, params: Params) -> None:
        super().__init__()
        self.params, self.num_users = params, num_users
        self.ego = nn.Embedding(num_users + num_items, params.dim)
        nn.init.normal_(self.ego.weight, std=INIT_STD)

    def attach(self, edges: graph.Edges) -> None:
        """Propagate over these pairs from now on."""
        super().attach(edges)
        self.adjacency = graph.laplacian(edges, "symmetric")

    def forward(self) -> tuple[Tensor, Tensor]:
        """Means over the layers of users [U, D] and items [N, D]."""
        final_VD = graph.layer_mean(graph.propagate(self.adjacency, self.ego.weight, self.params.num_layers))
        return final_VD[: self.num_users], final_VD[self.num_users :]

    def loss(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """BPR on the means with decay on layer 0 of the batch, scalar.

        Source: LightGCN, 2020, BPR with decay on layer 0.
        """
        ego = self.ego.weight[: self.num_users], self.ego.weight[self.num_users :]
        return self.pairwise(self(), ego, users_B, items_B, self.params.decay)


class LightGcn(graph.RowEncoder):
    """LightGCN as a behaviour encoder."""

    network = Network
