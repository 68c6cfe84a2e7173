"""Alignment: gradients, masks and the controls of the strength."""

from __future__ import annotations

import pytest
import torch
from draws import rand

from pipeline.tokenizers.alignment import View, alignment_v3, controlled_strength, info_nce, inner_products
from pipeline.tokenizers.world import World


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_identical_views_at_low_temperature_cost_nothing():
    x = torch.eye(6)
    assert float(info_nce(x, x, torch.arange(6), torch.ones(6, dtype=torch.bool), temperature=0.01).max()) < 1e-6


def test_a_masked_positive_gives_finite_gradients():
    x, y = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    mask = torch.tensor([True, False, True, True])
    terms = alignment_v3(
        {"text": View(x, torch.ones(4, dtype=torch.bool), x, torch.ones(4, dtype=torch.bool), 0), "behavior": View(y, mask, y, mask, 0)},
        torch.ones(4),
        temperature=0.07,
        world=World(),
    )
    terms["align_text"].backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(y.grad[1], torch.zeros(3))
    assert torch.equal(x.grad[1], torch.zeros(3))


def test_an_item_of_no_strength_pulls_nothing_but_stays_a_negative():
    x, y = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    everyone = torch.ones(4, dtype=torch.bool)
    w = torch.tensor([1.0, 0.0, 1.0, 1.0])
    alignment_v3({"text": View(x, everyone, x, everyone, 0), "behavior": View(y, everyone, y, everyone, 0)}, w, temperature=0.3, world=World())[
        "align_text"
    ].backward()
    assert torch.equal(x.grad[1], torch.zeros(3))
    assert float(y.grad[1].norm()) > 0


def test_views_that_are_absent_have_no_terms():
    everyone = torch.ones(4, dtype=torch.bool)
    x = View(rand(4, 3), everyone, rand(4, 3), everyone, 0)
    assert alignment_v3({"behavior": x}, torch.ones(4), temperature=0.1, world=World()) == {}
    assert set(alignment_v3({"image": x, "behavior": x}, torch.ones(4), temperature=0.1, world=World())) == {"align_image"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("adaptive", [0.1, 0.0, 0.5, 0.9]),
        ("mean", [0.5, 0.0, 0.5, 0.5]),
        ("one", [1.0, 0.0, 1.0, 1.0]),
        ("zero", [0.0, 0.0, 0.0, 0.0]),
        ("inverted", [0.9, 0.0, 0.5, 0.1]),
    ],
)
def test_controls_of_the_strength(kind, expected):
    w, mask = torch.tensor([0.1, 0.0, 0.5, 0.9]), torch.tensor([True, False, True, True])
    assert controlled_strength(w, mask, kind, generator=rng()).tolist() == pytest.approx(expected)


def test_shuffling_keeps_the_values_and_repeats_itself():
    w, mask = torch.rand(50, generator=rng()), torch.arange(50) >= 10
    dealt = controlled_strength(w, mask, "shuffled", generator=rng())
    assert torch.equal(dealt[:10], w[:10])
    assert torch.equal(dealt[10:].sort().values, w[10:].sort().values)
    assert not torch.equal(dealt, w)
    assert torch.equal(dealt, controlled_strength(w, mask, "shuffled", generator=rng()))


def test_what_a_softmax_compares_is_not_rounded_in_steps_of_lower_precision() -> None:
    a, b = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b.T).dtype == torch.bfloat16
        found = inner_products(a, b)
    assert torch.equal(found, a @ b.T)
