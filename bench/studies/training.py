"""How fast a training is beside ``transformers.Trainer``: the two engines in turns.

Each training is a process of its own (:mod:`trainkit.bench.studies.training_run`).
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Literal, get_args

import click
import msgspec
import numpy as np

from trainkit import tables
from trainkit.bench.files import ReportHead
from trainkit.bench.measure.statistics import Ratio, bootstrap_interval
from trainkit.bench.race.worker_process import last_line
from trainkit.bench.report.tables import noise, ratio_text
from trainkit.bench.studies.study import Session, Study, head
from trainkit.bench.studies.training_run import Timed, Trainer, TrainingJob
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.tables import Table


class TrainedCorpus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One corpus, and what trainkit must reach on it: a multiple of the other's samples/s.

    ``runs`` are the engines' in turns, as many of each.
    """

    name: str
    batch_size: int
    goal: float
    runs: dict[Trainer, tuple[Timed, ...]]


class Training(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training speed on some corpora."""

    schema: Literal["trainkit-training/2"] = "trainkit-training/2"
    backbone: str
    threads: int
    corpora: tuple[TrainedCorpus, ...]


@click.option("--trec", default="data/trec", show_default=True)
@click.option("--newsgroups", default="data/newsgroups20", show_default=True)
@click.option("--backbone", default="minilm", show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--newsgroups-rounds", default=3, show_default=True)
@click.option("--trec-steps", default=45, show_default=True, help="5 of them for warm-up.")
@click.option("--newsgroups-steps", default=8, show_default=True, help="2 of them for warm-up.")
def measure(
    session: Session,
    trec: str,
    newsgroups: str,
    backbone: str,
    batch_size: int,
    rounds: int,
    newsgroups_rounds: int,
    trec_steps: int,
    newsgroups_steps: int,
) -> Training:
    """Fine-tune a backbone with both engines, in turns, and compare their samples/s."""
    job = TrainingJob(
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
    plan = (("TREC", job, rounds, 1.5), ("newsgroups", longer, newsgroups_rounds, 1.0))
    corpora = tuple(
        TrainedCorpus(
            name=name, batch_size=batch_size, goal=goal, runs=_in_turns(one, count, session)
        )
        for name, one, count, goal in plan
    )
    return Training(**head(), backbone=backbone, threads=job.threads, corpora=corpora)


def _in_turns(job: TrainingJob, rounds: int, session: Session) -> dict[Trainer, tuple[Timed, ...]]:
    """Train with each engine in each round, in alternating order; each round has its seed."""
    runs: dict[Trainer, list[Timed]] = {engine: [] for engine in get_args(Trainer)}
    for turn in range(rounds):
        session.wait_until_quiet()
        for engine in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            session(f"{job.data}: round {turn + 1} of {rounds}, {engine}")
            runs[engine].append(_timed(msgspec.structs.replace(job, engine=engine, seed=turn)))
    return {engine: tuple(found) for engine, found in runs.items()}


def _timed(job: TrainingJob) -> Timed:
    command = [sys.executable, "-P", "-m", "trainkit.bench.studies.training_run"]
    done = subprocess.run(
        [*command, msgspec.json.encode(job).decode()], capture_output=True, check=False
    )
    if done.returncode:
        reason = last_line(done.stderr.decode(errors="replace"))
        raise CheckFailedError(f"the training with {job.engine} ended with an error: {reason}")
    return msgspec.json.decode(done.stdout, type=Timed)


def rates(corpus: TrainedCorpus, engine: Trainer) -> list[float]:
    """Return the samples/s of each round, by the median step."""
    return [corpus.batch_size / float(np.median(run.seconds)) for run in corpus.runs[engine]]


def ratios(corpus: TrainedCorpus) -> list[float]:
    """Return, round by round, how many times as fast trainkit was."""
    mine, other = (rates(corpus, engine) for engine in get_args(Trainer))
    return [a / b for a, b in zip(mine, other, strict=True)]


def check(training: Training) -> None:
    """Raise ``CheckFailedError`` if a goal is missed."""
    missed = [
        f"on {corpus.name} {found:.2f} times, not {corpus.goal:g}"
        for corpus in training.corpora
        if (found := float(np.median(ratios(corpus)))) < corpus.goal
    ]
    if missed:
        raise CheckFailedError(f"trainkit's training is too slow: {'; '.join(missed)}.")


def markdown(training: Training) -> str:
    """Lay the rates out as a table."""
    columns = (
        "texts",
        "padding",
        "samples/s: trainkit",
        "transformers.Trainer",
        "ratio (95% interval)",
        "last loss: trainkit, Trainer",
        "peak memory",
    )
    rows = [tuple(_cells(corpus)) for corpus in training.corpora]
    return tables.markdown(Table(columns, rows, notes=[*filter(None, [noise(training)])]))


def _cells(corpus: TrainedCorpus) -> Iterator[str]:
    found = ratios(corpus)
    runs = [corpus.runs[engine] for engine in get_args(Trainer)]
    yield from (corpus.name, f"{100 * runs[0][0].padding_share:.0f}%")
    yield from (f"{np.median(rates(corpus, engine)):.1f}" for engine in get_args(Trainer))
    yield ratio_text(Ratio(float(np.median(found)), *bootstrap_interval(found)))
    yield ", ".join(f"{np.mean([run.last_loss for run in of]):.2f}" for of in runs)
    yield ", ".join(f"{max(run.peak_rss_bytes or 0 for run in of) / 1e9:.1f} GB" for of in runs)


STUDY = Study("training", Training, measure, markdown, check)
