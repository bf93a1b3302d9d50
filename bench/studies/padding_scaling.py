"""Whether time follows real tokens: batches of random ids with a rising share of padding.

``python -m trainkit.bench.studies padding_scaling BUNDLE... --classifier FOLDER`` runs batches that
one long row pads, and the same rows without padding, one forward a length; of both it fits time
against real tokens. The folder of the same classifier is for contrast: a padded graph, by ONNX
Runtime's own optimizer. Writes ``bench/results/growth.json`` and ``growth.svg``, and fails where a
bundle's padded slope is not within a tenth of the other.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, TypeAlias

import click
import msgspec
import numpy as np
import numpy.typing as npt

from trainkit.bench.engines.registry import Spec
from trainkit.bench.measure.statistics import Ratio, bootstrap_interval
from trainkit.bench.race import runner
from trainkit.bench.race.runner import load_samples
from trainkit.bench.report.plots import Panel, Plot, PlotPoint, Series, svg
from trainkit.bench.report.tables import engine_labels, machine, noise
from trainkit.bench.result import BenchmarkSettings, Measurement, Result
from trainkit.bench.studies.padding_shapes import MEAN_LENGTH, SHARES, Shape, shapes, workload
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.serve.bundle import open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Growth", "check", "load", "main", "markdown", "plot", "slope_ratio"]

RESULTS = Path("bench/results/growth.json")
CONTRAST = "ort-optimizer"
TOLERANCE = 0.1

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Growth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``growth.json``.

    The shapes are those of :func:`.padding_shapes.shapes`; the one workload of ``result`` has three
    batches for each: the padded batch, its longest row, its other rows.
    """

    schema: Literal["trainkit-growth/1"] = "trainkit-growth/1"
    by_tokens: tuple[Shape, ...]
    by_rows: tuple[Shape, ...]
    result: Result
    batch_ms: tuple[tuple[tuple[float, ...], ...], ...]
    """Of each engine, in each round, the median time of each batch."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return all shapes, in the order of the batches."""
        return (*self.by_tokens, *self.by_rows)


@click.command(cls=ErrorReportingCommand)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--classifier", type=click.Path(path_type=Path), help="Hugging Face folder of them.")
@click.option("--min-rounds", default=20, show_default=True)
@click.option("--calm-minutes", default=0.0, help="To wait for a calm machine.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    bundles: tuple[Path, ...],
    classifier: Path | None,
    min_rounds: int,
    calm_minutes: float,
    out: Path,
) -> None:
    """Measure how the time of BUNDLES, of one model, grows with tokens, texts and padding."""
    encoder = open_bundle(bundles[0]).encoder()
    by_tokens, by_rows = shapes(encoder.max_length)
    specs = [Spec("onnx", bundle) for bundle in bundles]
    specs += [Spec(CONTRAST, classifier)] if classifier else []
    # A pass of all shapes is long, and a round needs no more than one.
    settings = BenchmarkSettings(
        threads=(usable_cores(),),
        min_seconds=0.0,
        min_rounds=min_rounds,
        warm_up_max_seconds=60.0,
    )
    with steps() as told, TemporaryDirectory() as scratch:
        samples = Path(scratch) / "samples.npz"
        wait_until_quiet(60 * calm_minutes, told)
        raced = runner.run_on(
            [workload((*by_tokens, *by_rows), encoder)],
            specs,
            settings,
            data="random ids",
            on_progress=told,
            command=["python", "-m", "trainkit.bench.studies.padding_scaling", *sys.argv[1:]],
            with_roofline=False,
            samples=samples,
        )
        batch_ms = medians_ms(raced, load_samples(samples))
    growth = Growth(by_tokens=by_tokens, by_rows=by_rows, result=raced, batch_ms=batch_ms)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(growth))
    write_atomically(out.with_suffix(".svg"), svg(plot(growth), raced))
    click.echo(markdown(growth))
    check(growth)


def medians_ms(
    result: Result, samples: Mapping[str, FloatArray]
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Return each engine's median time of each batch in each round, from the raw times."""
    (workload,) = result.workloads
    return tuple(
        tuple(
            tuple(
                round(1000 * float(seconds), 4)
                for seconds in np.median(samples[f"{workload.name}/{engine}/{number}"], axis=0)
            )
            for number in range(len(workload.measurements[0].rounds))
        )
        for engine in range(len(result.engines))
    )


def milliseconds(growth: Growth, measured: Measurement) -> tuple[FloatArray, FloatArray]:
    """Return the times of the padded shapes, (rounds, shapes), and those of their rows without."""
    by_round = growth.batch_ms[measured.engine]
    batch_ms = np.array(by_round).reshape(len(by_round), -1, 3)
    return batch_ms[:, :, 0], batch_ms[:, :, 1:].sum(axis=2)


def slopes(growth: Growth, measured: Measurement) -> tuple[FloatArray, FloatArray]:
    """Fit time against real tokens: ms a token of each round, padded and not.

    By least squares, of the shapes with padding; what is constant, as the second forward of the
    rows without padding, is in no slope.
    """
    chosen = [place for place, one in enumerate(growth.shapes) if one.longest > one.rest]
    tokens = [growth.shapes[place].tokens for place in chosen]
    padded, unpadded = (
        np.polyfit(tokens, times[:, chosen].T, 1)[0] for times in milliseconds(growth, measured)
    )
    return padded, unpadded


def slope_ratio(growth: Growth, measured: Measurement) -> Ratio:
    """Return the padded slope by the unpadded one: the median of the rounds and its interval."""
    padded, unpadded = slopes(growth, measured)
    ratios = (padded / unpadded).tolist()
    return Ratio(float(np.median(ratios)), *bootstrap_interval(ratios))


def check(growth: Growth) -> None:
    """Raise ``CheckFailedError`` where padding makes a bundle's slope differ by over a tenth."""
    faults = []
    for measured in growth.result.workloads[0].measurements:
        ratio = slope_ratio(growth, measured).median
        if growth.result.engines[measured.engine].runtime != CONTRAST and not (
            1 - TOLERANCE <= ratio <= 1 + TOLERANCE
        ):
            faults.append(f"{engine_labels(growth.result)[measured.engine]} has {ratio:.2f}")
    if faults:
        raise CheckFailedError(
            "time does not follow real tokens: the slope of padded batches by that of the same "
            f"rows without padding must be within {TOLERANCE:g} of 1, and {'; '.join(faults)}."
        )


def load(path: Path = RESULTS) -> Growth:
    """Read ``growth.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Growth)


class Curve(NamedTuple):
    """What is drawn: the places of some shapes, and what of each stands on the x axis."""

    title: str
    x: tuple[int, ...]
    places: tuple[int, ...]


def curves(growth: Growth) -> list[Curve]:
    """Return time by real tokens, by texts, and by positions of which as many are tokens."""
    count, shares = len(growth.by_tokens), len(SHARES)
    padded = range(shares - 2, count, shares)
    same = range(count - 2 * shares, count - shares)
    rows = range(count, len(growth.shapes))
    return [
        _curve(growth, f"tokens, {100 * SHARES[-2]:.0f} % padding", padded, "tokens"),
        _curve(growth, f"texts of {MEAN_LENGTH} tokens, half padding", rows, "rows"),
        _curve(growth, f"positions of {growth.shapes[same[0]].tokens:,} tokens", same, "positions"),
    ]


def _curve(growth: Growth, title: str, places: Sequence[int], field: str) -> Curve:
    x = tuple(getattr(growth.shapes[place], field) for place in places)
    return Curve(title, x, tuple(places))


def plot(growth: Growth) -> Plot:
    """Gather the times of the padded batches: the median of the rounds and its interval."""
    panels = []
    for title, x, places in curves(growth):
        series = []
        for measured in growth.result.workloads[0].measurements:
            padded, _ = milliseconds(growth, measured)
            points = [
                PlotPoint(at, float(np.median(times)), *bootstrap_interval(times))
                for at, times in zip(x, padded[:, places].T.tolist(), strict=True)
            ]
            series.append(Series(measured.engine, tuple(points)))
        panels.append(Panel(title, tuple(series)))
    return Plot("Growth", "Random ids.", "", "ms a batch", tuple(panels))


def markdown(growth: Growth) -> str:
    """Lay out the slopes, and the curves, in brackets for the same rows without padding."""
    measurements, labels = growth.result.workloads[0].measurements, engine_labels(growth.result)
    lines = ["| | ms a thousand tokens, padded | without padding | ratio (95 % interval) |"]
    lines.append("|---|---:|---:|---:|")
    for measured in measurements:
        slope_ms = [1000 * np.median(slope) for slope in slopes(growth, measured)]
        ratio = slope_ratio(growth, measured)
        lines.append(
            f"| {labels[measured.engine]} | {slope_ms[0]:.0f} | {slope_ms[1]:.0f} | "
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    for title, x, places in curves(growth):
        heads = " | ".join(f"{one:,}" for one in x)
        lines += ["", f"| ms of a batch, by {title} | {heads} |", "|---|" + "---:|" * len(x)]
        for measured in measurements:
            both = [np.median(times[:, places], axis=0) for times in milliseconds(growth, measured)]
            cells = (f"{padded:.1f} ({rows:.1f})" for padded, rows in zip(*both, strict=True))
            lines.append(f"| {labels[measured.engine]} | {' | '.join(cells)} |")
    lines += [f"\nNot measured: {one.runtime}, {one.reason}." for one in growth.result.unavailable]
    lines += ["", machine(growth.result)]
    lines += ["", noise(growth.result)] if growth.result.noisy else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
