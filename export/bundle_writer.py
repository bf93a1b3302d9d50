"""A classifier to a verified bundle: load, trace, compare, rewrite, compare, write, compare.

Nothing appears under the bundle's name unless its model, as read back from its file in its target
runtime, computed what the source computes; and nothing stays there unless it does so from there.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from trainkit.data.readers import Example
from trainkit.data.splits import load_sample
from trainkit.export import batch_invariance, parity, parity_cases
from trainkit.export.accuracy_gate import AccuracyGate, AccuracyReport
from trainkit.export.batch_invariance import InvarianceCheck
from trainkit.export.example import input_names
from trainkit.export.parity_cases import ProgressCallback
from trainkit.export.pipeline import ExportedModel, write_model
from trainkit.export.runtimes import runner
from trainkit.export.settings import ExportSettings, check_settings
from trainkit.export.source import ExportSource
from trainkit.models.closeness import TOLERANCES
from trainkit.models.sources import is_kind
from trainkit.serve import bundle
from trainkit.serve.bundle import BundleFiles, Manifest, Tensor
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import Text, TextEncoder
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.formats import Format
from trainkit.serve.types import Runner

PARITY_TEXTS = 64
READS_PADDING = (
    "The model itself gives other answers when a text is padded. trainkit batches only texts of "
    "one length with it; elsewhere, give it one text at a time."
)


ExportFormat: TypeAlias = Format | Literal["triton"]


class ExportTarget(NamedTuple):
    """Where an export goes, and how it is made; a Triton ``repository`` is named after ``name``."""

    out: Path
    settings: ExportSettings
    repository: bool
    name: str


def make_target(
    source: str, kind: ExportFormat, settings: ExportSettings, out: Path | None
) -> ExportTarget:
    """Complete ``settings``, and the place beside the run, or under ``exports/`` for a model."""
    folder = Path(source).resolve()
    home = folder if is_kind(folder, "run") else Path("exports") / folder.name
    suffix = "" if settings.precision == "fp32" else f"-{settings.precision}"
    return ExportTarget(
        out or home / f"{kind}{suffix}",
        msgspec.structs.replace(settings, format="onnx" if kind == "triton" else kind),
        kind == "triton",
        folder.name,
    )


class PreparedSource(NamedTuple):
    """A source with its own answers: on the parity matrix, in other batches, on the user's data."""

    source: ExportSource
    cases: list[parity_cases.Case]
    checks: tuple[InvarianceCheck, ...]
    gate: AccuracyGate | None


class ExportResult(NamedTuple):
    """A bundle under its final name, and the reports that its manifest holds."""

    folder: Path
    manifest: Manifest
    parity: parity.ParityReport
    accuracy: AccuracyReport | None


def export_all(
    source: ExportSource,
    targets: Sequence[ExportTarget],
    *,
    data: Sequence[Example] = (),
    force: bool = False,
    on_progress: ProgressCallback = lambda step: None,
) -> list[ExportResult]:
    """Export ``source`` to each target; its own answers are computed once.

    ``InputError`` for a target that exists comes before any work.
    """
    for goal in targets:
        check_settings(goal.settings, source.problem_type, data=bool(data))
        if goal.repository:
            from trainkit.export.triton import check_repository

            check_repository(goal.out, goal.name, source.labels, force=force)
        else:
            bundle.check_target(goal.out, force=force)
    prepared = prepare(source, data, on_progress)
    return [
        _export_repository(prepared, goal, force, on_progress)
        if goal.repository
        else write_bundle(prepared, goal.out, goal.settings, force=force, on_progress=on_progress)
        for goal in targets
    ]


def _export_repository(
    prepared: PreparedSource, goal: ExportTarget, force: bool, on_progress: ProgressCallback
) -> ExportResult:
    from trainkit.export.triton import write_repository

    with tempfile.TemporaryDirectory() as scratch:
        made = write_bundle(
            prepared, Path(scratch) / "bundle", goal.settings, on_progress=on_progress
        )
        write_repository(bundle.open_bundle(made.folder), goal.out, name=goal.name, force=force)
    return made._replace(folder=goal.out)


def prepare(
    source: ExportSource,
    data: Sequence[Example] = (),
    on_progress: ProgressCallback = lambda step: None,
) -> PreparedSource:
    """Compute what every export must compute.

    Raises CheckFailedError if the source itself gives NaN.
    """
    cases = parity_cases.run_reference(
        source.reference,
        parity_cases.make_cases(source.encoder, parity_texts()),
        lambda name: on_progress(f"PyTorch: {name}"),
    )
    checks = batch_invariance.check_invariance(
        source.reference, source.encoder, parity_texts(), TOLERANCES["fp32"]
    )
    if data:
        on_progress(f"PyTorch: {len(data)} texts")
    if batch_invariance.reads_padding(checks):
        source = source._replace(equal_lengths=True, notes=(*source.notes, READS_PADDING))
    return PreparedSource(source, cases, checks, AccuracyGate.of(source.classifier(), data))


def parity_texts() -> list[str]:
    """Return real sentences: the project's own questions, so that no bundle keeps a user's text."""
    return [example.text for example in load_sample()[:PARITY_TEXTS]]


def write_bundle(
    prepared: PreparedSource,
    out: Path,
    settings: ExportSettings,
    *,
    force: bool = False,
    on_progress: ProgressCallback = lambda step: None,
) -> ExportResult:
    """Write the prepared source as a bundle to ``out``.

    Raises ParityError or CheckFailedError if the export computes something else or its accuracy
    falls by more than ``settings`` allow, and InputError if ``out`` exists and ``force`` is not
    set; no bundle is written then, and nothing that existed is lost.
    """
    source = prepared.source
    check_settings(settings, source.problem_type, data=prepared.gate is not None)

    def accept(target: Path) -> None:
        on_progress("verify in its final place")
        # The hashes say that these are the bytes that just passed all cases.
        moved = bundle.open_bundle(target)
        # Noise is one figure of the whole matrix: of a part of it, it may be more.
        whole = TOLERANCES[settings.precision].noise is not None
        cases = prepared.cases if whole else parity_cases.representative(prepared.cases)
        report = _compare(moved, runner(moved), cases, on_progress)
        if not report.passed:
            raise parity.ParityError(report, "the move to its final place")

    with bundle.staged(out, force=force, accept=accept) as stage:
        written = write_model(source, prepared.cases, prepared.gate, settings, stage, on_progress)
        _write_tokenizer(stage, source.encoder)
        _write_config(stage, source)
        parity_cases.save_cases(stage / parity_cases.PARITY_FILE, prepared.cases)
        made = BundleFiles(stage, _manifest(source, settings, written))
        report, checks, accuracy = _prove(prepared, made, settings, on_progress)
        manifest = bundle.write_manifest(
            stage,
            msgspec.structs.replace(
                made.manifest,
                parity=msgspec.to_builtins(report),
                independence=tuple(msgspec.to_builtins(check) for check in checks),
                accuracy=msgspec.to_builtins(accuracy) if accuracy else None,
            ),
        )
    return ExportResult(out, manifest, report, accuracy)


def _compare(
    made: BundleFiles,
    run: Runner,
    cases: Sequence[parity_cases.Case],
    on_progress: ProgressCallback,
) -> parity.ParityReport:
    manifest = made.manifest
    return parity.compare(
        cases,
        run,
        manifest.precision,
        lambda name: on_progress(f"{manifest.format}: {name}"),
        manifest.problem_type,
    )


def _prove(
    prepared: PreparedSource,
    made: BundleFiles,
    settings: ExportSettings,
    on_progress: ProgressCallback,
) -> tuple[parity.ParityReport, tuple[InvarianceCheck, ...], AccuracyReport | None]:
    """Compare what lies in the bundle's folder, tokenizer and model, with the source."""
    check_same_texts(prepared.source, made)
    run = runner(made)
    report = _compare(made, run, prepared.cases, on_progress)
    if not report.passed:
        raise parity.ParityError(report)
    tolerance = TOLERANCES[settings.precision]
    ways = batch_invariance.check_invariance(run, made.encoder(), parity_texts(), tolerance)
    checks = batch_invariance.excuse_source(ways, prepared.checks)
    for check in checks:
        if not check.passed:
            raise CheckFailedError(
                f"the export's answers change with other {check.name}, by {check.max_abs:.1e}; "
                "no bundle was written."
            )
    if prepared.gate is None:
        return report, checks, None
    on_progress(f"{settings.format}: {len(prepared.gate.texts)} texts")
    candidate = Classifier.of_bundle(made, run)
    result = prepared.gate.check(candidate.logits(prepared.gate.texts), settings.limits())
    if not result.passed:
        raise CheckFailedError(f"on your data, {result.reason}; no bundle was written.")
    return report, checks, result.report


def check_same_texts(source: ExportSource, made: BundleFiles) -> None:
    """Raise CheckFailedError if the bundle has other labels or other token ids."""
    if source.labels != made.manifest.labels:
        raise CheckFailedError(
            f"{made.folder} names the labels {list(made.manifest.labels)}, its source "
            f"{list(source.labels)}: not the same model, or its label map was changed."
        )
    singles = parity_texts()
    texts: list[Text] = [*singles, *zip(singles[:8], singles[8:16], strict=True)]
    if made.encoder().tokens(texts) != source.encoder.tokens(texts):
        raise CheckFailedError(
            f"the tokenizer of {made.folder} gives other token ids than that of its source."
        )


def _write_tokenizer(stage: Path, encoder: TextEncoder) -> None:
    (stage / "tokenizer.json").write_text(encoder.tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.max_length,
        "pad_token": encoder.tokenizer.id_to_token(encoder.pad_id),
        "padding_side": "right",
        "truncation_side": (encoder.tokenizer.truncation or {}).get("direction", "right"),
    }
    if encoder.token_types:
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    _write_json(stage / "tokenizer_config.json", settings)


def _write_config(stage: Path, source: ExportSource) -> None:
    """Write ``config.json`` as Hugging Face does: the architecture, and what each label means."""
    architecture = dict(source.architecture)
    architecture["id2label"] = {str(i): label for i, label in enumerate(source.labels)}
    architecture["label2id"] = {label: i for i, label in enumerate(source.labels)}
    architecture["problem_type"] = source.problem_type
    _write_json(stage / "config.json", architecture)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _manifest(source: ExportSource, settings: ExportSettings, written: ExportedModel) -> Manifest:
    """Describe the export, as yet without its files and the reports on the whole bundle."""
    batch_axes = ("batch", "sequence")
    return Manifest(
        format_version=bundle.FORMAT_VERSION,
        format=settings.format,
        precision=settings.precision,
        opset=settings.opset if settings.format == "onnx" else None,
        inputs=tuple(Tensor(name, "int64", batch_axes) for name in input_names(source.encoder)),
        outputs=(Tensor("logits", "float32", ("batch", len(source.labels))),),
        labels=source.labels,
        problem_type=source.problem_type,
        pooling=source.pooling,
        max_length=source.encoder.max_length,
        pad_id=source.encoder.pad_id,
        source=dict(source.facts),
        stages=tuple(msgspec.to_builtins(stage) for stage in written.stages),
        parity={},
        independence=(),
        accuracy=None,
        search=written.search,
        machine=written.machine,
        equal_lengths=source.equal_lengths,
        notes=(*source.notes, *written.notes),
        temperature=msgspec.UNSET if source.temperature is None else source.temperature,
        files={},
    )
