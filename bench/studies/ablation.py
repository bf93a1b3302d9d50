"""What each choice is worth: what trainkit ships, beside the same model with one choice undone.

The variants change the graph, the session or the batches; each is a process of its own. The
baseline is what is shipped, and each variant's outputs are compared with its outputs.
"""

import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import click
import msgspec
import onnx_ir as ir
import onnxruntime as ort

from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.engines.registry import Spec
from trainkit.bench.race import runner
from trainkit.bench.report.tables import markdown
from trainkit.bench.result import BenchmarkSettings, Result, check
from trainkit.bench.studies.ablation_worker import AHEAD, BATCHINGS, SESSIONS, SHIPPED
from trainkit.bench.studies.study import Session, Study, command_line
from trainkit.data.columns import Columns
from trainkit.data.splits import load
from trainkit.export.bundle_writer import prepare, write_bundle
from trainkit.export.example import example_inputs, input_names
from trainkit.export.graph_file import save_graph
from trainkit.export.onnx_graph import export_graph
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.table import REWRITES
from trainkit.export.settings import ExportSettings
from trainkit.export.source import ExportSource, open_source
from trainkit.serve.bundle import Manifest, open_bundle, write_manifest
from trainkit.serve.cores import usable_cores

# What each variant of the graph leaves out. Made from the bundle_writer's own table, so that a new
# rewrite has its variant.
GRAPHS: dict[str, tuple[str, ...]] = {
    "no rewrites": tuple(rewrite.name for rewrite in REWRITES),
    **{f"without {rewrite.name}": (rewrite.name,) for rewrite in REWRITES},
}


@click.argument("source")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--text-column")
@click.option("--label-column")
@click.option("--texts", default=200, show_default=True, help="Test texts, from the first.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=[1, 32])
@click.option("--min-rounds", default=20, show_default=True)
@click.option("--min-seconds", default=5.0, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs"))
def measure(
    session: Session,
    source: str,
    data: Path,
    text_column: str | None,
    label_column: str | None,
    texts: int,
    batch_sizes: tuple[int, ...],
    min_rounds: int,
    min_seconds: float,
    work: Path,
) -> Result:
    """Measure what each choice is worth for SOURCE, a run or a Hugging Face folder."""
    splits = load(data, Columns(text_column=text_column, label_column=label_column))
    settings = BenchmarkSettings(
        batch_sizes=batch_sizes,
        threads=(usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    opened, home = open_source(source), work / f"ablation-{data.name}"
    shutil.rmtree(home, ignore_errors=True)  # the study's own, from its last run
    prepared = prepare(opened, on_progress=session)
    shipped = write_bundle(prepared, home / "shipped", ExportSettings()).folder
    session("write the variants")
    specs, unavailable = variants(opened, shipped, home)
    return runner.run(
        specs,
        splits.test[:texts],
        settings,
        data=data.name,
        on_progress=session,
        command=command_line(),
        worker=worker(unavailable),
    )


def worker(unavailable: Mapping[str, str]) -> Callable[[Spec, int], Sequence[str]]:
    """Return the command of a variant; ``EngineUnavailableError`` for one in ``unavailable``."""

    def command(spec: Spec, threads: int) -> Sequence[str]:
        if spec.runtime in unavailable:
            raise EngineUnavailableError(unavailable[spec.runtime])
        program = [sys.executable, "-P", "-m", "trainkit.bench.studies.ablation_worker"]
        return [*program, spec.runtime, str(spec.source), str(threads)]

    return command


def variants(source: ExportSource, shipped: Path, home: Path) -> tuple[list[Spec], dict[str, str]]:
    """Make the bundles of all variants of ``shipped`` in ``home``: the baseline first.

    Returns the variants, and for those that this model cannot have the reason.
    """
    untouched, complete = home / "untouched.onnx", home / "complete"
    encoder = source.encoder
    save_graph(export_graph(source.model, example_inputs(encoder), input_names(encoder)), untouched)
    facts = _write_graph(untouched, (), shipped, complete)
    specs, unavailable = [Spec(SHIPPED, shipped)], {}
    for name, left_out in GRAPHS.items():
        specs.append(Spec(name, home / name.replace(" ", "-")))
        if _write_graph(untouched, left_out, shipped, specs[-1].source).files == facts.files:
            unavailable[name] = f"the graph is the same with it: {_declined(facts, left_out)}"
    for name in SESSIONS:
        folder = shipped
        if name in AHEAD:
            folder = home / f"optimised-ahead-{AHEAD[name]}".lower()
            _write_ahead(AHEAD[name], shipped, folder)
        specs.append(Spec(name, folder))
    return [*specs, *(Spec(name, shipped) for name in BATCHINGS)], unavailable


def _declined(manifest: Manifest, names: Collection[str]) -> str:
    reasons = [
        reason
        for stage in manifest.stages
        if stage["name"] in names
        for reason in stage["declined"]
    ]
    return "; ".join(reasons) or "nothing is left of what it did"


def _write_graph(
    untouched: Path, left_out: Collection[str], shipped: Path, folder: Path
) -> Manifest:
    """Write a bundle whose graph had all rewrites, in their order, but those left out."""
    graph = ir.load(untouched)
    outcomes = []
    for name, rewrite in REWRITES:
        if name not in left_out:
            with quiet_exporter():
                outcomes.append(rewrite(graph))
    shutil.copytree(shipped, folder)
    bundle = open_bundle(folder)
    save_graph(graph, bundle.model_path)
    # The shipped bundle's proof is not this one's; the race compares them.
    stages = tuple(map(msgspec.to_builtins, outcomes))
    changed = msgspec.structs.replace(bundle.manifest, stages=stages, parity={})
    return write_manifest(folder, changed)


def _write_ahead(format: str, shipped: Path, folder: Path) -> None:
    """Write a bundle whose model file is what ONNX Runtime made of the shipped one."""
    shutil.copytree(shipped, folder)
    bundle = open_bundle(folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning that the file fits this kind of machine only
    options.add_session_config_entry("session.save_model_format", format)
    options.optimized_model_filepath = str(bundle.model_path)
    model = open_bundle(shipped).model_path
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, parity={}))


STUDY = Study(
    "ablation",
    Result,
    measure,
    markdown,
    check,
    file=lambda options: f"ablation-{options['data'].name}",
)
