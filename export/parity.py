"""The parity checker: does a candidate compute the reference's logits?

Runs a candidate over the cases of :mod:`trainkit.export.parity_cases` and reports the differences,
judged by the one table of tolerances. Needs no torch, so that a bundle can be verified again on the
machine that will serve it.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from trainkit.export.parity_cases import Case, ProgressCallback
from trainkit.models.closeness import TOLERANCES, Tolerance
from trainkit.serve.errors import CheckFailedError, first_line
from trainkit.serve.postprocess import ProblemType, decisions
from trainkit.serve.types import FloatArray, Runner


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """How far a candidate was from the reference on one case.

    ``max_abs`` in logits; ``max_rel`` as a share of the row's largest absolute logit.
    """

    case: str
    passed: bool
    max_abs: float | None
    max_rel: float | None
    changed_labels: int
    reason: str = ""


class WorstRow(msgspec.Struct, frozen=True, kw_only=True):
    """The row that was furthest off: what went in, what was expected and what came out."""

    case: str
    row: int
    inputs: dict[str, list[int]]
    expected: list[float]
    found: list[float]


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a parity matrix; ``worst`` holds its five worst cases, failed ones first.

    ``noise`` is the root mean square of all differences as a share of :func:`logit_std`.
    ``worst_row`` and ``noise`` are None if no case gave numbers of the right shape.
    ``near_ties``, of a precision that is judged by its noise: how many of the
    changed labels had a runner-up nearer than two logits of that error are to each other.
    """

    precision: str
    tolerance: Tolerance
    cases: int
    rows: int
    failed: int
    max_abs: float
    max_rel: float
    label_agreement: float
    worst: tuple[CaseResult, ...]
    worst_row: WorstRow | None = None
    noise: float | None = None
    near_ties: int | None = None

    @property
    def passed(self) -> bool:
        """True if no case failed, of at least one, nor the matrix as a whole."""
        limit = self.tolerance.noise
        quiet = limit is None or (self.noise is not None and self.noise <= limit)
        return self.failed == 0 and self.cases > 0 and quiet

    @property
    def why(self) -> str:
        """Say what failed: the worst case, or else all of them together; empty where it passed."""
        if self.passed:
            return ""
        if self.failed or self.noise is None or self.tolerance.noise is None:
            return f"{self.worst[0].case}: {self.worst[0].reason}" if self.worst else "no case"
        message = (
            f"the differences are {100 * self.noise:.1f}% of the logits' spread, not "
            f"{100 * self.tolerance.noise:g}% at most"
        )
        changed = round((1 - self.label_agreement) * self.rows)
        if changed and self.near_ties is not None:
            message += (
                f"; of {changed} changed labels {self.near_ties} changed only because the two "
                "largest logits lie nearer together than the error"
            )
        return message


class ParityError(CheckFailedError):
    """The candidate does not compute what the reference computes."""

    def __init__(self, report: ParityReport, stage: str = "") -> None:
        super().__init__(
            f"parity failed{f' after {stage}' if stage else ''}: {report.failed} of {report.cases} "
            f"cases, largest difference {report.max_abs:.1e}, labels agree on "
            f"{100 * report.label_agreement:.2f}% of rows; {report.why}."
        )
        self.report = report


def compare(
    cases: Sequence[Case],
    candidate: Runner,
    precision: str = "fp32",
    on_progress: ProgressCallback = lambda name: None,
    problem_type: ProblemType = "single_label_classification",
    noise_against: float | None = None,
) -> ParityReport:
    """Run the candidate over all cases and compare; every case is run, also after a failure.

    Noise is a share of ``noise_against``, by default of the spread of the cases' own logits.
    """
    tolerance = TOLERANCES[precision]
    results = []
    furthest: tuple[float, WorstRow | None] = (-1.0, None)
    answers = []
    for case in cases:
        on_progress(case.name)
        found = _run(case, candidate)
        answers.append(found)
        results.append(_compare_one(case, found, tolerance, problem_type))
        if not isinstance(found, str) and (results[-1].max_rel or 0.0) > furthest[0]:
            furthest = (results[-1].max_rel or 0.0, _worst_row(case, found))
    rows = sum(len(case.expected) for case in cases)
    changed = sum(result.changed_labels for result in results)
    return ParityReport(
        precision=precision,
        tolerance=tolerance,
        cases=len(results),
        rows=rows,
        failed=sum(not result.passed for result in results),
        max_abs=max((result.max_abs or 0.0 for result in results), default=0.0),
        max_rel=max((result.max_rel or 0.0 for result in results), default=0.0),
        label_agreement=1 - changed / max(1, rows),
        worst=tuple(sorted(results, key=_badness, reverse=True)[:5]),
        worst_row=furthest[1],
        noise=_noise(cases, answers, noise_against),
        near_ties=_near_ties(cases, answers, tolerance, problem_type),
    )


def logit_std(logits: FloatArray) -> float:
    """Return the root mean square of ``(rows, labels)`` logits, each about its mean over rows."""
    return float(np.sqrt(np.mean(np.square(logits - logits.mean(axis=0)))))


def _noise(
    cases: Sequence[Case], answers: Sequence[FloatArray | str], against: float | None
) -> float | None:
    logits = [found for found in answers if not isinstance(found, str)]
    if not logits or len(logits) < len(cases):
        return None
    expected = np.concatenate([case.expected for case in cases])
    errors = np.concatenate(logits) - expected
    against = logit_std(expected) if against is None else against
    return float(np.sqrt(np.mean(np.square(errors)))) / max(against, 1e-30)


def _near_ties(
    cases: Sequence[Case],
    answers: Sequence[FloatArray | str],
    tolerance: Tolerance,
    problem_type: ProblemType,
) -> int | None:
    logits = [found for found in answers if not isinstance(found, str)]
    single = problem_type == "single_label_classification"
    if tolerance.noise is None or not single or not logits or len(logits) < len(cases):
        return None
    found, expected = np.concatenate(logits), np.concatenate([case.expected for case in cases])
    two = np.sort(expected, axis=1)[:, -2:]
    near = two[:, -1] - two[:, 0] < np.sqrt(2 * np.mean(np.square(found - expected)))
    return int((near & (found.argmax(axis=1) != expected.argmax(axis=1))).sum())


def _badness(result: CaseResult) -> tuple[bool, float]:
    return not result.passed, float("inf") if result.max_rel is None else result.max_rel


def _run(case: Case, candidate: Runner) -> FloatArray | str:
    """Return the candidate's logits, or why they cannot be compared."""
    try:
        found = candidate(case.batch)
    except Exception as error:  # an error of the runtime is a finding, not a crash
        return f"{type(error).__name__}: {first_line(error)}"
    if found.shape != case.expected.shape:
        return f"shape {found.shape}, expected {case.expected.shape}"
    if not np.isfinite(found).all():
        return "NaN or infinity"
    return found


def _worst_row(case: Case, found: FloatArray) -> WorstRow:
    row = int(np.abs(found - case.expected).max(axis=1).argmax())
    return WorstRow(
        case=case.name,
        row=row,
        inputs={name: array[row].tolist() for name, array in case.batch.tensors().items()},
        expected=case.expected[row].tolist(),
        found=found[row].tolist(),
    )


def _compare_one(
    case: Case, found: FloatArray | str, tolerance: Tolerance, problem_type: ProblemType
) -> CaseResult:
    rows = len(case.expected)
    if isinstance(found, str):
        return _failed(case, rows, found)
    difference = np.abs(found - case.expected)
    scale = np.abs(case.expected).max(axis=1, keepdims=True)
    differs = decisions(found, problem_type) != decisions(case.expected, problem_type)
    changed = int(differs.any(axis=1).sum())
    reasons = []
    if tolerance.noise is None and (difference > tolerance.limit(case.expected)).any():
        reasons.append("difference over the tolerance")
    if changed and tolerance.same_decisions:
        reasons.append(f"{changed} of {rows} labels changed")
    return CaseResult(
        case=case.name,
        passed=not reasons,
        max_abs=float(difference.max()),
        max_rel=float((difference / np.maximum(scale, tolerance.absolute)).max()),
        changed_labels=changed,
        reason=", ".join(reasons),
    )


def _failed(case: Case, rows: int, reason: str) -> CaseResult:
    return CaseResult(
        case=case.name, passed=False, max_abs=None, max_rel=None, changed_labels=rows, reason=reason
    )
