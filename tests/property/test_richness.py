"""Whatever the catalogue: richness lies in [0, 1], grows with evidence, and is a function of the item alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import richness as r

kinds = st.sampled_from(r.KINDS)
counts = st.lists(st.integers(1, 10_000), min_size=2, max_size=60)


def fitted(kind: str, values: list[int]) -> tuple[dict, np.ndarray, np.ndarray]:
    count_N = np.asarray(values, float)
    norm_N = np.sqrt(count_N)
    return r.fit_reference(kind, count_N, norm_N, count_N / (count_N + 100)), count_N, norm_N


@settings(deadline=None)
@given(kinds, counts, st.integers(1, 10**9))
def test_a_record_breaking_new_item_moves_no_other_row(kind: str, values: list[int], record: int) -> None:
    reference, count_N, norm_N = fitted(kind, values)
    before = r.richness(reference, count_N, norm_N)
    after = r.richness(reference, np.append(count_N, record * 1e4), np.append(norm_N, record * 1e3))
    assert after[:-1].tobytes() == before.tobytes()
    assert 0 <= after[-1] <= 1


@settings(deadline=None)
@given(kinds, counts)
def test_richness_is_in_the_unit_interval_and_grows_with_evidence(kind: str, values: list[int]) -> None:
    reference, count_N, _norm_N = fitted(kind, values)
    grid = np.sort(np.concatenate([count_N, np.geomspace(0.5, 1e7, 50)]))
    value_G = r.richness(reference, grid, np.sqrt(grid))
    assert value_G.min() >= 0
    assert value_G.max() <= 1
    assert (np.diff(value_G) >= 0).all()
    strength_G = r.alignment_strength(value_G, reference["alpha"], reference["beta"])
    assert (np.diff(strength_G) >= 0).all()
    assert strength_G.max() <= 1 + 1e-12


@settings(deadline=None)
@given(kinds, counts, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(kind: str, values: list[int], random) -> None:
    reference, *_ = fitted(kind, values)
    shuffled = list(values)
    random.shuffle(shuffled)
    other, *_ = fitted(kind, shuffled)
    probe = np.array([1.0, 5.0, 77.0, 1e4])
    np.testing.assert_allclose(r.richness(reference, probe, np.sqrt(probe)), r.richness(other, probe, np.sqrt(probe)), rtol=1e-9)
