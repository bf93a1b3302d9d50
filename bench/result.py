"""The report of a benchmark: JSON is the source of truth, and every table is drawn from it."""

from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from trainkit.bench.environment import Environment
from trainkit.bench.protocol import Turn, WarmUp
from trainkit.export.parity import Report
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.files import write_atomically

__all__ = ["EngineResult", "Ratio", "Result", "Settings", "check", "load", "save"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to measure.

    ``threads`` is a number an engine. The measurement ends when every engine has run for
    ``min_seconds`` and in ``min_rounds`` rounds; a warm-up takes ``warm_up_max_seconds`` an engine
    at most, but always one pass.
    """

    batch_size: int = 32
    threads: int
    min_seconds: float = 10.0
    min_rounds: int = 20
    warm_up_max_seconds: float = 10.0

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least 1, not {value}"
            for name in ("batch_size", "threads", "min_rounds")
            if (value := getattr(self, name)) < 1
        ]
        faults += [
            f"{name} must be 0 or more, not {value}"
            for name in ("min_seconds", "warm_up_max_seconds")
            if not (value := getattr(self, name)) >= 0
        ]
        if faults:
            raise InputError("These benchmark settings do not work: " + "; ".join(faults) + ".")


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many texts an engine does while the baseline does one: above 1 is faster.

    The median over rounds of the two rates of one round, and its 95 % bootstrap interval.
    """

    median: float
    low: float
    high: float


class EngineResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: what it did, and the raw turns it was computed from.

    ``load_s`` is from the process's start to the open model. ``texts_per_s`` is the median over
    rounds, without tokenisation. Percentiles are of a batch's wall time, None where the sample does
    not carry them. ``cores_used`` is CPU time by wall time. ``peak_rss_bytes`` is the whole
    process's. ``folder_bytes`` counts the files in the source's folder, not those in folders below.
    ``ratio`` and ``outputs`` are against the first engine, and None for it.
    """

    name: str
    source: str
    texts_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    ratio: Ratio | None
    outputs: Report | None
    wrong: bool
    cores_used: float
    peak_rss_bytes: int | None
    load_s: float
    folder_bytes: int
    warm_up: WarmUp
    rounds: tuple[Turn, ...]


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole benchmark; the first engine is the baseline.

    ``padding_share`` is that of all positions in the batches; ``tokenisation_s`` holds each
    measured encoding of all texts. Where ``noisy``, ``noisy_because`` says why the timings deserve
    less trust.
    """

    schema: Literal["trainkit-bench/1"] = "trainkit-bench/1"
    command: tuple[str, ...]
    date: datetime
    settings: Settings
    environment_before: Environment
    environment_after: Environment
    texts: int
    batches: int
    tokens: int
    padding_share: float
    tokenisation_s: tuple[float, ...]
    noisy: bool
    noisy_because: tuple[str, ...]
    engines: tuple[EngineResult, ...]


def check(result: Result) -> None:
    """Raise ``CheckFailedError`` where an engine computed something else than the baseline."""
    wrong = [
        f"{engine.name} ({engine.source}): {engine.outputs.worst[0].reason}"
        for engine in result.engines
        if engine.wrong and engine.outputs
    ]
    if wrong:
        baseline = result.engines[0]
        raise CheckFailedError(
            f"not the outputs of {baseline.name} ({baseline.source}): {'; '.join(wrong)}. "
            "The speed of a wrong engine means nothing; look at it with: trainkit verify"
        )


def save(result: Result, path: Path) -> None:
    """Write the report as JSON; never half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.format(msgspec.json.encode(result), indent=1)
        write_atomically(path, encoded + b"\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another file."
        ) from None


def load(path: Path) -> Result:
    """Read what :func:`save` wrote; ``InputError`` where it is something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a report.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a report of this trainkit ({error}); make one with: trainkit bench run"
        ) from None
