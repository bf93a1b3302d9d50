"""From logits to probabilities and decisions, by the kind of problem."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trainkit.serve.errors import InputError
from trainkit.serve.types import FloatArray

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""As in a Hugging Face configuration: one label of several, any number of them, or a value."""

Thresholds: TypeAlias = float | Mapping[str, float]
"""What a probability must be above: one number for all labels, or some labels' own by name."""

NAMED, NAME_LENGTH = 5, 40  # of names in a message

TEMPERATURES = (0.01, 100.0)
"""Bounds: beyond them probabilities are 0 and 1, or all the same."""


def probabilities(
    logits: FloatArray, problem_type: ProblemType, temperature: float = 1.0
) -> FloatArray:
    """Turn (N, C) logits into softmax or, for several labels, sigmoid; a regression's stay.

    The logits are divided by ``temperature`` first: above 1 it makes a model less sure of itself,
    and changes no ranking (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification":
        sigmoid: FloatArray = np.exp(-np.logaddexp(0, -logits / temperature))
        return sigmoid
    scaled = (logits - logits.max(axis=1, keepdims=True, initial=-np.inf)) / temperature
    exponents = np.exp(scaled)
    scores: FloatArray = exponents / exponents.sum(axis=1, keepdims=True)
    return scores


def check_temperature(temperature: float, problem_type: ProblemType) -> None:
    """Raise ``InputError`` if logits of this kind cannot be divided by ``temperature``."""
    low, high = TEMPERATURES
    if not low <= temperature <= high:  # NaN too
        raise InputError(f"temperature must be from {low} to {high:g}, not {temperature}.")
    if problem_type == "regression" and temperature != 1:
        raise InputError(
            "the model is a regression: it has no probabilities to calibrate; "
            "leave temperature out."
        )


def label_thresholds(thresholds: Thresholds, labels: Sequence[str]) -> dict[str, float]:
    """Return every label's threshold; a label that a mapping does not name has 0.5.

    ``InputError`` names the labels that are not the model's, and what is not from 0 to 1.
    """
    if not isinstance(thresholds, Mapping):
        thresholds = dict.fromkeys(labels, thresholds)
    known = set(labels)
    unknown = [name for name in thresholds if name not in known]
    if unknown:
        named = ", ".join(f"{name[:NAME_LENGTH]!r}" for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED:,} more" if unknown[NAMED:] else ""
        raise InputError(
            f"thresholds name {named}{more}, which the model does not have; "
            f"its labels are {', '.join(labels)}."
        )
    for name, threshold in thresholds.items():
        if not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            raise InputError(
                f"the threshold of {name!r} must be a number from 0 to 1, not {threshold!r}."
            )
    return dict.fromkeys(labels, 0.5) | dict(thresholds)


def ranking(logits: FloatArray) -> npt.NDArray[np.intp]:
    """Return the columns of (N, C) logits in each row, the highest first.

    Not those of probabilities, of which two may round to the same number.
    """
    return np.argsort(-logits, axis=1, kind="stable")


def decisions(logits: FloatArray, problem_type: ProblemType) -> npt.NDArray[np.int64]:
    """Return what is decided for each of N rows: (N, 1) labels, or (N, C) yes and no.

    A regression decides nothing: (N, 0).
    """
    if problem_type == "regression":
        return np.empty((len(logits), 0), dtype=np.int64)
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64)
    best: npt.NDArray[np.int64] = logits.argmax(axis=1).astype(np.int64)
    return best[:, None]
