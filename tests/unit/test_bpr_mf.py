"""BPR-MF: its loss against a slow loop, what it learns, and what it leaves for later nights."""

from __future__ import annotations

import math

import pytest
import torch
from graph_world import ITEMS, lists, separation, sequences

from pipeline.config import BprMf as Params
from pipeline.encoders import bpr_mf, graph

SMALL = Params(dim=8, batch_size=32, max_epochs=30, patience=30, valid_users=20, learning_rate=0.03)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_equals_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = bpr_mf.Network(3, 4, SMALL.model_copy(update={"decay": 0.5}))
    network.attach(graph.edges_of(sequences([[0, 1], [2], [3, 0]]), 4))
    users, items, negatives, found = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), torch.tensor([True, True, False])
    monkeypatch.setattr(graph, "sample_negatives", lambda *_: (negatives, found))
    u, i = (table.weight.detach().double().numpy() for table in (network.users, network.items))
    ranked = [-math.log(1 / (1 + math.exp(-(u[a] @ i[b] - u[a] @ i[c])))) for a, b, c in ((0, 1, 2), (1, 2, 0))]
    squares = sum((u[a] ** 2).sum() + (i[b] ** 2).sum() + (i[c] ** 2).sum() for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)))
    assert network.loss(users, items).item() == pytest.approx(sum(ranked) / 2 + 0.5 * squares / (2 * 3), rel=1e-5)


def test_it_learns_tastes_and_keeps_no_user() -> None:
    result = bpr_mf.BprMf(SMALL).train(sequences(lists()), ITEMS, seed=3)
    assert result.item_vectors.shape == (ITEMS, 8)
    assert separation(result.item_vectors) > 0.7
    assert result.metrics["valid_recall@10"] > 0.9  # two items of the right half are left
    assert result.metrics["user_map_cosine"] > 0.8
    assert result.item_vectors.norm(dim=1).std() > 0  # as they are, not normalised
    assert all(40 not in tensor.shape for tensor in result.state.values())
