"""A source to the model file of a bundle, in stages: each change is followed by the parity matrix.

The untouched export is compared with the source; then every rewrite that changed something, then
the change of precision. The first stage that computes something else ends the export.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import onnx_ir as ir

from trainkit.export import matrix, parity
from trainkit.export.accuracy import Gate
from trainkit.export.example import example_inputs, input_names
from trainkit.export.graph_file import operators, save_graph
from trainkit.export.graph_session import graph_runner
from trainkit.export.onnx_graph import OPSET, OPSETS, export_graph
from trainkit.export.parity import Report
from trainkit.export.precision.fp16 import to_fp16
from trainkit.export.precision.gate import Limits
from trainkit.export.precision.overflow import overflowing
from trainkit.export.precision.proof import check_graph
from trainkit.export.precision.search import Found, search
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.outcome import Outcome
from trainkit.export.rewrite.table import REWRITES
from trainkit.export.runtimes import open_model
from trainkit.export.source import Source
from trainkit.serve.bundle import MODEL_FILES, Format, Precision
from trainkit.serve.classifier import BATCH_SIZE
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.postprocess import ProblemType
from trainkit.serve.types import FloatArray

__all__ = ["Settings", "Stage", "Written", "check_settings", "write_model"]

Told = Callable[[str], None]

# Of the user's texts, for static activations; calibration never sees a label.
CALIBRATION_TEXTS = 128

DEPRECATED = "PyTorch has deprecated TorchScript; its successor is --format pt2."
COMPILED = "Compiled for this machine's kind of processor; the manifest names it under machine."


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to export.

    ``external_data`` puts an ONNX graph's weights into a file beside it, however few they are.
    ``max_accuracy_drop`` in percentage points and ``min_label_agreement`` in percent are the gate
    on the user's texts for precisions below fp32; in fp32 every decision must be the same.
    """

    format: Format = "onnx"
    precision: Precision = "fp32"
    opset: int = OPSET
    optimize: bool = True
    external_data: bool = False
    max_accuracy_drop: float = 0.5
    min_label_agreement: float = 97.0

    def __post_init__(self) -> None:
        faults = []
        if self.opset not in OPSETS:
            faults.append(f"--opset must be {OPSETS[0]} to {OPSETS[-1]}, not {self.opset}")
        if self.format != "onnx" and self.precision != "fp32":
            faults.append(f"--precision {self.precision} goes with --format onnx alone")
        if self.format != "onnx" and self.opset != OPSET:
            faults.append("--opset goes with --format onnx alone")
        if self.format != "onnx" and self.external_data:
            faults.append("--external-data goes with --format onnx or triton alone")
        if self.max_accuracy_drop < 0:
            faults.append(f"--max-accuracy-drop must be 0 or more, not {self.max_accuracy_drop:g}")
        if not 0 <= self.min_label_agreement <= 100:
            faults.append(
                f"--min-label-agreement must be 0 to 100, not {self.min_label_agreement:g}"
            )
        if faults:
            raise InputError("; ".join(faults) + ".")

    def limits(self) -> Limits:
        """Return what the gate lets through."""
        if self.precision == "fp32":
            return Limits(max_drop_points=0, min_label_agreement=1)
        return Limits(
            max_drop_points=self.max_accuracy_drop,
            min_label_agreement=self.min_label_agreement / 100,
        )


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One step from the untouched export to the finished file.

    ``rewritten`` counts the places that it changed, ``declined`` gives reasons for the others;
    ``parity`` is None where nothing changed. ``operators`` counts the nodes of an ONNX graph.
    """

    name: str
    rewritten: int
    declined: tuple[str, ...] = ()
    operators: dict[str, int] | None = None
    parity: Report | None = None


class Written(NamedTuple):
    """What was written, for the manifest."""

    stages: tuple[Stage, ...]
    search: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


class _Proof(NamedTuple):
    """Compares the model, as it is now, with the source."""

    path: Path
    format: Format
    source: Source
    cases: Sequence[matrix.Case]
    told: Told

    def stage(
        self,
        name: str,
        *,
        few: bool = False,
        precision: Precision = "fp32",
        outcome: Outcome | None = None,
        graph: ir.Model | None = None,
    ) -> Stage:
        """Run the matrix, or its ``few`` cheap cases; ``ParityError`` where a case fails.

        An ONNX ``graph`` is run as it is in memory, anything else from the file.
        """
        report = parity.compare(
            matrix.brief(self.cases) if few else self.cases,
            graph_runner(graph) if graph else open_model(self.path, self.format),
            precision,
            lambda case: self.told(f"{self.format}, {name}: {case}"),
            self.source.problem_type,
        )
        if not report.passed:
            raise parity.ParityError(report, name)
        return Stage(
            name=name,
            rewritten=outcome.rewritten if outcome else 0,
            declined=outcome.declined if outcome else (),
            operators=operators(graph) if graph else None,
            parity=report,
        )


def check_settings(settings: Settings, problem_type: ProblemType, *, data: bool) -> None:
    """Raise ``InputError`` where int8 is asked for and cannot be judged."""
    if settings.precision != "int8":
        return
    if not data:
        raise InputError("int8 needs labelled texts to judge what it costs; give --data FILE.")
    if problem_type == "regression":
        raise InputError(
            "int8 is judged by its decisions, and a regression has none; use --precision fp16."
        )


def write_model(
    source: Source,
    cases: Sequence[matrix.Case],
    gate: Gate | None,
    settings: Settings,
    folder: Path,
    told: Told,
) -> Written:
    """Write the model file of ``settings.format`` into ``folder``.

    ``ParityError`` names the stage that computes something else.
    """
    path = folder / MODEL_FILES[settings.format]
    proof = _Proof(path, settings.format, source, cases, told)
    told(f"export to {settings.format}")
    if settings.format == "onnx":
        return _write_onnx(proof, gate, settings)
    example = example_inputs(source.encoder)
    if settings.format == "torchscript":
        from trainkit.export.torchscript import export_torchscript

        export_torchscript(source.model, example, path)
        return Written((proof.stage("export"),), notes=(DEPRECATED,))
    from trainkit.export import program

    if settings.format == "pt2":
        program.export_program(source.model, example, path)
        return Written((proof.stage("export"),))
    program.compile_program(source.model, example, path)
    return Written((proof.stage("export"),), machine=program.this_machine(), notes=(COMPILED,))


def _write_onnx(proof: _Proof, gate: Gate | None, settings: Settings) -> Written:
    encoder = proof.source.encoder
    graph = export_graph(
        proof.source.model, example_inputs(encoder), input_names(encoder), settings.opset
    )
    stages = [proof.stage("export", graph=graph)]
    # Source paths never stay inside, optimised or not.
    for name, rewrite in REWRITES if settings.optimize else REWRITES[:1]:
        with quiet_exporter():
            outcome = rewrite(graph)
        if not outcome.rewritten:
            stages.append(Stage(name=name, rewritten=0, declined=outcome.declined))
            continue
        stages.append(proof.stage(name, few=True, outcome=outcome, graph=graph))
    save_graph(graph, proof.path, external_data=settings.external_data)
    if settings.precision == "fp32":
        return Written(tuple(stages))
    search, outcome = _lower(proof, graph, gate, settings)
    if not outcome.rewritten:
        raise InputError(
            f"nothing of the graph can be {settings.precision} ({'; '.join(outcome.declined)}); "
            "export fp32."
        )
    stages.append(proof.stage(outcome.name, precision=settings.precision, outcome=outcome))
    return Written(tuple(stages), search=search)


def _lower(
    proof: _Proof, graph: ir.Model, gate: Gate | None, settings: Settings
) -> tuple[dict[str, Any] | None, Outcome]:
    """Save the graph in the precision that is asked for; the search is recorded where it was."""
    with tempfile.TemporaryDirectory() as scratch:
        if settings.precision == "fp16":
            batches = [case.batch for case in matrix.short(proof.cases)]
            outcome = to_fp16(graph, overflowing(graph, batches, Path(scratch)))
            save_graph(graph, proof.path, external_data=settings.external_data)
            return None, outcome
        found = _search(proof, gate, settings, Path(scratch))
        found.result.check()
        # What check() makes sure of.
        assert found.model is not None
        assert found.outcome is not None
        faults = check_graph(ir.load(proof.path), found.model)
        if faults:
            raise CheckFailedError(
                f"the int8 graph is not the fp32 graph: {faults[0]} ({len(faults)} such); "
                "no bundle was written."
            )
        save_graph(found.model, proof.path, external_data=settings.external_data)
    return msgspec.to_builtins(found.result), found.outcome


def _search(proof: _Proof, gate: Gate | None, settings: Settings, scratch: Path) -> Found:
    assert gate is not None  # see check_settings
    source = proof.source

    def evaluate(path: Path) -> FloatArray:
        return source.classifier(open_model(path, "onnx")).logits(gate.texts)

    def fault(path: Path) -> str:
        run = open_model(path, "onnx")
        return parity.compare(
            proof.cases, run, settings.precision, problem_type=source.problem_type
        ).why

    rows = source.encoder.tokens(gate.texts[:CALIBRATION_TEXTS])
    starts = range(0, len(rows), BATCH_SIZE)
    return search(
        lambda: ir.load(proof.path),
        gate,
        settings.limits(),
        evaluate,
        scratch,
        calibration=[source.encoder.pad(rows[start : start + BATCH_SIZE]) for start in starts],
        fault=fault,
        told=proof.told,
    )
