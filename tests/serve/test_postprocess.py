"""Logits to probabilities at a temperature, and thresholds of several labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import check_temperature, label_thresholds, probabilities

LOGITS = np.random.default_rng(0).normal(scale=5, size=(50, 4)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1, 3.0, 100.0])
def test_probabilities_are_those_of_scipy(temperature):
    scaled = LOGITS.astype(np.float64) / temperature
    single = probabilities(LOGITS, "single_label_classification", temperature)
    several = probabilities(LOGITS, "multi_label_classification", temperature)
    assert single.dtype == several.dtype == np.float32
    # At 0.01 a logit's own float32 rounding, 1e-7 of 20, is multiplied by a hundred.
    np.testing.assert_allclose(single, softmax(scaled, axis=1), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(several, expit(scaled), rtol=1e-4, atol=1e-7)
    assert np.array_equal(probabilities(LOGITS, "regression"), LOGITS)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=5), st.floats(0.01, 100))
def test_no_temperature_makes_a_probability_that_is_none(row, temperature):
    logits = np.array([row], dtype=np.float32)
    for kind in ("single_label_classification", "multi_label_classification"):
        found = probabilities(logits, kind, temperature)
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf"), 0.001])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(InputError, match=r"temperature must be from 0\.01 to 100, not"):
        check_temperature(temperature, "single_label_classification")


def test_a_regression_has_no_temperature():
    check_temperature(1.0, "regression")
    with pytest.raises(InputError, match="no probabilities to calibrate; leave temperature out"):
        check_temperature(2.0, "regression")


def test_thresholds_are_one_for_all_or_by_name():
    assert label_thresholds(0.3, ["a", "b"]) == {"a": 0.3, "b": 0.3}
    assert label_thresholds({"b": 1}, ["a", "b"]) == {"a": 0.5, "b": 1}


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        ({"c": 0.1, "a": 0.1, "d": 0.1}, "name 'c', 'd', which .* its labels are a, b"),
        ({"b": 1.5}, "threshold of 'b' must be a number from 0 to 1, not 1.5"),
        (float("nan"), "from 0 to 1, not nan"),
        ("0.5", "from 0 to 1, not '0.5'"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(thresholds, told):
    with pytest.raises(InputError, match=told):
        label_thresholds(thresholds, ["a", "b"])


def test_names_that_nobody_knows_are_counted_and_not_all_repeated():
    with pytest.raises(InputError, match=r"'n0', .*'n4' and 99,995 more, which") as refused:
        label_thresholds({f"n{number}": 0.5 for number in range(100_000)}, ("A", "B"))
    assert len(str(refused.value)) < 300
    with pytest.raises(InputError) as refused:
        label_thresholds({"x" * 10_000: 0.5}, ("A", "B"))
    assert len(str(refused.value)) < 300
