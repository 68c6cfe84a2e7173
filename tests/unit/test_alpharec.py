"""AlphaRec: loss, users as means of texts, propagation, cold items, rows of a frozen night, the linear probe, and mixing in an intent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graph_world import ITEMS, lists, separation, sequences, texts
from torch.nn import functional as F

from pipeline.config import AlphaRec as Params
from pipeline.encoders import alpharec, graph

SMALL = Params(
    dim=8, hidden_dim=12, num_layers=2, batch_size=64, max_epochs=8, patience=8, valid_users=20, learning_rate=0.01, num_negatives=8, temperature=0.2
)
WORLD = [[0, 1], [1, 2, 3], [3]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base():
    return alpharec.AlphaRec(SMALL).train(sequences(lists()), ITEMS, seed=5, content=texts())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def network(**changes: object) -> alpharec.Network:
    torch.manual_seed(0)
    made = alpharec.Network(texts()[:5], SMALL.model_copy(update=changes))
    made.attach(graph.edges_of(sequences(WORLD), 5))
    return made


def test_info_nce_equals_a_slow_loop() -> None:
    torch.manual_seed(0)
    users, items, negatives = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    hit = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    u, i, n = (part.double().numpy() for part in (users, items, negatives))
    slow = []
    for b in range(3):
        own = math.exp(cosine(u[b], i[b]) / 0.2)
        slow.append(-math.log(own / (own + sum(math.exp(cosine(u[b], n[s]) / 0.2) for s in range(5) if not hit[b, s]))))
    np.testing.assert_allclose(alpharec.info_nce(users, items, negatives, hit, 0.2).numpy(), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_a_user_is_the_mapped_mean_of_its_texts(form: str) -> None:
    made = network(form=form)
    ego = made.layers()[0]
    for user, items in enumerate(WORLD):
        torch.testing.assert_close(ego[user], made.map(made.content[items].mean(0)))
    torch.testing.assert_close(ego[3:], made.map(made.content))
    assert (made.map.first.bias is None) is (form == "linear")


def test_an_item_without_pairs_is_its_mapped_text_over_the_layers() -> None:
    made = network()
    users, items = made()
    torch.testing.assert_close(items[4], made.map(made.content[4]) / 3)
    assert users.shape == (3, 8)


def test_it_learns_tastes_is_deterministic_and_keeps_no_user(base) -> None:
    again = alpharec.AlphaRec(SMALL).train(sequences(lists()), ITEMS, seed=5, content=texts())
    assert all(torch.equal(base.state[name], again.state[name]) for name in base.state)
    assert separation(base.item_vectors) > 0.5
    assert base.metrics["valid_recall@10"] > 0.9
    assert base.item_vectors.norm(dim=1).std() > 0  # as they are, not normalised
    assert all(40 not in tensor.shape for tensor in base.state.values())
    with pytest.raises(ValueError, match="text vectors"):
        alpharec.AlphaRec(SMALL).train(sequences(lists()), ITEMS, seed=5)


def test_items_that_changed_nothing_get_their_base_vector_again(base) -> None:
    """Tonight's graph is the base's: propagation from the kept layers must give what training exported."""
    moved = torch.arange(ITEMS)
    found = alpharec.AlphaRec(SMALL).train_rows(base.state, sequences(lists()), moved, moved, content=texts())
    torch.testing.assert_close(found.vectors, base.item_vectors, rtol=1e-4, atol=1e-5)


def test_a_new_item_is_placed_by_text_and_users_and_by_nothing_else(base) -> None:
    world = [part + ([20] if user % 4 == 0 else []) for user, part in enumerate(lists())]
    other = [part + ([21] if user % 4 == 1 else []) for user, part in enumerate(world)]
    content = texts()
    content[22] = 0

    def rows(lists_: list[list[int]], moved: list[int], vectors: torch.Tensor = content):
        seeds = torch.zeros(len(moved), dtype=torch.int64)
        return alpharec.AlphaRec(SMALL).train_rows(base.state, sequences(lists_), torch.tensor(moved), seeds, content=vectors)

    both = rows(other, [20, 21, 22])
    assert both.near.tolist() == [True, True, False]  # 22 has neither a text nor a user
    assert both.curve == []
    torch.testing.assert_close(rows(world, [20]).vectors[0], both.vectors[0])
    similar = F.normalize(both.vectors[:1], dim=1) @ F.normalize(base.item_vectors, dim=1).T
    assert similar[0, :10].mean() > similar[0, 10:].mean() + 0.5
    holding = [part for part in other if {20, 21} & set(part)]
    torch.testing.assert_close(rows(holding, [20, 21]).vectors, both.vectors)  # users without a moved item say nothing
    for nobody in (lists(), []):
        torch.testing.assert_close(rows(nobody, [21]).vectors[0], alpharec.mapped(base.state, content[[21]], SMALL)[0] / 3)


def test_the_probe_tells_texts_from_texts_dealt_out_at_random() -> None:
    encoder = alpharec.AlphaRec(SMALL.model_copy(update={"max_epochs": 5}))
    found = encoder.probe(sequences(lists()), ITEMS, seed=1, content=texts())
    assert set(found) == {"probe/recall@20", "probe/ndcg@20", "probe/dealt_recall@20", "probe/dealt_ndcg@20", "probe_lift"}
    assert found["probe_lift"] == pytest.approx(found["probe/recall@20"] / found["probe/dealt_recall@20"])
    assert found["probe/ndcg@20"] > found["probe/dealt_ndcg@20"] + 0.1
    assert alpharec.AlphaRec(SMALL.model_copy(update={"probe": False})).probe(sequences(lists()), ITEMS, seed=1, content=texts()) == {}
