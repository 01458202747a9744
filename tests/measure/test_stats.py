"""Medians, paired ratios and their bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmopt.measure import stats


def noisy(n: int, seed: int, *, centre: float = 10.0, spread: float = 0.05) -> np.ndarray:
    return centre * np.exp(spread * np.random.default_rng(seed).standard_normal(n))


def test_the_value_is_the_median_and_the_interval_holds_it() -> None:
    for n in (1, 2, 3, 6, 20):
        x = noisy(n, n)
        found = stats.interval(x.tolist())
        assert found.value == pytest.approx(float(np.median(x)))
        assert x.min() <= found.low <= found.value <= found.high <= x.max()
        assert found.rounds == n


def test_one_sample_is_its_own_interval() -> None:
    found = stats.interval([3.5])
    assert (found.value, found.low, found.high) == (3.5, 3.5, 3.5)


def test_no_samples_are_not_a_number() -> None:
    found = stats.interval([])
    assert all(math.isnan(v) for v in (found.value, found.low, found.high))
    assert found.rounds == 0


def test_one_outlier_does_not_move_the_median() -> None:
    calm = stats.interval([10.0, 10.1, 9.9, 10.0, 10.05, 9.95, 10.0])
    stormy = stats.interval([10.0, 10.1, 9.9, 10.0, 10.05, 9.95, 1000.0])
    assert stormy.value == pytest.approx(calm.value, rel=0.01)


def test_same_seed_same_interval() -> None:
    x = noisy(12, 0).tolist()
    assert stats.interval(x, seed=3) == stats.interval(x, seed=3)


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    stats.interval(noisy(10, 0).tolist())
    assert (np.random.get_state()[1] == before).all()


def test_more_rounds_narrow_the_interval() -> None:
    widths = [
        np.mean([w.high - w.low for w in (stats.interval(noisy(n, s).tolist()) for s in range(20))])
        for n in (6, 24, 96)
    ]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("rounds", [6, 12, 20])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rounds: int) -> None:
    hits = sum(not stats.interval(noisy(rounds, 1000 + s).tolist()).excludes(10.0) for s in range(300))
    assert hits >= 0.9 * 300


def test_a_ratio_is_of_pairs_so_drift_cancels() -> None:
    drift = np.linspace(1, 5, 12)
    old, new = drift * noisy(12, 1, centre=20, spread=0.005), drift * noisy(12, 2, centre=10, spread=0.005)
    found = stats.ratio(old.tolist(), new.tolist())
    assert found.value == pytest.approx(2, rel=0.01)
    assert found.high - found.low < 0.05
    # unpaired, the same samples say nothing
    assert stats.interval(old.tolist()).low < stats.interval(new.tolist()).high


def test_above_one_is_faster() -> None:
    assert stats.ratio([20.0] * 5, [10.0] * 5).value == 2
    assert stats.ratio([10.0] * 5, [20.0] * 5).value == 0.5


def test_a_ratio_turned_round_is_its_inverse() -> None:
    old, new = noisy(15, 3).tolist(), noisy(15, 4, centre=7).tolist()
    a, b = stats.ratio(old, new), stats.ratio(new, old)
    assert a.value == pytest.approx(1 / b.value)
    assert a.low == pytest.approx(1 / b.high, rel=0.01)


def test_equal_stages_are_seldom_told_apart_and_different_ones_nearly_always() -> None:
    def told_apart(factor: float) -> float:
        found = [
            stats.ratio(noisy(12, s, spread=0.02).tolist(), (factor * noisy(12, 500 + s, spread=0.02)).tolist())
            for s in range(200)
        ]
        return sum(f.excludes(1.0) for f in found) / 200

    assert told_apart(1.0) < 0.15
    assert told_apart(1.05) > 0.9


def test_samples_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths, got 3 and 2"):
        stats.ratio([1.0, 2.0, 3.0], [1.0, 2.0])
