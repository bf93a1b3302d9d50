"""From logits to probabilities and decisions, by the kind of problem."""

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "ProblemType", "decisions", "probabilities"]

FloatArray: TypeAlias = npt.NDArray[np.float32]

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""As in a Hugging Face configuration: one label of several, any number of them, or a value."""


def probabilities(logits: FloatArray, problem_type: ProblemType) -> FloatArray:
    """Turn (N, C) logits into softmax or, for several labels, sigmoid; a regression's stay."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification":
        return np.exp(-np.logaddexp(0, -logits))
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    scores: FloatArray = exponents / exponents.sum(axis=1, keepdims=True)
    return scores


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
