"""Richness, alignment strength and their frozen reference, against loops and printed values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline import richness as r

COUNTS = np.array([5, 5, 6, 9, 20, 40, 400, 1000])
NORMS = np.array([0.2, 0.3, 0.25, 0.4, 0.6, 0.5, 0.9, 1.2])


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0002), (0.5, 0.0246), (0.7, 0.163), (0.8, 0.368), (0.9, 0.684), (1, 1.0)])
def test_alignment_strength_has_the_printed_values(value: float, expected: float) -> None:
    assert float(r.alignment_strength(value, 10, 9)) == pytest.approx(expected, abs=5e-4 if expected > 0.001 else 5e-5)


def test_alignment_strength_equals_a_slow_loop() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    values = np.linspace(0, 1, 11)
    slow = [sigmoid(7 * n - 3) / sigmoid(7 - 3) for n in values]
    np.testing.assert_allclose(r.alignment_strength(values, 7, 3), slow, rtol=1e-12)


def test_each_kind_equals_its_formula() -> None:
    references = {kind: r.fit_reference(kind, COUNTS, NORMS, NORMS / 2) for kind in r.KINDS}
    span = NORMS.max() - NORMS.min()
    np.testing.assert_allclose(r.richness(references["norm"], COUNTS, NORMS), [(n - NORMS.min()) / span for n in NORMS])
    np.testing.assert_allclose(r.richness(references["count"], COUNTS, NORMS), [math.log1p(c) / math.log1p(1000) for c in COUNTS])
    kappa = references["reliability"]["kappa"]
    np.testing.assert_allclose(r.richness(references["reliability"], COUNTS, NORMS), [c / (c + kappa) for c in COUNTS])
    slow = [(sum(x < c for x in COUNTS) + (sum(x == c for x in COUNTS) - 1) / 2) / (len(COUNTS) - 1) for c in COUNTS]
    np.testing.assert_allclose(r.richness(references["rank"], COUNTS, NORMS), slow)


def test_rank_is_interpolated_between_knots_and_clipped_beyond_them() -> None:
    reference = r.fit_reference("rank", [10, 20, 30], [1, 1, 1])
    np.testing.assert_allclose(r.richness(reference, [1, 10, 15, 20, 30, 10**9], 1.0), [0, 0, 0.25, 0.5, 1, 1])


def test_many_knots_are_thinned_and_stay_close() -> None:
    counts = np.arange(5, 5005)
    reference = r.fit_reference("rank", counts, np.ones(counts.size))
    assert len(reference["knots"]["count"]) == r.MAX_KNOTS
    np.testing.assert_allclose(r.richness(reference, counts, 1.0), (counts - 5) / 4999, atol=1e-9)


@pytest.mark.parametrize("kind", r.KINDS)
@pytest.mark.parametrize("share", [0.25, 0.4, 0.5])
def test_beta_leaves_the_asked_share_of_items_weakly_aligned(kind: str, share: float) -> None:
    counts = np.random.default_rng(0).zipf(1.6, 2000).clip(5, 5000)
    norms = np.log1p(counts) + np.random.default_rng(1).normal(0, 0.01, 2000)
    reference = r.fit_reference(kind, counts, norms, counts / (counts + 300.0), low_strength_share=share)
    strength = r.alignment_strength(r.richness(reference, counts, norms), reference["alpha"], reference["beta"])
    values, frequency = np.unique(r.richness(reference, counts, norms), return_counts=True)
    attainable = np.cumsum(frequency)[:-1] / counts.size
    assert values.size > 2
    assert (strength < r.LOW_STRENGTH).mean() == pytest.approx(attainable[np.abs(attainable - share).argmin()], abs=1e-9)


def test_beta_solves_the_equation_and_gives_up_above_its_reach() -> None:
    assert float(r.alignment_strength(0.4, 10, r.beta_for(0.4, 10))) == pytest.approx(0.05)
    assert r.beta_for(0.9, 10) == r.MAX_BETA
    assert float(r.alignment_strength(0.9, 10, r.MAX_BETA)) > 0.05


def test_a_given_beta_is_kept() -> None:
    assert r.fit_reference("rank", COUNTS, NORMS, beta=9.0)["beta"] == 9.0


def test_kappa_is_found_again() -> None:
    counts = np.repeat([6, 10, 20, 60, 200, 800], 30).astype(float)
    overlap = 0.4 * (counts / 2) / (counts / 2 + 50) + np.random.default_rng(0).normal(0, 0.005, counts.size)
    overlap[::7] = np.nan
    assert r.fit_kappa(counts, overlap) == pytest.approx(50, rel=0.2)


def test_the_reference_survives_json() -> None:
    reference = r.fit_reference("rank", COUNTS, NORMS, NORMS / 2)
    assert json.loads(json.dumps(reference)) == reference


def test_evidence_bucket_is_exact_at_powers_of_two() -> None:
    counts = np.array([0, 1, 2, 3, 4, 7, 8, 2**29 - 1, 2**29, 2**40])
    assert r.evidence_bucket(counts).tolist() == [-1, 0, 1, 1, 2, 2, 3, 28, 29, 40]


def test_one_item_or_equal_items_have_a_reference() -> None:
    for kind in r.KINDS:
        reference = r.fit_reference(kind, [7, 7], [1.0, 1.0], [0.5, 0.5])
        assert np.isfinite(r.alignment_strength(r.richness(reference, 7, 1.0), reference["alpha"], reference["beta"])).all()


@pytest.mark.parametrize(
    ("kind", "counts", "norms", "overlap", "message"),
    [
        ("popularity", [1], [1.0], None, "unknown richness kind"),
        ("rank", [], [], None, "non-empty"),
        ("rank", [1, 2], [1.0], None, "non-empty"),
        ("norm", [1, 2], [1.0, math.nan], None, "finite"),
        ("reliability", [1, 2], [1.0, 2.0], None, "split-half"),
        ("reliability", [1, 2], [1.0, 2.0], [math.nan, math.nan], "no item has a measured overlap"),
    ],
)
def test_bad_arguments_are_refused(kind: str, counts: list, norms: list, overlap: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        r.fit_reference(kind, counts, norms, overlap)
