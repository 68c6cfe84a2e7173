"""DAS: its equations against loops, codes of users, what debiasing and the alignment terms move."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import rand, unit
from tokenizer_items import das_settings, noise, tiny_history, tiny_items, training

from pipeline.tokenizers import das, histories
from pipeline.tokenizers.alignment import view
from pipeline.tokenizers.base import FitOptions, History
from pipeline.tokenizers.das import Catalogue, Das, Network, Training
from pipeline.tokenizers.world import World


def stage(**changes: object) -> Training:
    torch.manual_seed(0)
    items, history = tiny_items(), tiny_history()
    network = Network(das_settings(**changes), {"text": 12, "image": 8, "behavior": 6})
    taken = histories.context(history.index_T, history.offset_U[1:], history.offset_U[:-1], 5)
    network.fit_inputs(items, taken)
    source = network.source(items)
    events = histories.events(history, 96, who="x")
    people = network.prepare(network.user, das.pooled(source, *taken))
    return Training(network, events, Catalogue(source, network.prepare(network.item, source), people, das._log_popularity(items, events)))


@pytest.fixture(scope="module")
def fitted() -> Das:
    tokenizer = Das(das_settings())
    tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training(), history=tiny_history()))
    return tokenizer


def test_popularity_bias_against_a_loop():
    conformity, popularity = rand(3), rand(4, seed=1)
    slow = [[math.log1p(math.exp(float(conformity[b]))) * float(popularity[c]) for c in range(4)] for b in range(3)]
    np.testing.assert_allclose(das.popularity_bias(conformity, popularity).numpy(), slow, rtol=1e-5)


def test_users_are_means_of_what_they_took():
    items, rows, shown = tiny_items(12), torch.tensor([[0, 5, 7], [6, 6, 0], [1, 2, 3]]), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    users = das.pooled(items, rows, shown)
    for b in range(3):
        had = [int(rows[b, t]) for t in range(3) if shown[b, t] and items.text_N[rows[b, t]]]
        assert bool(users.text_N[b]) == bool(had)
        slow = np.mean([items.text_ND[row].numpy() for row in had], axis=0) if had else np.zeros(12)
        np.testing.assert_allclose(users.text_ND[b].numpy(), slow, rtol=1e-5, atol=1e-6)


def test_dual_alignment_against_a_loop():
    sides = {"code_item": 0, "code_user": 1, "item": 2, "user": 3, "next_item": 4, "next_user": 5}
    vectors, shown = {name: rand(5, 3, seed=seed) for name, seed in sides.items()}, {name: torch.ones(5, dtype=torch.bool) for name in sides}
    shown["item"][1] = shown["next_user"][4] = False
    keys = {
        "item": torch.tensor([1, 2, 1, 3, 4]),
        "user": torch.tensor([0, 1, 2, 2, 3]),
        "next_item": torch.tensor([7, 7, 8, 9, 7]),
        "next_user": torch.tensor([4, 5, 4, 6, 7]),
    }
    rival = {name: key[:, None] != key for name, key in keys.items()}
    made = {name: view(vectors[name], shown[name], World()) for name in sides}
    found = das.dual_alignment(made, rival, temperature=0.3, world=World())
    met = {"u2i": ("code_user", "item", ["item", "user"]), "i2u": ("code_item", "user", ["item", "user"]), "i2i": ("code_item", "item", ["item"])}
    met |= {"u2u": ("code_user", "user", ["user"]), "co_i2i": ("code_item", "next_item", ["item", "next_item"])}
    met |= {"co_u2u": ("code_user", "next_user", ["item", "user", "next_user"])}
    assert set(found) == set(met)
    for name, (one, two, names) in met.items():
        losses = []
        for b in range(5):
            if not (shown[one][b] and shown[two][b]):
                continue
            for x, y in ((one, two), (two, one)):
                others = [c for c in range(5) if c == b or (shown[y][c] and all(rival[key][b, c] for key in names))]
                scores = {c: float(unit(vectors[x][b]) @ unit(vectors[y][c])) / 0.3 for c in others}
                losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[b])
        assert float(found[name]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_nobody_is_company_to_himself_and_no_person_is_a_rival_of_himself():
    model = stage()
    at_B = model.events.draw(noise())
    people_B = model.events.user_T[at_B]
    alone, _ = model._questions(at_B, at_B, True, World())
    assert alone["co_u2u"].item() == 0.0, "an answer that nobody else took has no company"
    twin_B = model.events.twins(at_B, noise()[:, 2])
    seen: dict[str, torch.Tensor] = {}
    original = das.dual_alignment

    def look(views, pairs, **rest):
        """Keep what the questions ask for."""
        seen.update(pairs, shown=views["next_user"].own_B)
        return original(views, pairs, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(das, "dual_alignment", look)
        model._questions(at_B, twin_B, True, World())
    company_B = model.events.user_T[twin_B]
    for b in range(len(at_B)):
        assert not (seen["shown"][b] and company_B[b] == people_B[b])
        for c in range(len(at_B)):
            rivals = company_B[b] != company_B[c] and people_B[b] != company_B[c] and company_B[b] != people_B[c]
            assert bool(seen["next_user"][b, c]) == bool(rivals)


def test_total_is_the_weighted_sum_of_the_terms():
    model = stage()
    terms = {name: float(term.detach()) for name, term in model.losses(model.catalogue.items, noise(), quantise=True, world=World()).items()}
    weighted = sum(weight * terms[name] for name, weight in model._weights().items())
    assert terms["total"] == pytest.approx(terms["item/total"] + terms["user/total"] + weighted, rel=1e-5)


def test_every_alignment_term_moves_its_sides_and_company_is_codes_with_codes():
    model = stage()
    terms = model.losses(model.catalogue.items, noise(), quantise=True, world=World())
    sides = {"u2i": ("user", "item_tower"), "i2u": ("item", "user_tower"), "i2i": ("item", "item_tower"), "u2u": ("user", "user_tower")}
    sides |= {"co_i2i": ("item", ""), "co_u2u": ("user", "")}
    for name, (coded, tower) in sides.items():
        weights = [getattr(model.network, coded).encoder[0].weight, *([getattr(model.network, tower)[0].weight] if tower else [])]
        for gradient in torch.autograd.grad(terms[name], weights, retain_graph=True):
            assert bool(gradient.any()), name
    towers = [*model.network.item_tower.parameters(), *model.network.user_tower.parameters()]
    for name in ("co_i2i", "co_u2u"):
        assert not any(gradient is not None for gradient in torch.autograd.grad(terms[name], towers, retain_graph=True, allow_unused=True)), name


def test_codes_after_the_alignment_leave_the_training_unquantised():
    model = stage(joint=False)
    rows = model.network.item.codebook_LKD
    model.losses(model.catalogue.items, noise(), quantise=True, world=World())["total"].backward()
    assert rows.grad is None or not bool(rows.grad.any())
    tokenizer = Das(das_settings(joint=False))
    report = tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training(), history=tiny_history()))
    assert report.metrics["perplexity"] > 2
    assert report.metrics["left_over/level_1"] < report.metrics["left_over/level_0"] < 0.5, "code rows belong to the latents as they ended"


@pytest.mark.parametrize("debias", [True, False])
def test_popularity_is_learnt_apart_only_when_asked(debias):
    model = stage(debias=debias)
    model.losses(model.catalogue.items, noise(), quantise=True, world=World())["collaborative"].backward()
    for part in (model.network.popularity, model.network.conformity):
        assert (part[0].weight.grad is not None and bool(part[0].weight.grad.any())) is debias


def test_weights_of_zero_leave_two_plain_autoencoders():
    off = {"collaborative": 0.0, "align_items": 0.0, "align_users": 0.0, "align_user_item": 0.0, "align_neighbours": 0.0}
    model = stage(**off)
    model.losses(model.catalogue.items, noise(), quantise=True, world=World())["total"].backward()
    assert not any(bool(p.grad.any()) for tower in (model.network.item_tower, model.network.user_tower) for p in tower.parameters() if p.grad is not None)
    assert bool(model.network.item.encoder[0].weight.grad.any())


def test_looking_at_held_out_users_counts_no_code():
    model = stage()
    before = model.network.user.usage_LK.clone()
    found = model.evaluate(model.catalogue.items, quantise=True)
    assert torch.equal(model.network.user.usage_LK, before)
    assert {"held_out/collaborative", "held_out/u2i", "user/score", "nmse/text", "score"} <= set(found)


def test_items_are_coded_by_content_alone(fitted):
    items = tiny_items()
    out = fitted.encode(items)
    hidden = fitted.encode(replace(items, behavior_N=torch.zeros(96, dtype=torch.bool)))
    assert torch.equal(out.codes_NL, hidden.codes_NL)
    shown = items.text_N | items.image_N
    assert torch.equal(out.codes_NL[:, 0] < 12, shown)
    assert torch.equal(out.weights_NL[:, 1], shown.float())


def test_users_have_codes_of_their_own(fitted):
    out = fitted.encode_users(tiny_items(), tiny_history())
    assert out.codes_NL.shape == out.weights_NL.shape == (41, 2)
    assert (out.codes_NL[40] == 12).all()
    assert (out.weights_NL[40] == 0).all()
    assert (out.codes_NL[:40] < 12).all()
    assert fitted.config()["user_codebook_sizes"] == [12, 12]
    same = [len(out.codes_NL[:40][torch.arange(40) % 8 == cluster].unique(dim=0)) for cluster in range(8)]
    assert np.mean(same) < len(out.codes_NL[:40].unique(dim=0)) / 2  # users of one taste share codes


def test_a_users_code_depends_on_that_user_alone(fitted):
    history = tiny_history()
    whole = fitted.encode_users(tiny_items(), history)
    few = History(index_T=history.index_T[80:96], offset_U=torch.tensor([0, 8, 16]))
    assert torch.equal(fitted.encode_users(tiny_items(), few).codes_NL, whole.codes_NL[10:12])
    nobody = fitted.encode_users(tiny_items(), History(index_T=history.index_T[:0], offset_U=torch.zeros(1, dtype=torch.int64)))
    assert nobody.codes_NL.shape == (0, 2)


def test_popularity_comes_from_the_items_or_else_from_the_histories():
    events, items = histories.events(tiny_history(), 96, who="x"), tiny_items()
    counted = das._log_popularity(items, events)
    given = das._log_popularity(replace(items, popularity_N=torch.arange(96.0)), events)
    slow = np.log1p(np.bincount(events.item_T.numpy(), minlength=96))
    np.testing.assert_allclose(counted.numpy(), (slow - slow.mean()) / slow.std(), rtol=1e-4, atol=1e-5)
    assert float(given[0]) == pytest.approx((0 - np.log1p(np.arange(96)).mean()) / np.log1p(np.arange(96)).std(), rel=1e-4)
