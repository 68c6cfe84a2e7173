"""NGCF: messages, layers of both forms and their concatenation against slow loops over neighbours, dropout, and what it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import rand
from graph_world import ITEMS, lists, separation, sequences

from pipeline.config import Ngcf as Params
from pipeline.encoders import graph, ngcf

SMALL = Params(dim=8, num_layers=3, batch_size=32, max_epochs=15, patience=15, valid_users=20, learning_rate=0.02)
WORLD = [[0, 1], [1, 2, 3], [3]]
NEAR = {0: [3, 4], 1: [4, 5, 6], 2: [6], 3: [0], 4: [0, 1], 5: [1], 6: [1, 2], 7: []}
pytestmark = pytest.mark.usefixtures("one_thread")


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def network(**changes: object) -> ngcf.Network:
    torch.manual_seed(0)
    made = ngcf.Network(3, 5, SMALL.model_copy(update=changes))
    made.attach(graph.edges_of(sequences(WORLD), 5))
    return made.eval()


def test_a_layer_of_the_paper_is_the_sum_of_its_messages() -> None:
    x, first, second = rand(8, 4), rand(4, 4, seed=1), rand(4, 4, seed=2)
    a, w1, w2 = (part.double().numpy() for part in (x, first, second))
    slow = np.zeros((8, 4))
    for to, near in NEAR.items():
        total = a[to] @ w1  # the node's message to itself
        for source in near:
            told = np.zeros(4)
            for d in range(4):
                told[d] = sum(a[source, k] * w1[k, d] + a[source, k] * a[to, k] * w2[k, d] for k in range(4))
            told /= math.sqrt(len(near)) * math.sqrt(len(NEAR[source]))
            degrees = torch.tensor([float(len(near) * len(NEAR[source]))])
            np.testing.assert_allclose(ngcf.message(x[[source]], x[[to]], degrees, first, second)[0].numpy(), told, rtol=1e-4, atol=1e-6)
            total = total + told
        slow[to] = leaky(total)
    adjacency = graph.laplacian(graph.edges_of(sequences(WORLD), 5), "symmetric")
    np.testing.assert_allclose(ngcf.paper_layer(adjacency, x, first, second).numpy(), slow, rtol=1e-4, atol=1e-6)
    without = leaky(np.stack([a[to] @ w1 + sum((a[s] @ w1 / math.sqrt(len(near) * len(NEAR[s])) for s in near), np.zeros(4)) for to, near in NEAR.items()]))
    np.testing.assert_allclose(ngcf.paper_layer(adjacency, x, first, None).numpy(), without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("product", [True, False])
def test_a_layer_of_the_released_form_equals_a_slow_loop(product: bool) -> None:
    x, parts = rand(8, 4), [(rand(4, 4, seed=seed), rand(4, seed=seed + 9)) for seed in (1, 2)]
    a, (w1, b1), (w2, b2) = x.double().numpy(), *((w.double().numpy(), b.double().numpy()) for w, b in parts)
    slow = np.zeros((8, 4))
    for v, near in NEAR.items():
        mean = sum((a[w] for w in near), a[v].copy()) / (len(near) + 1)
        slow[v] = leaky(mean @ w1 + b1) + (leaky((mean * a[v]) @ w2 + b2) if product else 0)
    adjacency = graph.laplacian(graph.edges_of(sequences(WORLD), 5), "row_loops")
    np.testing.assert_allclose(ngcf.released_layer(adjacency, x, parts[0], parts[1] if product else None).numpy(), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_layers_stand_end_to_end(form: str) -> None:
    made = network(form=form)
    users, items = made()
    assert (users.shape, items.shape) == ((3, 32), (5, 32))
    layers = torch.cat([users, items]).unflatten(1, (4, 8))
    torch.testing.assert_close(layers[:, 0], made.ego.weight)
    torch.testing.assert_close(
        layers[:, 1], made.layer(0, made.ego.weight) if form == "paper" else torch.nn.functional.normalize(made.layer(0, made.ego.weight))
    )
    if form == "released":
        torch.testing.assert_close(layers[:, 1:].norm(dim=2), torch.ones(8, 3))


def test_messages_are_dropped_in_training_only() -> None:
    made = network(dropout=0.5)
    quiet = torch.cat(made())
    torch.testing.assert_close(torch.cat(made()), quiet)
    loud = torch.cat(made.train()())
    torch.testing.assert_close(loud[:, :8], quiet[:, :8])  # layer 0 is never dropped
    assert 0.3 < float((loud[:, 8:16] == 0).float().mean()) < 0.7


def test_the_loss_decays_the_final_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(decay=0.5)
    monkeypatch.setattr(graph, "sample_negatives", lambda *_: (torch.tensor([2]), torch.tensor([True])))
    users, items = (part.detach().double().numpy() for part in made())
    ranked = -math.log(1 / (1 + math.exp(-(users[0] @ items[1] - users[0] @ items[2]))))
    squares = (users[0] ** 2).sum() + (items[1] ** 2).sum() + (items[2] ** 2).sum()
    assert made.loss(torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(ranked + 0.5 * squares / 2, rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_it_learns_tastes(form: str) -> None:
    result = ngcf.Ngcf(SMALL.model_copy(update={"form": form})).train(sequences(lists()), ITEMS, seed=3)
    assert result.item_vectors.shape == (ITEMS, 32)
    assert separation(result.item_vectors) > 0.5
    assert result.metrics["valid_recall@10"] > 0.9
