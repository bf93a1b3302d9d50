"""One training run from start to end: a folder, a model, its training, temperature and scores."""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainkit.data.readers import Example
from trainkit.data.splits import Splits
from trainkit.models import classifier
from trainkit.models.sources import CHECKPOINT
from trainkit.serve.calibration import NoBestTemperatureError, fit_temperature
from trainkit.serve.classifier import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, remove_empty, write_atomically
from trainkit.serve.types import FloatArray
from trainkit.trainer import checkpoint, run_folder, state
from trainkit.trainer.callbacks import NoCallback, TrainingCallback
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.loop import SAVE_EVERY_S, TrainingResult, fit
from trainkit.trainer.metrics import Evaluation, evaluate
from trainkit.trainer.new_model import make_model
from trainkit.trainer.peft_adapter import write_adapter
from trainkit.trainer.run_config import DataSpec, ModelSpec
from trainkit.trainer.run_folder import CONFIG, RunConfig, fingerprint
from trainkit.trainer.setup import seed_everything

if TYPE_CHECKING:
    from trainkit.trainer.range_test import RangeTest

VALIDATION = "valid.json"
VALIDATED = "validated"  # the model that validation scores, where the kept one is a refit
EVALUATION = "test.json"
REPORTED_TEXTS = 20_000  # of train, which are looked through for wrong labels
COMPARED_TEXTS = 16  # of the test set, between a prefix and its PEFT adapter


class RunResult(NamedTuple):
    """A finished run: its folder, what training gave, scores on validation and test, and notes.

    ``no_temperature`` says why none was kept, else it is empty.
    """

    folder: Path
    trained: TrainingResult
    valid: Evaluation
    test: Evaluation
    no_temperature: str = ""
    notes: tuple[str, ...] = ()


def train(
    spec: ModelSpec,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: TrainingCallback | None = None,
    *,
    source: DataSpec | None = None,
    resume: bool = False,
    save_every_s: float = SAVE_EVERY_S,
    tested: "RangeTest | None" = None,
    report: bool = False,
    group: ProcessGroup = SINGLE,
) -> RunResult:
    """Train into ``folder``, score the test set once, and point ``latest`` at the folder.

    ``folder`` must not exist, or with ``resume`` hold an unfinished run of the same settings and
    data. An error or interrupt before the first saved state leaves no new folder. ``source`` (for
    ``--resume``) and the curve of ``tested``, by which the learning rate in ``config`` was chosen,
    are kept in the folder; with ``report`` it gets ``report.html`` too.

    Of a ``group`` the main process calls this, the others :func:`train_worker`.
    """
    if report:
        import trainkit.trainer.report  # noqa: F401  # missing packages are reported now, not later
    run_config = RunConfig(
        model=spec, training=config, data_sha256=fingerprint(splits), source=source
    )
    with nullcontext() if resume else _new_folder(folder):
        if resume:
            _check_unfinished(folder)
            run_folder.check_resumed(folder, run_config)
        else:
            run_folder.write(folder, run_config)
            if tested is not None:
                tested.write(folder)
        callback = progress or NoCallback()
        models = _fit_models(spec, splits, config, folder, callback, save_every_s, group)
        return _finish(models, splits, run_config, folder, report)


def train_worker(
    spec: ModelSpec, splits: Splits, config: TrainConfig, folder: Path, group: ProcessGroup
) -> None:
    """Train along with the main process of ``group``, which writes ``folder``."""
    _fit_models(spec, splits, config, folder, NoCallback(), math.inf, group)


class _FittedModels(NamedTuple):
    """The classifier that validation scores and the one that is kept: the same without a refit.

    ``result`` has the history of the first and the model of the second.
    """

    validated: Classifier
    kept: Classifier
    result: TrainingResult


def _fit_models(
    spec: ModelSpec,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    callback: TrainingCallback,
    save_every_s: float,
    group: ProcessGroup,
) -> _FittedModels:
    def fit_into(
        home: Path, splits: Splits, until: int | None = None
    ) -> tuple[Classifier, TrainingResult]:
        if group.is_main:
            home.mkdir(exist_ok=True)
        seed_everything(config.seed)
        new = make_model(spec, splits, config)
        result = fit(new, splits, config, home, callback, save_every_s, group, until)
        runner = classifier.torch_runner(result.model)
        return Classifier(new.encoder, runner, new.model.config.labels), result

    if not config.refit:
        model, result = fit_into(folder, splits)
        return _FittedModels(model, model, result)
    validated, result = fit_into(folder / VALIDATED, splits)
    if result.interrupted:  # the model that is to be kept has not been started
        raise KeyboardInterrupt
    callback.refit()
    # Up to the epoch that was kept: the last one, or the best one if the training stopped early.
    # Choosing between the epochs of a whole schedule by few texts would be choosing by chance, and
    # before the last one the rates have not fallen yet.
    both = Splits(splits.train + splits.valid, (), splits.test)
    kept, refitted = fit_into(folder, both, result.best.epoch)
    return _FittedModels(validated, kept, result._replace(model=refitted.model))


def _finish(
    models: _FittedModels, splits: Splits, run_config: RunConfig, folder: Path, report: bool
) -> RunResult:
    """Calibrate and score the models, and write the rest of the run's folder."""
    result, labels = models.result, models.kept.labels
    valid_logits = _logits(models.validated, splits.valid)
    temperature, no_temperature = 1.0, ""
    try:
        columns = [labels.index(example.label) for example in splits.valid]
        temperature = fit_temperature(valid_logits, columns)
    except NoBestTemperatureError as error:
        no_temperature = str(error)
    valid = _evaluate(valid_logits, splits.valid, labels, temperature)
    checkpoint.calibrate(
        folder,
        None if no_temperature else temperature,
        {
            **result.best.validation,
            "valid_raw_calibration_error": valid.raw_calibration_error,
            "valid_calibration_error": valid.calibration_error,
        },
    )
    test_logits = _logits(models.kept, splits.test)
    test = _evaluate(test_logits, splits.test, labels, temperature)
    texts = [example.text for example in splits.test[:COMPARED_TEXTS]]
    note = write_adapter(folder, result.model, models.kept.encoder, texts)
    notes = () if note is None else (note,)
    run = RunResult(folder, result, valid, test, no_temperature, notes)
    if report:
        _write_report(run, run_config, splits, models.kept, (valid_logits, test_logits))
    write_atomically(folder / VALIDATION, pretty_json(valid))
    write_atomically(folder / EVALUATION, pretty_json(test))
    checkpoint.point_latest(folder)
    if not result.interrupted:
        state.delete(folder)
        state.delete(folder / VALIDATED)
    return run


def _write_report(
    run: RunResult,
    run_config: RunConfig,
    splits: Splits,
    model: Classifier,
    logits: tuple[FloatArray, FloatArray],
) -> None:
    from trainkit.trainer import report

    train = splits.train[:REPORTED_TEXTS]
    page = report.html(
        report.Sections(
            title=f"Run {run.folder.name}",
            spec=run_config.model,
            config=run_config.training,
            splits=splits,
            labels=model.labels,
            history=run.trained.history,
            best=run.trained.best,
            train=report.ScoredExamples("Training texts", train, _logits(model, train)),
            valid=report.ScoredExamples("Validation texts", splits.valid, logits[0]),
            test=report.ScoredExamples("Test texts", splits.test, logits[1]),
            scores=(run.valid, run.test),
            no_temperature=run.no_temperature,
        )
    )
    write_atomically(run.folder / report.REPORT, page.encode())


def _logits(model: Classifier, examples: Sequence[Example]) -> FloatArray:
    return model.logits([example.text for example in examples])


def _evaluate(
    logits: FloatArray, examples: Sequence[Example], labels: Sequence[str], temperature: float
) -> Evaluation:
    return evaluate(logits, [example.label for example in examples], labels, temperature)


def _check_unfinished(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a run (no {CONFIG}); name one with --resume.")
    if (folder / EVALUATION).is_file() and not (folder / state.STATE).is_file():
        raise InputError(f"{folder} is finished; there is nothing to resume.")


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make the run's folder; remove it again if nothing came to be in it that is worth keeping."""
    latest = folder.parent / checkpoint.LATEST
    if folder.name == checkpoint.LATEST or (latest.exists() and not latest.is_symlink()):
        raise InputError(
            f"{latest} is the link to the newest run, not a run; "
            "choose another --name, or move what is there."
        )
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{folder} exists already; choose another --name.") from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}); choose another --runs."
        ) from None
    try:
        yield
    finally:
        homes = (folder, folder / VALIDATED)
        kept = (CHECKPOINT, state.STATE)
        if not any((home / name).exists() for home in homes for name in kept):
            shutil.rmtree(folder)
            remove_empty(made)
