"""``trainkit.benchmark``: runtimes timed side by side on one model, and what follows from it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.api.inputs import Folder, Split, examples_of, progress
from trainkit.api.models import Bundle, TrainedModel
from trainkit.api.scores import folder_of
from trainkit.data.columns import Columns, Labels
from trainkit.serve.formats import Precision

if TYPE_CHECKING:
    from trainkit.bench.engines.registry import Spec
    from trainkit.bench.report.recommend import Recommendation
    from trainkit.bench.result import Result
    from trainkit.export.parity_cases import ProgressCallback


class Benchmark:
    """A finished benchmark: its ``result``, and what can be made of it."""

    def __init__(self, result: "Result") -> None:
        self.result = result

    @classmethod
    def load(cls, path: Folder) -> "Benchmark":
        """Read a file that :meth:`save` or ``trainkit bench run --out`` wrote."""
        from trainkit.bench.result import load

        return cls(load(Path(path)))

    def save(self, path: Folder) -> None:
        """Write the result as JSON."""
        from trainkit.bench.result import save

        save(self.result, Path(path))

    def check(self) -> None:
        """Raise CheckFailedError if an engine computed something else than the first one."""
        from trainkit.bench.result import check

        check(self.result)

    def to_html(self, path: Folder) -> None:
        """Write one page with tables and plots, which loads nothing from outside."""
        from trainkit.bench.report.html import html

        _write(path, html(self.result))

    def to_markdown(self, path: Folder) -> None:
        """Write the tables as Markdown."""
        from trainkit.bench.report.tables import markdown

        _write(path, markdown(self.result))

    def to_csv(self, path: Folder) -> None:
        """Write one row per measurement, with all figures."""
        from trainkit.bench.report.tables import csv

        _write(path, csv(self.result))

    def recommend(
        self,
        *,
        latency_below_ms: float | None = None,
        min_accuracy: float | None = None,
        max_accuracy_drop: float | None = None,
        precision: Precision | None = None,
    ) -> "Recommendation":
        """Return the runtime, threads, batch size and precision to deploy, with the evidence.

        It has the most texts/s; with ``latency_below_ms`` among those whose batches take less.
        ``min_accuracy`` is in percent, ``max_accuracy_drop`` in percentage points below the first
        engine's accuracy. The recommendation's ``choice`` is None if nothing fits.
        """
        from trainkit.bench.report.recommend import Wanted, recommend

        wanted = Wanted(
            latency_below_ms=latency_below_ms,
            min_accuracy=min_accuracy,
            max_accuracy_drop=max_accuracy_drop,
            precision=precision,
        )
        return recommend(self.result, wanted)


def benchmark(
    sources: Sequence[TrainedModel | Bundle | Folder] = (),
    data: Any = "sample",
    labels: Sequence[str | int] | None = None,
    *,
    split: Split | None = None,
    all_runtimes: bool = False,
    batch_sizes: Sequence[int] = (32,),
    lengths: Sequence[int] = (),
    single_stream: bool = False,
    rates: Sequence[float] = (),
    threads: Sequence[int] = (),
    min_seconds: float = 10.0,
    min_rounds: int = 20,
    text_column: str | None = None,
    label_column: str | None = None,
    trec_labels: Labels = "coarse",
    samples: Folder | None = None,
    on_progress: "ProgressCallback | None" = None,
    command: Sequence[str] = (),
) -> Benchmark:
    """Time runtimes on one model, in turns, each in a process of its own; the first is baseline.

    A source is a run, a bundle, or "RUNTIME:FOLDER"; ``all_runtimes`` adds every runtime that can
    take it. Without sources: runs/latest and its bundles. ``data`` is as for
    :func:`trainkit.train`.

    The texts are timed in batches of each of ``batch_sizes``; also in full batches of each of
    ``lengths`` (tokens), one at a time (``single_stream``), and with Poisson arrivals at ``rates``
    (requests/s). ``threads`` are those of each engine, by default one per core. A workload ends
    after ``min_seconds`` and ``min_rounds``. ``samples`` is an .npz file for every batch's time.
    :meth:`Benchmark.check` compares all outputs with the first engine's.
    """
    from trainkit.bench.race import runner
    from trainkit.bench.result import BenchmarkSettings
    from trainkit.serve.cores import usable_cores

    settings = BenchmarkSettings(
        batch_sizes=tuple(batch_sizes),
        lengths=tuple(lengths),
        rates=tuple(rates),
        single_stream=single_stream,
        threads=tuple(threads) or (usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    specs = _specs([folder_of(source) for source in sources] or latest(), all_runtimes)
    columns = Columns(trec_labels, text_column, label_column)
    name = Path(data).name if isinstance(data, str | os.PathLike) else "texts in memory"
    with progress(on_progress) as report:
        result = runner.run(
            specs,
            examples_of(data, labels, columns, split, specs[0].source),
            settings,
            data=name,
            on_progress=report,
            samples=None if samples is None else Path(samples),
            command=command,
        )
    return Benchmark(result)


def latest() -> list[str]:
    """Return the newest run and the bundles that were exported into its folder."""
    from trainkit.serve.formats import MODEL_FILES

    run = Path("runs/latest")
    bundles = (run / name for name in sorted(MODEL_FILES, reverse=True))
    return [str(run), *(str(bundle) for bundle in bundles if bundle.is_dir())]


def _specs(sources: Sequence[str], all_runtimes: bool) -> "list[Spec]":
    from trainkit.bench.engines.registry import applicable, parse

    specs = [parse(source) for source in sources]
    if all_runtimes:
        specs += [
            parse(f"{runtime}:{spec.source}")
            for spec in list(specs)
            for runtime in applicable(spec.source)
        ]
    return list(dict.fromkeys(specs))


def _write(path: Folder, content: str) -> None:
    from trainkit.bench import files

    files.write(Path(path), content.encode())
