"""A source to the model file of a bundle, in stages: each change is followed by the parity matrix.

The untouched export is compared with the source; then every rewrite that changed something, then
the change of precision. The first stage that computes something else ends the export.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import onnx_ir as ir

from trainkit.export import parity, parity_cases
from trainkit.export.accuracy_gate import AccuracyGate
from trainkit.export.example import example_inputs, input_names
from trainkit.export.graph_file import operators, save_graph
from trainkit.export.graph_session import graph_runner
from trainkit.export.onnx_graph import export_graph
from trainkit.export.parity import ParityReport
from trainkit.export.parity_cases import ProgressCallback
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.overflow import overflowing
from trainkit.export.precision.quantized_graph_check import diff_graphs
from trainkit.export.precision.search import Found, search
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.table import REWRITES
from trainkit.export.runtimes import open_model
from trainkit.export.settings import ExportSettings
from trainkit.export.source import ExportSource
from trainkit.serve.classifier import BATCH_SIZE
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.formats import MODEL_FILES, Format, Precision
from trainkit.serve.types import FloatArray

# Of the user's texts, for static activations; calibration never sees a label.
CALIBRATION_TEXTS = 128

DEPRECATED = "PyTorch has deprecated TorchScript; its successor is --format pt2."
COMPILED = "Compiled for this machine's kind of processor; the manifest names it under machine."


class Stage(RewriteResult, frozen=True, kw_only=True):
    """One step from the untouched export to the finished file.

    ``parity`` is None if nothing changed. ``operators`` counts the nodes of an ONNX graph.
    """

    operators: dict[str, int] | None = None
    parity: ParityReport | None = None


class ExportedModel(NamedTuple):
    """What was written, for the manifest."""

    stages: tuple[Stage, ...]
    search: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


class _StageVerifier(NamedTuple):
    """Compares the model, as it is now, with the source."""

    path: Path
    format: Format
    source: ExportSource
    cases: Sequence[parity_cases.Case]
    on_progress: ProgressCallback

    def stage(
        self,
        name: str,
        *,
        few: bool = False,
        precision: Precision = "fp32",
        outcome: RewriteResult | None = None,
        graph: ir.Model | None = None,
    ) -> Stage:
        """Run the matrix, or its ``few`` cheap cases; raises ParityError if a case fails.

        An ONNX ``graph`` is run as it is in memory, anything else from the file.
        """
        report = parity.compare(
            parity_cases.representative(self.cases) if few else self.cases,
            graph_runner(graph) if graph else open_model(self.path, self.format),
            precision,
            lambda case: self.on_progress(f"{self.format}, {name}: {case}"),
            self.source.problem_type,
        )
        if not report.passed:
            raise parity.ParityError(report, name)
        outcome = outcome or RewriteResult(name=name, rewritten=0)
        return Stage(
            **msgspec.structs.asdict(outcome),
            operators=operators(graph) if graph else None,
            parity=report,
        )


def write_model(
    source: ExportSource,
    cases: Sequence[parity_cases.Case],
    gate: AccuracyGate | None,
    settings: ExportSettings,
    folder: Path,
    on_progress: ProgressCallback,
) -> ExportedModel:
    """Write the model file of ``settings.format`` into ``folder``.

    ``ParityError`` names the stage that computes something else.
    """
    path = folder / MODEL_FILES[settings.format]
    verifier = _StageVerifier(path, settings.format, source, cases, on_progress)
    on_progress(f"export to {settings.format}")
    if settings.format == "onnx":
        return _write_onnx(verifier, gate, settings)
    example = example_inputs(source.encoder)
    if settings.format == "torchscript":
        from trainkit.export.torchscript import export_torchscript

        export_torchscript(source.model, example, path)
        return ExportedModel((verifier.stage("export"),), notes=(DEPRECATED,))
    from trainkit.export import program

    if settings.format == "pt2":
        program.export_program(source.model, example, path)
        return ExportedModel((verifier.stage("export"),))
    program.compile_program(source.model, example, path)
    return ExportedModel(
        (verifier.stage("export"),), machine=program.this_machine(), notes=(COMPILED,)
    )


def _write_onnx(
    verifier: _StageVerifier, gate: AccuracyGate | None, settings: ExportSettings
) -> ExportedModel:
    encoder = verifier.source.encoder
    graph = export_graph(
        verifier.source.model, example_inputs(encoder), input_names(encoder), settings.opset
    )
    stages = [verifier.stage("export", graph=graph)]
    # ExportSource paths never stay inside, optimised or not.
    for name, rewrite in REWRITES if settings.optimize else REWRITES[:1]:
        with quiet_exporter():
            outcome = rewrite(graph)
        if not outcome.rewritten:
            stages.append(Stage(**msgspec.structs.asdict(outcome)))
            continue
        stages.append(verifier.stage(name, few=True, outcome=outcome, graph=graph))
    save_graph(graph, verifier.path, external_data=settings.external_data)
    if settings.precision == "fp32":
        return ExportedModel(tuple(stages))
    search, outcome = _quantize(verifier, graph, gate, settings)
    if not outcome.rewritten:
        raise InputError(
            f"nothing of the graph can be {settings.precision} ({'; '.join(outcome.declined)}); "
            "export fp32."
        )
    stages.append(verifier.stage(outcome.name, precision=settings.precision, outcome=outcome))
    return ExportedModel(tuple(stages), search=search)


def _quantize(
    verifier: _StageVerifier, graph: ir.Model, gate: AccuracyGate | None, settings: ExportSettings
) -> tuple[dict[str, Any] | None, RewriteResult]:
    """Save the graph in the precision that is asked for; the search is recorded where it was."""
    with tempfile.TemporaryDirectory() as scratch:
        if settings.precision == "fp16":
            batches = [case.batch for case in parity_cases.without_longest(verifier.cases)]
            outcome = to_fp16(graph, overflowing(graph, batches, Path(scratch)))
            save_graph(graph, verifier.path, external_data=settings.external_data)
            return None, outcome
        found = _search(verifier, gate, settings, Path(scratch))
        found.result.check()
        # What check() makes sure of.
        assert found.model is not None
        assert found.outcome is not None
        faults = diff_graphs(ir.load(verifier.path), found.model)
        if faults:
            raise CheckFailedError(
                f"the int8 graph is not the fp32 graph: {faults[0]} ({len(faults)} such); "
                "no bundle was written."
            )
        save_graph(found.model, verifier.path, external_data=settings.external_data)
    return msgspec.to_builtins(found.result), found.outcome


def _search(
    verifier: _StageVerifier, gate: AccuracyGate | None, settings: ExportSettings, scratch: Path
) -> Found:
    assert gate is not None  # see check_settings
    source = verifier.source

    def evaluate(path: Path) -> FloatArray:
        return source.classifier(open_model(path, "onnx")).logits(gate.texts)

    def fault(path: Path) -> str:
        run = open_model(path, "onnx")
        return parity.compare(
            verifier.cases, run, settings.precision, problem_type=source.problem_type
        ).why

    rows = source.encoder.tokens(gate.texts[:CALIBRATION_TEXTS])
    starts = range(0, len(rows), BATCH_SIZE)
    return search(
        lambda: ir.load(verifier.path),
        gate,
        settings.limits(),
        evaluate,
        scratch,
        calibration=[source.encoder.pad(rows[start : start + BATCH_SIZE]) for start in starts],
        fault=fault,
        on_progress=verifier.on_progress,
    )
