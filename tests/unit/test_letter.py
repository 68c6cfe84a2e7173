"""LETTER: its two losses against loops, the partners and clusters behind them, ablations, resume, and the tokenizer's duties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tokenizer_contract as contract
import torch
from draws import rand
from tokenizer_items import WIDTHS, tiny_items, training

from pipeline.config import Letter as Settings
from pipeline.tokenizers import letter
from pipeline.tokenizers.base import FitOptions
from pipeline.tokenizers.letter import Letter, Network, Training
from pipeline.tokenizers.world import World


def settings(**changes: object) -> Settings:
    return Settings(**{"num_levels": 3, "codebook_size": 12, "latent_dim": 8, "hidden_dims": [24], "warmup_epochs": 2, "num_clusters": 4, **changes})


def test_collaborative_loss_against_a_loop():
    z, behavior, known = rand(5, 3), rand(5, 3, seed=1), torch.tensor([True, True, False, True, True])
    found = letter.collaborative_loss(z, behavior, torch.arange(5), known)
    for i in range(5):
        terms = [math.exp(float(z[i].double() @ behavior[j].double())) if known[j] or j == i else 0.0 for j in range(5)]
        assert float(found[i]) == pytest.approx(-math.log(terms[i] / sum(terms)), rel=1e-5)


def test_diversity_loss_against_a_loop():
    book, codes, partners = rand(6, 3), torch.tensor([0, 3, 3]), torch.tensor([2, 1, 5])
    found = letter.diversity_loss(book[codes], codes, partners, book)
    for i, (own, other) in enumerate(zip(codes.tolist(), partners.tolist(), strict=True)):
        terms = {k: math.exp(float(book[own].double() @ book[k].double())) for k in range(6) if k != own}
        assert float(found[i]) == pytest.approx(-math.log(terms[other] / sum(terms.values())), rel=1e-5)


def test_partners_are_the_other_codes_of_the_cluster_alike_likely():
    cluster = torch.tensor([0, 1, 0, 2, 1, 0, 0])
    codes = torch.arange(7).repeat(3000)
    partners, paired = letter.draw_partners(codes, cluster, torch.rand(len(codes), generator=torch.Generator().manual_seed(0)))
    for code in range(7):
        others = [k for k in range(7) if k != code and cluster[k] == cluster[code]]
        drawn = torch.bincount(partners[codes == code], minlength=7)
        assert bool(paired[code]) == bool(others)
        if others:
            assert drawn.nonzero().flatten().tolist() == others
            assert float((drawn[others].double() / 3000 - 1 / len(others)).abs().max()) < 0.04
    assert int(partners[3]) == 4
    assert letter.draw_partners(torch.tensor([0]), cluster, torch.tensor([1.0 - 2.0**-24]))[0].tolist() == [6]


def test_clusters_are_even_and_repeat_themselves():
    rows = rand(40, 4) * torch.linspace(0.1, 3.0, 40)[:, None]
    cluster = letter.even_clusters(rows, 5)
    assert 5 <= int(torch.bincount(cluster, minlength=5).min()) <= int(torch.bincount(cluster).max()) <= 12
    assert torch.equal(cluster, letter.even_clusters(rows, 5))
    assert int(letter.even_clusters(rows[:6], 10).max()) == 2


def test_clusters_are_found_anew_only_now_and_then():
    network = Network(settings(), WIDTHS)
    first = network.clusters().clone()
    network.autoencoder.codebook_LKD.data.copy_(rand(3, 12, 8, seed=7))
    for _ in range(letter.CLUSTER_STEPS - 1):
        assert torch.equal(network.clusters(), first)
    assert not torch.equal(network.clusters(), first)


def test_behaviour_is_a_teacher_and_no_input():
    items, tokenizer = tiny_items(), contract.fitted("letter", settings())
    codes = tokenizer.encode(items).codes_NL
    assert torch.equal(tokenizer.encode(replace(items, behavior_ND=items.behavior_ND.flip(0))).codes_NL, codes)
    assert torch.equal(tokenizer.encode(replace(items, behavior_ND=None, behavior_N=torch.zeros(96, dtype=torch.bool))).codes_NL, codes)
    with pytest.raises(ValueError, match="text or image"):
        Letter(settings()).fit(tiny_items(modalities=("behavior",)), FitOptions(seed=0, settings=training()))


def test_weights_of_zero_take_the_losses_away_and_gradients_reach_what_they_should():
    items = tiny_items()
    noise = torch.rand(96, 8, generator=torch.Generator().manual_seed(0))
    for alpha, beta in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1)):
        network = Network(settings(collaborative_weight=alpha, diversity_weight=beta), WIDTHS)
        network.fit_inputs(items)
        losses = Training(network).losses(network.prepare(items), noise, quantise=True, world=World())
        assert ("collaborative" in losses, "diversity" in losses) == (alpha > 0, beta > 0)
        plain = sum(weight * float(losses[name].detach()) for name, weight in (("reconstruction", 1), ("codebook", 1), ("commitment", 0.25)))
        extra = sum(weight * float(losses[name].detach()) for name, weight in (("collaborative", alpha), ("diversity", beta)) if weight)
        assert float(losses["total"].detach()) == pytest.approx(plain + extra, rel=1e-5)
        for name, parameters in (("collaborative", network.autoencoder.encoder.parameters()), ("diversity", [network.autoencoder.codebook_LKD])):
            if name in losses:
                assert all(float(gradient.abs().sum()) > 0 for gradient in torch.autograd.grad(losses[name], list(parameters), retain_graph=True))


def test_only_items_with_content_and_behaviour_are_aligned():
    items = tiny_items()
    network = Network(settings(), WIDTHS)
    network.fit_inputs(items)
    prepared = network.prepare(items)
    z = rand(96, 8).requires_grad_()
    Training(network)._collaborative(prepared, z, World()).backward()
    assert torch.equal(z.grad.abs().sum(1) > 0, items.behavior_N & (items.text_N | items.image_N))
    np.testing.assert_array_equal(prepared.behavior_ND[~items.behavior_N].numpy(), 0.0)


def test_the_control_deals_the_same_behaviour_to_other_items():
    items = tiny_items()
    dealt = letter.shuffled_behaviour(items, 3)
    seen = items.behavior_N
    assert torch.equal(dealt.behavior_ND[~seen], items.behavior_ND[~seen])
    assert torch.equal(dealt.behavior_ND[seen].sort(0).values, items.behavior_ND[seen].sort(0).values)
    assert float((dealt.behavior_ND[seen] == items.behavior_ND[seen]).all(1).double().mean()) < 0.2
    own, control = (Letter(settings(collaborative=whose)) for whose in ("own", "shuffled"))
    for tokenizer in (own, control):
        tokenizer.fit(tiny_items(200), FitOptions(seed=0, settings=training(max_epochs=3)))
    assert not torch.equal(own.codebooks()[0], control.codebooks()[0])


def test_alignment_tells_items_apart_by_their_behaviour():
    found = {}
    for alpha in (0.0, 0.1):
        tokenizer = Letter(settings(collaborative_weight=alpha))
        found[alpha] = tokenizer.fit(tiny_items(200), FitOptions(seed=0, settings=training(max_epochs=20, learning_rate=3e-3))).metrics["collaborative"]
    assert found[0.1] < math.log(150) - 0.7 < found[0.0]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    contract.resumes_bit_for_bit("letter", settings(), tmp_path)


def test_what_every_tokenizer_owes():
    contract.repeats_and_survives_storage("letter", settings())
    contract.speaks_in_shape("letter", settings())
    contract.begins_at_its_champion("letter", settings())
    contract.renames_and_holds("letter", settings())
    with pytest.raises(ValueError, match="not fitted"):
        Letter(settings()).encode(tiny_items(3))
