import numpy as np
import pytest

from trainkit.bench.measure.statistics import bootstrap_interval, percentile, spread


def test_the_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval([2.0] * 9) == (2.0, 2.0)


def test_the_interval_holds_the_true_median_about_95_times_in_100() -> None:
    random = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(random.normal(3.0, 1.0, size=25).tolist(), resamples=400)
        held += low <= 3.0 <= high
    assert 0.88 <= held / 200 <= 1.0


def test_the_interval_narrows_with_more_values_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(1).normal(size=400).tolist()
    few, many = bootstrap_interval(values[:20]), bootstrap_interval(values)
    assert many.high - many.low < (few.high - few.low) / 2
    assert bootstrap_interval(values) == many


@pytest.mark.parametrize(("percent", "enough"), [(50, 20), (90, 50), (99, 459)])
def test_a_percentile_is_withheld_from_a_sample_that_is_too_small(
    percent: int, enough: int
) -> None:
    assert percentile([1.0] * (enough - 1), percent) is None
    assert percentile([1.0] * enough, percent) == 1.0


def test_percentiles_and_spread_are_those_of_the_sample() -> None:
    values = [float(number) for number in range(101)]
    assert percentile(values, 90) == 90
    assert spread(values) == 1.0  # from 25 to 75, around 50
