"""Metrics against hand-made counts and slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.tokenizers import metrics


def test_counts_leave_out_the_masked_code():
    assert metrics.code_counts(torch.tensor([0, 2, 2, 4, 4, 4]), 4).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("code", [-1, 5])
def test_counts_refuse_codes_out_of_range(code):
    with pytest.raises(ValueError, match="codes lie in"):
        metrics.code_counts(torch.tensor([0, code]), 4)


def test_utilisation_needs_two_items_a_code():
    counts = torch.tensor([0, 1, 2, 3])
    assert metrics.utilisation(counts) == 0.5
    assert metrics.utilisation(counts, at_least=1) == 0.75
    assert metrics.dead_codes(counts) == 1


def test_entropy_and_perplexity_of_even_and_empty_use():
    assert metrics.entropy(torch.full((8,), 5)) == pytest.approx(math.log(8))
    assert metrics.perplexity(torch.tensor([3, 0, 0])) == pytest.approx(1.0)
    assert metrics.entropy(torch.zeros(4)) == 0.0


def test_entropy_is_the_sum_by_definition():
    counts = [5, 1, 0, 14]
    slow = -sum(c / 20 * math.log(c / 20) for c in counts if c)
    assert metrics.entropy(torch.tensor(counts)) == pytest.approx(slow, abs=1e-12)


def test_gini_is_the_mean_difference_by_definition():
    counts = [5, 1, 0, 14]
    slow = sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * sum(counts))
    assert metrics.gini(torch.tensor(counts)) == pytest.approx(slow)
    assert metrics.gini(torch.full((7,), 3)) == pytest.approx(0.0)
    assert metrics.gini(torch.zeros(3)) == 0.0


def test_collision_rate_counts_items_not_tuples():
    codes = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0], [1, 1]])
    assert metrics.collision_rate(codes) == pytest.approx(3 / 5)
    assert metrics.collision_rate(codes[:0]) == 0.0


def test_tuple_ids_survive_products_beyond_int64():
    codes = torch.tensor([[99_999] * 20, [99_999] * 19 + [0], [99_999] * 20])
    ids = metrics.tuple_ids(codes)
    assert ids[0] == ids[2]
    assert ids[0] != ids[1]


def test_nmse_is_one_for_the_mean_and_zero_for_the_target():
    target = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert metrics.nmse(target, target.mean(0).expand_as(target)) == pytest.approx(1.0, abs=1e-6)
    assert metrics.nmse(target, target) == 0.0
    mask = torch.arange(50) < 20
    assert metrics.nmse(target, torch.where(mask[:, None], target, 0.0), mask) == 0.0
    assert math.isnan(metrics.nmse(target[:0], target[:0]))


def test_code_use_reports_every_position_and_the_means():
    codes = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 2]])
    found = metrics.code_use(codes, [2, 3], ["text_0", "behavior_0"])
    assert found["utilisation/text_0"] == 1.0
    assert found["utilisation/behavior_0"] == pytest.approx(1 / 3)
    assert found["utilisation"] == pytest.approx(2 / 3)
    assert found["dead_codes"] == 0.0
    assert found["collision_rate"] == 0.5
