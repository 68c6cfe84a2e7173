"""ADA-SID: positions, masks, gates, controls, what is stored and what moves what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tokenizer_items import ada_settings, tiny_items, training

from pipeline.tokenizers import TOKENIZERS, from_state
from pipeline.tokenizers.ada_sid import AdaSid, ExpertBank, Network, Training
from pipeline.tokenizers.base import MODALITIES, FitOptions, ItemBatch, codebook_digest
from pipeline.tokenizers.router import behavior_router
from pipeline.tokenizers.world import World


@pytest.fixture(scope="module")
def fitted() -> AdaSid:
    tokenizer = AdaSid(ada_settings())
    tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training()))
    return tokenizer


def network(**changes: object) -> tuple[Network, ItemBatch]:
    items = tiny_items()
    torch.manual_seed(0)
    made = Network(ada_settings(**changes), {"text": 12, "image": 8, "behavior": 6})
    made.fit_inputs(items)
    made.controller.fit_buckets(items.richness_N[items.behavior_N])
    return made, made.prepare(items)


def test_positions_and_shapes(fitted):
    assert TOKENIZERS["ada_sid"] is AdaSid
    assert fitted.slots == ("shared_0", "text_0", "image_0", "behavior_0", "behavior_1")
    assert fitted.codebook_sizes == (12,) * 5
    out = fitted.encode(tiny_items())
    assert out.codes_NL.shape == out.weights_NL.shape == (96, 5)
    assert (out.codes_NL.dtype, out.weights_NL.dtype, out.quantized_ND.dtype) == (torch.int64, torch.float32, torch.float32)
    assert [tuple(book.shape) for book in fitted.codebooks()] == [(12, 8)] * 5


def test_a_masked_position_has_the_reserved_code_and_no_weight(fitted):
    items = tiny_items()
    out = fitted.encode(items)
    for position, slot in enumerate(fitted.slots):
        mask = torch.ones(96, dtype=torch.bool) if slot.startswith("shared") else items.mask(slot.split("_")[0])
        assert (out.codes_NL[mask, position] < 12).all()
        assert (out.codes_NL[~mask, position] == 12).all()
        assert (out.weights_NL[~mask, position] == 0).all()


def test_an_item_without_any_modality_is_masked_everywhere(fitted):
    items = tiny_items(4)
    nobody = torch.zeros(4, dtype=torch.bool)
    out = fitted.encode(replace(items, text_N=nobody, image_N=nobody, behavior_N=nobody))
    assert (out.codes_NL == 12).all()
    assert (out.weights_NL == 0).all()


def test_weights_are_one_for_content_and_bounded_for_behaviour(fitted):
    items = tiny_items(gaps=False)
    out = fitted.encode(items)
    assert (out.weights_NL[:, :3] == 1).all()
    behavior = out.weights_NL[:, 3:]
    assert (behavior >= 0).all()
    assert (behavior <= 2).all()
    assert float(behavior[behavior > 0].mean()) > 0.5


@pytest.mark.parametrize("present", [("text",), ("behavior",), ("text", "behavior"), ("image", "behavior")])
def test_absent_modalities_lose_their_experts_and_positions(present):
    tokenizer = AdaSid(ada_settings())
    items = tiny_items(modalities=present, gaps=False)
    report = tokenizer.fit(items, FitOptions(seed=0, settings=training(max_epochs=3)))
    assert {slot.rsplit("_", 1)[0] for slot in tokenizer.slots} == {"shared", *present}
    assert (tokenizer.encode(items).codes_NL < 12).all()
    assert {name for name in report.metrics if name.startswith("nmse/")} == {f"nmse/{name}" for name in present}


def test_a_batch_that_lacks_a_known_modality_is_masked_there(fitted):
    items = tiny_items(10)
    lacking = replace(items, image_ND=None, image_N=torch.zeros(10, dtype=torch.bool))
    hidden = replace(items, image_N=torch.zeros(10, dtype=torch.bool))
    assert torch.equal(fitted.encode(lacking).codes_NL, fitted.encode(hidden).codes_NL)
    assert (fitted.encode(lacking).codes_NL[:, 2] == 12).all()


def test_no_modality_at_all_is_refused():
    with pytest.raises(ValueError, match="no expert"):
        AdaSid(ada_settings()).fit(tiny_items(modalities=()), FitOptions(seed=0, settings=training()))


def test_vectors_of_another_width_are_refused(fitted):
    items = tiny_items(4)
    with pytest.raises(ValueError, match="text vectors are 3 wide, the tokenizer was fitted on 12"):
        fitted.encode(replace(items, text_ND=torch.zeros(4, 3)))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_shorter_than_its_warm_up_still_learns_codes(epochs):
    tokenizer = AdaSid(ada_settings(warmup_epochs=50))
    report = tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=epochs)))
    assert report.metrics["utilisation"] > 0.5


def test_an_unfitted_tokenizer_says_so():
    with pytest.raises(ValueError, match="not fitted"):
        AdaSid(ada_settings()).encode(tiny_items(4))


def test_the_company_of_an_item_moves_nothing(fitted):
    items = tiny_items(2100, seed=3)
    whole = fitted.encode(items)
    rows = torch.tensor([1999, 3, 3, 1024, 700])
    some = fitted.encode(items.take(rows))
    assert torch.equal(some.codes_NL, whole.codes_NL[rows])
    assert torch.equal(some.weights_NL, whole.weights_NL[rows])
    assert torch.equal(some.quantized_ND, whole.quantized_ND[rows])


def test_values_behind_a_mask_do_not_matter(fitted):
    items = tiny_items()
    loud = replace(items, **{f"{name}_ND": torch.where(items.mask(name)[:, None], items.vectors(name), 1e3) for name in MODALITIES})
    assert torch.equal(fitted.encode(items).codes_NL, fitted.encode(loud).codes_NL)


def test_state_and_config_rebuild_the_tokenizer(fitted):
    stored = safetensors.torch.load(safetensors.torch.save(fitted.state()))
    again = from_state(fitted.config(), stored)
    one, two = fitted.encode(tiny_items()), again.encode(tiny_items())
    assert torch.equal(one.codes_NL, two.codes_NL)
    assert torch.equal(one.weights_NL, two.weights_NL)
    assert codebook_digest(fitted.codebooks()) == codebook_digest(again.codebooks())
    stored["decoder.direct.weight"] = stored["decoder.direct.weight"][:3]
    with pytest.raises(RuntimeError, match="decoder"):
        from_state(fitted.config(), stored)


def test_the_same_seed_gives_the_same_tokenizer(fitted):
    again, other = AdaSid(ada_settings()), AdaSid(ada_settings())
    again.fit(tiny_items(), FitOptions(seed=1, settings=training()))
    other.fit(tiny_items(), FitOptions(seed=2, settings=training()))
    assert codebook_digest(again.codebooks()) == codebook_digest(fitted.codebooks())
    assert codebook_digest(other.codebooks()) != codebook_digest(fitted.codebooks())


@pytest.mark.parametrize("known", [1, 5])
def test_behaviour_that_is_all_alike_stays_as_it_is(known: int):
    """On a first night one item may have behaviour; scaled to a variance it does not have, it would drown every other term."""
    items = tiny_items()
    alike = replace(items, behavior_ND=torch.ones_like(items.behavior_ND), behavior_N=torch.arange(len(items.behavior_N)) < known)
    torch.manual_seed(0)
    made = Network(ada_settings(), {"text": 12, "image": 8, "behavior": 6})
    made.fit_inputs(alike)
    assert made.get_buffer("scale_behavior") == 1.0


def test_inputs_get_one_scale_each_and_keep_behaviour_norms():
    made, prepared = network()
    items = tiny_items()
    for name in MODALITIES:
        seen = prepared.vectors(name)[items.mask(name)]
        assert float(seen.var(0, correction=0).mean()) == pytest.approx(1.0, rel=1e-4)
    ratio = prepared.behavior_ND.norm(dim=1)[items.behavior_N] / items.behavior_ND.norm(dim=1)[items.behavior_N]
    assert torch.allclose(ratio, made.scale_behavior.expand_as(ratio), rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
def test_experts_of_a_modality_begin_apart_or_each_with_the_whole_of_it(whole):
    torch.manual_seed(0)
    points = torch.randn(200, 6) * torch.arange(1.0, 7.0)
    bank = ExpertBank(3, 6, 5, 8).requires_grad_(False)
    bank.start_on(points, whole=whole)
    seen = [points @ direct for direct in bank.direct_EDD]
    distances = [torch.cdist(latents, latents) for latents in seen]
    if whole:
        assert all(torch.allclose(each, torch.cdist(points, points), atol=0.02) for each in distances), "a turn keeps all distances"
        assert not torch.allclose(seen[0], seen[1], atol=0.1)
    else:
        assert torch.allclose(sum(each.square() for each in distances), torch.cdist(points, points).square(), rtol=1e-3, atol=1e-2), "each axis is somebody's"
        assert all(int(torch.linalg.matrix_rank(direct, tol=1e-4)) == 2 for direct in bank.direct_EDD)


@pytest.mark.parametrize("code_gradient", [True, False])
def test_the_decoder_reaches_the_code_rows_only_when_asked(code_gradient):
    made, prepared = network(code_gradient=code_gradient)
    estimate = made(prepared, quantise=True).estimate
    sum(value.square().mean() for value in estimate.values()).backward()
    assert (made.codebook_LKD.grad is not None and bool(made.codebook_LKD.grad.any())) is code_gradient
    assert bool(made.expert["text"].first.weight.grad.any())


def test_a_behaviour_expert_that_is_off_adds_nothing():
    made, prepared = network()
    with torch.no_grad():
        made.gate["behavior"][2].weight.zero_()
        made.gate["behavior"][2].bias.fill_(-1.0)
        passed = made(prepared, quantise=True)
        without = made(replace(prepared, behavior_ND=torch.zeros_like(prepared.behavior_ND)), quantise=True)
    assert (passed.router_BE == 0).all()
    content = passed.gate_BL[..., None] * passed.zq_BLD
    assert (content[:, 3:] == 0).all()
    assert torch.equal(passed.codes_BL[:, 1:3], without.codes_BL[:, 1:3])


def test_dropout_hides_modalities_but_never_all_of_an_item():
    made, prepared = network(content_dropout=0.6, behavior_dropout=0.6)
    noise = torch.rand(96, 8, generator=torch.Generator().manual_seed(0))
    shown = Training(made)._hide(prepared, noise)
    before, after = (torch.stack([batch.mask(name) for name in MODALITIES]) for batch in (prepared, shown))
    assert torch.equal(before.any(0), after.any(0))
    assert int(after.sum()) < 0.75 * int(before.sum())
    assert not (after & ~before).any()


def test_total_is_the_weighted_sum_of_the_terms():
    made, prepared = network()
    noise = torch.rand(96, 8, generator=torch.Generator().manual_seed(0))
    terms = {name: term.detach() for name, term in Training(made).losses(prepared, noise, quantise=True, world=World()).items()}
    settings = made.settings
    align = sum(value for name, value in terms.items() if name.startswith("align"))
    total = terms["reconstruction"] + settings.codebook_weight * terms["codebook"] + settings.commitment * terms["commitment"]
    assert float(terms["total"]) == pytest.approx(float(total + settings.align_weight * align + terms["gate"]), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "v2"},
        {"strength": "shuffled"},
        {"strength": "inverted"},
        {"sparsity": "scalar"},
        {"sparsity": "off"},
        {"detach_behavior": True},
        {"expert_start": "whole"},
        {"num_shared": 0},
        {"num_text": 2, "num_image": 0},
        {"warmup_epochs": 0},
    ],
)
def test_every_form_and_control_trains(changes):
    tokenizer = AdaSid(ada_settings(**changes))
    report = tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=4)))
    assert all(value == value for values in report.curves.values() for value in values)
    assert tokenizer.encode(tiny_items()).codes_NL.shape == (96, len(tokenizer.slots))


def test_router_one_gives_every_behaviour_code_the_weight_one():
    tokenizer = AdaSid(ada_settings(router="one"))
    tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=3)))
    items = tiny_items()
    out = tokenizer.encode(items)
    assert (out.weights_NL[items.behavior_N, 3:] == 1).all()
    assert tokenizer.fitted.controller.kind == "off"


def test_training_brings_the_error_down_and_uses_the_codes():
    tokenizer = AdaSid(ada_settings())
    items = tiny_items(300, gaps=False)
    report = tokenizer.fit(items, FitOptions(seed=0, settings=training(max_epochs=25, patience=25, learning_rate=1e-2)))
    assert report.curves["loss/reconstruction"][-1] < 0.6 * report.curves["loss/reconstruction"][0]
    assert all(report.metrics[f"nmse/{name}"] < 0.8 for name in MODALITIES)
    assert report.metrics["utilisation"] > 0.9


def test_buckets_have_targets_that_fall_with_richness_and_ties_share_one():
    made, _ = network()
    target = made.controller.target_Q
    assert (target[:-1] > target[1:]).all()
    assert made.controller.bucket(torch.zeros(5)).unique().numel() == 1
    tied = Network(ada_settings(), {"text": 12}).controller
    tied.fit_buckets(torch.cat([torch.zeros(60), torch.ones(40)]))
    assert tied.bucket(torch.tensor([0.0, 1.0])).unique().numel() == 2
    assert torch.isfinite(tied.target_Q).all()


def test_the_margin_finds_the_share_of_logits_that_shall_be_off():
    made, _ = network(num_behavior=4, sparsity="bucket")
    controller = made.controller.train()
    logit = torch.randn(96, 4, generator=torch.Generator().manual_seed(1)) + 1.0
    richness, everyone = torch.linspace(0, 1, 96), torch.ones(96, dtype=torch.bool)
    for _ in range(300):
        controller.penalty(behavior_router(logit, richness), logit, richness, everyone, World())
    bucket = controller.bucket(richness)
    for at in range(3):
        below = float((logit[bucket == at] < controller.margin_Q[at]).float().mean())
        assert below == pytest.approx(float(controller.target_Q[at]), abs=0.05)


def test_a_margin_per_expert_closes_all_experts_alike_and_the_common_one_closes_the_weakest():
    logit = torch.randn(96, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([-3.0, 0.0, 3.0])
    richness, everyone = torch.linspace(0, 1, 96), torch.ones(96, dtype=torch.bool)
    due = {}
    for kind in ("bucket", "expert"):
        made, _ = network(num_behavior=3, sparsity=kind)
        controller = made.controller.train()
        for _ in range(300):
            controller.penalty(behavior_router(logit, richness), logit, richness, everyone, World())
        bucket = controller.bucket(richness)
        due[kind] = (logit < controller.margin_Q[bucket].view(96, -1)).float()
        for at in range(3):
            assert float(due[kind][bucket == at].mean()) == pytest.approx(float(controller.target_Q[at]), abs=0.05)
    spread = {kind: float(due_BE.mean(0).max() - due_BE.mean(0).min()) for kind, due_BE in due.items()}
    assert spread["bucket"] > 0.5
    assert spread["expert"] < 0.1


def test_the_controller_brings_the_active_share_to_its_target():
    gaps = []
    for seed in range(4):
        tokenizer = AdaSid(ada_settings(num_behavior=4, active_share=0.5, lambda_step=1.05, lambda_init=1e-3))
        settings = training(max_epochs=40, patience=40, learning_rate=1e-2, batch_size=64)
        report = tokenizer.fit(tiny_items(400, gaps=False), FitOptions(seed=seed, settings=settings))
        active = {name: value for name, value in report.metrics.items() if name.startswith("active_share/")}
        assert len(active) == 3
        gaps += [abs(value - report.metrics[name.replace("share", "target")]) for name, value in active.items()]
    assert sum(gaps) / len(gaps) < 0.06
