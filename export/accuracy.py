"""The user's own labelled texts: an export's accuracy and decisions beside its source's."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from trainkit.data.readers import Example
from trainkit.serve.classifier import Classifier
from trainkit.serve.postprocess import ProblemType, decisions
from trainkit.serve.types import FloatArray
from trainkit.trainer.metrics import Evaluation, evaluate

__all__ = ["Accuracy", "Gate", "measure", "reference_gate"]


class Gate(NamedTuple):
    """The user's texts, and the source's own answers to them: (N, C) logits, and its temperature.

    ``evaluation`` is None where the model has not one label a text: its accuracy on single labels
    says nothing, and only agreement counts.
    """

    texts: list[str]
    labels: list[str]
    names: tuple[str, ...]
    problem_type: ProblemType
    logits: FloatArray
    evaluation: Evaluation | None
    temperature: float = 1.0


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """An export on the user's texts, beside its source.

    ``drop_points`` are percentage points of accuracy lost; ``agreement`` the share of texts for
    which the decision is the same; ``max_abs`` the largest difference of a logit.
    """

    count: int
    accuracy: float | None
    source_accuracy: float | None
    drop_points: float
    agreement: float
    max_abs: float
    evaluation: Evaluation | None


def reference_gate(classifier: Classifier, data: Sequence[Example]) -> Gate | None:
    """Classify ``data`` with the source; None without data.

    ``InputError`` where a label of the data is none of the model's.
    """
    if not data:
        return None
    texts, labels = [example.text for example in data], [example.label for example in data]
    logits = classifier.logits(texts)
    single = classifier.problem_type == "single_label_classification"
    temperature = classifier.temperature
    scores = evaluate(logits, labels, classifier.labels, temperature) if single else None
    problem_type = classifier.problem_type
    return Gate(texts, labels, classifier.labels, problem_type, logits, scores, temperature)


def measure(gate: Gate, logits: FloatArray) -> Accuracy:
    """Compare an export's logits (N, C) with the source's."""
    same = decisions(logits, gate.problem_type) == decisions(gate.logits, gate.problem_type)
    evaluation = None
    if gate.evaluation is not None:
        evaluation = evaluate(logits, gate.labels, gate.names, gate.temperature)
    found = evaluation.accuracy if evaluation else None
    expected = gate.evaluation.accuracy if gate.evaluation else None
    return Accuracy(
        count=len(gate.texts),
        accuracy=found,
        source_accuracy=expected,
        drop_points=0.0 if found is None or expected is None else 100 * (expected - found),
        agreement=float(same.all(axis=1).mean()),
        max_abs=float(np.abs(logits - gate.logits).max()),
        evaluation=evaluation,
    )
