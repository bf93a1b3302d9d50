"""Proof that an export computes what its source computes: the one parity checker.

A matrix of batch sizes, lengths and masks, and real sentences, each run through a reference and a
candidate. Needs no torch: the inputs and the reference's logits are kept in the bundle, so that a
bundle can be verified again on the machine that will serve it.
"""

import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trainkit.serve.classifier import Runner
from trainkit.serve.decision import FloatArray, ProblemType, decisions
from trainkit.serve.encoding import Batch, IntArray, TextEncoder
from trainkit.serve.errors import CheckFailedError, InputError

__all__ = [
    "PARITY_FILE",
    "TOLERANCES",
    "Case",
    "CaseResult",
    "ParityError",
    "Report",
    "Tolerance",
    "WorstRow",
    "brief",
    "compare",
    "load_cases",
    "make_cases",
    "reference_cases",
    "save_cases",
    "short",
]

PARITY_FILE = "parity.npz"
BATCH_SIZES = (1, 2, 7)
LENGTHS = (1, 2, 17)  # and the model's maximum
# Seven rows of 512 tokens cost more than all the rest together, and show what two of them show.
POSITIONS = 900
TEXT_BATCH = 8
SENTENCES = "texts"
BRIEF_TEXTS = 2  # batches of sentences


class Tolerance(msgspec.Struct, frozen=True):
    """The largest difference of a logit: ``absolute + relative * the row's largest |logit|``.

    With ``same_decisions`` no label of any row may change, even inside that. With ``noise`` the
    matrix is judged as a whole instead: the root mean square of all differences may be that share
    of the logits' spread.
    """

    absolute: float
    relative: float
    same_decisions: bool = False
    noise: float | None = None


# The one table of tolerances. float32 has 24 bits (6e-8): a runtime may add the terms of a sum in
# another order, which came to 1.1e-5 at most (bench/results/trec.json). What the tests sabotage,
# down to one perturbed weight, lies outside.
TOLERANCES = {
    "fp32": Tolerance(absolute=2e-5, relative=2e-5, same_decisions=True),
    # float16 has 11 bits (5e-4), and a dozen layers round some thirty times one after the other.
    "fp16": Tolerance(absolute=2e-2, relative=1e-2),
    # int8 rounds by design: single logits of random ids move far, all of them together by 5 to 17 %
    # of their spread (docs/precision.md). Beside this its graph is compared with fp32's node by
    # node, and a row must have the same answer in any company, to the digits of fp32.
    "int8": Tolerance(absolute=2e-5, relative=2e-5, noise=0.25),
}


class Case(NamedTuple):
    """One input of the matrix, and the reference's logits (B, C) for it."""

    name: str
    batch: Batch
    expected: FloatArray


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a parity matrix; ``worst`` holds its five worst cases, failed ones first.

    ``noise`` is the root mean square of all differences as a share of the spread of the logits,
    each about its mean over the rows. ``worst_row`` and ``noise`` are None where no case gave
    numbers of the right shape. ``near_ties``, of a precision that is judged by its noise: how many
    of the changed labels had a runner-up nearer than two logits of that error are to each other.
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
        said = (
            f"the differences are {100 * self.noise:.1f} % of the logits' spread, not "
            f"{100 * self.tolerance.noise:g} % at most"
        )
        changed = round((1 - self.label_agreement) * self.rows)
        if changed and self.near_ties is not None:
            said += (
                f"; of {changed} changed labels {self.near_ties} changed only because the two "
                "largest logits lie nearer together than the error"
            )
        return said


class ParityError(CheckFailedError):
    """The candidate does not compute what the reference computes."""

    def __init__(self, report: Report, stage: str = "") -> None:
        super().__init__(
            f"parity failed{f' after {stage}' if stage else ''}: {report.failed} of {report.cases} "
            f"cases, largest difference {report.max_abs:.1e}, labels agree on "
            f"{100 * report.label_agreement:.2f} % of rows; {report.why}."
        )
        self.report = report


def masks(batch: int, length: int) -> Iterator[tuple[str, IntArray]]:
    """Yield each kind of padding as a (B, S) mask; rows differ in how much of it they have."""
    tokens = np.maximum(1, length - np.arange(batch) * length // batch)  # (B,), first row full
    right = (np.arange(length) < tokens[:, None]).astype(np.int64)
    if batch == 1 and length > 1:
        right[0, length // 2 + 1 :] = 0  # a row alone must be padded too
    gapped = np.ones((batch, length), dtype=np.int64)
    gapped[:, 1::3] = 0
    blank = right.copy()
    blank[-1] = 0
    yield "full", np.ones((batch, length), dtype=np.int64)
    yield "right", right
    yield "left", right[:, ::-1].copy()
    yield "gapped", gapped
    yield "one row blank", blank


def make_cases(
    encoder: TextEncoder, texts: Sequence[str], seed: int = 0, *, blank_rows: bool = True
) -> Iterator[tuple[str, Batch]]:
    """Yield the matrix of random ids, then ``texts`` in batches of eight.

    Hidden positions hold random ids too, not padding: a mask that got lost cannot go unnoticed.
    Token types, where the model has them, are random as well. Without ``blank_rows`` each row has a
    token at least.
    """
    random = np.random.default_rng(seed)
    vocabulary = encoder.tokenizer.get_vocab_size()
    lengths = sorted({min(length, encoder.max_length) for length in (*LENGTHS, encoder.max_length)})
    for length, batch in itertools.product(lengths, BATCH_SIZES):
        if batch != 2 and batch * length > POSITIONS:
            continue
        ids = random.integers(0, vocabulary, size=(batch, length), dtype=np.int64)
        types = random.integers(0, 2, size=ids.shape) if encoder.token_types else None
        for kind, mask in masks(batch, length):
            if not blank_rows and not mask.any(axis=1).all():
                continue
            yield f"{batch} x {length}, {kind}", Batch(ids, mask, types)
    rows = encoder.tokens(texts)
    for start in range(0, len(rows), TEXT_BATCH):
        chosen = rows[start : start + TEXT_BATCH]
        yield f"{SENTENCES} {start + 1} to {start + len(chosen)}", encoder.pad(chosen)


def brief(cases: Sequence[Case]) -> list[Case]:
    """Leave out what costs most: the maximum length where that is long, and most sentences.

    For the stages between the untouched export and the finished bundle, which both get all.
    """
    sentences = [case.name for case in cases if case.name.startswith(SENTENCES)]
    return [case for case in short(cases) if case.name not in sentences[BRIEF_TEXTS:]]


def short(cases: Sequence[Case]) -> list[Case]:
    """Leave out the cases of the maximum length where that is long."""
    return [case for case in cases if case.batch.input_ids.size <= POSITIONS // 2]


def reference_cases(
    reference: Runner,
    inputs: Iterator[tuple[str, Batch]],
    told: Callable[[str], None] = lambda name: None,
) -> list[Case]:
    """Run the reference over the inputs; ``CheckFailedError`` if it gives anything but numbers."""
    cases = []
    for name, batch in inputs:
        told(name)
        expected = reference(batch)
        if not np.isfinite(expected).all():
            raise CheckFailedError(
                f"the model itself gives NaN or infinity on case '{name}'; train it again."
            )
        cases.append(Case(name, batch, expected))
    return cases


def compare(
    cases: Sequence[Case],
    candidate: Runner,
    precision: str = "fp32",
    told: Callable[[str], None] = lambda name: None,
    problem_type: ProblemType = "single_label_classification",
) -> Report:
    """Run the candidate over all cases and compare; every case is run, also after a failure."""
    tolerance = TOLERANCES[precision]
    results = []
    furthest: tuple[float, WorstRow | None] = (-1.0, None)
    answers = []
    for case in cases:
        told(case.name)
        found = _run(case, candidate)
        answers.append(found)
        results.append(_compare_one(case, found, tolerance, problem_type))
        if not isinstance(found, str) and (results[-1].max_rel or 0.0) > furthest[0]:
            furthest = (results[-1].max_rel or 0.0, _worst_row(case, found))
    rows = sum(len(case.expected) for case in cases)
    changed = sum(result.changed_labels for result in results)
    return Report(
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
        noise=_noise(cases, answers),
        near_ties=_near_ties(cases, answers, tolerance, problem_type),
    )


def _noise(cases: Sequence[Case], answers: Sequence[FloatArray | str]) -> float | None:
    logits = [found for found in answers if not isinstance(found, str)]
    if not logits or len(logits) < len(cases):
        return None
    expected = np.concatenate([case.expected for case in cases])
    errors = np.concatenate(logits) - expected
    spread = np.sqrt(np.mean(np.square(expected - expected.mean(axis=0))))
    return float(np.sqrt(np.mean(np.square(errors))) / max(spread, np.float32(1e-30)))


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
    except Exception as error:  # whatever a runtime raises on a shape is a finding, not a crash
        said = str(error).splitlines() or ["no message"]
        return f"{type(error).__name__}: {said[0]}"
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
    limit = tolerance.absolute + tolerance.relative * scale
    if tolerance.noise is None and (difference > limit).any():
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


def save_cases(path: Path, cases: Sequence[Case]) -> None:
    """Keep the cases as compressed arrays: each case's ids, mask, expected logits and name."""
    arrays: dict[str, Any] = {}
    for number, (name, batch, expected) in enumerate(cases):
        arrays[f"{number}/ids"] = batch.input_ids.astype(np.int32)
        arrays[f"{number}/mask"] = batch.attention_mask.astype(np.bool_)
        if batch.token_type_ids is not None:
            arrays[f"{number}/types"] = batch.token_type_ids.astype(np.int8)
        arrays[f"{number}/logits"] = expected
        arrays[f"{number}/name"] = np.array(name)
    np.savez_compressed(path, **arrays)


def load_cases(path: Path) -> list[Case]:
    """Read what :func:`save_cases` wrote; never unpickles."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.endswith("/name")]
            return [_load_case(arrays, number) for number in range(len(names))]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); export the bundle again.") from None


def _load_case(arrays: Any, number: int) -> Case:
    types = f"{number}/types"
    batch = Batch(
        arrays[f"{number}/ids"].astype(np.int64),
        arrays[f"{number}/mask"].astype(np.int64),
        arrays[types].astype(np.int64) if types in arrays.files else None,
    )
    return Case(str(arrays[f"{number}/name"]), batch, arrays[f"{number}/logits"])
