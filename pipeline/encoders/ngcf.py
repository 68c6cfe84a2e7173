"""NGCF: rows of users and items, propagated with weights, a product of both ends and an activation; an item's vector is its layers end to end.

Source: NGCF (arXiv 1905.08108); its formulas were checked against notes that print them, so parts are named in place of equation numbers. Two forms, which
differ in more than the paper says: `paper` follows its equations; `released` follows the published program (row-normalised adjacency with self loops, an
activation and a bias per part, layers of unit length).
differs: dropout falls on the outputs of a layer, as in the published program, not on single messages; there is no node dropout.
Tensor suffixes: U users, N items, V nodes, B batch, D width, F = (layers + 1) * D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Ngcf as Params
from pipeline.encoders import graph

SLOPE = 0.2  # of the activation below zero: TensorFlow's default, which the published program takes


def message(from_ED: Tensor, to_ED: Tensor, degrees_E: Tensor, sum_DD: Tensor, product_DD: Tensor) -> Tensor:
    """What one end of each pair tells the other [E, D]: (from W1 + (from * to) W2) / sqrt(product of the degrees of both ends).

    `paper_layer` adds these messages up without making them one by one.
    Source: NGCF (arXiv 1905.08108), message construction with its Laplacian norm
    """
    return (from_ED @ sum_DD + (from_ED * to_ED) @ product_DD) * degrees_E.rsqrt()[:, None]


def paper_layer(adjacency: graph.Sparse, x_VD: Tensor, sum_DD: Tensor, product_DD: Tensor | None) -> Tensor:
    """The next layer [V, D], LeakyReLU((L + I) X W1 + (L X * X) W2), L the symmetric adjacency.

    Args:
        product_DD: None leaves the product part out.
    Source: NGCF (arXiv 1905.08108), propagation rule in matrix form
    """
    near_VD = adjacency @ x_VD
    total_VD = (near_VD + x_VD) @ sum_DD
    return F.leaky_relu(total_VD if product_DD is None else total_VD + (near_VD * x_VD) @ product_DD, SLOPE)


def released_layer(adjacency: graph.Sparse, x_VD: Tensor, sum_part: tuple[Tensor, Tensor], product_part: tuple[Tensor, Tensor] | None) -> Tensor:
    """The next layer [V, D], LeakyReLU(L X W1 + b1) + LeakyReLU((L X * X) W2 + b2), L with self loops and rows that sum to one.

    Source: NGCF's released code, layer; differs: adjacency, biases and an activation per part are not the paper's.
    """
    near_VD = adjacency @ x_VD
    total_VD = F.leaky_relu(near_VD @ sum_part[0] + sum_part[1], SLOPE)
    return total_VD if product_part is None else total_VD + F.leaky_relu((near_VD * x_VD) @ product_part[0] + product_part[1], SLOPE)


class Network(graph.GraphNetwork):
    """One table of users and items and two matrices per layer."""

    def __init__(self, num_users: int, num_items: int, params: Params) -> None:
        super().__init__()
        self.params, self.num_users = params, num_users
        self.ego = nn.Embedding(num_users + num_items, params.dim)
        layers, dim = params.num_layers, params.dim
        self.sum_LDD, self.product_LDD = nn.Parameter(torch.empty(layers, dim, dim)), nn.Parameter(torch.empty(layers, dim, dim))
        self.sum_LD, self.product_LD = nn.Parameter(torch.zeros(layers, dim)), nn.Parameter(torch.zeros(layers, dim))
        nn.init.xavier_uniform_(self.ego.weight)
        for matrix_DD in (*self.sum_LDD, *self.product_LDD):
            nn.init.xavier_uniform_(matrix_DD)

    def attach(self, edges: graph.Edges) -> None:
        """Propagate over these pairs from now on."""
        super().attach(edges)
        self.adjacency = graph.laplacian(edges, "symmetric" if self.params.form == "paper" else "row_loops")

    def forward(self) -> tuple[Tensor, Tensor]:
        """Layers end to end of users [U, F] and items [N, F].

        Source: NGCF (arXiv 1905.08108), concatenation of layers 0 .. K
        """
        layers = [self.ego.weight]
        hidden_VD = self.ego.weight
        for number in range(self.params.num_layers):
            hidden_VD = F.dropout(self.layer(number, hidden_VD), self.params.dropout, self.training)
            layers.append(hidden_VD if self.params.form == "paper" else F.normalize(hidden_VD, dim=1))
        final_VF = torch.cat(layers, dim=1)
        return final_VF[: self.num_users], final_VF[self.num_users :]

    def layer(self, number: int, x_VD: Tensor) -> Tensor:
        """One layer of the chosen form, without dropout [V, D]."""
        product = self.params.product
        if self.params.form == "paper":
            return paper_layer(self.adjacency, x_VD, self.sum_LDD[number], self.product_LDD[number] if product else None)
        product_part = (self.product_LDD[number], self.product_LD[number]) if product else None
        return released_layer(self.adjacency, x_VD, (self.sum_LDD[number], self.sum_LD[number]), product_part)

    def loss(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """BPR with decay on the final vectors of the batch, scalar.

        Source: NGCF's released code, BPR with decay on the final vectors
        """
        final = self()
        return self.pairwise(final, final, users_B, items_B, self.params.decay)


class Ngcf(graph.RowEncoder):
    """NGCF as a behaviour encoder.

    Source: NGCF (arXiv 1905.08108), training; differs: stops on NDCG@10 (said to be Recall@20 there).
    """

    network = Network
