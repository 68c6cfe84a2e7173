"""Tuning by histories: the soft index against loops, what a reader sees of an item, and what tuning moves in ADA-SID."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import rand
from tokenizer_items import ada_settings, noise, tiny_history, tiny_items, training

from pipeline.errors import ContractError
from pipeline.tokenizers import ada_sid, histories, tuning
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import FitOptions, Start, codebook_digest
from pipeline.tokenizers.tuning import Tuned, Tuning
from pipeline.tokenizers.world import World


def second_stage(**changes: object) -> Tuning:
    torch.manual_seed(0)
    items = tiny_items()
    made = ada_sid.Network(ada_settings(**changes), {"text": 12, "image": 8, "behavior": 6})
    made.fit_inputs(items)
    made.controller.fit_buckets(items.richness_N[items.behavior_N])
    return Tuning(ada_sid.Training(made), Tuned(made), histories.events(tiny_history(), 96, who="x"), made.prepare(items))


def test_soft_index_is_the_nearest_code_with_the_gradient_of_the_softmax():
    z, book, weigh = rand(3, 2, 4).requires_grad_(), rand(2, 5, 4, seed=1), rand(3, 2, 5, seed=2)
    index = tuning.soft_index(z, book, temperature=0.1)
    for b in range(3):
        for p in range(2):
            cosines = [float(z[b, p].detach() @ book[p, k] / (z[b, p].detach().norm() * book[p, k].norm())) for k in range(5)]
            np.testing.assert_allclose(index[b, p].detach().numpy(), np.eye(5)[int(np.argmax(cosines))], atol=1e-6)
    soft = torch.softmax(torch.einsum("bld,lkd->blk", F.normalize(z, dim=-1), F.normalize(book, dim=-1)) / 0.1, -1)
    through, plain = (torch.autograd.grad((each * weigh).sum(), z)[0] for each in (index, soft))
    torch.testing.assert_close(through, plain, rtol=1e-4, atol=1e-5)


def test_soft_embedding_is_the_mean_over_shown_positions():
    index, table, shown = rand(2, 3, 4), rand(3, 4, 5, seed=1), torch.tensor([[True, False, True], [False, False, False]])
    slow = np.zeros((2, 5))
    for b in range(2):
        rows = [sum(float(index[b, p, k]) * table[p, k].numpy() for k in range(4)) for p in range(3) if shown[b, p]]
        slow[b] = np.mean(rows, axis=0) if rows else 0.0
    np.testing.assert_allclose(tuning.soft_embedding(index, table, shown).numpy(), slow, rtol=1e-4, atol=1e-6)


def test_a_weighted_reader_sees_the_weighted_mean():
    index, table, weight = rand(2, 3, 4), rand(3, 4, 5, seed=1), torch.tensor([[1.0, 0.0, 0.25], [0.0, 0.0, 0.0]])
    slow = np.zeros((2, 5))
    for p in range(3):
        slow[0] += float(weight[0, p]) / 1.25 * sum(float(index[0, p, k]) * table[p, k].numpy() for k in range(4))
    np.testing.assert_allclose(tuning.soft_embedding(index, table, weight).numpy(), slow, rtol=1e-4, atol=1e-6)


def test_a_reader_sees_behaviour_as_far_as_the_router_opens_it():
    stage = second_stage()
    made = stage.network.tokenizer(stage.prepared, quantise=True)
    experts = made.router_BE.shape[1]
    assert torch.equal(made.read_BL[:, -experts:], made.router_BE)
    assert torch.equal(made.read_BL[:, :-experts], made.shown_BL[:, :-experts].float())
    assert not bool(made.read_BL[~made.shown_BL].any())


def test_the_next_item_loss_moves_experts_code_books_and_router():
    stage = second_stage()
    stage._next(stage.events.train_P[:64], World()).mean().backward()
    made = stage.network.tokenizer
    for name in ("shared", "text", "behavior"):
        assert bool(made.expert[name].direct_EDD.grad.any()), name
    assert bool(made.codebook_LKD.grad.flatten(1).any(1).all())
    assert any(bool(each.grad.any()) for each in made.gate["behavior"].parameters())


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_what_is_kept_is_the_training_s_own_loss(keep):
    stage = second_stage(tune_keep=keep)
    terms = {name: float(term.detach()) for name, term in stage.losses(stage.prepared, noise(), quantise=True, world=World()).items()}
    own = stage.first.losses(stage.prepared, noise().flip(1), quantise=True, world=World())
    assert terms["total"] == pytest.approx(terms["next_item"] + keep * float(own["total"].detach()), rel=1e-5)
    assert {"reconstruction", "codebook", "commitment", "align_text", "gate"} <= terms.keys()


def test_tuning_has_the_last_word_and_needs_histories():
    plain, tuned = AdaSid(ada_settings()), AdaSid(ada_settings(tune_epochs=6))
    assert (plain.needs_history, tuned.needs_history) == (False, True)
    plain.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=4)))
    report = tuned.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=4, patience=8), history=tiny_history()))
    losses = report.curves["tune/loss/next_item"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert codebook_digest(plain.codebooks()) != codebook_digest(tuned.codebooks())
    assert tuned.state().keys() == plain.state().keys()
    with pytest.raises(ContractError, match="ADA-SID's tuning learns from users' histories"):
        AdaSid(ada_settings(tune_epochs=6)).fit(tiny_items(), FitOptions(seed=0, settings=training()))


def test_without_tuning_a_history_changes_nothing():
    alone, beside = AdaSid(ada_settings()), AdaSid(ada_settings())
    alone.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=3)))
    beside.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=3), history=tiny_history()))
    assert codebook_digest(alone.codebooks()) == codebook_digest(beside.codebooks())


def test_a_champion_from_before_a_setting_came_had_its_default():
    champion = AdaSid(ada_settings())
    champion.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=2)))
    config = champion.config()
    stored = {**config, "settings": {name: value for name, value in config["settings"].items() if not name.startswith("tune")}}
    old = AdaSid.load(stored, champion.state())
    old.config = lambda: stored  # type: ignore[method-assign]
    report = AdaSid(ada_settings()).fit(tiny_items(), FitOptions(seed=1, settings=training(max_epochs=2), start=Start(tokenizer=old, pull=0.0)))
    assert report.curves
    with pytest.raises(ContractError, match="cannot begin at this champion"):
        AdaSid(ada_settings(tune_epochs=3)).fit(
            tiny_items(), FitOptions(seed=1, settings=training(max_epochs=2), start=Start(tokenizer=old, pull=0.0), history=tiny_history())
        )
