"""Medians, paired ratios and their intervals.

Rounds are interleaved, so sample i of two stages was taken under the same conditions: ratios are taken round by round,
and the bootstrap resamples rounds. A machine that drifts then moves both sides and leaves the ratio alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.measure.report import Interval

_RESAMPLES = 2000


def interval(samples: Sequence[float], seed: int = 0) -> Interval:
    """Median with its 95% bootstrap interval. Empty samples give NaN."""
    x = np.asarray(samples, dtype=np.float64)
    if x.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    picks = np.random.default_rng(seed).integers(0, x.size, size=(_RESAMPLES, x.size))
    low, high = np.percentile(np.median(x[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(x)), float(low), float(high), int(x.size))


def ratio(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Interval:
    """Median of old / new over paired rounds with its 95% interval: above 1, new is faster."""
    a, b = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired samples: expected equal lengths, got {a.size} and {b.size}")
    return interval((a / b).tolist(), seed)
