"""The search for int8 settings that keep the accuracy: what was tried, and what came out.

Settings are tried in the order of their speed on the processors measured (docs/precision.md); the
first that passes the gate is chosen. If none does, the products that suffer most stay in fp32: one,
two, four of them and so on. Every try is recorded, also those that failed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import onnx_ir as ir

from trainkit.export.accuracy_gate import AccuracyGate, AccuracyLimits, GateResult
from trainkit.export.parity_cases import ProgressCallback
from trainkit.export.precision.calibration import Range, calibrate
from trainkit.export.precision.int8 import to_int8
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.sensitivity import Evaluate, Sensitivity, rank
from trainkit.export.rewrite.base import RewriteResult
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, first_line

# Fastest first. In all of them a row's answer depends on that row alone, which one dynamic scale
# for a whole batch does not give (docs/precision.md).
CANDIDATES = (
    Int8Settings(activations="static"),
    Int8Settings(activations="static", percentile=99.99),
    Int8Settings(activations="per token"),
    # For an x86 processor without VNNI, on which products of full range saturate.
    Int8Settings(activations="per token", weight_bits=7),
)


class Try(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One candidate on the gate's texts, with its settings and its size, also as a share of fp32's.

    The figures are None if it gave no logits, ``accuracy`` also if the model does not give one
    label per text.
    """

    passed: bool
    reason: str = ""
    accuracy: float | None = None
    drop_points: float | None = None
    label_agreement: float | None = None
    max_abs: float | None = None
    settings: Int8Settings
    size_bytes: int
    size_ratio: float


class SearchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the manifest keeps: the choice, None if nothing passed, and every try in order."""

    limits: AccuracyLimits
    texts: int
    source_accuracy: float | None
    chosen: Try | None
    tries: tuple[Try, ...]
    sensitivity: tuple[Sensitivity, ...] = ()

    def check(self) -> Try:
        """Return the choice; raises CheckFailedError with the nearest try if there is none."""
        if self.chosen is not None:
            return self.chosen
        nearest = max(self.tries, key=_merit)
        raise CheckFailedError(
            f"none of {len(self.tries)} int8 settings passed on your {self.texts} texts; the "
            f"nearest: {nearest.reason}. Allow more with --max-accuracy-drop or "
            "--min-label-agreement where that is it, give more texts, or export fp16 or fp32; no "
            "bundle was written."
        )


class Found(NamedTuple):
    """The record, and the chosen graph with what was done to it; both None if none passed."""

    result: SearchResult
    model: ir.Model | None
    outcome: RewriteResult | None


def search(
    fresh: Callable[[], ir.Model],
    gate: AccuracyGate,
    limits: AccuracyLimits,
    evaluate: Evaluate,
    scratch: Path,
    *,
    calibration: Sequence[Batch] = (),
    candidates: Sequence[Int8Settings] = CANDIDATES,
    fault: Callable[[Path], str] = lambda path: "",
    on_progress: ProgressCallback = lambda step: None,
) -> Found:
    """Find the first settings whose int8 graph stays within ``limits`` on the texts of ``gate``.

    ``fresh`` returns the fp32 graph, a copy of its own each time. ``evaluate`` opens a file and
    returns its logits on the gate's texts. ``scratch`` is an empty folder for files.
    ``calibration`` are batches of texts, best not those of the gate; without any, candidates
    with static activations are left out. ``fault`` says what else is wrong with a file that the
    gate lets through, nothing if all is well.
    """
    return _Int8Search(fresh, gate, limits, evaluate, scratch, calibration, fault, on_progress).run(
        [one for one in candidates if calibration or one.activations != "static"]
    )


class _Made(NamedTuple):
    path: Path
    size_bytes: int
    model: ir.Model
    outcome: RewriteResult


@dataclass
class _Int8Search:
    """What :func:`search` was given, and what it found out so far."""

    fresh: Callable[[], ir.Model]
    gate: AccuracyGate
    limits: AccuracyLimits
    evaluate: Evaluate
    scratch: Path
    calibration: Sequence[Batch]
    fault: Callable[[Path], str]
    on_progress: ProgressCallback
    fp32_bytes: int = 0
    ranges: dict[float, dict[str, Range]] = field(default_factory=dict)
    tries: list[Try] = field(default_factory=list)
    sensitivity: tuple[Sensitivity, ...] = ()

    def run(self, candidates: Sequence[Int8Settings]) -> Found:
        self.fp32_bytes = _save(self.fresh(), self.scratch)
        for settings in self._settings(candidates):
            self.on_progress(f"int8: {describe(settings)}")
            made = self._make(settings)
            tried = self._try(settings, made)
            self.tries.append(tried)
            if tried.passed:
                return Found(self._result(tried), made.model, made.outcome)
        return Found(self._result(None), None, None)

    def _settings(self, candidates: Sequence[Int8Settings]) -> Iterator[Int8Settings]:
        """Yield the candidates; then the nearest of them with ever more products in fp32."""
        yield from candidates
        if not self.tries:
            return
        nearest = max(self.tries, key=_merit).settings
        self.on_progress("int8: which products suffer most")
        self.sensitivity = rank(
            self.fresh,
            nearest,
            lambda settings: self._make(settings).path,
            self.evaluate,
            self.gate.logits,
        )
        count = 1
        while count < len(self.sensitivity):
            names = (name for one in self.sensitivity[:count] for name in one.names)
            yield msgspec.structs.replace(nearest, keep=tuple(names))
            count *= 2

    def _make(self, settings: Int8Settings) -> _Made:
        model = self.fresh()
        outcome = to_int8(model, settings, self._ranges(settings))
        return _Made(self.scratch / FILE, _save(model, self.scratch), model, outcome)

    def _ranges(self, settings: Int8Settings) -> dict[str, Range]:
        if settings.activations != "static":
            return {}
        if settings.percentile not in self.ranges:
            self.on_progress(f"int8: calibrate, {settings.percentile:g}%")
            self.ranges[settings.percentile] = calibrate(
                self.fresh(), self.calibration, self.scratch, settings.percentile
            )
        return self.ranges[settings.percentile]

    def _try(self, settings: Int8Settings, made: _Made) -> Try:
        result = self._check(made.path)
        figures: dict[str, float | None] = {}
        if (report := result.report) is not None:
            figures = {
                "accuracy": report.accuracy,
                "drop_points": report.drop_points,
                "label_agreement": report.agreement,
                "max_abs": report.max_abs,
            }
        return Try(
            passed=result.passed,
            reason=result.reason,
            settings=settings,
            size_bytes=made.size_bytes,
            size_ratio=made.size_bytes / self.fp32_bytes,
            **figures,
        )

    def _check(self, path: Path) -> GateResult:
        try:
            logits = self.evaluate(path)
        except (
            Exception
        ) as error:  # a runtime may raise anything; it is a finding about this candidate
            return GateResult(f"{type(error).__name__}: {first_line(error)}")
        result = self.gate.check(logits, self.limits)
        return result._replace(reason=self.fault(path)) if result.passed else result

    def _result(self, chosen: Try | None) -> SearchResult:
        return SearchResult(
            limits=self.limits,
            texts=len(self.gate.texts),
            source_accuracy=self.gate.source_accuracy,
            chosen=chosen,
            tries=tuple(self.tries),
            sensitivity=self.sensitivity,
        )


FILE = "candidate.onnx"


def describe(settings: Int8Settings) -> str:
    """Say what is special about settings, in a few words."""
    words = [f"{settings.activations} activations"]
    if settings.percentile != 100:
        words.append(f"{settings.percentile:g}% of values")
    if settings.weight_bits != 8:
        words.append(f"{settings.weight_bits}-bit weights")
    if settings.keep:
        words.append(f"{len(settings.keep)} nodes in fp32")
    return ", ".join(words)


def _merit(tried: Try) -> tuple[float, float, float]:
    """Order tries by how near they came; one without logits is the farthest."""
    if tried.label_agreement is None or tried.max_abs is None:
        return (-1.0, -1.0, 0.0)
    return (tried.accuracy or 0.0, tried.label_agreement, -tried.max_abs)


def _save(model: ir.Model, folder: Path) -> int:
    """Write the candidate's file, its weights beside it, and return their size in bytes."""
    paths = (folder / FILE, folder / f"{FILE}.data")
    for path in paths:
        path.unlink(missing_ok=True)  # a session may still map the last one's weights
    ir.save(model, paths[0], external_data=paths[1].name)
    return sum(path.stat().st_size for path in paths if path.exists())
