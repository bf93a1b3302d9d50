"""How fast a training is beside ``transformers.Trainer``: ``python -m trainkit.bench.studies
training``.

Each training is a process of its own (see :mod:`trainkit.bench.studies.training_run`); the two
engines take turns. Writes ``bench/results/training.json``.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import click
import msgspec
import numpy as np

from trainkit.bench.measure.environment import (
    Environment,
    cpu_steal_monitor,
    describe,
)
from trainkit.bench.measure.statistics import bootstrap_interval
from trainkit.bench.race.worker_process import last_line
from trainkit.bench.studies.quiet_machine import wait_until_quiet
from trainkit.bench.studies.training_run import Engine, Job, Timed
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import steps
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically

__all__ = ["Training", "load", "main", "markdown"]

RESULTS = Path("bench/results/training.json")


class Corpus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One corpus, and what trainkit must reach on it: a multiple of the other's samples a second.

    ``runs`` are the engines' in turns, as many of each.
    """

    name: str
    batch_size: int
    goal: float
    runs: dict[Engine, tuple[Timed, ...]]


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``training.json``."""

    schema: str
    command: tuple[str, ...]
    environment: Environment
    noisy_because: tuple[str, ...]
    backbone: str
    threads: int
    corpora: tuple[Corpus, ...]


@click.command(cls=ErrorReportingCommand)
@click.option("--trec", default="data/trec", show_default=True)
@click.option("--newsgroups", default="data/newsgroups20", show_default=True)
@click.option("--backbone", default="minilm", show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--newsgroups-rounds", default=3, show_default=True)
@click.option("--trec-steps", default=45, show_default=True, help="Of which the first 5 warm up.")
@click.option("--newsgroups-steps", default=8, show_default=True, help="The first 2 warm up.")
@click.option("--calm-minutes", default=0.0, help="To wait for a calm machine, each time.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    trec: str,
    newsgroups: str,
    backbone: str,
    batch_size: int,
    rounds: int,
    newsgroups_rounds: int,
    trec_steps: int,
    newsgroups_steps: int,
    calm_minutes: float,
    out: Path,
) -> None:
    """Fine-tune a backbone with both engines, in turns, and compare their samples a second."""
    theft = cpu_steal_monitor()
    job = Job(
        engine="trainkit",
        data=trec,
        backbone=backbone,
        batch_size=batch_size,
        steps=trec_steps,
        warm_up=5,
        threads=usable_cores(),
        seed=0,
    )
    longer = msgspec.structs.replace(job, data=newsgroups, steps=newsgroups_steps, warm_up=2)
    with steps() as told:
        corpora = (
            Corpus(
                name="TREC",
                batch_size=batch_size,
                goal=1.5,
                runs=_in_turns(job, rounds, calm_minutes, told),
            ),
            Corpus(
                name="newsgroups",
                batch_size=batch_size,
                goal=1.0,
                runs=_in_turns(longer, newsgroups_rounds, calm_minutes, told),
            ),
        )
    found = Training(
        schema="trainkit-training/1",
        command=("python", "-m", "trainkit.bench.studies.training", *sys.argv[1:]),
        environment=describe(),
        noisy_because=theft(),
        backbone=backbone,
        threads=job.threads,
        corpora=corpora,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(found))
    click.echo(markdown(found))
    check(found)


def _in_turns(
    job: Job, rounds: int, calm_minutes: float, told: Callable[[str], None]
) -> dict[Engine, tuple[Timed, ...]]:
    """Train with each engine in each round, the other one first each time, with its own seed."""
    runs: dict[Engine, list[Timed]] = {engine: [] for engine in get_args(Engine)}
    for turn in range(rounds):
        wait_until_quiet(60 * calm_minutes, told)
        for engine in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            told(f"{job.data}: round {turn + 1} of {rounds}, {engine}")
            runs[engine].append(_timed(msgspec.structs.replace(job, engine=engine, seed=turn)))
    return {engine: tuple(found) for engine, found in runs.items()}


def _timed(job: Job) -> Timed:
    command = [sys.executable, "-P", "-m", "trainkit.bench.studies.training_run"]
    done = subprocess.run(
        [*command, msgspec.json.encode(job).decode()], capture_output=True, check=False
    )
    if done.returncode:
        said = last_line(done.stderr.decode(errors="replace"))
        raise CheckFailedError(f"the training with {job.engine} ended with an error: {said}")
    return msgspec.json.decode(done.stdout, type=Timed)


def load(path: Path = RESULTS) -> Training:
    """Read ``training.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Training)


def rates(corpus: Corpus, engine: Engine) -> list[float]:
    """Return the samples a second of each round, by the median step."""
    return [corpus.batch_size / float(np.median(run.seconds)) for run in corpus.runs[engine]]


def ratios(corpus: Corpus) -> list[float]:
    """Return, round by round, how many times as fast trainkit was."""
    mine, other = (rates(corpus, engine) for engine in get_args(Engine))
    return [a / b for a, b in zip(mine, other, strict=True)]


def check(training: Training) -> None:
    """Raise ``CheckFailedError`` where a goal is missed."""
    missed = [
        f"on {corpus.name} {found:.2f} times, not {corpus.goal:g}"
        for corpus in training.corpora
        if (found := float(np.median(ratios(corpus)))) < corpus.goal
    ]
    if missed:
        raise CheckFailedError(f"trainkit's training is too slow: {'; '.join(missed)}.")


def markdown(training: Training) -> str:
    """Lay the rates out as a table."""
    lines = [
        "| texts | padding | samples a second: trainkit | transformers.Trainer | ratio, 95 % | "
        "last loss: trainkit, Trainer | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_row(corpus) for corpus in training.corpora]
    notes = [f"Noisy: {reason}." for reason in training.noisy_because]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _row(corpus: Corpus) -> str:
    found = ratios(corpus)
    low, high = bootstrap_interval(found)
    engines: Sequence[Engine] = get_args(Engine)
    mine, other = (f"{np.median(rates(corpus, engine)):.1f}" for engine in engines)
    runs = [corpus.runs[engine] for engine in engines]
    losses = ", ".join(f"{np.mean([run.last_loss for run in of]):.2f}" for of in runs)
    peaks = ", ".join(f"{max(run.peak_rss_bytes or 0 for run in of) / 1e9:.1f} GB" for of in runs)
    return (
        f"| {corpus.name} | {100 * runs[0][0].padding_share:.0f} % | {mine} | {other} | "
        f"{np.median(found):.2f} ({low:.2f} to {high:.2f}) | {losses} | {peaks} |"
    )


if __name__ == "__main__":
    sys.exit(main())
