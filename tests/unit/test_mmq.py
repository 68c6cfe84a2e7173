"""MMQ: its equations against loops, what its two stages move, and what switching a term off does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import rand
from tokenizer_items import mmq_settings, noise, tiny_history, tiny_items, training

from pipeline.tokenizers import histories, mmq
from pipeline.tokenizers.base import FitOptions, ItemBatch, codebook_digest
from pipeline.tokenizers.mmq import Mmq, Network, Training
from pipeline.tokenizers.tuning import Tuned, Tuning
from pipeline.tokenizers.world import World


def network(**changes: object) -> tuple[Network, ItemBatch]:
    torch.manual_seed(0)
    made = Network(mmq_settings(**changes), {"text": 12, "image": 8})
    made.fit_inputs(tiny_items())
    return made, made.inputs.prepare(tiny_items())


def second_stage(**changes: object) -> Tuning:
    made, prepared = network(**changes)
    torch.manual_seed(1)
    return Tuning(Training(made), Tuned(made), histories.events(tiny_history(), 96, who="x"), prepared)


def test_orthogonality_against_a_loop():
    maps = list(rand(3, 4, 2))
    unit = [each.flatten().numpy() / np.linalg.norm(each.numpy()) for each in maps]
    slow = sum((float(unit[i] @ unit[j]) - (i == j)) ** 2 for i in range(3) for j in range(3))
    assert float(mmq.orthogonality(maps)) == pytest.approx(slow, rel=1e-5)
    assert float(mmq.orthogonality([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])])) == pytest.approx(0.0, abs=1e-12)


def test_positions_masks_and_weights():
    tokenizer = Mmq(mmq_settings(tune_epochs=0))
    tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=3)))
    assert tokenizer.slots == ("shared_0", "text_0", "text_1", "image_0")
    out = tokenizer.encode(tiny_items())
    for position, slot in enumerate(tokenizer.slots):
        shown = (tiny_items().text_N | tiny_items().image_N) if slot.startswith("shared") else tiny_items().mask(slot.split("_")[0])
        assert torch.equal(out.codes_NL[:, position] < 12, shown)
        assert torch.equal(out.weights_NL[:, position], shown.float())


def test_a_data_set_without_images_has_no_image_positions():
    tokenizer = Mmq(mmq_settings(tune_epochs=0))
    report = tokenizer.fit(tiny_items(modalities=("text", "behavior"), gaps=False), FitOptions(seed=0, settings=training(max_epochs=3)))
    assert tokenizer.slots == ("shared_0", "text_0", "text_1")
    assert {name for name in report.metrics if name.startswith("nmse")} == {"nmse/text", "nmse_own/text"}


def test_behaviour_vectors_are_not_read():
    tokenizer = Mmq(mmq_settings(tune_epochs=0))
    tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=2)))
    items = tiny_items()
    other = replace(items, behavior_ND=items.behavior_ND * 7 + 1)
    assert torch.equal(tokenizer.encode(items).codes_NL, tokenizer.encode(other).codes_NL)


def test_total_is_the_weighted_sum_of_the_terms():
    made, prepared = network()
    terms = {name: float(term.detach()) for name, term in Training(made).losses(prepared, noise(), quantise=True, world=World()).items()}
    settings = made.settings
    weights = {"reconstruction": settings.reconstruction, "auxiliary": settings.auxiliary, "orthogonality": settings.orthogonality}
    weights |= {"codebook": settings.codebook_weight, "commitment": settings.commitment}
    assert (settings.reconstruction, settings.auxiliary, settings.orthogonality) == (12.0, 10.0, 0.005)
    assert terms["total"] == pytest.approx(sum(weight * terms[name] for name, weight in weights.items()) / 22.0, rel=1e-5)


def test_the_auxiliary_term_sees_a_modality_through_its_own_experts_only():
    made, prepared = network(auxiliary=1.0)
    terms = Training(made).reconstruction(prepared, made(prepared, quantise=True), World())
    terms["auxiliary"].backward()
    assert bool(made.expert["text"].direct_EDD.grad.any())
    assert made.expert["shared"].direct_EDD.grad is None or not bool(made.expert["shared"].direct_EDD.grad.any())
    assert made.decoder.direct.weight.grad is None


@pytest.mark.parametrize(("name", "module"), [("auxiliary", "own_decoder"), ("reconstruction", "decoder")])
def test_a_weight_of_zero_switches_a_term_off(name, module):
    made, prepared = network(**{name: 0.0})
    Training(made).losses(prepared, noise(), quantise=True, world=World())["total"].backward()
    gradients = [parameter.grad for parameter in getattr(made, module).parameters()]
    assert not any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_the_next_item_loss_moves_experts_and_code_books():
    stage = second_stage()
    stage._next(stage.events.train_P[:32], World()).mean().backward()
    made = stage.network.tokenizer
    assert bool(made.expert["shared"].direct_EDD.grad.any())
    assert bool(made.expert["text"].direct_EDD.grad.any())
    assert bool(made.codebook_LKD.grad.flatten(1).any(1).all())
    assert bool(stage.network.table_LKD.grad.any())


def test_the_total_of_stage_two():
    stage = second_stage()
    terms = {name: float(term.detach()) for name, term in stage.losses(stage.prepared, noise(), quantise=True, world=World()).items()}
    assert terms["total"] == pytest.approx(terms["next_item"] + 0.5 * terms["reconstruction"] + 0.5 * terms["auxiliary"], rel=1e-5)


def test_tuning_learns_what_users_do_and_moves_codes():
    plain, tuned = Mmq(mmq_settings(tune_epochs=0)), Mmq(mmq_settings(tune_epochs=8))
    plain.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=4)))
    report = tuned.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=4, patience=8), history=tiny_history()))
    losses = report.curves["tune/loss/next_item"]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert codebook_digest(plain.codebooks()) != codebook_digest(tuned.codebooks())
    assert not any(name.startswith(("reader", "tokenizer", "table")) for name in tuned.state())
