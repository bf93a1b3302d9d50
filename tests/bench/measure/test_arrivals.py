import numpy as np
import pytest
from scipy.stats import kstest

from trainkit.bench.measure.arrivals import Arrivals, arrivals, arrivals_within


@pytest.mark.parametrize("seed", range(5))
def test_poisson_gaps_are_exponential_with_the_mean_of_the_rate(seed: int) -> None:
    gaps = np.diff(arrivals("poisson", 40.0, 5001, seed))
    assert kstest(gaps, "expon", args=(0, 1 / 40)).pvalue > 0.001
    assert kstest(gaps, "expon", args=(0, 1 / 44)).pvalue < 0.001  # a tenth more: it would show
    assert (
        kstest(np.diff(arrivals("constant", 40.0, 5001)), "expon", args=(0, 1 / 40)).pvalue < 1e-9
    )


def test_poisson_gaps_do_not_depend_on_the_gap_before() -> None:
    gaps = np.diff(arrivals("poisson", 40.0, 5001))
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.05


def test_constant_arrivals_are_equidistant_and_do_not_drift() -> None:
    due = arrivals("constant", 30.0, 90_001)
    np.testing.assert_allclose(np.diff(due), 1 / 30, rtol=1e-6)
    assert due[-1] == 3000.0


@pytest.mark.parametrize("kind", ["constant", "poisson"])
def test_due_times_ascend_from_zero_and_more_of_them_begin_alike(kind: Arrivals) -> None:
    due = arrivals(kind, 100.0, 1000, seed=3)
    assert (due.dtype, due.shape, due[0]) == (np.float64, (1000,), 0.0)
    assert (np.diff(due) > 0).all()
    np.testing.assert_array_equal(arrivals(kind, 100.0, 10, seed=3), due[:10])
    assert arrivals(kind, 100.0, 0).shape == (0,)
    within = arrivals_within(kind, 100.0, 5.0, seed=3)
    assert within[-1] < 5.0 <= due[len(within)]
    np.testing.assert_array_equal(within, due[: len(within)])


def test_another_seed_gives_other_poisson_arrivals() -> None:
    assert not np.array_equal(arrivals("poisson", 1, 9, seed=1), arrivals("poisson", 1, 9, seed=2))


@pytest.mark.parametrize(("rate", "count"), [(0, 1), (-1, 1), (float("nan"), 1), (1, -1)])
def test_rates_and_counts_that_mean_nothing_are_refused(rate: float, count: int) -> None:
    with pytest.raises(ValueError, match="a rate above 0"):
        arrivals("poisson", rate, count)
