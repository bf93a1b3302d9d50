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

from trainkit.serve.classifier import FloatArray, Runner
from trainkit.serve.encoding import Batch, IntArray, TextEncoder, pad
from trainkit.serve.errors import CheckFailedError, InputError

__all__ = [
    "PARITY_FILE",
    "TOLERANCES",
    "Case",
    "CaseResult",
    "ParityError",
    "Report",
    "Tolerance",
    "compare",
    "load_cases",
    "make_cases",
    "reference_cases",
    "save_cases",
]

PARITY_FILE = "parity.npz"
BATCH_SIZES = (1, 2, 7)
LENGTHS = (1, 2, 17)  # and the model's maximum
TEXT_BATCH = 8


class Tolerance(msgspec.Struct, frozen=True):
    """The largest difference of a logit: ``absolute + relative * the row's largest |logit|``."""

    absolute: float
    relative: float


# The one table of tolerances. float32 has 24 bits (6e-8): a runtime may add the terms of a sum in
# another order, which came to 1.1e-5 at most (bench/results/trec.json). What the tests sabotage,
# down to one perturbed weight, lies outside.
TOLERANCES = {"fp32": Tolerance(absolute=2e-5, relative=2e-5)}


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a parity matrix; ``worst`` holds its five worst cases, failed ones first."""

    precision: str
    tolerance: Tolerance
    cases: int
    rows: int
    failed: int
    max_abs: float
    max_rel: float
    label_agreement: float
    worst: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        """True if no case failed, of at least one."""
        return self.failed == 0 and self.cases > 0


class ParityError(CheckFailedError):
    """The candidate does not compute what the reference computes."""

    def __init__(self, report: Report) -> None:
        super().__init__(
            f"parity failed: {report.failed} of {report.cases} cases, largest difference "
            f"{report.max_abs:.1e}, labels agree on {100 * report.label_agreement:.2f} % of rows."
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
    encoder: TextEncoder, texts: Sequence[str], seed: int = 0
) -> Iterator[tuple[str, Batch]]:
    """Yield the matrix of random ids, then ``texts`` in batches of eight.

    Hidden positions hold random ids too, not padding: a mask that got lost cannot go unnoticed.
    """
    random = np.random.default_rng(seed)
    vocabulary = encoder.tokenizer.get_vocab_size()
    lengths = sorted({min(length, encoder.max_length) for length in (*LENGTHS, encoder.max_length)})
    for length, batch in itertools.product(lengths, BATCH_SIZES):
        ids = random.integers(0, vocabulary, size=(batch, length), dtype=np.int64)
        for kind, mask in masks(batch, length):
            yield f"{batch} x {length}, {kind}", Batch(ids, mask)
    rows = encoder.token_ids(texts)
    for start in range(0, len(rows), TEXT_BATCH):
        chosen = rows[start : start + TEXT_BATCH]
        yield f"texts {start + 1} to {start + len(chosen)}", pad(chosen, encoder.pad_id)


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
) -> Report:
    """Run the candidate over all cases and compare; every case is run, also after a failure."""
    tolerance = TOLERANCES[precision]
    results = []
    for case in cases:
        told(case.name)
        results.append(_compare_one(case, candidate, tolerance))
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
    )


def _badness(result: CaseResult) -> tuple[bool, float]:
    return not result.passed, float("inf") if result.max_rel is None else result.max_rel


def _compare_one(case: Case, candidate: Runner, tolerance: Tolerance) -> CaseResult:
    rows = len(case.expected)
    try:
        found = candidate(case.batch)
    except Exception as error:  # whatever a runtime raises on a shape is a finding, not a crash
        said = str(error).splitlines() or ["no message"]
        return _failed(case, rows, f"{type(error).__name__}: {said[0]}")
    if found.shape != case.expected.shape:
        return _failed(case, rows, f"shape {found.shape}, expected {case.expected.shape}")
    if not np.isfinite(found).all():
        return _failed(case, rows, "NaN or infinity")
    difference = np.abs(found - case.expected)
    scale = np.abs(case.expected).max(axis=1, keepdims=True)
    changed = int((found.argmax(axis=1) != case.expected.argmax(axis=1)).sum())
    reasons = []
    if (difference > tolerance.absolute + tolerance.relative * scale).any():
        reasons.append("difference over the tolerance")
    if changed:
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
        arrays[f"{number}/logits"] = expected
        arrays[f"{number}/name"] = np.array(name)
    np.savez_compressed(path, **arrays)


def load_cases(path: Path) -> list[Case]:
    """Read what :func:`save_cases` wrote; never unpickles."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return [
                Case(
                    str(arrays[f"{number}/name"]),
                    Batch(
                        arrays[f"{number}/ids"].astype(np.int64),
                        arrays[f"{number}/mask"].astype(np.int64),
                    ),
                    arrays[f"{number}/logits"],
                )
                for number in range(len(arrays.files) // 4)
            ]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); export the bundle again.") from None
