"""Every metric against a slow loop, with ties; intervals against what they should cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pipeline import evaluation as ev
from pipeline import intervals

RNG = np.random.default_rng(0)


def slow_rank(scores: list[float], target: int, seen: set[int]) -> float:
    left = [index for index in range(len(scores)) if index == target or index not in seen]
    above = sum(scores[index] > scores[target] for index in left)
    equal = sum(scores[index] == scores[target] for index in left if index != target)
    return 1 + above + equal / 2


def packed(lists: list[list[int]]) -> ev.Packed:
    return ev.Packed(np.cumsum([0] + [len(part) for part in lists]), np.array([item for part in lists for item in part], np.int64))


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_equal_a_slow_loop_with_ties_and_history(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "CELLS", 40)  # several chunks
    scores = RNG.integers(0, 4, (23, 12)).astype(float)
    targets = RNG.integers(0, 12, 23)
    lists = [RNG.integers(0, 12, RNG.integers(0, 6)).tolist() for _ in range(23)]
    found = ev.ranks_in_chunks(lambda rows: torch.from_numpy(scores[rows]), targets, 12, packed(lists) if masked else None)
    slow = [slow_rank(scores[b].tolist(), int(targets[b]), set(lists[b]) if masked else set()) for b in range(23)]
    np.testing.assert_allclose(found, slow)


def test_a_score_that_is_not_finite_is_refused_and_inputs_stay() -> None:
    scores = torch.tensor([[1.0, math.nan, 0.0]])
    with pytest.raises(ValueError, match="finite"):
        ev.target_ranks(scores, torch.tensor([1]))
    scores = torch.ones(1, 3)
    assert ev.target_ranks(scores, torch.tensor([1]), packed([[0, 1]])).tolist() == [1.5]
    assert torch.equal(scores, torch.ones(1, 3))


def test_recall_and_ndcg_equal_their_formulas() -> None:
    ranks = np.array([1, 2.5, 10, 10.5, 11, 50])
    assert ev.recall_at(ranks, 10).tolist() == [1, 1, 1, 0, 0, 0]
    np.testing.assert_allclose(ev.ndcg_at(ranks, 10), [1 / math.log2(r + 1) if r <= 10 else 0 for r in ranks])
    metrics = ev.ranking_metrics(ranks, (10, 50))
    assert metrics["recall@10"] == 0.5
    assert metrics["recall@50"] == 1
    assert ev.ranking_metrics([], (10,)) == {}


def slow_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs) if pairs else math.nan


def test_auc_and_gauc_equal_slow_loops() -> None:
    labels, users = RNG.integers(0, 2, 300), RNG.integers(0, 40, 300).astype(str)
    labels[users == "3"] = 1
    scores = RNG.integers(0, 8, 300) / 8 + labels * 0.1
    assert ev.auc(labels, scores) == pytest.approx(slow_auc(labels, scores))
    per_user = {u: slow_auc(labels[users == u], scores[users == u]) for u in np.unique(users)}
    good = {u: value for u, value in per_user.items() if not math.isnan(value)}
    expected = sum(value * (users == u).sum() for u, value in good.items()) / sum((users == u).sum() for u in good)
    value, covered = ev.gauc(labels, scores, users)
    assert value == pytest.approx(expected)
    assert covered == pytest.approx(len(good) / len(per_user))
    result = ev.user_auc(labels, scores, users)
    assert result.covered == pytest.approx(sum((users == u).sum() for u in good) / 300)
    assert "3" not in result.users


def test_one_class_has_no_auc_and_bad_scores_are_refused() -> None:
    assert math.isnan(ev.auc([1, 1], [0.1, 0.2]))
    assert math.isnan(ev.auc([], []))
    with pytest.raises(ValueError, match="finite"):
        ev.auc([0, 1], [0.1, math.inf])


def test_logloss_equals_its_formula_and_survives_certainty() -> None:
    assert ev.logloss([1, 0, 1], [0.9, 0.2, 0.5]) == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.5)) / 3)
    assert ev.logloss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(1e-7))


def test_spearman_equals_the_library() -> None:
    from scipy.stats import spearmanr

    a, b = RNG.integers(0, 6, 80).astype(float), RNG.integers(0, 6, 80).astype(float)
    assert ev.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    a[3] = math.nan
    assert ev.spearman(a, b) == pytest.approx(spearmanr(np.delete(a, 3), np.delete(b, 3)).statistic)
    assert math.isnan(ev.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(ev.spearman([1, 2, math.nan], [1, 2, 3])), "two points always lie on a line"


def test_neighbor_overlap_equals_a_slow_loop() -> None:
    a, b = torch.from_numpy(RNG.normal(size=(30, 4))), torch.from_numpy(RNG.normal(size=(30, 4)))

    def neighbours(table: torch.Tensor, item: int) -> set[int]:
        cosine = torch.nn.functional.cosine_similarity(table, table[item : item + 1])
        return set([other for other in cosine.argsort(descending=True).tolist() if other != item][:5])

    slow = [len(neighbours(a, item) & neighbours(b, item)) / 5 for item in range(30)]
    np.testing.assert_allclose(ev.neighbor_overlap(a, b, k=5), slow)
    np.testing.assert_allclose(ev.neighbor_overlap(a, b, k=5, rows_B=torch.tensor([4, 20])), [slow[4], slow[20]])
    q, _ = torch.linalg.qr(torch.from_numpy(RNG.normal(size=(4, 4))))
    np.testing.assert_allclose(ev.neighbor_overlap(a, a @ q, k=5), 1.0)
    assert np.isnan(ev.neighbor_overlap(a[:1], b[:1])).all()


HISTORIES = [[0, 1, 2, 1], [1, 2], [2, 0, 3], [3], [0, 1, 3]]


def test_history_matrix_keeps_the_latest_age() -> None:
    dense = ev.history_matrix(packed(HISTORIES), 4, decay=0.5).toarray()
    np.testing.assert_allclose(dense[0], [0.125, 1, 0.5, 0])
    np.testing.assert_allclose(dense[2], [0.5, 0, 0.25, 1 * 1.0])


def test_markov_counts_equal_a_slow_loop() -> None:
    slow = np.zeros((4, 4))
    for part in HISTORIES:
        for before, after in itertools.pairwise(part):
            slow[before, after] += 1
    np.testing.assert_array_equal(ev.markov_counts(packed(HISTORIES), 4).toarray(), slow)


def test_ease_weights_solve_the_constrained_ridge_regression() -> None:
    x = ev.history_matrix(packed(HISTORIES), 4).toarray()
    found = ev.ease_weights(packed(HISTORIES), 4, l2=0.7)
    for item in range(4):
        others = [other for other in range(4) if other != item]
        ridge = np.linalg.solve(x[:, others].T @ x[:, others] + 0.7 * np.eye(3), x[:, others].T @ x[:, item])
        np.testing.assert_allclose(found[others, item], ridge, atol=1e-12)
    assert (np.diag(found) == 0).all()


def test_floors_find_what_is_in_the_counts() -> None:
    lists = [[0, 1, 2], [0, 1, 2], [3, 1, 2], [2, 0, 1], [3, 2, 0]]
    ranks = ev.floor_ranks(packed(lists), [3, 3, 0, 2, 1], 4, mask_history=False, l2=1.0)
    assert set(ranks) == {"popularity", "markov", "ease"}
    assert ranks["markov"][3:].tolist() == [1, 1]  # 1 is always followed by 2, 0 by 1
    assert ranks["popularity"].tolist() == [4, 4, 2.5, 1, 2.5]
    masked = ev.floor_ranks(packed(lists), [3, 3, 0, 2, 1], 4, mask_history=True, ease=False)
    assert masked["popularity"].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_in_a_list_equal_a_slow_loop_and_what_was_not_found_stands_in_the_middle_of_the_rest(masked: bool) -> None:
    draw = np.random.default_rng(3)
    items = np.stack([draw.permutation(12)[:5] for _ in range(30)])
    items[:3, 3:] = -1
    scores = np.where(items >= 0, -np.sort(-draw.integers(0, 4, items.shape).astype(float), axis=1), -np.inf)
    targets, lists = draw.integers(0, 12, 30), [draw.integers(0, 12, draw.integers(0, 5)).tolist() for _ in range(30)]
    lists[4] = [int(targets[4])] * 2
    found = ev.listed_ranks(torch.from_numpy(items), torch.from_numpy(scores), targets, 12, packed(lists) if masked else None)
    for row, target in enumerate(targets):
        out = set(lists[row]) - {target} if masked else set()
        listed = {int(item): score for item, score in zip(items[row], scores[row], strict=True) if item >= 0 and item not in out}
        rest = 12 - len(out)
        slow = (
            1 + sum(s > listed[target] for s in listed.values()) + sum(s == listed[target] for i, s in listed.items() if i != target) / 2
            if target in listed
            else (len(listed) + 1 + rest) / 2
        )
        assert found[row] == slow


def test_slices_are_popularity_and_cold_items() -> None:
    masks = ev.strata(np.array(["head", "tail", "tail", "torso"]), [9, 0, 4, 5])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "all": [True] * 4,
        "head": [True, False, False, False],
        "torso": [False, False, False, True],
        "tail": [False, True, True, False],
        "evidence_0": [False, True, False, False],
        "evidence_1_4": [False, False, True, False],
    }
    assert "evidence_0" not in ev.strata(np.array(["head"]), [3])


def test_the_table_of_arms_is_means_over_seeds_and_differences_over_users_and_seeds() -> None:
    draw = np.random.default_rng(0)
    users, masks = draw.integers(0, 40, 200), {"all": np.ones(200, bool), "tail": draw.random(200) < 0.4}
    good, floor = [draw.integers(1, 30, 200).astype(float) for _ in range(2)], [draw.integers(1, 300, 200).astype(float)]
    table = ev.retrieval_table({"real": good, "markov": floor}, users, masks, [("real", "markov"), ("real", "absent")], ks=(10,))
    assert table["arms"]["real"]["tail"]["recall@10"] == pytest.approx(np.mean([ev.recall_at(run, 10)[masks["tail"]].mean() for run in good]))
    assert table["arms"]["markov"]["all"] == {
        "recall@10": ev.recall_at(floor[0], 10).mean(),
        "ndcg@10": ev.ndcg_at(floor[0], 10).mean(),
        "rows": 200,
        "thin": True,
    }
    assert {(row["b"], row["stratum"], row["metric"]) for row in table["differences"]} == {
        ("markov", name, metric) for name in masks for metric in ("recall@10", "ndcg@10")
    }
    row = next(row for row in table["differences"] if (row["stratum"], row["metric"]) == ("all", "ndcg@10"))
    by_seed = [ev.ndcg_at(run, 10) - ev.ndcg_at(floor[0], 10) for run in good]
    expected = intervals.estimate(intervals.mean_effect(by_seed, users))
    assert (row["mean"], row["low"], row["high"], row["seeds"]) == (expected.difference, expected.low, expected.high, 2)
    assert row["seed_sd"] == pytest.approx(np.std([part.mean() for part in by_seed], ddof=1))
    assert row["low"] > 0


def test_a_slice_is_thin_below_a_thousand_rows() -> None:
    ranks, masks = [np.ones(1000)], {"all": np.ones(1000, bool), "most": np.arange(1000) > 0}
    table = ev.retrieval_table({"a": ranks, "b": ranks}, np.arange(1000), masks, [("a", "b")], ks=(10,))
    assert {name: row["thin"] for name, row in table["arms"]["a"].items()} == {"all": False, "most": True}
    assert {row["stratum"]: row["thin"] for row in table["differences"]} == {"all": False, "most": True}


def test_the_effect_on_gauc_is_of_users_and_counts_their_rows() -> None:
    labels, users = RNG.integers(0, 2, 300), RNG.integers(0, 40, 300)
    a, b = RNG.random((2, 2, 300))
    effect = ev.gauc_effect(labels, a, b, users)
    np.testing.assert_allclose(effect.theta_S, [ev.gauc(labels, x, users)[0] - ev.gauc(labels, y, users)[0] for x, y in zip(a, b, strict=True)])
    assert (effect.influence_SU.shape, effect.rows) == ((2, ev.user_auc(labels, a[0], users).users.size), 300)


def test_floors_can_be_fitted_on_other_events_than_they_are_asked_with() -> None:
    train, contexts = [[0, 1, 2], [0, 1, 2], [3, 1]], [[0], [1], [2, 3]]
    ranks = ev.floor_ranks(packed(contexts), [1, 2, 0], 4, mask_history=True, fitted_on=packed(train), seen=packed([[0, 2], [1], [2, 3]]), ease=False)
    assert ranks["markov"].tolist() == [1, 1, 2]
    assert ranks["popularity"].tolist() == [1, 1.5, 2]
    decayed, flat = (ev.floor_ranks(packed([[0, 3]]), [2], 4, mask_history=False, fitted_on=packed(train), decay=decay, l2=0.1)["ease"] for decay in (0.1, 1.0))
    weights, target = ev.ease_weights(packed(train), 4, l2=0.1), 2
    for found, decay in ((decayed, 0.1), (flat, 1.0)):
        scores = weights[3] + decay * weights[0]
        assert found[0] == 1 + (scores > scores[target]).sum()
