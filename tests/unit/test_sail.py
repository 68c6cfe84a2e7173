"""SAIL: every equation against a slow loop, the recipe's parts, masks, determinism, resume, and the six-way report."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from draws import rand
from torch import Tensor
from torch.nn import functional as F

from pipeline import evaluation
from pipeline.config import ContentCre
from pipeline.encoders import sail, sail_pairs, sail_report
from pipeline.encoders.sail_pairs import PairSet, Questions
from pipeline.tokenizers.base import History

SMALL: dict[str, Any] = {
    "enabled": True, "widths": [4, 8], "hidden_dim": 16, "steps": 4, "sequence_steps": 4, "identity_steps": 4, "round_steps": 2, "batch_size": 8,
    "num_hard": 2, "sample": 64, "clusters": 4, "min_peak": 1, "learning_rate": 0.01, "sources": ["category", "session"], "held_share": 0.2,
}  # fmt: skip
N = 60


def settings(**changes: Any) -> ContentCre:
    return ContentCre(**{**SMALL, **changes})


def cosine(a: Any, b: Any) -> float:
    a, b = (part.numpy() if isinstance(part, Tensor) else part for part in (a, b))
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


# ---------------------------------------------------------------- equations


def slow_nce(query: Any, target: Any, rival: Any, hard: Any, shown: Any, tau: float) -> list[float]:
    found = []
    for i in range(len(query)):
        positive = math.exp(cosine(query[i], target[i]) / tau)
        below = sum(math.exp(cosine(query[i], target[j]) / tau) for j in range(len(target)) if rival[i][j])
        mined = sum(math.exp(cosine(query[i], hard[i][h]) / tau) for h in range(len(hard[i])) if shown[i][h])
        found.append(-math.log(positive / (positive + below + mined)))
    return found


def nce_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, target, hard = rand(5, 6, seed=seed), rand(5, 6, seed=seed + 1), rand(5, 3, 6, seed=seed + 2)
    rival, shown = rand(5, 5, seed=seed + 3) > -0.3, rand(5, 3, seed=seed + 4) > 0
    return query, target, rival & ~torch.eye(5, dtype=torch.bool), hard, shown


def test_nce_has_positive_hard_and_in_batch_in_its_denominator() -> None:
    query, target, rival, hard, shown = nce_case()
    found = sail.info_nce(query, target, rival, hard, shown, 0.2)
    np.testing.assert_allclose(found, slow_nce(query.numpy(), target.numpy(), rival.numpy(), hard.numpy(), shown.numpy(), 0.2), rtol=1e-5)
    without = sail.info_nce(query, target, rival, hard, torch.zeros_like(shown), 0.2)
    assert (found[shown.any(1)] > without[shown.any(1)]).all()


def test_nested_nce_adds_up_the_leading_widths() -> None:
    query, target, rival, hard, shown = nce_case(7)
    found = sail.nested_nce(query, target, rival, hard, shown, 0.3, [2, 6])
    slow = np.zeros(5)
    for width in (2, 6):
        slow += slow_nce(query[:, :width].numpy(), target[:, :width].numpy(), rival.numpy(), hard[..., :width].numpy(), shown.numpy(), 0.3)
    np.testing.assert_allclose(found, slow, rtol=1e-5)


def test_cosent_counts_every_pair_in_the_wrong_order() -> None:
    score, grade = rand(7), torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0, 1.0, 0.3])
    slow = sum(math.exp(float(score[k] - score[i]) / 0.2) for i in range(7) for k in range(7) if grade[i] > grade[k])
    assert float(sail.cosent(score, grade, 0.2)) == pytest.approx(math.log(1 + slow), rel=1e-5)
    assert float(sail.cosent(score, torch.ones(7), 0.2)) == 0.0
    assert float(sail.cosent(grade, grade, 0.01)) < 0.1 < float(sail.cosent(-grade, grade, 0.01))


def test_fusion_takes_the_gate_where_both_are_there_and_else_what_is_there() -> None:
    image, text, gate = rand(4, 3), rand(4, 3, seed=1), torch.sigmoid(rand(4, 3, seed=2))
    has_image, has_text = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = sail.fuse(image, text, gate, has_image, has_text)
    for column in range(3):
        assert float(found[0, column]) == pytest.approx(float(gate[0, column] * image[0, column] + (1 - gate[0, column]) * text[0, column]))
    assert torch.equal(found[1], image[1])
    assert torch.equal(found[2], text[2])
    assert torch.equal(found[3], torch.zeros(3))


def test_the_query_of_a_history_is_the_mean_of_its_unit_vectors() -> None:
    items, shown = rand(2, 3, 4), torch.tensor([[True, False, True], [False, True, False]])
    found = sail.mean_vector(items, shown).numpy()
    for row in range(2):
        kept = [items[row, place].numpy() / np.linalg.norm(items[row, place]) for place in range(3) if shown[row, place]]
        np.testing.assert_allclose(found[row], np.mean(kept, axis=0), rtol=1e-5)


def test_identity_distillation_compares_mapped_prefixes_with_the_teacher() -> None:
    vectors, mapping, teacher = rand(4, 6), rand(6, 5, seed=1), rand(4, 5, seed=2)
    rival = ~torch.eye(4, dtype=torch.bool)
    slow = np.zeros(4)
    for width in (2, 6):
        mapped = vectors[:, :width].numpy() @ mapping[:width].numpy()
        slow += slow_nce(mapped, teacher.numpy(), rival.numpy(), np.zeros((4, 0, 5)), np.zeros((4, 0)), 0.5)
    np.testing.assert_allclose(sail.identity_nce(vectors, mapping, teacher, rival, 0.5, [2, 6]), slow, rtol=1e-5)


def test_the_threshold_has_the_best_f1_of_all() -> None:
    positive, negative = rand(40) + 0.8, rand(200, seed=1)
    positive[:10] = positive[0]

    def f1(threshold: float) -> float:
        true, false = int((positive >= threshold).sum()), int((negative >= threshold).sum())
        return 2 * true / (true + false + len(positive))

    found = sail_pairs.f1_threshold(positive, negative)
    best = max(f1(float(score)) for score in torch.cat([positive, negative]).double())
    assert f1(found) == pytest.approx(best)


def test_hard_negatives_are_the_best_below_the_threshold_that_are_allowed() -> None:
    queries, candidates, allowed = rand(6, 5), rand(20, 5, seed=1), rand(6, 20, seed=2) > -1
    found = sail_pairs.hard_negatives(queries, candidates, allowed, threshold=0.5, most=3)
    for row in range(6):
        scores = {place: cosine(queries[row], candidates[place]) for place in range(20) if allowed[row, place]}
        slow = sorted((place for place, score in scores.items() if score < 0.5), key=lambda place: -scores[place])[:3]
        assert found[row].tolist() == slow + [-1] * (3 - len(slow))
    assert (sail_pairs.hard_negatives(queries, candidates, allowed, threshold=-1.0, most=3) == -1).all()


def test_agreement_follows_the_plan_and_weights_follow_agreement() -> None:
    near, far = rand(8, 6), rand(8, 6, seed=5)
    valid = near + 0.05 * rand(8, 6, seed=6)
    unit = [part.numpy() / np.linalg.norm(part, axis=1, keepdims=True) for part in (near, valid)]
    cos = unit[0] @ unit[1].T
    cost = 1 - cos
    log = -(cost - (cost.max() + cost.min()) / 2) / ((cost.max() - cost.min()) / 2) / sail_pairs.PLAN_EPSILON
    plan = np.exp(log)
    for _ in range(sail_pairs.PLAN_ROUNDS):
        plan /= plan.sum(0, keepdims=True)
        plan /= plan.sum(1, keepdims=True)
    assert sail_pairs.agreement(near, valid) == pytest.approx(float((plan / 8 * cos).sum()), rel=1e-4)
    weights = sail_pairs.source_weights([near, far], [valid], temperature=0.1)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert weights[0] > 0.9
    drawn = [sail_pairs.draw_source(weights, float(share)) for share in np.linspace(0, 0.9999, 1000)]
    assert np.bincount(drawn, minlength=2) / 1000 == pytest.approx(weights.numpy(), abs=0.01)


# ---------------------------------------------------------------- what is learned from


def shop(seed: int = 0) -> tuple[sail.Content, list[PairSet], History, dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Items of 4 clusters: text shows them faintly, half the items have an image; users stay in a cluster; the teacher knows the cluster."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, 4, N)
    centre = rng.normal(size=(4, 12))
    text = torch.tensor(0.5 * centre[cluster] + rng.normal(size=(N, 12)), dtype=torch.float32)
    image = torch.tensor(centre[cluster][:, :10] + rng.normal(size=(N, 10)), dtype=torch.float32)
    shown = {"text": torch.ones(N, dtype=torch.bool), "image": torch.tensor(rng.uniform(size=N) < 0.5)}
    left, right = np.triu_indices(N, 1)
    same = np.flatnonzero((cluster[left] == cluster[right]) & (rng.uniform(size=len(left)) < 0.5))
    other = np.flatnonzero((cluster[left] == cluster[right]) & (rng.uniform(size=len(left)) < 0.5))
    sets = [
        PairSet(name=name, collaborative=flag, left_P=torch.tensor(left[at]), right_P=torch.tensor(right[at]), grade_P=torch.tensor(rng.uniform(size=len(at))))
        for name, flag, at in (("category", False, same), ("session", True, other))
    ]
    users = [rng.permutation(np.flatnonzero(cluster == user % 4))[:8] for user in range(24)]
    history = History(
        index_T=torch.tensor(np.concatenate(users)), offset_U=torch.tensor(np.concatenate([[0], np.cumsum([len(user) for user in users])]), dtype=torch.int64)
    )
    teacher = torch.tensor(np.eye(4)[cluster] + 0.1 * rng.normal(size=(N, 4)), dtype=torch.float32)
    return (
        sail.Content(vectors={"text": text, "image": image}, shown=shown),
        sets,
        history,
        {"behavior": (teacher, torch.ones(N, dtype=torch.bool))},
        torch.tensor(cluster),
    )


def held(count: int = 12) -> Tensor:
    return torch.arange(N) % (N // count) == 0


def test_no_item_of_an_evaluation_pair_is_ever_learned_from() -> None:
    content, sets, history, teachers, _ = shop()
    given = sail.lessons(content, sets, history, teachers, held(), settings(), seed=1)
    for part in given.train.values():
        assert not held()[torch.cat([part.left_P, part.right_P])].any()
    assert any(len(part) for part in given.valid.values())
    assert all(held()[torch.cat([part.left_P, part.right_P])].all() for part in given.valid.values())
    for asked in given.questions.values():
        assert not held()[asked.target_Q].any()
        assert not held()[asked.rows_QT[asked.shown_QT]].any()
    assert not (given.teachers["behavior"][1] & held()).any()


def test_questions_look_back_only() -> None:
    history = History(index_T=torch.tensor([0, 1, 2, 3, 4, 5]), offset_U=torch.tensor([0, 4, 6]))
    asked = sail_pairs.questions(history, torch.ones(6, dtype=torch.bool), length=2, most=100, generator=torch.Generator().manual_seed(0))
    assert asked.target_Q.tolist() == [1, 2, 3, 5]
    assert asked.rows_QT[2].tolist() == [2, 1]
    assert asked.rows_QT[3][asked.shown_QT[3]].tolist() == [4]


def test_peaks_keep_what_is_like_the_target() -> None:
    asked = Questions(
        rows_QT=torch.tensor([[0, 1, 2], [3, 4, 5]]), shown_QT=torch.tensor([[True, True, True], [True, True, False]]), target_Q=torch.tensor([6, 7])
    )
    similarity = torch.tensor([[0.9, 0.1, 0.8], [0.9, 0.2, 0.9]])
    single = sail_pairs.single_peak(asked, similarity, threshold=0.5, least=2)
    assert single.target_Q.tolist() == [6]
    assert single.shown_QT.tolist() == [[True, False, True]]
    label = torch.tensor([1, 1, 0, 2, 0, 2, 1, 2])
    assert sail_pairs.multi_peak(asked, label, share=0.6).target_Q.tolist() == [6]
    assert sail_pairs.multi_peak(asked, label, share=0.5).target_Q.tolist() == [6, 7]


def test_a_known_pair_in_either_direction_is_contained() -> None:
    keys = PairSet(name="a", collaborative=False, left_P=torch.tensor([0, 2]), right_P=torch.tensor([1, 3]), grade_P=torch.ones(2)).keys(5)
    found = sail_pairs.contains(keys, torch.arange(25)).view(5, 5)
    assert torch.nonzero(found).tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert not sail_pairs.contains(keys[:0], torch.arange(3)).any()


def test_mined_negatives_are_no_partners_and_lie_below_the_threshold() -> None:
    content, sets, *_ = shop()
    vectors, pairs = content.vectors["text"], sets[0]
    shown = torch.ones(N, dtype=torch.bool)
    hard, threshold = sail_pairs.mine(vectors, shown, pairs, most=4, sample=500, fixed=None, generator=torch.Generator().manual_seed(0))
    rows, places = torch.nonzero(hard >= 0).T
    score = F.cosine_similarity(vectors[rows], vectors[hard[rows, places]])
    assert len(rows) > N
    assert (score < threshold + 1e-6).all()
    assert not sail_pairs.contains(pairs.keys(N), rows * N + hard[rows, places]).any()
    assert sail_pairs.mine(vectors, shown, pairs, most=4, sample=500, fixed=0.9, generator=torch.Generator())[1] == 0.9


def test_no_partner_and_no_equal_target_is_a_negative_of_the_batch() -> None:
    keys = PairSet(name="a", collaborative=False, left_P=torch.tensor([0, 1, 0]), right_P=torch.tensor([2, 3, 3]), grade_P=torch.ones(3)).keys(9)
    batch = sail.pair_batch(torch.tensor([0, 1, 4]), torch.tensor([2, 3, 2]), torch.ones(3), keys, torch.tensor([[5, -1]] * 3), 9)
    assert batch.rival_BB.tolist() == [[False, False, False], [True, False, True], [False, True, False]]
    assert batch.rows_R[batch.left_B].tolist() == [0, 1, 4]
    assert batch.rows_R[batch.hard_BH[:, 0]].tolist() == [5, 5, 5]
    assert (batch.hard_BH[:, 1] == -1).all()


def test_a_pattern_without_vectors_is_dropped_and_changes_nothing_else() -> None:
    vectors = {side: F.normalize(rand(6, 8, seed=place), dim=1) for place, side in enumerate(("text", "image", "fused"))}
    everyone = torch.ones(6, dtype=torch.bool)
    batch = sail.pair_batch(
        torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([0.1, 0.5, 0.9]), torch.empty(0, dtype=torch.int64), torch.full((3, 0), -1), 6
    )
    chosen = settings(patterns=["fused-fused", "text-text", "text-image"])
    full = sail.pair_losses(sail.Views(vectors=vectors, shown=dict.fromkeys(vectors, everyone)), batch, torch.tensor(0.1), chosen)
    assert set(full) == {"fused-fused", "text-text", "text-image", "cosent", "total"}
    expected = full["fused-fused"] + chosen.single * full["text-text"] + chosen.cross * full["text-image"] + chosen.cosent * full["cosent"]
    assert float(full["total"]) == pytest.approx(float(expected), rel=1e-6)
    blind = sail.Views(vectors=vectors, shown={"text": everyone, "fused": everyone, "image": torch.zeros(6, dtype=torch.bool)})
    less = sail.pair_losses(blind, batch, torch.tensor(0.1), chosen)
    assert set(less) == {"fused-fused", "text-text", "cosent", "total"}
    assert torch.equal(less["text-text"], full["text-text"])


def test_hiding_leaves_every_item_something() -> None:
    content, *_ = shop()
    hidden = sail.hide(content, 0.3, torch.rand(N, generator=torch.Generator().manual_seed(0)))
    assert (hidden.shown["text"] | hidden.shown["image"]).all()
    both = content.shown["image"]
    assert 0 < int((~hidden.shown["text"]).sum()) < int(both.sum())
    assert int((both & ~hidden.shown["image"]).sum()) > 0
    assert sail.hide(content, 0.0, torch.zeros(N)) is content


# ---------------------------------------------------------------- the recipe


class Memory:
    """A checkpoint in memory that can make the run die after some saves."""

    def __init__(self, die_after: int = -1) -> None:
        self.kept: Any = None
        self.saves, self.die_after = 0, die_after

    def load(self) -> Any:
        return self.kept

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        self.kept = (
            {name: value.clone() for name, value in tensors.items()},
            {**document, "curves": {name: list(v) for name, v in document["curves"].items()}},
        )
        self.saves += 1
        if self.saves == self.die_after:
            raise KeyboardInterrupt


def fitted(checkpoint: Memory | None = None, seed: int = 3, **changes: Any) -> tuple[sail.Sail, dict[str, list[float]]]:
    content, sets, history, teachers, _ = shop()
    chosen = settings(**changes)
    given = sail.lessons(content, sets, history, teachers, held(), chosen, seed=1)
    return sail.Sail.fit(content, given, chosen, seed=seed, checkpoint=checkpoint)


@cache
def plain() -> tuple[sail.Sail, dict[str, list[float]]]:
    """A run with nothing changed; tests only look at it."""
    return fitted()


def test_it_begins_at_the_centred_base_vectors() -> None:
    content, *_ = shop()
    untrained = sail.Recipe(content, sail.lessons(content, shop()[1], None, {}, held(), settings(), 1), settings(widths=[12]), seed=0)
    views = untrained.network(content)
    unit = F.normalize(content.vectors["text"], dim=1)
    centred = F.normalize(unit - unit.mean(0), dim=1)
    torch.testing.assert_close(views.vectors["text"] @ views.vectors["text"].T, centred @ centred.T, rtol=1e-4, atol=1e-5)


def test_no_held_item_is_a_hard_negative() -> None:
    content, sets, *_ = shop()
    chosen = settings(num_hard=len(content), sample=len(content))
    recipe = sail.Recipe(content, sail.lessons(content, sets, None, {}, held(), chosen, 1), chosen, seed=0)
    hard, _ = recipe._mined("hard", recipe._views(), 0)
    drawn = torch.cat([rows_NH[rows_NH >= 0] for rows_NH in hard.values()]).unique()
    assert len(drawn) > 10
    assert not held()[drawn].any()


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_the_nearer_half_of_the_sources_goes_on(count: int, kept: int) -> None:
    content, (first, second), *_ = shop()
    names = ["category", "words", "session", "sequence"][:count]
    sets = [replace((first, second)[at % 2].take(torch.arange(at, len(first) // 2, at + 1)), name=name) for at, name in enumerate(names)]
    chosen = settings(sources=names, target="content")
    recipe = sail.Recipe(content, sail.lessons(content, sets, None, {}, held(20), chosen, 1), chosen, seed=0)
    views = recipe._views()
    whole, nearest = (recipe._weights(phase, views, 0) for phase in ("all", "nearest"))
    assert (whole > 0).all()
    assert torch.nonzero(nearest).flatten().tolist() == whole.argsort(descending=True)[:kept].sort().values.tolist()
    assert float(nearest.sum()) == pytest.approx(1.0)
    alike = sail.Recipe(content, recipe.given, settings(sources=names, weights="uniform"), seed=0)
    assert (alike._weights("nearest", views, 0) == 1 / count).all(), "none of them is nearer"


def test_the_whole_recipe_runs_every_phase_and_draws_pairs_together() -> None:
    encoder, curves = fitted(steps=15, sequence_steps=10, identity_steps=10, round_steps=10, batch_size=24)
    assert {name.split("/")[0] for name in curves} == set(sail.PHASES)
    assert "hard/threshold/session" in curves
    assert curves["all/weight/category"][0] + curves["all/weight/session"][0] == pytest.approx(1.0)
    untrained, nothing = fitted(steps=0, sequence_steps=0, identity_steps=0)
    assert nothing == {}
    content, _, _, _, cluster = shop()
    upper = torch.triu(torch.ones(N, N, dtype=torch.bool), 1)

    def auc(found: sail.Sail) -> float:
        unit = found.encode(content).vectors["fused"]
        return evaluation.auc((cluster[:, None] == cluster[None, :])[upper].numpy(), (unit @ unit.T)[upper].numpy())

    assert auc(encoder) > auc(untrained) + 0.08


def test_same_arguments_same_bits_and_another_seed_other_bits() -> None:
    first, again, other = plain()[0].state(), fitted()[0].state(), fitted(seed=4)[0].state()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("die_after", [1, 5, 9])
def test_a_run_that_died_goes_on_bit_for_bit(die_after: int) -> None:
    whole, curves = plain()
    memory = Memory(die_after)
    with pytest.raises(KeyboardInterrupt):
        fitted(memory)
    resumed, resumed_curves = fitted(memory)
    assert all(torch.equal(value, resumed.state()[name]) for name, value in whole.state().items())
    assert resumed_curves == curves


def test_a_checkpoint_of_another_start_is_left_alone() -> None:
    memory = Memory(3)
    with pytest.raises(KeyboardInterrupt):
        fitted(memory, seed=9)
    memory.die_after = -1
    again, expected = fitted(memory)[0].state(), plain()[0].state()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


@pytest.mark.parametrize(
    "changes",
    [{"negatives": "off"}, {"negatives": "fixed"}, {"weights": "uniform"}, {"specialised": False}, {"sequence_steps": 0}, {"identity_steps": 0}, {"steps": 0}],
    ids=str,
)
def test_every_part_can_be_switched_off(changes: dict[str, Any]) -> None:
    encoder, curves = fitted(**changes)
    assert all(bool(value.isfinite().all()) for value in encoder.state().values())
    phases = {name.split("/")[0] for name in curves}
    if changes.get("negatives") == "off":
        assert "hard" not in phases
    if changes.get("weights") == "uniform":
        assert curves["all/weight/category"] == [0.5, 0.5]
    assert ("sequence" in phases) == (changes.get("sequence_steps") != 0)


def test_state_and_config_rebuild_it_and_the_id_names_the_weights() -> None:
    encoder, _ = plain()
    content, *_ = shop()
    loaded = sail.Sail.load(encoder.config(), encoder.state())
    assert loaded.identify() == encoder.identify() == encoder.config()["encoder_id"]
    assert all(torch.equal(value, loaded.encode(content).vectors[side]) for side, value in encoder.encode(content).vectors.items())
    moved = {name: value + 1e-3 for name, value in encoder.state().items()}
    assert sail.Sail.load(encoder.config(), moved).identify() != encoder.identify()
    assert sail.Sail.load({**encoder.config(), "settings": {**encoder.config()["settings"], "width": 4}}, encoder.state()).identify().endswith("-w4-l2")
    with pytest.raises(RuntimeError):
        sail.Sail.load({**encoder.config(), "base_widths": {"text": 12}}, encoder.state())


def test_an_item_has_one_vector_whatever_stands_beside_it_and_narrow_is_a_prefix() -> None:
    encoder, _ = plain()
    content, *_ = shop()
    whole, alone = encoder.encode(content), encoder.encode(content.take(torch.tensor([7])))
    assert all(torch.equal(whole.vectors[side][7:8], alone.vectors[side]) for side in whole.vectors)
    narrow = encoder.encode(content, 4).vectors["fused"]
    torch.testing.assert_close(narrow, F.normalize(whole.vectors["fused"][:, :4], dim=1))
    text_only = sail.Content(vectors=content.vectors, shown={"text": content.shown["text"], "image": torch.zeros(N, dtype=torch.bool)})
    assert torch.equal(encoder.encode(text_only).vectors["text"], whole.vectors["text"])
    assert not encoder.encode(text_only).vectors["image"].any()
    with pytest.raises(ValueError, match="widths"):
        encoder.encode(sail.Content(vectors={"text": torch.zeros(2, 5)}, shown={"text": torch.ones(2, dtype=torch.bool)}))


def test_a_catalogue_without_images_learns_from_texts() -> None:
    content, sets, history, teachers, _ = shop()
    texts = sail.Content(vectors={"text": content.vectors["text"]}, shown={"text": content.shown["text"]})
    given = sail.lessons(texts, sets, history, teachers, held(), settings(), seed=1)
    encoder, curves = sail.Sail.fit(texts, given, settings(), seed=3)
    assert "all/loss/text-text" in curves
    assert "all/loss/text-image" not in curves
    assert set(encoder.encode(texts).vectors) == {"text", "fused"}


def test_without_pairs_there_is_nothing_to_learn() -> None:
    content, sets, *_ = shop()
    with pytest.raises(ValueError, match="no source"):
        sail.lessons(content, sets, None, {}, torch.ones(N, dtype=torch.bool), settings(), seed=1)


@pytest.mark.parametrize("bad", [{"widths": [8, 4]}, {"width": 5}, {"patterns": ["text-audio"]}, {"patterns": []}, {"widths": []}], ids=str)
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"widths|width|patterns|at least"):
        settings(**bad)


# ---------------------------------------------------------------- the report


def test_recall_counts_both_directions_without_the_item_itself() -> None:
    vectors, left, right = rand(30, 4), torch.tensor([0, 3, 5]), torch.tensor([1, 9, 2])
    hits = []
    for a, b in [*zip(left, right, strict=True), *zip(right, left, strict=True)]:
        scores = [cosine(vectors[a], vectors[item]) if item != a else -2 for item in range(30)]
        hits.append(sum(score > scores[b] for score in scores) < 10)
    assert sail_report.recall(vectors, left, right, 10) == pytest.approx(np.mean(hits))


def test_mutual_information_kendall_and_bijection_against_loops() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 80), rng.integers(0, 5, 80)
    joint = np.array([[np.mean((a == i) & (b == j)) for j in range(5)] for i in range(4)])
    pa, pb = joint.sum(1), joint.sum(0)
    shared = sum(joint[i, j] * math.log(joint[i, j] / (pa[i] * pb[j])) for i in range(4) for j in range(5) if joint[i, j])
    entropy = [-sum(p * math.log(p) for p in part if p) for part in (pa, pb)]
    assert sail_report.mutual_information(torch.tensor(a), torch.tensor(b)) == pytest.approx(2 * shared / sum(entropy))
    assert sail_report.mutual_information(torch.tensor(a), torch.tensor(3 - a)) == pytest.approx(1.0)
    assert sail_report.mutual_information(torch.zeros(5), torch.zeros(5)) == 0.0
    x, y = rand(3, 6), rand(3, 6, seed=1)
    u, v = x.numpy(), y.numpy()
    slow = [sum(np.sign((u[r, i] - u[r, j]) * (v[r, i] - v[r, j])) for i in range(6) for j in range(6) if i != j) / 30 for r in range(3)]
    assert sail_report.kendall(x, y) == pytest.approx(float(np.mean(slow)), rel=1e-5)
    assert sail_report.kendall(x, 2 * x + 1) == pytest.approx(1.0)
    assert sail_report.bijective_hits(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2, 2, 0, 0, 0])) == pytest.approx(0.8)
    assert sail_report.separability(np.array([1.0, 3.0]), np.array([-1.0, 1.0])) == pytest.approx(2.0)


def test_the_table_has_six_ways_and_better_vectors_score_better() -> None:
    content, sets, _, teachers, cluster = shop()
    perfect = F.one_hot(cluster, 4).float() + 0.01 * rand(N, 4)
    table = sail_report.six_ways({"text": content.vectors["text"], "perfect": perfect}, sets, cluster, teachers["behavior"][0], clusters=4, seed=0)
    names = {name.split("/")[0] for name in table["text"]}
    assert names == {"recall@50", "separability", "auc", "nmi", "kendall", "overlap@20", "bijective"}
    assert all(table["perfect"][name] > value for name, value in table["text"].items() if not name.startswith("recall"))
    data = sail_report.figure_data({**table, "less": {"auc/content": 0.5}})
    assert data["rows"]["less"].count(None) == len(data["columns"]) - 1
    nothing = sail_report.six_ways({"text": content.vectors["text"]}, [], torch.full((N,), -1), torch.zeros(N, 1))
    assert nothing == {"text": {}}


def test_ids_are_made_by_clustering_and_by_quantisation() -> None:
    content, sets, _, _, cluster = shop()
    perfect = F.one_hot(cluster, 4).float() + 0.05 * rand(N, 4)
    codes = sail_report.sids(perfect, [4, 8], 3, seed=0)
    assert {name: tuple(value.shape) for name, value in codes.items()} == {"cluster_4": (N, 1), "cluster_8": (N, 1), "quantised": (N, 3)}
    found, worse = sail_report.sid_ways(codes, sets, cluster), sail_report.sid_ways(sail_report.sids(content.vectors["text"], [4, 8], 3, seed=0), sets, cluster)
    assert found["sid/cluster_4/nmi"] > 0.9
    assert found["sid/cluster_4/lift"] > worse["sid/cluster_4/lift"]
    assert found["sid/quantised/collision_rate"] <= found["sid/cluster_4/collision_rate"]
