"""Statistics of timings: percentiles, bootstrap intervals and ratios with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

# Smaller samples do not carry the percentile. 459 is the smallest n with 1 - 0.99**n >= 0.99: only
# then does the sample reach beyond the true p99 with 99% confidence; the others by the same rule.
MIN_SAMPLES = {50: 20, 90: 50, 95: 90, 99: 459, 99.9: 4603}

RATIO_RESAMPLES = 4000
SEED = 0


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ratio of two speeds with its 95% bootstrap interval; above 1 the first is faster."""

    median: float
    low: float
    high: float

    @classmethod
    def of_rounds(cls, rates: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        """Return the median of the ratios inside each round, for rounds that were interleaved.

        For durations, pass the baseline's first.
        """
        ratios = [rate / base for rate, base in zip(rates, baseline, strict=True)]
        return cls(float(np.median(ratios)), *bootstrap_interval(ratios))

    @classmethod
    def of_samples(cls, rates: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        """Return the ratio of the medians of two independent samples.

        Both are resampled for the interval (Efron and Tibshirani 1993, chapter 8).
        """
        random = np.random.default_rng(SEED)
        medians_base, medians = (
            np.median(random.choice(values, size=(RATIO_RESAMPLES, len(values))), axis=1)
            for values in (baseline, rates)
        )
        low, high = np.quantile(medians / medians_base, [0.025, 0.975])
        return cls(float(np.median(rates) / np.median(baseline)), float(low), float(high))


def bootstrap_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of the median (Efron 1979).

    The values must be independent: rounds, not the passes inside a round, which share the same
    disturbances. Raises ``ValueError`` for an empty sample.
    """
    drawn = np.random.default_rng(seed).choice(values, size=(resamples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(low), float(high))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, or None if the sample is too small for it (``MIN_SAMPLES``)."""
    if len(values) < MIN_SAMPLES[percent]:
        return None
    return float(np.percentile(values, percent))


def spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles as a share of the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
