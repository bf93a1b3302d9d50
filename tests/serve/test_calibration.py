"""The fitted temperature is that of least negative log-likelihood, as scipy and torch find it."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from trainkit.serve.calibration import fit_temperature
from trainkit.serve.errors import InputError

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


def drawn(problem_type, sharpness, seed):
    """Return logits that are ``sharpness`` times too sure, and labels drawn from the true ones."""
    random = np.random.default_rng(seed)
    true = random.normal(scale=2, size=(400, 5))
    if problem_type == SINGLE:
        labels = (true + random.gumbel(size=true.shape)).argmax(axis=1)  # the Gumbel-max trick
    else:
        labels = (true > random.logistic(size=true.shape)).astype(int)
    return (true * sharpness).astype(np.float32), labels


def loss(problem_type, logits, labels):
    if problem_type == SINGLE:
        return F.cross_entropy(logits, torch.tensor(labels))
    return F.binary_cross_entropy_with_logits(logits, torch.tensor(labels, dtype=torch.float64))


@pytest.mark.parametrize("problem_type", [SINGLE, SEVERAL])
@pytest.mark.parametrize(("sharpness", "seed"), [(0.2, 1), (1.0, 2), (3.0, 3), (20.0, 4)])
def test_it_is_the_minimum_that_scipy_and_torch_find(problem_type, sharpness, seed):
    logits, labels = drawn(problem_type, sharpness, seed)
    found = fit_temperature(logits, labels, problem_type)
    wide = torch.tensor(logits, dtype=torch.float64)
    by_scipy = minimize_scalar(
        lambda log: loss(problem_type, wide / np.exp(log), labels).item(),
        bounds=(np.log(0.01), np.log(100)),
        options={"xatol": 1e-10},
    )
    # A minimum's place is known to the square root of what its value is known to.
    assert found == pytest.approx(np.exp(by_scipy.x), rel=1e-6)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def step():
        lbfgs.zero_grad()
        value = loss(problem_type, wide / log_temperature.exp(), labels)
        value.backward()
        return value

    lbfgs.step(step)
    assert found == pytest.approx(log_temperature.exp().item(), rel=1e-4)
    assert found == pytest.approx(sharpness, rel=0.2)  # what was put in, but for the draw


def test_other_labels_give_another_temperature():
    logits, labels = drawn(SINGLE, 1.0, 5)
    wrong = labels.copy()
    wrong[:40] = (wrong[:40] + 1) % 5
    assert fit_temperature(logits, wrong) > 1.1 * fit_temperature(logits, labels)


GOOD = np.array([[2.0, 0], [0, 1], [1, 0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type", "told"),
    [
        (GOOD, [0, 1, 0], SINGLE, "right about every label"),
        (GOOD, [1, 0, 1], SINGLE, "say nothing of these labels"),
        (GOOD, [[1, 0], [0, 1], [1, 0]], "regression", "no probabilities to calibrate"),
        (GOOD, [0, 1], SINGLE, r"labels must be \(3,\) for logits \(3, 2\), not \(2,\)"),
        (GOOD, [0, 1, 0], SEVERAL, r"labels must be \(3, 2\)"),
        (GOOD, [0, 2, 0], SINGLE, "labels must be from 0 to 1, .* from 0 to 2"),
        (GOOD, [0, -1, 0], SINGLE, "they go from -1 to 0"),
        (GOOD, ["a", "b", "a"], SINGLE, r"use classify\.labels\.index"),
        (GOOD, [[2, 0], [0, 1], [1, 0]], SEVERAL, "must be 0 or 1"),
        (GOOD * np.float32("nan"), [0, 1, 0], SINGLE, "must be finite"),
        (GOOD[:0], [], SINGLE, "not empty"),
        (GOOD[0], [0], SINGLE, r"\(texts, labels\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(logits, labels, problem_type, told):
    with pytest.raises(InputError, match=told):
        fit_temperature(logits, labels, problem_type)
