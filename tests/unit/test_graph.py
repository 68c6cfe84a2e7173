"""Pairs, sparse products, sampled negatives, the shared training loop, and rows that are trained against a frozen base."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graph_world import ITEMS, lists, sequences

from pipeline.config import LightGcn as Params
from pipeline.encoders import graph
from pipeline.encoders.lightgcn import LightGcn

SMALL = Params(dim=8, num_layers=2, batch_size=32, max_epochs=8, patience=8, valid_users=20, row_steps=40, learning_rate=0.03)
pytestmark = pytest.mark.usefixtures("one_thread")


def edges() -> graph.Edges:
    return graph.edges_of(sequences([[0, 1, 1], [2], [], [0, 3, 9]]), 5)


def dense(sparse: graph.Sparse) -> np.ndarray:
    matrix = sparse.matrix.to_dense().numpy()
    np.testing.assert_array_equal(sparse.transpose.to_dense().numpy(), matrix.T)
    return matrix


def test_a_pair_counts_once_and_unknown_items_are_left_out() -> None:
    found = edges()
    assert list(zip(found.users.tolist(), found.items.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2), (3, 0), (3, 3)]
    assert [part.tolist() for part in found.degrees()] == [[2, 1, 0, 2], [2, 1, 1, 1, 0]]
    users, items = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    assert {(u, i) for u in range(4) for i in range(5) if found.contains(users, items)[u, i]} == {(0, 0), (0, 1), (1, 2), (3, 0), (3, 3)}
    assert not graph.edges_of(sequences([[7]]), 5).contains(users, items).any()


@pytest.mark.parametrize("form", ["symmetric", "row_loops"])
def test_the_adjacency_equals_slow_loops(form: str) -> None:
    found = edges()
    pairs = set(zip(found.users.tolist(), (found.items + 4).tolist(), strict=True))
    neighbours = {v: [w for w in range(9) if (v, w) in pairs or (w, v) in pairs] for v in range(9)}
    slow = np.zeros((9, 9))
    for v, near in neighbours.items():
        for w in near:
            slow[v, w] = 1 / math.sqrt(len(near) * len(neighbours[w])) if form == "symmetric" else 1 / (len(near) + 1)
        if form == "row_loops":
            slow[v, v] = 1 / (len(near) + 1)
    np.testing.assert_allclose(dense(graph.laplacian(found, form)), slow, rtol=1e-6)


def test_the_mean_of_a_users_items_equals_a_slow_loop() -> None:
    slow = np.zeros((4, 5))
    for user, items in enumerate([[0, 1], [2], [], [0, 3]]):
        for item in items:
            slow[user, item] = 1 / len(items)
    np.testing.assert_allclose(dense(graph.mean_of_items(edges())), slow)


def test_the_sparse_product_has_the_gradient_of_the_dense_one() -> None:
    matrix = graph.laplacian(edges(), "row_loops")
    x, y = (torch.arange(27.0).view(9, 3).requires_grad_() for _ in range(2))
    ((matrix @ x) ** 2).sum().backward()
    ((matrix.matrix.to_dense() @ y) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_bpr_and_the_decay_equal_slow_loops() -> None:
    positive, negative = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([0.1, 1.0, 3.0])
    slow = [-math.log(1 / (1 + math.exp(-(p - n)))) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)]
    np.testing.assert_allclose(graph.bpr_loss(positive, negative).numpy(), slow, rtol=1e-5)
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert float(graph.squared_norm(rows, rows)) == pytest.approx(sum(float(x) ** 2 for row in rows for x in row) * 2 / 6, rel=1e-5)


def test_negatives_are_candidates_that_the_user_does_not_have() -> None:
    torch.manual_seed(0)
    found = edges()
    users = torch.tensor([0, 1, 3]).repeat(400)
    items, free = graph.sample_negatives(found, torch.arange(4), users)
    assert free.all()
    drawn = {user: set(items[users == user].tolist()) for user in (0, 1, 3)}
    assert drawn == {0: {2, 3}, 1: {0, 1, 3}, 3: {1, 2}}
    assert not graph.sample_negatives(found, torch.tensor([2]), torch.tensor([1, 1]))[1].any()  # a user who has every candidate


def test_training_is_deterministic_stops_early_and_refuses_nothing_to_learn_from() -> None:
    encoder, data = LightGcn(SMALL.model_copy(update={"max_epochs": 30, "patience": 2})), sequences(lists())
    before = torch.random.get_rng_state()
    first, again = encoder.train(data, ITEMS, seed=5), encoder.train(data, ITEMS, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert not torch.equal(first.item_vectors, encoder.train(data, ITEMS, seed=6).item_vectors)
    scores = first.curves["valid_ndcg@10"]
    assert first.metrics["valid_ndcg@10"] == max(scores)
    assert len(scores) == min(30, int(first.metrics["best_epoch"]) + 2)
    with pytest.raises(ValueError, match="no graph"):
        encoder.train(sequences([[], []]), ITEMS, seed=0)


def test_without_questions_all_epochs_run() -> None:
    result = LightGcn(SMALL).train(sequences([[0, 1], [1, 2], [2, 0]]), 3, seed=0)
    assert result.metrics["epochs"] == result.metrics["best_epoch"] == SMALL.max_epochs


def test_held_out_baskets_train_nothing() -> None:
    """Two worlds that differ in what their users did last: the same loss in every epoch."""
    world = lists()
    other = [[*part[:-1], (part[-1] + 1) % ITEMS if (part[-1] + 1) % ITEMS not in part else part[-1]] for part in world]
    assert world != other
    curves = [LightGcn(SMALL.model_copy(update={"valid_users": 100})).train(sequences(part), ITEMS, seed=1).curves["loss"] for part in (world, other)]
    assert curves[0] == curves[1]


# ---------------------------------------------------------------- rows of a frozen generation


@pytest.fixture(scope="module")
def base():
    return LightGcn(SMALL).train(sequences(lists()), ITEMS, seed=5)


def nightly() -> list[list[int]]:
    """Items 20 and 21 are new: 20 is met by even users (first half), 21 by odd users; user 40 is new."""
    world = [part + ([20] if user % 4 == 0 else [21] if user % 4 == 1 else []) for user, part in enumerate(lists())]
    return [*world, [3, 4, 20]]


def rows(base, world: list[list[int]], moved: list[int], seeds: list[int]):
    return LightGcn(SMALL).train_rows(base.state, sequences(world), torch.tensor(moved, dtype=torch.int64), torch.tensor(seeds, dtype=torch.int64))


def test_a_row_does_not_depend_on_which_others_moved(base, monkeypatch: pytest.MonkeyPatch) -> None:
    together = rows(base, nightly(), [20, 5, 21], [7, 8, 9])
    assert together.near.all()
    for place, (item, seed) in enumerate([(20, 7), (5, 8), (21, 9)]):
        torch.testing.assert_close(rows(base, nightly(), [item], [seed]).vectors[0], together.vectors[place], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(graph, "ROW_CHUNK", 1)
    apart = rows(base, nightly(), [20, 5, 21], [7, 8, 9])
    torch.testing.assert_close(apart.vectors, together.vectors, rtol=1e-4, atol=1e-5)
    assert len(apart.curve) == SMALL.row_steps


def test_rows_follow_their_seed_learn_and_leave_the_base_alone(base) -> None:
    before = {name: tensor.clone() for name, tensor in base.state.items()}
    first, again, other = (rows(base, nightly(), [20, 21], seeds) for seeds in ([1, 2], [1, 2], [3, 2]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state.items())
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors[0], other.vectors[0])
    torch.testing.assert_close(first.vectors[1], other.vectors[1], rtol=1e-4, atol=1e-5)
    assert np.mean(first.curve[-10:]) < np.mean(first.curve[:10])
    unit = torch.nn.functional.normalize(base.item_vectors, dim=1)
    cosine = torch.nn.functional.normalize(first.vectors, dim=1) @ unit.T
    assert cosine[0, :10].mean() > cosine[0, 10:].mean() + 0.5
    assert cosine[1, 10:].mean() > cosine[1, :10].mean() + 0.5


def test_what_the_base_says_nothing_about_waits_and_nothing_moved_is_nothing(base) -> None:
    found = rows(base, [*lists(), [22, 23], [22]], [22, 3], [1, 2])
    assert found.near.tolist() == [False, True]
    assert found.vectors.shape == (1, 8)
    nothing = rows(base, nightly(), [], [])
    assert (nothing.vectors.shape, nothing.curve, nothing.near.numel()) == ((0, 8), [], 0)


def test_a_known_item_starts_from_its_row_and_a_new_one_from_its_users_items(base) -> None:
    world, items = [[0, 1, 20], [2, 20], [20]], base.state["items"]
    found = graph.edges_of(sequences(world), ITEMS)
    moved = torch.tensor([1, 20])
    start = graph.initial_rows(items, found, graph.own_pairs(sequences(world), moved, found), moved)
    torch.testing.assert_close(start[0], items[1])
    torch.testing.assert_close(start[1], ((items[0] + items[1]) / 2 + items[2]) / 2)


def test_the_user_map_finds_a_linear_map_again() -> None:
    torch.manual_seed(0)
    features, map_ = torch.randn(200, 4), torch.randn(4, 4)
    torch.testing.assert_close(graph.user_map(features, features @ map_), map_, rtol=0.01, atol=0.01)


def test_user_features_equal_slow_loops() -> None:
    found, items, degree = edges(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0, 1.0, 9.0, 0.0, 2.0])
    slow = np.zeros((4, 3))
    for user, own in enumerate([[0, 1], [2], [], [0, 3]]):
        for item in own:
            slow[user] += items[item].numpy() / math.sqrt(len(own) * max(float(degree[item]), 1))
    np.testing.assert_allclose(graph.user_features(found, items, degree).numpy(), slow, rtol=1e-5)
