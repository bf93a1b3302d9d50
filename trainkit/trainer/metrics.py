"""How good a classifier's answers are: accuracy, F1, confusion, calibration. Numpy only."""

from collections.abc import Sequence

import msgspec
import numpy as np

from trainkit.serve.classifier import FloatArray
from trainkit.serve.errors import InputError

__all__ = ["Evaluation", "LabelScore", "evaluate"]

BINS = 15  # of confidence, as in Guo et al. 2017


class LabelScore(msgspec.Struct, frozen=True):
    """Precision, recall and F1 of one label, 0 where undefined; ``count`` texts have it."""

    precision: float
    recall: float
    f1: float
    count: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Scores over N texts. ``confusion[i][j]`` counts texts of label i that were called j.

    ``calibration_error`` is the expected calibration error (Guo et al. 2017) over 15 equal bins.
    """

    count: int
    accuracy: float
    macro_f1: float
    loss: float
    calibration_error: float
    per_label: dict[str, LabelScore]
    confusion: list[list[int]]


def evaluate(logits: FloatArray, labels: Sequence[str], names: Sequence[str]) -> Evaluation:
    """Score (N, C) ``logits`` against the N true ``labels``; ``names`` gives the C label names.

    ``InputError`` where a true label is none of the model's. Macro-F1 averages over the labels that
    occur, in truth or in answers.
    """
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise InputError(
            f"the data has {len(unknown)} labels that the model lacks, first '{unknown[0]}'; "
            f"it knows {', '.join(names[:10])}{' …' if len(names) > 10 else ''}."
        )
    if not labels:
        raise InputError("there are no texts to evaluate; give a file with at least one.")
    number = {name: i for i, name in enumerate(names)}
    true = np.array([number[label] for label in labels])
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    answers = logits.argmax(axis=1)
    confidence = np.exp(log_probabilities.max(axis=1))
    correct = answers == true
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (true, answers), 1)
    scores = _label_scores(confusion)
    occurring = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    return Evaluation(
        count=len(labels),
        accuracy=float(correct.mean()),
        macro_f1=float(
            np.mean([s.f1 for s, there in zip(scores, occurring, strict=True) if there])
        ),
        loss=float(-log_probabilities[np.arange(len(true)), true].mean()),
        calibration_error=_calibration_error(confidence, correct),
        per_label=dict(zip(names, scores, strict=True)),
        confusion=confusion.tolist(),
    )


def _label_scores(confusion: "np.typing.NDArray[np.int64]") -> list[LabelScore]:
    hits, called, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    precision = hits / np.maximum(called, 1)
    recall = hits / np.maximum(there, 1)
    f1 = 2 * hits / np.maximum(called + there, 1)
    columns = zip(precision, recall, f1, there, strict=True)
    return [LabelScore(float(p), float(r), float(f), int(n)) for p, r, f, n in columns]


def _calibration_error(
    confidence: "np.typing.NDArray[np.floating]", correct: "np.typing.NDArray[np.bool_]"
) -> float:
    """Average |accuracy - confidence| over the bins, weighted by how many texts each holds."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))
