"""The accuracy of each kind of model over several seeds, beside a linear SVM on tf-idf.

Settings were chosen on validation; the test set is scored once. It takes hours, one training per
core; finished trainings in ``--work`` are reused and interrupted ones are resumed.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import msgspec
import numpy as np

from trainkit import tables
from trainkit.bench.engines.base import limit_torch
from trainkit.bench.files import ReportHead
from trainkit.bench.studies.study import Session, Study, head
from trainkit.console import stderr
from trainkit.data.columns import Columns
from trainkit.data.readers import Example
from trainkit.data.splits import load
from trainkit.serve.cores import usable_cores
from trainkit.serve.errors import CheckFailedError
from trainkit.tables import Table
from trainkit.trainer import checkpoint, run_folder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.metrics import Evaluation
from trainkit.trainer.run import EVALUATION, VALIDATION, train
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.run_folder import RunConfig
from trainkit.trainer.settings import resolve

SEEDS = 3


class AccuracyTask(NamedTuple):
    """A data set, and what each kind of model must reach on it, in percent, with its settings.

    Settings that are not named are the defaults of the kind; all were chosen on validation.
    """

    name: str
    folder: str
    columns: Columns
    models: tuple[tuple[dict[str, Any], float], ...]


class AccuracyJob(NamedTuple):
    """One training: of ``settings`` with ``seed``, on the texts of ``task``, into ``folder``."""

    task: AccuracyTask
    settings: dict[str, Any]
    seed: int
    folder: Path


SIMPLE = {"model": "simple"}
PREFIX = {"model": "prefix", "backbone": "minilm"}
FINETUNE = {"model": "finetune", "backbone": "minilm"}
REFIT = {"refit": True}
TASKS = (
    AccuracyTask(
        "TREC-6",
        "trec",
        Columns(),
        (
            (SIMPLE | REFIT | {"epochs": 10}, 90.8),
            (PREFIX | REFIT | {"epochs": 8, "batch_size": 16, "average_decay": 0.99}, 96.5),
            (FINETUNE | REFIT | {"epochs": 4, "average_decay": 0.99}, 97.2),
        ),
    ),
    AccuracyTask(
        "TREC-50",
        "trec",
        Columns(labels="fine"),
        ((PREFIX | {"epochs": 6}, 87.0), (FINETUNE, 90.0)),
    ),
    AccuracyTask(
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


class ModelAccuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class AccuracyFigures(ReportHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All models and baselines; a run is repeated exactly with the same number of threads."""

    schema: Literal["trainkit-accuracy/3"] = "trainkit-accuracy/3"
    threads: int
    models: tuple[ModelAccuracy, ...]
    baselines: tuple[Baseline, ...]


@click.option("--data", type=click.Path(path_type=Path), default="data", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="runs/accuracy", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=SEEDS, show_default=True)
@click.option("--finished-only", is_flag=True, help="Train nothing; use what WORK holds.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def measure(
    session: Session, data: Path, work: Path, seeds: int, finished_only: bool, threads: int
) -> AccuracyFigures:
    """Train all models on the data sets in the folder DATA, and compare with the goals.

    The cores divided by THREADS trainings run at once.
    """
    models = [(task, settings, goal) for task in TASKS for settings, goal in task.models]
    jobs = [jobs_of(task, settings, work, seeds) for task, settings, _ in models]
    if finished_only:
        missing = [j for some in jobs for j in some if not (j.folder / EVALUATION).is_file()]
        stderr.print(f"Not trained: {', '.join(job.folder.name for job in missing) or 'nothing'}")
        jobs = [[job for job in some if job not in missing] for some in jobs]
    trained = train_all([job for of_model in jobs for job in of_model], data, threads)
    return AccuracyFigures(
        **head(),
        threads=threads,
        models=tuple(
            _model(task, settings, goal, of_model, trained)
            for (task, settings, goal), of_model in zip(models, jobs, strict=True)
            if of_model
        ),
        baselines=tuple(_baseline(task, data) for task in TASKS),
    )


def jobs_of(
    task: AccuracyTask, settings: dict[str, Any], work: Path, seeds: int
) -> list[AccuracyJob]:
    """Name a training a seed, each with its folder in ``work``."""
    return [
        AccuracyJob(task, settings, seed, work / f"{task.name}-{settings['model']}-{seed}")
        for seed in range(seeds)
    ]


def train_all(jobs: Sequence[AccuracyJob], data: Path, threads: int) -> dict[Path, Trained]:
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
                stderr.print(f"{folder.name}: {accuracy:.1f}% on validation", highlight=False)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run keep their state
            raise
    return trained


def _train(job: AccuracyJob, data: Path) -> Trained:
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
    task: AccuracyTask,
    settings: dict[str, Any],
    goal: float,
    jobs: Sequence[AccuracyJob],
    trained: dict[Path, Trained],
) -> ModelAccuracy:
    """Gather the seeds of one kind of model on one data set."""
    choice, config = resolve({**settings, "seed": 0})
    model = checkpoint.load(jobs[0].folder).model
    kept = [tensor for tensor in model.trained_state().values() if tensor.is_floating_point()]
    count = sum(tensor.numel() for tensor in kept)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return ModelAccuracy(
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


def _baseline(task: AccuracyTask, data: Path) -> Baseline:
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


def mean(model: ModelAccuracy) -> float:
    """Return the mean test accuracy over the seeds, in percent."""
    return 100 * float(np.mean([run.test_accuracy for run in model.runs]))


def check(accuracy: AccuracyFigures) -> None:
    """Raise ``CheckFailedError`` if a goal is missed."""
    missed = [
        f"{model.task} {model.choice.kind} {mean(model):.1f}%, not {model.goal:g}%"
        for model in accuracy.models
        if mean(model) < model.goal - 1e-9
    ]
    if missed:
        raise CheckFailedError(f"Below the goal: {'; '.join(missed)}.")


def markdown(accuracy: AccuracyFigures) -> str:
    """Lay the accuracies out as a table."""
    columns = (
        "texts",
        "model",
        "trained parameters",
        "seeds",
        "test: mean",
        "range",
        "validation: mean",
        "goal",
    )
    rows: list[tuple[str, ...]] = []
    for baseline in accuracy.baselines:
        score = f"{100 * baseline.test_accuracy:.1f}%"
        rows.append((baseline.task, "tf-idf, linear SVM", "", "", score, "", "", ""))
        rows += [_cells(model) for model in accuracy.models if model.task == baseline.task]
    return tables.markdown(Table(columns, rows))


def _cells(model: ModelAccuracy) -> tuple[str, ...]:
    scores = [100 * run.test_accuracy for run in model.runs]
    valid = 100 * float(np.mean([run.valid_accuracy for run in model.runs]))
    backbone = f" on {model.choice.backbone}" if model.choice.backbone else ""
    share = model.trained_parameters / (model.trained_parameters + model.backbone_parameters)
    percent = f"{100 * share:.2f}" if model.backbone_parameters else "100"
    return (
        model.task,
        f"`{model.choice.kind}`{backbone}",
        f"{model.trained_parameters:,} ({percent}%)",
        str(len(scores)),
        f"{mean(model):.1f}%",
        f"{min(scores):.1f} to {max(scores):.1f}%",
        f"{valid:.1f}%",
        f"{model.goal:g}%",
    )


STUDY = Study("accuracy", AccuracyFigures, measure, markdown, check)
