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

__all__ = ["EVALUATION", "VALIDATED", "VALIDATION", "RunResult", "train", "train_worker"]

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
    """Train into ``folder``, score test once, point ``latest`` at it.

    ``folder`` must not exist, or with ``resume`` hold a run of the same settings and data that did
    not come to its end. An error or interrupt before the first saved state leaves no new folder.
    ``source`` is kept beside the settings, for whoever resumes, and the curve of ``tested``, by
    which the rate in ``config`` was chosen, in the folder. ``report`` writes ``report.html`` too.

    In a ``group`` it is for the process that leads; the others :func:`follow`.
    """
    if report:
        import trainkit.trainer.report  # noqa: F401  # what it needs is missing now, not afterwards
    run_config = RunConfig(
        model=spec, training=config, data_sha256=fingerprint(splits), source=source
    )
    with nullcontext() if resume else _fresh(folder):
        if resume:
            _check_unfinished(folder)
            run_folder.check_resumed(folder, run_config)
        else:
            run_folder.write(folder, run_config)
            if tested is not None:
                tested.write(folder)
        fitting = _Fitting(spec, config, folder, progress or NoCallback(), save_every_s, group)
        answer, trained = fitting.validated(splits)
        validated = _validate(answer, splits.valid)
        if config.refit:
            answer, kept = fitting.refit(splits, trained)
            trained = trained._replace(model=kept.model)
        return _finish(answer, trained, validated, splits, run_config, folder, report)


def train_worker(
    spec: ModelSpec, splits: Splits, config: TrainConfig, folder: Path, group: ProcessGroup
) -> None:
    """Train along with the process of ``group`` that leads, which writes ``folder``."""
    fitting = _Fitting(spec, config, folder, NoCallback(), math.inf, group)
    trained = fitting.validated(splits)[1]
    if config.refit:
        fitting.refit(splits, trained)


class _Fitting(NamedTuple):
    """How the one or two trainings of a run are made: each into a folder of its own."""

    spec: ModelSpec
    config: TrainConfig
    folder: Path
    progress: TrainingCallback
    save_every_s: float
    group: ProcessGroup

    def validated(self, splits: Splits) -> tuple[Classifier, TrainingResult]:
        """Train the model that the validation texts score and calibrate."""
        if self.config.refit is not True:
            return self._fit(splits, self.folder)
        answer, trained = self._fit(splits, self.folder / VALIDATED)
        if trained.interrupted:  # the model that is to be kept has not begun
            raise KeyboardInterrupt
        return answer, trained

    def refit(self, splits: Splits, validated: TrainingResult) -> tuple[Classifier, TrainingResult]:
        """Train anew on the validation texts too, up to the epoch that the first model was kept at.

        That is the last one, or the best one where the first training was stopped early. Between
        epochs of a whole schedule none is chosen: by few texts, that is to choose by chance, and
        before the last one the rates have not fallen yet.
        """
        self.progress.refit()
        both = Splits(splits.train + splits.valid, (), splits.test)
        return self._fit(both, self.folder, validated.best.epoch)

    def _fit(
        self, splits: Splits, folder: Path, until: int | None = None
    ) -> tuple[Classifier, TrainingResult]:
        if self.group.is_main:
            folder.mkdir(exist_ok=True)
        seed_everything(self.config.seed)
        new = make_model(self.spec, splits, self.config)
        trained = fit(
            new, splits, self.config, folder, self.progress, self.save_every_s, self.group, until
        )
        runner = classifier.torch_runner(trained.model)
        return Classifier(new.encoder, runner, new.model.config.labels), trained


class _Validated(NamedTuple):
    """What the validation texts said: (N, C) logits, their scores, and the fitted temperature."""

    logits: FloatArray
    scores: Evaluation
    temperature: float
    no_temperature: str


def _validate(answer: Classifier, examples: Sequence[Example]) -> _Validated:
    logits = _logits(answer, examples)
    columns = [answer.labels.index(example.label) for example in examples]
    temperature, no_temperature = 1.0, ""
    try:
        temperature = fit_temperature(logits, columns)
    except NoBestTemperatureError as error:
        no_temperature = str(error)
    scores = _evaluate(answer, logits, examples, temperature)
    return _Validated(logits, scores, temperature, no_temperature)


def _finish(
    answer: Classifier,
    trained: TrainingResult,
    validated: _Validated,
    splits: Splits,
    run_config: RunConfig,
    folder: Path,
    report: bool,
) -> RunResult:
    """Score and calibrate what was trained, and write what the run's folder holds beside it."""
    _, valid, temperature, no_temperature = validated
    checkpoint.calibrate(
        folder,
        None if no_temperature else temperature,
        {
            **trained.best.validation,
            "valid_raw_calibration_error": valid.raw_calibration_error,
            "valid_calibration_error": valid.calibration_error,
        },
    )
    test_logits = _logits(answer, splits.test)
    test = _evaluate(answer, test_logits, splits.test, temperature)
    texts = [example.text for example in splits.test[:COMPARED_TEXTS]]
    note = write_adapter(folder, trained.model, answer.encoder, texts)
    notes = () if note is None else (note,)
    run = RunResult(folder, trained, valid, test, no_temperature, notes)
    if report:
        _write_report(run, run_config, splits, answer, (validated.logits, test_logits))
    write_atomically(folder / VALIDATION, pretty_json(valid))
    write_atomically(folder / EVALUATION, pretty_json(test))
    checkpoint.point_latest(folder)
    if not trained.interrupted:
        state.delete(folder)
        state.delete(folder / VALIDATED)
    return run


def _write_report(
    run: RunResult,
    run_config: RunConfig,
    splits: Splits,
    answer: Classifier,
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
            labels=answer.labels,
            history=run.trained.history,
            best=run.trained.best,
            train=report.ScoredExamples("Training texts", train, _logits(answer, train)),
            valid=report.ScoredExamples("Validation texts", splits.valid, logits[0]),
            test=report.ScoredExamples("Test texts", splits.test, logits[1]),
            scores=(run.valid, run.test),
            no_temperature=run.no_temperature,
        )
    )
    write_atomically(run.folder / report.REPORT, page.encode())


def _logits(answer: Classifier, examples: Sequence[Example]) -> FloatArray:
    return answer.logits([example.text for example in examples])


def _evaluate(
    answer: Classifier, logits: FloatArray, examples: Sequence[Example], temperature: float
) -> Evaluation:
    return evaluate(logits, [example.label for example in examples], answer.labels, temperature)


def _check_unfinished(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a run (no {CONFIG}); name one with --resume.")
    if (folder / EVALUATION).is_file() and not (folder / state.STATE).is_file():
        raise InputError(f"{folder} is finished; there is nothing to go on with.")


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
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
        kept = (checkpoint.CHECKPOINT, state.STATE)
        if not any((home / name).exists() for home in homes for name in kept):
            shutil.rmtree(folder)
            remove_empty(made)
