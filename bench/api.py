"""The benchmark's Python API: the same as ``trainkit bench``, with results as objects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.bench import files, result
from trainkit.bench.engines.registry import Spec, applicable, parse
from trainkit.bench.load import generator
from trainkit.bench.load.protocols import guess_protocol
from trainkit.bench.load.result import LoadResult, LoadSettings
from trainkit.bench.race import runner
from trainkit.bench.report import compare as comparing
from trainkit.bench.report import recommend as recommending
from trainkit.bench.report import tables
from trainkit.bench.report.compare import Comparison
from trainkit.bench.report.recommend import Recommendation, Wanted
from trainkit.bench.result import BenchmarkSettings, Result
from trainkit.data.readers import Example
from trainkit.serve.cores import usable_cores


@dataclass(frozen=True)
class Benchmark:
    """A finished benchmark; ``result`` holds all figures."""

    result: Result

    def __rich_console__(self, *_: Any) -> Any:
        """Yield the tables; ``rich.print(benchmark)`` shows them."""
        yield tables.table(self.result)

    def check(self) -> None:
        """Raise ``CheckFailedError`` if an engine's outputs differ from the baseline's."""
        result.check(self.result)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, which :func:`open_result` reads."""
        result.save(self.result, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write one HTML page with plots and tables."""
        from trainkit.bench.report.html import html  # loads matplotlib

        files.write(Path(path), html(self.result).encode())

    def to_markdown(self, path: str | Path) -> None:
        """Write the tables as Markdown."""
        files.write(Path(path), tables.markdown(self.result).encode())

    def to_csv(self, path: str | Path) -> None:
        """Write one row per measurement, with all figures."""
        files.write(Path(path), tables.csv(self.result).encode())

    def recommend(
        self,
        *,
        latency_below_ms: float | None = None,
        min_accuracy: float | None = None,
        max_accuracy_drop: float | None = None,
        precision: str | None = None,
    ) -> Recommendation:
        """Return the fastest engine that meets the limits, with the evidence.

        ``latency_below_ms`` limits the highest percentile of a batch's latency that the sample
        carries; ``min_accuracy`` is in percent and ``max_accuracy_drop`` in percentage points below
        the first engine. Raises ``CheckFailedError`` if no engine meets them.
        """
        wanted = Wanted(
            latency_below_ms=latency_below_ms,
            min_accuracy=min_accuracy,
            max_accuracy_drop=max_accuracy_drop,
            precision=precision,
        )
        recommendation = recommending.recommend(self.result, wanted)
        recommending.check(recommendation)
        return recommendation


def run(
    engines: Sequence[str | Path],
    examples: Sequence[Example],
    *,
    data: str = "",
    every_runtime: bool = False,
    batch_sizes: Sequence[int] = (32,),
    lengths: Sequence[int] = (),
    rates: Sequence[float] = (),
    single_stream: bool = False,
    threads: Sequence[int] = (),
    min_seconds: float = 10.0,
    min_rounds: int = 20,
    samples: str | Path | None = None,
    command: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda step: None,
) -> Benchmark:
    """Measure runtimes on one model, in turns, each in a process of its own.

    ``engines`` are "RUNTIME:FOLDER" or the folder of a run, a bundle or a Hugging Face model; the
    first is the baseline. With ``every_runtime`` each folder is measured in all runtimes that take
    it. ``examples`` are texts with labels, in their order of arrival, called ``data`` in the
    report. ``lengths`` adds full batches of that many tokens, ``rates`` single texts that arrive at
    that many per second, ``single_stream`` one text after the other. ``threads`` defaults to one
    per core. Each workload ends after ``min_seconds`` and ``min_rounds``. ``samples`` names an
    ``.npz`` file for the time of every batch.

    Raises ``InputError`` for input that cannot be measured.
    """
    specs = [parse(str(engine)) for engine in engines]
    if every_runtime:
        specs += [Spec(name, spec.source) for spec in specs for name in applicable(spec.source)]
    settings = BenchmarkSettings(
        batch_sizes=tuple(batch_sizes),
        lengths=tuple(lengths),
        rates=tuple(rates),
        single_stream=single_stream,
        threads=tuple(threads) or (usable_cores(),),
        min_seconds=min_seconds,
        min_rounds=min_rounds,
    )
    return Benchmark(
        runner.run(
            list(dict.fromkeys(specs)),
            examples,
            settings,
            data=data,
            on_progress=on_progress,
            command=command,
            samples=None if samples is None else Path(samples),
        )
    )


def open_result(path: str | Path) -> Benchmark:
    """Read a result that :meth:`Benchmark.save` or ``trainkit bench run --out`` wrote."""
    return Benchmark(result.load(Path(path)))


def compare(before: Benchmark, after: Benchmark) -> Comparison:
    """Compare two benchmarks of the same engines: which became faster or slower.

    Raises ``InputError`` if they have no engine on the same workload in common.
    """
    return comparing.compare(before.result, after.result)


def load_test(
    url: str,
    texts: Sequence[str],
    *,
    headers: Mapping[str, str] | None = None,
    data: str = "",
    command: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda step: None,
    **settings: Any,
) -> LoadResult:
    """Load a server with ``texts``, which repeat in order, at one rate, or search for the highest.

    ``settings`` are the fields of :class:`~trainkit.bench.load.result.LoadSettings`: with
    ``p99_below_ms`` the highest rate is searched for that keeps p99 below it. The protocol is
    guessed from the URL if it is not given.

    Raises ``InputError`` if nothing listens or the first request is refused.
    """
    settings.setdefault("protocol", guess_protocol(url))
    return generator.run(
        generator.Target(url, texts, headers or {}),
        LoadSettings(**settings),
        data=data,
        command=command,
        on_progress=on_progress,
    )
