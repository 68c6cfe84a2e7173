"""The NumPy definitions of popularity against slow loops and worked examples."""

import numpy as np
import pytest

from pipeline import popularity


def slow_decayed_count(rows, num_items, window_days, half_life_days):
    total = [0] * num_items
    for item, age, events in rows:
        if age < window_days:
            total[item] += int(events) * round(2**32 * 2.0 ** (-age / half_life_days))
    return [units / 2**32 for units in total]


def test_decayed_count_is_the_sum_over_the_window():
    rng = np.random.default_rng(0)
    item_E, age_E, events_E = rng.integers(0, 7, 300), rng.integers(0, 120, 300), rng.integers(1, 9, 300)
    found_N = popularity.decayed_count(item_E, age_E, events_E, 8, window_days=90, half_life_days=14.0)
    assert found_N.tolist() == slow_decayed_count(zip(item_E, age_E, events_E, strict=True), 8, 90, 14.0)
    assert found_N[7] == 0.0


def test_an_event_counts_whole_today_and_half_after_one_half_life_and_not_at_the_end_of_the_window():
    found_N = popularity.decayed_count([0, 1, 2, 3], [0, 14, 89, 90], [1, 1, 1, 1], 4, window_days=90, half_life_days=14.0)
    np.testing.assert_allclose(found_N, [1.0, 0.5, 2 ** (-89 / 14), 0.0])


def test_an_event_after_the_cutoff_is_refused():
    with pytest.raises(ValueError, match="after the cutoff"):
        popularity.decayed_count([0], [-1], [1], 1, window_days=90, half_life_days=14.0)


@pytest.mark.parametrize(("window", "half_life"), [(0, 14.0), (90, 0.0)])
def test_a_window_and_a_half_life_must_be_positive(window, half_life):
    with pytest.raises(ValueError, match="must be"):
        popularity.decayed_count([0], [0], [1], 1, window_days=window, half_life_days=half_life)


def test_evidence_never_decays():
    count_N, first_N = popularity.evidence([0, 0, 2], [400, 3, 0], [5, 1, 2], 3)
    assert count_N.tolist() == [6, 0, 2]
    assert first_N.tolist() == [400, -1, 0]


def test_percentile_shares_the_mean_rank_among_ties():
    assert popularity.percentile([3.0, 0.0, 0.0, 7.0, 3.0]).tolist() == [0.625, 0.125, 0.125, 1.0, 0.625]


def test_percentile_of_a_lone_item_is_one():
    assert popularity.percentile([0.0]).tolist() == [1.0]
    assert popularity.percentile([]).size == 0


def test_deciles_run_from_zero_to_nine():
    assert popularity.decile([0.0, 0.0999, 0.1, 0.95, 1.0]).tolist() == [0, 0, 1, 9, 9]


def test_strata_cut_by_popularity_then_item_id():
    found_N = popularity.strata([5, 5, 4, 3, 3, 2, 2, 1, 1, 1], list("badcefhgij"), head_share=0.1, tail_share=0.5)
    assert found_N.tolist() == ["torso", "head", "torso", "torso", "torso", "tail", "tail", "tail", "tail", "tail"]


def test_an_item_without_events_in_the_window_is_tail_even_when_the_head_is_not_full():
    found_N = popularity.strata([9.0, 0.0, 0.0, 0.0], list("abcd"), head_share=0.5, tail_share=0.25)
    assert found_N.tolist() == ["head", "tail", "tail", "tail"]


def test_shares_are_rounded_to_whole_items():
    counts = np.arange(1, 11)
    for head_share, heads in ((0.04, 0), (0.05, 1), (0.25, 3), (0.3, 3)):
        found_N = popularity.strata(counts, counts.astype(str), head_share=head_share, tail_share=0.2)
        assert (found_N == "head").sum() == heads
