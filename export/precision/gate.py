"""Whether a candidate of lower precision may go out: its accuracy and labels beside the source's.

In go the logits of both on the same labelled texts and the limits; out comes a verdict, with the
reason where it is no.
"""

import msgspec
import numpy as np

from trainkit.export import accuracy
from trainkit.serve.errors import InputError
from trainkit.serve.types import FloatArray

__all__ = ["Limits", "Verdict", "judge"]

# 100 * (0.87 - 0.865) is 0.5000000000000004: a drop of just the limit passes.
ROUNDING_POINTS = 1e-9


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate on the labelled texts.

    ``drop_points``: percentage points of accuracy lost, negative where some were won.
    ``label_agreement``: the share of texts with the source's decision. ``max_abs``: the largest
    difference of a logit. All are None where the candidate gave no logits, and ``accuracy`` where
    the model has not one label a text.
    """

    passed: bool
    reason: str = ""
    accuracy: float | None = None
    drop_points: float | None = None
    label_agreement: float | None = None
    max_abs: float | None = None


def judge(logits: FloatArray, gate: accuracy.Gate, limits: Limits) -> Verdict:
    """Compare a candidate's (N, C) logits with the source's; every fault is in the reason."""
    if logits.shape != gate.logits.shape:
        return Verdict(
            passed=False, reason=f"logits of shape {logits.shape}, not {gate.logits.shape}"
        )
    if not np.isfinite(logits).all():
        return Verdict(passed=False, reason="logits are NaN or infinite")
    found = accuracy.measure(gate, logits)
    reasons = []
    if found.drop_points > limits.max_drop_points + ROUNDING_POINTS:
        reasons.append(
            f"accuracy drops by {found.drop_points:.2f} points, over {limits.max_drop_points:g}"
        )
    if found.agreement < limits.min_label_agreement:
        reasons.append(
            f"{100 * found.agreement:.2f} % of labels agree, "
            f"under {100 * limits.min_label_agreement:g} %"
        )
    return Verdict(
        passed=not reasons,
        reason=", ".join(reasons),
        accuracy=found.accuracy,
        drop_points=found.drop_points,
        label_agreement=found.agreement,
        max_abs=found.max_abs,
    )
