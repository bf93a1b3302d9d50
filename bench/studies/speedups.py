"""Speed-ups of trainkit's ONNX bundle over the fastest competing engine, with goals.

The competitors are the engines that run neither trainkit's forward nor its exports; the fastest is
the one of the highest median throughput.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trainkit import tables
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.report.tables import engine_labels
from trainkit.bench.result import Measurement, Result, WorkloadResult
from trainkit.tables import Table

WORKERS = "onnx-workers"
DEFAULT = ("onnx",)
OURS = (*DEFAULT, WORKERS)
OTHERS = (
    "huggingface",
    "compile",
    "pipeline",
    "transformers-exporters",
    "ort-optimizer",
    "optimum",
    "optimum-o2",
    "optimum-int8",
    "openvino-converter",
    "sentence-transformers",
)
NAMES = {"minilm": "MiniLM-L6", "base": "BERT-base's size"}
HEADINGS = ("fp32 against fp32", "int8 against fp32", "int8 against int8", "fp32: share of peak")


class Goals(NamedTuple):
    """The least figure under each of ``HEADINGS``; or None without a goal."""

    fp32: float | None = None
    int8: float | None = None
    int8_by_int8: float | None = None
    peak_share: float | None = None


class SpeedupCell(NamedTuple):
    """A cell of the table: what was reached, and against whom; the goal, empty without one."""

    reached: str
    goal: str
    missed: bool

    def __str__(self) -> str:
        """Say both, and whether the goal is missed."""
        if not self.goal:
            return self.reached
        return f"{self.reached}; goal {self.goal}{', **missed**' if self.missed else ''}"


def markdown(results: Mapping[str, Result]) -> str:
    """Return a table with a row per run and batch size; a figure that misses its goal is marked."""
    rows = []
    found: list[SpeedupCell] = []
    wrong, noisy = [], []
    for name, result in results.items():
        model = name.removeprefix("suite-").removesuffix(f"-{result.data}")
        if result.noisy:
            noisy.append(f"{model}, {result.data}")
        for workload in result.workloads:
            if workload.scenario != "offline":
                continue
            run = f"{model}, {result.data}, {workload.batch_size}"
            row = figures(result, workload, _goals(result.data, workload.batch_size))
            rows.append((run, *map(str, row)))
            found += row
            wrong += [
                f"{engine_labels(result)[one.engine]} ({run})"
                for one in workload.measurements
                if one.wrong and result.engines[one.engine].runtime in (*OURS, *OTHERS)
            ]
    notes = [summary(found)]
    if wrong:
        notes.append(f"Left out because of wrong outputs: {', '.join(wrong)}.")
    if noisy:
        notes.append(f"Noisy, for the reasons below their tables: {'; '.join(noisy)}.")
    columns = ("model, texts, batch", *HEADINGS)
    return tables.markdown(Table(columns, rows, notes=notes, numeric=False))


def headline(results: Mapping[str, Result]) -> str:
    """Return a small table of the default runtime's speed-ups on newsgroups posts."""
    rows = []
    machines = set()
    for model, name in NAMES.items():
        result = results[f"suite-{model}-newsgroups20"]
        here = result.environment
        machines.add(f"{here.processor} ({', '.join(here.flags)}), {here.cores} cores")
        for workload in sorted(result.workloads, key=lambda one: -one.batch_size):
            size = workload.batch_size
            fp32, _, int8, _ = figures(result, workload, Goals(), DEFAULT)
            how = f"batches of {size}" if size > 1 else "single texts"
            rows.append((f"{name}, {how}", fp32.reached, int8.reached))
    note = f"{'; '.join(sorted(machines))}; 95% intervals in brackets."
    columns = ("newsgroups posts", "float32", "int8")
    return tables.markdown(Table(columns, rows, notes=[note], numeric=False))


def _goals(data: str, batch_size: int) -> Goals:
    if batch_size == 1:
        return Goals(fp32=1.15, int8=1.6)
    if data == "newsgroups20":
        return Goals(fp32=2.5, int8=4.0, int8_by_int8=2.0, peak_share=0.85)
    if data == "trec" and batch_size == 32:
        return Goals(fp32=2.2, int8=3.0, peak_share=0.85)
    return Goals(peak_share=0.85)


def summary(found: Sequence[SpeedupCell]) -> str:
    """Say how many of the figures that have a goal miss it."""
    goals = [one for one in found if one.goal]
    return f"{sum(one.missed for one in goals)} of {len(goals)} goals are missed."


def figures(
    result: Result, workload: WorkloadResult, goals: Goals, runtimes: tuple[str, ...] = OURS
) -> tuple[SpeedupCell, ...]:
    """Return the figures under ``HEADINGS`` of one workload; ``runtimes`` are those of ours."""
    ours = _fastest(result, workload, runtimes, "fp32")
    ours8 = _fastest(result, workload, runtimes, "int8")
    others = _fastest(result, workload, OTHERS, "fp32")
    others8 = _fastest(result, workload, OTHERS, "int8")
    return (
        _ratio(result, workload, ours, others, goals.fp32),
        _ratio(result, workload, ours8, others, goals.int8),
        _ratio(result, workload, ours8, others8, goals.int8_by_int8),
        _share(ours.roofline_share if ours else None, goals.peak_share),
    )


def _fastest(
    result: Result, workload: WorkloadResult, runtimes: tuple[str, ...], precision: str
) -> Measurement | None:
    sound = [
        measured
        for measured in workload.measurements
        if not measured.wrong
        and (engine := result.engines[measured.engine]).runtime in runtimes
        and engine.precision == precision
    ]
    return max(sound, key=lambda one: one.texts_per_s, default=None)


def _ratio(
    result: Result,
    workload: WorkloadResult,
    ours: Measurement | None,
    other: Measurement | None,
    goal: float | None,
) -> SpeedupCell:
    wanted = "" if goal is None else f"{goal:g}"
    if ours is None or other is None:
        return SpeedupCell("not measured", wanted, goal is not None)
    ratio = Ratio.of_rounds(workload.speeds(ours), workload.speeds(other))
    median, low = (f"{_down(100 * value) / 100:.2f}" for value in (ratio.median, ratio.low))
    whom = engine_labels(result)[other.engine]
    how = " with workers" if result.engines[ours.engine].runtime == WORKERS else ""
    reached = f"{median} ({low} to {ratio.high:.2f}){how}, {whom}"
    return SpeedupCell(reached, wanted, goal is not None and ratio.median < goal)


def _share(share: float | None, goal: float | None) -> SpeedupCell:
    wanted = "" if goal is None else f"{100 * goal:g}%"
    if share is None or share > 1:  # which cannot be, so that it shows nothing
        shown = f"{100 * share:.0f}%, so the peak was measured too low" if share else "not measured"
        return SpeedupCell(shown, wanted, goal is not None)
    return SpeedupCell(f"{_down(100 * share)}%", wanted, goal is not None and share < goal)


def _down(number: float) -> int:
    """Round down, so that what misses a goal never reads like it; but not for the last bit."""
    return math.floor(round(number, 6))
