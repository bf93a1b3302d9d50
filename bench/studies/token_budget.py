"""How many tokens a forward should have on a CPU: the same texts in larger and smaller parts.

``python -m trainkit.bench.studies token_budget BUNDLE... --data data/trec`` runs batches of real
texts through :func:`trainkit.serve.forward_pool.split_batches` with several budgets, and whole,
each in a process of its own, and writes ``bench/results/batches.json``. It fails if the budget that
serving uses is slower than the one of other devices.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec

from trainkit.bench import result
from trainkit.bench.engines.base import Engine, versions_of
from trainkit.bench.engines.registry import Spec
from trainkit.bench.race import runner
from trainkit.bench.race.worker import speak
from trainkit.bench.report.tables import machine, noise
from trainkit.bench.result import BenchmarkSettings, Result, WorkloadResult
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.data.columns import Columns
from trainkit.data.splits import load as load_splits
from trainkit.serve.bundle import open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.forward_pool import CPU_TOKENS, MAX_TOKENS, split_batches
from trainkit.serve.onnx_session import onnx_runner

__all__ = ["Batches", "check", "load", "main", "markdown", "work"]

RESULTS = Path("bench/results/batches.json")
WHOLE = "whole"
BUDGETS = ("128", "256", "512", "1024", "2048", "4096", WHOLE)
BASELINE = str(MAX_TOKENS)
PROGRAM = "import sys; from trainkit.bench.studies.token_budget import work; work(*sys.argv[1:])"


class Batches(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``batches.json``: a race of the budgets for each bundle.

    An engine's ``runtime`` is its budget in tokens, padding included, or "whole".
    """

    schema: Literal["trainkit-batches/1"] = "trainkit-batches/1"
    races: tuple[Result, ...]


@click.command(cls=ErrorReportingCommand)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--text-column")
@click.option("--label-column")
@click.option("--texts", default=200, show_default=True, help="Of the test set, from its start.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--min-seconds", default=5.0, show_default=True, help="Of each budget.")
@click.option("--min-rounds", default=20, show_default=True)
@click.option("--calm-minutes", default=0.0, help="To wait for a calm machine.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    bundles: tuple[Path, ...],
    data: Path,
    text_column: str | None,
    label_column: str | None,
    texts: int,
    batch_size: int,
    min_seconds: float,
    min_rounds: int,
    calm_minutes: float,
    out: Path,
) -> None:
    """Measure every budget of tokens on each of BUNDLES."""
    for bundle in bundles:
        _check_cut(bundle)
    splits = load_splits(data, Columns(text_column=text_column, label_column=label_column))
    settings = BenchmarkSettings(
        batch_sizes=(batch_size,),
        threads=(usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    races = []
    with steps() as told:
        wait_until_quiet(60 * calm_minutes, told)
        for bundle in bundles:
            raced = runner.run(
                [Spec(budget, bundle) for budget in _baseline_first()],
                splits.test[:texts],
                settings,
                data=data.name,
                on_progress=told,
                command=["python", "-m", "trainkit.bench.studies.token_budget", *sys.argv[1:]],
                worker=_command,
                with_roofline=False,
            )
            races.append(raced)
    measured = Batches(races=tuple(races))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(measured))
    click.echo(markdown(measured))
    check(measured)


def _baseline_first() -> list[str]:
    return [BASELINE, *(budget for budget in BUDGETS if budget != BASELINE)]


def _check_cut(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    if manifest.format != "onnx":
        raise InputError(f"{folder} is {manifest.format}; give an ONNX bundle.")
    if manifest.equal_lengths:
        raise InputError(f"{folder} takes texts of one length only; its batches are not cut.")


def _command(spec: Spec, threads: int) -> Sequence[str]:
    return [sys.executable, "-P", "-c", PROGRAM, spec.runtime, str(spec.source), str(threads)]


def work(budget: str, source: str, threads: str) -> None:
    """Be the worker of one budget: answer requests until standard input ends."""
    speak(lambda: _open(budget, Path(source), int(threads)))


def _open(budget: str, source: Path, threads: int) -> Engine:
    bundle = open_bundle(source)
    run = onnx_runner(bundle.model_path, threads=threads)
    name = "whole batches" if budget == WHOLE else f"{budget} tokens"
    return Engine(
        name,
        run if budget == WHOLE else split_batches(run, int(budget)),
        precision=bundle.manifest.precision,
        versions=versions_of("onnxruntime"),
    )


def check(batches: Batches) -> None:
    """Raise ``CheckFailedError`` where outputs differ, or serving's own budget is the slower one.

    Slower: its whole interval of the speed by the baseline's is below 1.
    """
    for raced in batches.races:
        result.check(raced)
        (place,) = (n for n, one in enumerate(raced.engines) if one.runtime == str(CPU_TOKENS))
        for workload in raced.workloads:
            ratio = workload.measurements[place].ratio
            if ratio is not None and ratio.high < 1:
                raise CheckFailedError(
                    f"{CPU_TOKENS} tokens a forward, as serving has on a CPU, has "
                    f"{ratio.median:.2f} of the speed of {BASELINE} "
                    f"({raced.engines[place].precision}, {workload.name}); change CPU_TOKENS."
                )


def load(path: Path = RESULTS) -> Batches:
    """Read ``batches.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Batches)


def markdown(batches: Batches) -> str:
    """Lay the budgets out as a table for each race, with the speed of each by the baseline's."""
    lines = []
    for raced in batches.races:
        for workload in raced.workloads:
            lines += [*_table(raced, workload), ""]
    lines.append(machine(batches.races[0]))
    lines += [line for raced in batches.races for line in ("", noise(raced)) if raced.noisy]
    return "\n".join(lines)


def _table(raced: Result, workload: WorkloadResult) -> Iterator[str]:
    yield (
        f"**{raced.data}, {raced.engines[0].precision}: {workload.texts} texts in batches of "
        f"{workload.batch_size}, {100 * workload.padding_share:.0f} % padding, "
        f"{len(workload.measurements[0].rounds)} rounds**"
    )
    yield ""
    yield f"| a forward | texts/s | by {BASELINE} tokens (95 % interval) |"
    yield "|---|---:|---:|"
    places = {engine.runtime: place for place, engine in enumerate(raced.engines)}
    for budget in BUDGETS:
        measured = workload.measurements[places[budget]]
        ratio = measured.ratio
        by = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "1"
        name = raced.engines[places[budget]].name
        yield f"| {name} | {measured.texts_per_s:,.0f} | {by} |"


if __name__ == "__main__":
    main()
