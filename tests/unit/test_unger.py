"""UNGER: its equations against loops, which side stands in for which, and what its terms move."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import rand, unit
from tokenizer_items import noise, tiny_history, tiny_items, training, unger_settings

from pipeline import config
from pipeline.tokenizers import histories, unger
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.rq_kmeans import RqKmeans
from pipeline.tokenizers.unger import Network, Training, Unger
from pipeline.tokenizers.world import World


def stage(**changes: object) -> Training:
    torch.manual_seed(0)
    network = Network(unger_settings(**changes), {"text": 12, "image": 8, "behavior": 6})
    network.inputs.fit(tiny_items())
    return Training(network, histories.events(tiny_history(), 96, who="x"), network.inputs.prepare(tiny_items()))


@pytest.fixture(scope="module")
def fitted() -> Unger:
    tokenizer = Unger(unger_settings())
    tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training(), history=tiny_history()))
    return tokenizer


def test_adaption_layer_against_a_loop():
    hidden, gain, shift = rand(3, 4), rand(3, 4, seed=1), rand(3, 4, seed=2)
    found = unger.adapted(hidden, gain, shift)
    for b in range(3):
        row = hidden[b].numpy().astype(np.float64)
        normal = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
        np.testing.assert_allclose(found[b].numpy(), (1 + gain[b].numpy()) * normal + shift[b].numpy(), rtol=1e-4, atol=1e-5)


def test_the_integrated_vector_and_who_stands_in():
    behavior, content = rand(4, 3), rand(4, 3, seed=1)
    has_behavior, has_content = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = unger.integrate(behavior, content, has_behavior, has_content)
    slow = np.zeros((4, 6))
    for b in range(4):
        left = unit(content[b]) if has_content[b] else unit(behavior[b])
        right = unit(behavior[b]) if has_behavior[b] else unit(content[b])
        slow[b] = np.concatenate([left, right]) * (bool(has_behavior[b]) or bool(has_content[b]))
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-5, atol=1e-6)


def test_alignment_against_a_loop():
    behavior, content, both = rand(4, 3), rand(4, 3, seed=1), torch.tensor([True, True, False, True])
    rows, total = [0, 1, 3], 0.0
    for one, two in ((behavior, content), (content, behavior)):
        for i in rows:
            scores = [float(unit(one[i]) @ unit(two[j])) / 0.2 for j in rows]
            total += math.log(sum(map(math.exp, scores))) - scores[rows.index(i)]
    assert float(unger.alignment_loss(behavior, content, both, temperature=0.2, world=World())) == pytest.approx(total / 6, rel=1e-5)


def test_a_generator_learns_from_the_integrated_vector_where_the_codes_are_of_unger(fitted):
    items = tiny_items()
    taught = unger.teacher_vectors(fitted, items)
    torch.testing.assert_close(taught, fitted.integrated(items) * fitted.shown(items)[:, None])
    other = unger.teacher_vectors(RqKmeans(config.RqKmeans()), items)
    assert other.shape[1] == sum(items.widths().values())


def test_total_is_the_weighted_sum_and_both_terms_move_behaviours_map():
    model = stage()
    terms = model.losses(model.prepared, noise(), quantise=True, world=World())
    torch.testing.assert_close(terms["total"], terms["next_item"] + 0.5 * terms["alignment"])
    for name in ("next_item", "alignment"):
        gradient = torch.autograd.grad(terms[name], model.network.behavior_WD, retain_graph=True)[0]
        assert bool(gradient.any())


def test_switches_stop_what_they_say():
    frozen = stage(freeze_behavior=True)
    frozen.losses(frozen.prepared, noise(), quantise=True, world=World())["total"].backward()
    assert frozen.network.behavior_WD.grad is None
    assert bool(frozen.network.hidden.weight.grad.any())
    alone = stage(next_item=0.0)
    alone.losses(alone.prepared, noise(), quantise=True, world=World())["total"].backward()
    assert not any(bool(parameter.grad.any()) for parameter in alone.network.reader.parameters() if parameter.grad is not None)


def test_training_aligns_content_with_behaviour():
    tokenizer = Unger(unger_settings(alignment=2.0))
    report = tokenizer.fit(
        tiny_items(gaps=False), FitOptions(seed=0, settings=training(max_epochs=25, patience=25, learning_rate=0.01), history=tiny_history())
    )
    assert report.curves["loss/alignment"][-1] < 0.9 * report.curves["loss/alignment"][0]
    assert report.curves["loss/next_item"][-1] < report.curves["loss/next_item"][0]
    assert 0 < report.metrics["nmse/integrated"] < 1


def test_one_side_is_enough_to_get_codes(fitted):
    items = tiny_items()
    nobody = torch.zeros(96, dtype=torch.bool)
    for hidden in ({"behavior_N": nobody}, {"text_N": nobody, "image_N": nobody}):
        shown = items.text_N | items.image_N if "behavior_N" in hidden else items.behavior_N
        out = fitted.encode(replace(items, **hidden))
        assert torch.equal(out.codes_NL[:, 0] < 12, shown)
        assert torch.equal(out.weights_NL[:, 0], shown.float())


def test_codes_stand_for_the_integrated_vector(fitted):
    items = tiny_items()
    out, whole = fitted.encode(items), fitted.integrated(items)
    assert whole.shape == out.quantized_ND.shape == (96, 16)
    books = fitted.codebooks()
    torch.testing.assert_close(out.quantized_ND[0], books[0][out.codes_NL[0, 0]] + books[1][out.codes_NL[0, 1]], rtol=1e-4, atol=1e-5)
    assert float((out.quantized_ND - whole).square().mean()) < 0.5 * float((whole - whole.mean(0)).square().mean())
