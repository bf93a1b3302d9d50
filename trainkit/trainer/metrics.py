"""How good a classifier's answers are: accuracy, F1, confusion, calibration. Numpy only."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import probabilities
from trainkit.serve.types import FloatArray

BINS = 15  # of confidence, as in Guo et al. 2017


class LabelMetrics(msgspec.Struct, frozen=True):
    """Precision, recall and F1 of one label, 0 where undefined; ``count`` texts have it."""

    precision: float
    recall: float
    f1: float
    count: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Scores over N texts. ``confusion[i][j]`` counts texts of label i that were called j.

    ``calibration_error`` is the expected calibration error (Guo et al. 2017) over 15 bins of equal
    width. It and ``loss`` are those of the probabilities at ``temperature``;
    ``raw_calibration_error`` is that of the logits' plain softmax.
    """

    count: int
    accuracy: float
    macro_f1: float
    loss: float
    calibration_error: float
    raw_calibration_error: float
    temperature: float
    per_label: dict[str, LabelMetrics]
    confusion: list[list[int]]


class Reliability(NamedTuple):
    """The points of a reliability diagram, a bin of confidence each; nothing where it is empty.

    ``counts`` of texts, their mean ``confidences``, and their ``accuracies``, (15,) each.
    """

    counts: npt.NDArray[np.int64]
    confidences: npt.NDArray[np.float64]
    accuracies: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Average |accuracy - confidence| over the bins, weighted by how many texts each holds."""
        gaps = np.abs(self.accuracies - self.confidences)
        return float((gaps * self.counts).sum() / self.counts.sum())


def evaluate(
    logits: FloatArray,
    labels: Sequence[str],
    names: Sequence[str],
    temperature: float = 1.0,
) -> Evaluation:
    """Score (N, C) ``logits`` against the N true ``labels``; ``names`` gives the C label names.

    Raises ``InputError`` if a true label is none of the model's. Macro-F1 averages over the labels
    that occur, in truth or in answers.
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
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    answers = logits.argmax(axis=1)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (true, answers), 1)
    scores = _label_scores(confusion)
    occurring = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    return Evaluation(
        count=len(labels),
        accuracy=float((answers == true).mean()),
        macro_f1=float(
            np.mean([s.f1 for s, there in zip(scores, occurring, strict=True) if there])
        ),
        loss=float(-log_probabilities[np.arange(len(true)), true].mean()),
        calibration_error=reliability(logits, true, temperature).error,
        raw_calibration_error=reliability(logits, true).error,
        temperature=temperature,
        per_label=dict(zip(names, scores, strict=True)),
        confusion=confusion.tolist(),
    )


def _label_scores(confusion: npt.NDArray[np.int64]) -> list[LabelMetrics]:
    hits, called, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    precision = hits / np.maximum(called, 1)
    recall = hits / np.maximum(there, 1)
    f1 = 2 * hits / np.maximum(called + there, 1)
    columns = zip(precision, recall, f1, there, strict=True)
    return [LabelMetrics(float(p), float(r), float(f), int(n)) for p, r, f, n in columns]


def reliability(
    logits: FloatArray, true: npt.NDArray[np.int64], temperature: float = 1.0
) -> Reliability:
    """Sort N answers into 15 bins of equal width by how sure they are (Guo et al. 2017).

    ``logits`` are (N, C), ``true`` the (N,) right columns.
    """
    confidence = probabilities(logits, "single_label_classification", temperature).max(axis=1)
    correct = logits.argmax(axis=1) == true
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = (np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, correct))
    means = [total / np.maximum(counts, 1) for total in sums]
    return Reliability(counts, *means)
