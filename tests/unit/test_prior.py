"""What content says of behaviour: the map, the mixture, and what it changes for items that have little or none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import rand
from tokenizer_items import ada_settings, tiny_items, training

from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import FitOptions, ItemBatch
from pipeline.tokenizers.prior import BehaviorPrior, ridge

WIDTHS = {"text": 12, "image": 8, "behavior": 6}


def fitted(items: ItemBatch) -> BehaviorPrior:
    prior = BehaviorPrior(items.widths())
    prior.fit(items)
    return prior


def linear_items(noise: float) -> ItemBatch:
    """Items whose behaviour is a linear map of their text, plus noise."""
    items = tiny_items(400, gaps=False)
    made = items.text_ND @ rand(12, 6, seed=3)
    return replace(items, behavior_ND=made + noise * rand(400, 6, seed=4), richness_N=torch.linspace(0.1, 1, 400))


def test_ridge_is_least_squares_with_the_penalty_as_further_rows():
    design, target, weight = rand(30, 4).double(), rand(30, 2, seed=1).double(), torch.rand(30, generator=torch.Generator().manual_seed(2)).double()
    found = ridge(design, target, weight, 0.3)
    scale = 0.3 * np.mean([sum(float(weight[n] * design[n, x] ** 2) for n in range(30)) for x in range(4)])
    root = weight.sqrt()[:, None]
    rows = np.vstack([(root * design).numpy(), np.sqrt(scale) * np.eye(4)])
    slow = np.linalg.lstsq(rows, np.vstack([(root * target).numpy(), np.zeros((4, 2))]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-9, atol=1e-12)


def test_a_linear_relation_is_found_and_noise_is_not_taken_for_one():
    assert float(fitted(linear_items(0.0)).error) < 0.01
    items = linear_items(0.0)
    assert float(fitted(replace(items, behavior_ND=rand(400, 6, seed=9))).error) > 0.9


def test_the_richest_item_keeps_its_vector_and_an_item_without_behaviour_gets_the_guess():
    items = linear_items(0.0)
    none_N = torch.arange(400) < 50
    known = replace(items, behavior_N=~none_N, richness_N=torch.where(none_N, 0.0, items.richness_N))
    seen = fitted(known).apply_to(known, shrink=True)
    assert seen.behavior_N.all()
    torch.testing.assert_close(seen.behavior_ND[-1], items.behavior_ND[-1])
    gap = (seen.behavior_ND[:50] - items.behavior_ND[:50]).norm() / items.behavior_ND[:50].norm()
    assert float(gap) < 0.1, "the guess stands in for vectors that were hidden"


def test_without_shrinking_behaviour_stays_as_it_comes():
    items = tiny_items()
    seen = fitted(items).apply_to(items, shrink=False)
    torch.testing.assert_close(seen.behavior_ND[items.behavior_N], items.behavior_ND[items.behavior_N])
    assert (seen.behavior_N & ~items.behavior_N).any()


def test_an_item_without_content_keeps_what_it_has():
    items = tiny_items()
    nobody = torch.zeros(96, dtype=torch.bool)
    bare = replace(items, text_N=nobody, image_N=nobody)
    seen = fitted(items).apply_to(bare, shrink=True)
    assert torch.equal(seen.behavior_N, items.behavior_N)
    assert torch.equal(seen.behavior_ND, torch.where(items.behavior_N[:, None], items.behavior_ND, 0.0))


def test_content_that_says_nothing_of_behaviour_gives_no_guess():
    items = replace(tiny_items(400), behavior_ND=rand(400, 6, seed=9))
    prior = fitted(items)
    assert float(prior.error) > 0.95
    seen = prior.apply_to(items, shrink=True)
    assert torch.equal(seen.behavior_N, items.behavior_N)
    assert torch.equal(seen.behavior_ND, torch.where(items.behavior_N[:, None], items.behavior_ND, 0.0))


def test_too_few_items_teach_nothing():
    items = tiny_items(20)
    prior = fitted(items)
    assert not prior.map_DX.any()
    assert float(prior.error) == 1.0


def test_what_lies_behind_a_mask_changes_nothing():
    items = tiny_items()
    dirt = {name: torch.where(items.mask(name)[:, None], items.vectors(name), 1e6) for name in WIDTHS}
    dirty = replace(items, **{f"{name}_ND": value for name, value in dirt.items()})
    assert torch.equal(fitted(items).map_DX, fitted(dirty).map_DX)
    assert torch.equal(fitted(items).apply_to(items, shrink=True).behavior_ND, fitted(items).apply_to(dirty, shrink=True).behavior_ND)


@pytest.fixture(scope="module")
def tokenizer() -> AdaSid:
    made = AdaSid(ada_settings(behavior_prior="poor"))
    made.fit(tiny_items(), FitOptions(seed=1, settings=training()))
    return made


def test_an_item_with_content_alone_has_behaviour_codes(tokenizer):
    items = tiny_items()
    out = tokenizer.encode(items)
    content_N = items.text_N | items.image_N
    shown_N = items.behavior_N | content_N
    behavior = [at for at, slot in enumerate(tokenizer.slots) if slot.startswith("behavior")]
    assert (~items.behavior_N & content_N).any()
    assert (out.codes_NL[shown_N][:, behavior] < 12).all()
    assert (out.codes_NL[~shown_N][:, behavior] == 12).all()


def test_an_item_has_the_same_codes_alone_and_in_company(tokenizer):
    items = tiny_items()
    together = tokenizer.encode(items)
    for row in (0, 17, 95):
        alone = tokenizer.encode(items.take(slice(row, row + 1)))
        assert torch.equal(alone.codes_NL[0], together.codes_NL[row])
        assert torch.equal(alone.weights_NL[0], together.weights_NL[row])


def test_it_is_stored_with_the_tokenizer(tokenizer):
    again = AdaSid.load(tokenizer.config(), tokenizer.state())
    assert torch.equal(again.encode(tiny_items()).codes_NL, tokenizer.encode(tiny_items()).codes_NL)
    assert float(again.fitted.prior.error) < 1.0


def test_without_content_there_is_no_prior():
    made = AdaSid(ada_settings(behavior_prior="poor"))
    made.fit(tiny_items(modalities=("behavior",), gaps=False), FitOptions(seed=0, settings=training(max_epochs=3)))
    assert made.fitted.prior is None
