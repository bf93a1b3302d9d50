"""What each kind of model reaches over several seeds: ``python -m trainkit.bench.studies
accuracy``.

Trains every model of :data:`TASKS` with the seeds 0, 1, ... and its own settings, chosen on
validation, and scores the test set once, beside a linear SVM on tf-idf of words and word pairs.
Writes ``bench/results/accuracy.json``. It takes hours, a training a core; what is finished in
``--work`` is not trained again, and what was cut off goes on.
"""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np

from trainkit.bench.engines.base import limit_torch
from trainkit.bench.measure.environment import Environment, describe
from trainkit.cli_errors import ErrorReportingCommand
from trainkit.console import stderr
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import load
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.trainer import checkpoint, run_folder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import Evaluation
from trainkit.trainer.run import EVALUATION, VALIDATION, train
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.run_folder import RunConfig
from trainkit.trainer.settings import resolve

__all__ = ["TASKS", "Accuracy", "jobs_of", "load_accuracy", "main", "markdown", "train_all"]

RESULTS = Path("bench/results/accuracy.json")
SEEDS = 3


class Task(NamedTuple):
    """A data set, and what each kind of model must reach on it, in percent, with its settings.

    Settings that are not named are the defaults of the kind; all were chosen on validation.
    """

    name: str
    folder: str
    columns: Columns
    models: tuple[tuple[dict[str, Any], float], ...]


class Job(NamedTuple):
    """One training: of ``settings`` with ``seed``, on the texts of ``task``, into ``folder``."""

    task: Task
    settings: dict[str, Any]
    seed: int
    folder: Path


SIMPLE = {"model": "simple"}
PREFIX = {"model": "prefix", "backbone": "minilm"}
FINETUNE = {"model": "finetune", "backbone": "minilm"}
REFIT = {"refit": True}
TASKS = (
    Task(
        "TREC-6",
        "trec",
        Columns(),
        (
            (SIMPLE | REFIT | {"epochs": 10}, 90.8),
            (PREFIX | REFIT | {"epochs": 8, "batch_size": 16, "average_decay": 0.99}, 96.5),
            (FINETUNE | REFIT | {"epochs": 4, "average_decay": 0.99}, 97.2),
        ),
    ),
    Task(
        "TREC-50",
        "trec",
        Columns(labels="fine"),
        ((PREFIX | {"epochs": 6}, 87.0), (FINETUNE, 90.0)),
    ),
    Task(
        "banking77",
        "banking77",
        Columns(),
        ((PREFIX | {"epochs": 5}, 89.0), (FINETUNE | {"epochs": 3}, 92.0)),
    ),
)


class Trained(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training: accuracies as shares, of the best epoch."""

    seed: int
    valid_accuracy: float
    test_accuracy: float
    test_macro_f1: float
    best_epoch: int


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of model on one data set, over the seeds; ``goal`` is for the mean of test."""

    task: str
    choice: ModelSpec
    training: TrainConfig
    goal: float
    trained_parameters: int
    backbone_parameters: int
    runs: tuple[Trained, ...]


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The linear SVM; ``c`` was chosen on validation, on which it was then trained too."""

    task: str
    c: float
    test_accuracy: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``accuracy.json``."""

    schema: str
    command: tuple[str, ...]
    environment: Environment
    threads: int
    """Of each training: to the bit, a run is repeated with as many."""
    models: tuple[Model, ...]
    baselines: tuple[Baseline, ...]


@click.command(cls=ErrorReportingCommand)
@click.option("--data", type=click.Path(path_type=Path), default="data", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/accuracy", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=SEEDS, show_default=True)
@click.option("--finished-only", is_flag=True, help="Train nothing: take what WORK holds.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(data: Path, work: Path, seeds: int, finished_only: bool, threads: int, out: Path) -> None:
    """Train all models on the data sets in the folder DATA, and compare with the goals.

    As many trainings run at once as there are cores for so many threads each.
    """
    models = [(task, settings, goal) for task in TASKS for settings, goal in task.models]
    jobs = [jobs_of(task, settings, work, seeds) for task, settings, _ in models]
    if finished_only:
        absent = [j for some in jobs for j in some if not (j.folder / EVALUATION).is_file()]
        stderr.print(f"Not trained: {', '.join(job.folder.name for job in absent) or 'nothing'}")
        jobs = [[job for job in some if job not in absent] for some in jobs]
    trained = train_all([job for of_model in jobs for job in of_model], data, threads)
    found = Accuracy(
        schema="trainkit-accuracy/2",
        command=("python", "-m", "trainkit.bench.studies.accuracy", *sys.argv[1:]),
        environment=describe(),
        threads=threads,
        models=tuple(
            _model(task, settings, goal, of_model, trained)
            for (task, settings, goal), of_model in zip(models, jobs, strict=True)
            if of_model
        ),
        baselines=tuple(_baseline(task, data) for task in TASKS),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, pretty_json(found))
    click.echo(markdown(found))
    check(found)


def jobs_of(task: Task, settings: dict[str, Any], work: Path, seeds: int) -> list[Job]:
    """Name a training a seed, each with its folder in ``work``."""
    return [
        Job(task, settings, seed, work / f"{task.name}-{settings['model']}-{seed}")
        for seed in range(seeds)
    ]


def train_all(jobs: Sequence[Job], data: Path, threads: int) -> dict[Path, Trained]:
    """Train several at once; return what each came to, by its folder."""
    pool = ProcessPoolExecutor(
        max(1, usable_cores() // threads),
        multiprocessing.get_context("spawn"),
        initializer=limit_torch,
        initargs=(threads,),
    )
    trained = {}
    with pool:
        running = {pool.submit(_train, job, data): job for job in jobs}
        try:
            for done in as_completed(running):
                folder = running[done].folder
                trained[folder] = done.result()
                accuracy = 100 * trained[folder].valid_accuracy
                stderr.print(f"{folder.name}: {accuracy:.1f} % on validation", highlight=False)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run keep their state
            raise
    return trained


def _train(job: Job, data: Path) -> Trained:
    """Train into the job's folder what is not there yet."""
    splits = load(data / job.task.folder, job.task.columns, job.seed)
    choice, config = resolve({**job.settings, "seed": job.seed})
    resumed = (job.folder / run_folder.CONFIG).is_file()
    wanted = RunConfig(model=choice, training=config, data_sha256=run_folder.fingerprint(splits))
    if resumed:
        run_folder.check_resumed(job.folder, wanted)
    if not (job.folder / EVALUATION).is_file():
        train(choice, splits, config, job.folder, resume=resumed)
    return _trained(job.folder, job.seed)


def _model(
    task: Task,
    settings: dict[str, Any],
    goal: float,
    jobs: Sequence[Job],
    trained: dict[Path, Trained],
) -> Model:
    """Gather the seeds of one kind of model on one data set."""
    choice, config = resolve({**settings, "seed": 0})
    model = checkpoint.load(jobs[0].folder).model
    kept = [tensor for tensor in model.trained_state().values() if tensor.is_floating_point()]
    count = sum(tensor.numel() for tensor in kept)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return Model(
        task=task.name,
        choice=choice,
        training=config,
        goal=goal,
        trained_parameters=count,
        backbone_parameters=frozen,
        runs=tuple(trained[job.folder] for job in jobs),
    )


def _trained(folder: Path, seed: int) -> Trained:
    valid, test = (
        msgspec.json.decode((folder / name).read_bytes(), type=Evaluation)
        for name in (VALIDATION, EVALUATION)
    )
    return Trained(
        seed=seed,
        valid_accuracy=valid.accuracy,
        test_accuracy=test.accuracy,
        test_macro_f1=test.macro_f1,
        best_epoch=checkpoint.load(folder).checkpoint.epoch,
    )


def _baseline(task: Task, data: Path) -> Baseline:
    """Fit tf-idf and the SVM on train; with the C that is best on validation, on both."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    splits = load(data / task.folder, task.columns, seed=0)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")

    def texts(examples: Sequence[Example]) -> list[str]:
        return [example.text for example in examples]

    def labels(examples: Sequence[Example]) -> list[str]:
        return [example.label for example in examples]

    def score(c: float, fitted: Sequence[Example], scored: Sequence[Example]) -> float:
        svm = LinearSVC(C=c, random_state=0)
        svm.fit(vectorizer.fit_transform(texts(fitted)), labels(fitted))
        return float(svm.score(vectorizer.transform(texts(scored)), labels(scored)))

    c = max((0.1, 0.3, 1.0, 3.0, 10.0), key=lambda c: score(c, splits.train, splits.valid))
    known = splits.train + splits.valid
    return Baseline(task=task.name, c=c, test_accuracy=score(c, known, splits.test))


def load_accuracy(path: Path = RESULTS) -> Accuracy:
    """Read ``accuracy.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Accuracy)


def mean(model: Model) -> float:
    """Return the mean test accuracy over the seeds, in percent."""
    return 100 * float(np.mean([run.test_accuracy for run in model.runs]))


def check(accuracy: Accuracy) -> None:
    """Raise ``CheckFailedError`` where a goal is missed."""
    missed = [
        f"{model.task} {model.choice.kind} {mean(model):.1f} %, not {model.goal:g} %"
        for model in accuracy.models
        if mean(model) < model.goal - 1e-9
    ]
    if missed:
        raise CheckFailedError(f"Below the goal: {'; '.join(missed)}.")


def markdown(accuracy: Accuracy) -> str:
    """Lay the accuracies out as a table."""
    lines = [
        "| texts | model | trained parameters | seeds | test: mean | range | validation: mean "
        "| goal |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for baseline in accuracy.baselines:
        lines.append(
            f"| {baseline.task} | tf-idf, linear SVM | | | {100 * baseline.test_accuracy:.1f} % "
            "| | | |"
        )
        lines += [_row(model) for model in accuracy.models if model.task == baseline.task]
    return "\n".join(lines)


def _row(model: Model) -> str:
    scores = [100 * run.test_accuracy for run in model.runs]
    valid = 100 * float(np.mean([run.valid_accuracy for run in model.runs]))
    name = f"`{model.choice.kind}`" + (
        f" on {model.choice.backbone}" if model.choice.backbone else ""
    )
    share = model.trained_parameters / (model.trained_parameters + model.backbone_parameters)
    percent = f"{100 * share:.2f}" if model.backbone_parameters else "100"
    return (
        f"| {model.task} | {name} | {model.trained_parameters:,} ({percent} %) | "
        f"{len(scores)} | "
        f"{mean(model):.1f} % | {min(scores):.1f} to {max(scores):.1f} % | {valid:.1f} % | "
        f"{model.goal:g} % |"
    )


if __name__ == "__main__":
    sys.exit(main())
