"""Temperature scaling (Guo et al. 2017).

Takes the logits of texts that the model was not trained on, and their labels, and returns one
number. Training fits it on the validation texts and the bundle stores it.
"""

import numpy as np
import numpy.typing as npt

from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import TEMPERATURES, ProblemType, probabilities
from trainkit.serve.types import FloatArray

STEPS = 60  # of bisection: the bounds are nine units apart in the logarithm, so to the last bit


class NoBestTemperatureError(InputError):
    """The likelihood has no maximum: the logits are right about every text, or about none."""


def fit_temperature(
    logits: FloatArray,
    labels: npt.ArrayLike,
    problem_type: ProblemType = "single_label_classification",
) -> float:
    """Return the temperature of least negative log-likelihood (Guo et al. 2017).

    ``logits`` are (N, C). ``labels`` are the N right columns or, for several labels a text, (N, C)
    of 0 and 1: one temperature for all labels then too. The likelihood is convex in the inverse of
    the temperature, so that a bisection of its slope finds the one best value.

    Raises ``InputError`` if shapes or labels are invalid or the problem is a regression, and
    ``NoBestTemperatureError`` if the logits are right about every text or unrelated to the labels.
    """
    scores = np.asarray(logits, dtype=np.float64)
    targets = _targets(scores, np.asarray(labels), problem_type)
    low, high = TEMPERATURES
    if _slope(scores, targets, problem_type, low) <= 0:
        raise NoBestTemperatureError(
            "the logits are right about every label, so no temperature is best; "
            "fit it on more texts, and on none that the model was trained on."
        )
    if _slope(scores, targets, problem_type, high) >= 0:
        raise NoBestTemperatureError(
            "the logits say nothing of these labels, so no temperature is best; "
            "check that the labels are in the order of the texts and of Classifier.labels."
        )
    for _ in range(STEPS):
        middle = float(np.sqrt(low * high))
        if _slope(scores, targets, problem_type, middle) > 0:
            low = middle
        else:
            high = middle
    return float(np.sqrt(low * high))


def _slope(
    scores: npt.NDArray[np.float64],
    targets: npt.NDArray[np.float64],
    problem_type: ProblemType,
    temperature: float,
) -> float:
    """Return how the negative log-likelihood grows with 1 / temperature."""
    found = probabilities(scores, problem_type, temperature)  # type: ignore[arg-type]  # float64
    return float(((found - targets) * scores).sum())


def _targets(
    scores: npt.NDArray[np.float64], labels: npt.NDArray[np.generic], problem_type: ProblemType
) -> npt.NDArray[np.float64]:
    """Return the probabilities that would be right, (N, C) of 0 and 1."""
    if problem_type == "regression":
        raise InputError("a regression has no probabilities to calibrate.")
    if scores.ndim != 2 or not scores.size:
        raise InputError(f"logits must be (texts, labels) and not empty, not {scores.shape}.")
    if not np.isfinite(scores).all():
        raise InputError("logits must be finite: some are NaN or infinite.")
    several = problem_type == "multi_label_classification"
    shape = scores.shape if several else scores.shape[:1]
    if labels.shape != shape:
        raise InputError(f"labels must be {shape} for logits {scores.shape}, not {labels.shape}.")
    if several:
        if not np.isin(labels, (0, 1)).all():
            raise InputError("labels of a multi-label model must be 0 or 1 for every label.")
        return labels.astype(np.float64)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError("labels must be numbers of columns; use classify.labels.index(name).")
    columns = labels.astype(np.int64)
    if columns.min() < 0 or columns.max() >= scores.shape[1]:
        raise InputError(
            f"labels must be from 0 to {scores.shape[1] - 1}, the columns of the logits; "
            f"they go from {columns.min()} to {columns.max()}."
        )
    return np.eye(scores.shape[1])[columns]
