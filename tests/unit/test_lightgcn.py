"""LightGCN: propagation, mean of layers and loss against slow loops over neighbours, and what it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graph_world import ITEMS, lists, separation, sequences

from pipeline.config import LightGcn as Params
from pipeline.encoders import graph, lightgcn

SMALL = Params(dim=8, num_layers=3, batch_size=32, max_epochs=20, patience=20, valid_users=20, learning_rate=0.03)
WORLD = [[0, 1], [1, 2, 3], [3]]
pytestmark = pytest.mark.usefixtures("one_thread")


def slow_layers(ego: np.ndarray, layers: int) -> list[np.ndarray]:
    """Propagation node by node; items are nodes 3 .. 7, item 4 has no user."""
    near: dict[int, list[int]] = {v: [] for v in range(8)}
    for user, items in enumerate(WORLD):
        for item in items:
            near[user].append(3 + item)
            near[3 + item].append(user)
    found = [ego]
    for _ in range(layers):
        following = np.zeros_like(ego)
        for v, neighbours in near.items():
            for w in neighbours:
                following[v] += found[-1][w] / (math.sqrt(len(neighbours)) * math.sqrt(len(near[w])))
        found.append(following)
    return found


def network(**changes: object) -> lightgcn.Network:
    torch.manual_seed(0)
    made = lightgcn.Network(3, 5, SMALL.model_copy(update=changes))
    made.attach(graph.edges_of(sequences(WORLD), 5))
    return made


def test_propagation_and_the_mean_of_layers_equal_slow_loops() -> None:
    made = network()
    slow = slow_layers(made.ego.weight.detach().double().numpy(), 3)
    for layer, expected in zip(graph.propagate(made.adjacency, made.ego.weight, 3), slow, strict=True):
        np.testing.assert_allclose(layer.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    users, items = made()
    np.testing.assert_allclose(torch.cat([users, items]).detach().numpy(), sum(slow) / 4, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(items[4], made.ego.weight[7] / 4)  # no neighbour: its own layer alone


def test_without_layers_it_is_matrix_factorisation() -> None:
    made = network(num_layers=0)
    torch.testing.assert_close(torch.cat(made()), made.ego.weight)


def test_the_loss_scores_means_and_decays_layer_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(decay=0.5)
    monkeypatch.setattr(graph, "sample_negatives", lambda *_: (torch.tensor([2, 0]), torch.tensor([True, True])))
    ego = made.ego.weight.detach().double().numpy()
    final = sum(slow_layers(ego, 3)) / 4
    triples = [(0, 1, 2), (1, 3, 0)]
    ranked = [-math.log(1 / (1 + math.exp(-(final[u] @ final[3 + i] - final[u] @ final[3 + j])))) for u, i, j in triples]
    squares = sum((ego[u] ** 2).sum() + (ego[3 + i] ** 2).sum() + (ego[3 + j] ** 2).sum() for u, i, j in triples)
    assert made.loss(torch.tensor([0, 1]), torch.tensor([1, 3])).item() == pytest.approx(sum(ranked) / 2 + 0.5 * squares / 4, rel=1e-5)


def test_it_learns_tastes_and_exports_over_every_pair() -> None:
    result = lightgcn.LightGcn(SMALL).train(sequences(lists()), ITEMS, seed=3)
    assert separation(result.item_vectors) > 1
    assert result.metrics["valid_recall@10"] > 0.9
    assert result.state["item_degrees"].sum() == 40 * 8  # the held-out baskets count in the exported vectors
