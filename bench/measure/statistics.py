"""What a sample of timings says, and what it is too small to say."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap_interval", "percentile", "spread"]

# Below these a percentile is mostly luck. 459 is the smallest n with 1 - 0.99**n >= 0.99: only then
# does the sample reach beyond the true p99 with 99 % confidence; the others by the same rule.
MIN_SAMPLES = {50: 20, 90: 50, 95: 90, 99: 459, 99.9: 4603}


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def bootstrap_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of the median (Efron 1979); no values: ValueError.

    The values must be independent: rounds, not the passes inside a round, which share whatever
    else the machine was doing then.
    """
    drawn = np.random.default_rng(seed).choice(values, size=(resamples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(low), float(high))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, or None where there are too few values to know it."""
    if len(values) < MIN_SAMPLES[percent]:
        return None
    return float(np.percentile(values, percent))


def spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles as a share of the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
