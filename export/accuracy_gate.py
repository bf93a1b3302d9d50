"""The accuracy gate: an export's accuracy and decisions on the user's labelled texts."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from trainkit.data.readers import Example
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import ProblemType, decisions
from trainkit.serve.types import FloatArray
from trainkit.trainer.metrics import Evaluation, evaluate

# 100 * (0.87 - 0.865) is 0.5000000000000004: a drop of exactly the limit passes.
ROUNDING_POINTS = 1e-9


class AccuracyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_drop_points`` of accuracy in percentage points; ``min_label_agreement`` is a share."""

    max_drop_points: float
    min_label_agreement: float = 0.0

    def __post_init__(self) -> None:
        if not self.max_drop_points >= 0:
            raise InputError(
                f"the largest drop of accuracy must be 0 points or more, not "
                f"{self.max_drop_points}."
            )
        if not 0 <= self.min_label_agreement <= 1:
            raise InputError(
                f"the least agreement of labels is a share from 0 to 1, not "
                f"{self.min_label_agreement}."
            )


class AccuracyReport(msgspec.Struct, frozen=True, kw_only=True):
    """An export on the user's texts, compared with its source.

    ``drop_points`` are percentage points of accuracy lost, negative if some were gained;
    ``agreement`` is the share of texts with the same decision; ``max_abs`` the largest difference
    of a logit. Accuracies are None for a model that does not give one label per text.
    """

    count: int
    accuracy: float | None
    source_accuracy: float | None
    drop_points: float
    agreement: float
    max_abs: float
    evaluation: Evaluation | None


class GateResult(NamedTuple):
    """``reason`` lists the limits that were exceeded; ``report`` is None without usable logits."""

    reason: str
    report: AccuracyReport | None = None

    @property
    def passed(self) -> bool:
        """True if no limit was exceeded."""
        return not self.reason


class AccuracyGate(NamedTuple):
    """The user's texts, the source's logits (N, C) for them, and the source's temperature.

    ``evaluation`` is None for a model that does not give one label per text: only the agreement of
    decisions counts then.
    """

    texts: list[str]
    labels: list[str]
    names: tuple[str, ...]
    problem_type: ProblemType
    logits: FloatArray
    evaluation: Evaluation | None
    temperature: float = 1.0

    @classmethod
    def of(cls, classifier: Classifier, data: Sequence[Example]) -> "AccuracyGate | None":
        """Classify ``data`` with the source; None without data.

        Raises InputError if the data has a label that the model does not know.
        """
        if not data:
            return None
        texts, labels = [example.text for example in data], [example.label for example in data]
        logits = classifier.logits(texts)
        single = classifier.problem_type == "single_label_classification"
        temperature = classifier.temperature
        scores = evaluate(logits, labels, classifier.labels, temperature) if single else None
        return cls(
            texts, labels, classifier.labels, classifier.problem_type, logits, scores, temperature
        )

    @property
    def source_accuracy(self) -> float | None:
        """The source's accuracy on the texts."""
        return self.evaluation.accuracy if self.evaluation else None

    def check(self, logits: FloatArray, limits: AccuracyLimits) -> GateResult:
        """Compare an export's logits (N, C) with the source's."""
        if logits.shape != self.logits.shape:
            return GateResult(f"logits of shape {logits.shape}, not {self.logits.shape}")
        if not np.isfinite(logits).all():
            return GateResult("logits are NaN or infinite")
        report = self._compare(logits)
        reasons = []
        if report.drop_points > limits.max_drop_points + ROUNDING_POINTS:
            drop = f"accuracy drops by {report.drop_points:.2f} points"
            reasons.append(f"{drop}, over {limits.max_drop_points:g}")
        if report.agreement < limits.min_label_agreement:
            reasons.append(
                f"{100 * report.agreement:.2f}% of labels agree, "
                f"under {100 * limits.min_label_agreement:g}%"
            )
        return GateResult(", ".join(reasons), report)

    def _compare(self, logits: FloatArray) -> AccuracyReport:
        same = decisions(logits, self.problem_type) == decisions(self.logits, self.problem_type)
        evaluation, drop_points = None, 0.0
        if self.evaluation is not None:
            evaluation = evaluate(logits, self.labels, self.names, self.temperature)
            drop_points = 100 * (self.evaluation.accuracy - evaluation.accuracy)
        return AccuracyReport(
            count=len(self.texts),
            accuracy=evaluation.accuracy if evaluation else None,
            source_accuracy=self.source_accuracy,
            drop_points=drop_points,
            agreement=float(same.all(axis=1).mean()),
            max_abs=float(np.abs(logits - self.logits).max()),
            evaluation=evaluation,
        )
