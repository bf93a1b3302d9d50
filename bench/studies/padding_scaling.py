"""Whether time follows real tokens: batches of random ids with a rising share of padding.

Batches that one long row pads are compared with the same rows without padding; for both, time is
fitted against real tokens. A padded graph by ONNX Runtime's own optimizer is there for contrast.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, TypeAlias

import click
import numpy as np
import numpy.typing as npt

from trainkit import tables
from trainkit.bench.engines.registry import Spec
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.statistics import Ratio, bootstrap_interval
from trainkit.bench.race import runner
from trainkit.bench.race.runner import load_samples
from trainkit.bench.report.plots import Panel, Plot, PlotPoint, Series, svg
from trainkit.bench.report.tables import engine_labels, footer, ratio_text
from trainkit.bench.result import BenchmarkSettings, Measurement, Result
from trainkit.bench.studies.padding_shapes import MEAN_LENGTH, SHARES, Shape, shapes, workload
from trainkit.bench.studies.study import Session, Study, command_line, head
from trainkit.serve.bundle import open_bundle
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import write_atomically
from trainkit.tables import Table

CONTRAST = "ort-optimizer"
TOLERANCE = 0.1

FloatArray: TypeAlias = npt.NDArray[np.float64]


class PaddingScaling(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The measured shapes.

    The shapes are those of :func:`.padding_shapes.shapes`; the one workload of ``result`` has three
    batches for each: the padded batch, its longest row, its other rows.
    """

    schema: Literal["trainkit-padding-scaling/1"] = "trainkit-padding-scaling/1"
    by_tokens: tuple[Shape, ...]
    by_rows: tuple[Shape, ...]
    result: Result
    batch_ms: tuple[tuple[tuple[float, ...], ...], ...]
    """Of each engine, in each round, the median time of each batch."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return all shapes, in the order of the batches."""
        return (*self.by_tokens, *self.by_rows)


@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--classifier", type=click.Path(path_type=Path), help="Their Hugging Face folder.")
@click.option("--min-rounds", default=20, show_default=True)
def measure(
    session: Session, bundles: tuple[Path, ...], classifier: Path | None, min_rounds: int
) -> PaddingScaling:
    """Measure how the time of BUNDLES, of one model, grows with tokens, texts and padding."""
    encoder = open_bundle(bundles[0]).encoder()
    by_tokens, by_rows = shapes(encoder.max_length)
    specs = [Spec("onnx", bundle) for bundle in bundles]
    specs += [Spec(CONTRAST, classifier)] if classifier else []
    # A pass over all shapes is long, so a round needs only one.
    settings = BenchmarkSettings(
        threads=(usable_cores(),), min_seconds=0.0, min_rounds=min_rounds, warm_up_max_seconds=60.0
    )
    with TemporaryDirectory() as scratch:
        samples = Path(scratch) / "samples.npz"
        result = runner.run_on(
            [workload((*by_tokens, *by_rows), encoder)],
            specs,
            settings,
            data="random ids",
            on_progress=session,
            command=command_line(),
            samples=samples,
        )
        batch_ms = medians_ms(result, load_samples(samples))
    return PaddingScaling(
        **head(), by_tokens=by_tokens, by_rows=by_rows, result=result, batch_ms=batch_ms
    )


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


def milliseconds(growth: PaddingScaling, measured: Measurement) -> tuple[FloatArray, FloatArray]:
    """Return the times of the padded shapes, (rounds, shapes), and those of their rows without."""
    by_round = growth.batch_ms[measured.engine]
    batch_ms = np.array(by_round).reshape(len(by_round), -1, 3)
    return batch_ms[:, :, 0], batch_ms[:, :, 1:].sum(axis=2)


def slopes(growth: PaddingScaling, measured: Measurement) -> tuple[FloatArray, FloatArray]:
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


def slope_ratio(growth: PaddingScaling, measured: Measurement) -> Ratio:
    """Return the padded slope by the unpadded one: the median of the rounds and its interval."""
    padded, unpadded = slopes(growth, measured)
    ratios = (padded / unpadded).tolist()
    return Ratio(float(np.median(ratios)), *bootstrap_interval(ratios))


def check(growth: PaddingScaling) -> None:
    """Raise ``CheckFailedError`` if padding makes a bundle's slope differ by over a tenth."""
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


class Curve(NamedTuple):
    """What is drawn: the places of some shapes, and what of each stands on the x axis."""

    title: str
    x: tuple[int, ...]
    places: tuple[int, ...]


def curves(growth: PaddingScaling) -> list[Curve]:
    """Return time by real tokens, by texts, and by positions of which as many are tokens."""
    count, shares = len(growth.by_tokens), len(SHARES)
    padded = range(shares - 2, count, shares)
    same = range(count - 2 * shares, count - shares)
    rows = range(count, len(growth.shapes))
    return [
        _curve(growth, f"tokens, {100 * SHARES[-2]:.0f}% padding", padded, "tokens"),
        _curve(growth, f"texts of {MEAN_LENGTH} tokens, half padding", rows, "rows"),
        _curve(growth, f"positions of {growth.shapes[same[0]].tokens:,} tokens", same, "positions"),
    ]


def _curve(growth: PaddingScaling, title: str, places: Sequence[int], field: str) -> Curve:
    x = tuple(getattr(growth.shapes[place], field) for place in places)
    return Curve(title, x, tuple(places))


def plot(growth: PaddingScaling) -> Plot:
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
    return Plot("PaddingScaling", "Random ids.", "", "ms per batch", tuple(panels))


def markdown(growth: PaddingScaling) -> str:
    """Lay out the slopes, and the curves, in brackets for the same rows without padding."""
    measurements, labels = growth.result.workloads[0].measurements, engine_labels(growth.result)
    columns = ("", "ms per 1,000 tokens, padded", "without padding", "ratio (95% interval)")
    rows: list[tuple[str, ...]] = []
    for measured in measurements:
        padded, unpadded = (f"{1000 * np.median(slope):.0f}" for slope in slopes(growth, measured))
        ratio = ratio_text(slope_ratio(growth, measured))
        rows.append((labels[measured.engine], padded, unpadded, ratio))
    parts = [tables.markdown(Table(columns, rows))]
    for title, x, places in curves(growth):
        heads = (f"ms per batch, by {title}", *(f"{one:,}" for one in x))
        rows = []
        for measured in measurements:
            times = (np.median(one[:, places], axis=0) for one in milliseconds(growth, measured))
            cells = (f"{padded:.1f} ({alone:.1f})" for padded, alone in zip(*times, strict=True))
            rows.append((labels[measured.engine], *cells))
        parts.append(tables.markdown(Table(heads, rows)))
    return "\n\n".join((*parts, *footer(growth.result)))


def write_plot(path: Path) -> None:
    """Draw a result's plot beside it, as SVG."""
    growth = STUDY.load(path)
    write_atomically(path.with_suffix(".svg"), svg(plot(growth), growth.result))


STUDY = Study("padding_scaling", PaddingScaling, measure, markdown, check)
