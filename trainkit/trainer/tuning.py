"""The search for good settings: Optuna's trials, in an SQLite file that processes may share.

The best settings are written beside the study, as a TOML file for ``trainkit train --config``.
Trials use train and validation only.
"""

import contextlib
import math
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import optuna
from optuna.storages import RDBStorage
from optuna.trial import Trial, TrialState

from trainkit.data.splits import Splits
from trainkit.models.config import Kind
from trainkit.serve.errors import InputError
from trainkit.serve.files import write_atomically
from trainkit.trainer.callbacks import Epoch, NoCallback
from trainkit.trainer.loop import fit
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run_folder import fingerprint
from trainkit.trainer.settings import resolve, to_toml
from trainkit.trainer.setup import seed_everything
from trainkit.trainer.train_step import DivergedError

NAME = SHAPE = "trainkit"  # of the study in its file, and of the attribute that holds its shape
WAIT_S = 60  # for the lock of another process that writes
PrunerName = Literal["median", "halving", "none"]


class FloatRange(NamedTuple):
    """The numbers from ``low`` to ``high``, on a logarithmic scale or not."""

    low: float
    high: float
    log: bool = False


# Around the defaults of each kind. A tuple is a choice.
RATES: dict[Kind, FloatRange] = {
    "simple": FloatRange(2e-4, 1e-2, log=True),
    "prefix": FloatRange(1e-3, 5e-2, log=True),
    "finetune": FloatRange(1e-5, 3e-4, log=True),
}
SPACE: dict[str, FloatRange | tuple[int, ...]] = {
    "head_learning_rate": FloatRange(1e-4, 1e-2, log=True),
    "batch_size": (16, 32, 64),
    "weight_decay": FloatRange(0.0, 0.2),
    "warmup_share": FloatRange(0.0, 0.3),
    "label_smoothing": FloatRange(0.0, 0.2),
    "dropout": FloatRange(0.0, 0.6),
}
PREFIX_LENGTHS = (4, 8, 16, 32, 64)


class StudySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all trials of one study share."""

    data_sha256: str
    fixed: dict[str, Any]
    searched: list[str]


class TuningResult(NamedTuple):
    """The best trial of a study so far: its validation accuracy, and the file of its settings."""

    trial: int
    valid_accuracy: float
    searched: dict[str, Any]
    finished: int
    config: Path


def tune(
    fixed: Mapping[str, Any],
    splits: Splits,
    file: Path,
    *,
    trials: int,
    pruner: PrunerName = "median",
    on_progress: Callable[[str], None] = lambda line: None,
) -> TuningResult:
    """Add trials to the study in ``file`` until ``trials`` are finished; make it where it is not.

    Settings in ``fixed`` (by option, ``model`` among them) are the same in every trial. Processes
    that work at one study at the same time may each finish one more. Raises ``InputError`` if
    ``file`` holds anything else than a study of these settings and this data: it is left as it is.
    """
    spec, config = resolve(fixed)
    seen = Splits(splits.train, splits.valid, ())  # nothing may be chosen by the test set
    space = {name: values for name, values in _space(spec.kind).items() if name not in fixed}
    if not space:
        raise InputError("every setting is given, nothing is left to choose; give fewer.")
    shape = StudySpec(fingerprint(seen), dict(fixed), sorted(space))
    best = file.with_suffix(".toml")
    if best == file:
        raise InputError(f"{file} is where the best settings go; give --study another suffix.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _opened(file, shape, best) as study:
        study.pruner = _pruner(pruner)
        while _finished(study) < trials:
            trial = study.ask()
            # By number: a study is repeatable, and processes that share it do not try the same.
            study.sampler = optuna.samplers.TPESampler(
                seed=(config.seed + trial.number) % 2**32, multivariate=False
            )
            on_progress(_try(study, trial, fixed, space, seen))
            _write_best(study, fixed, best)
        return _write_best(study, fixed, best) or _nothing(file)


def _space(kind: Kind) -> dict[str, FloatRange | tuple[int, ...]]:
    prefix = {"prefix_length": PREFIX_LENGTHS} if kind == "prefix" else {}
    return {"learning_rate": RATES[kind], **SPACE, **prefix}


def _pruner(name: PrunerName) -> optuna.pruners.BasePruner:
    """Epochs are the steps: no trial is ended by its first."""
    if name == "median":
        # Steps count from 1 here, and those below n_warmup_steps are spared.
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    return optuna.pruners.NopPruner()


class PruningCallback(NoCallback):
    """Reports each epoch to the Optuna trial, which its pruner may end."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def epoch(self, result: Epoch) -> None:
        """Report the accuracy; raise ``TrialPruned`` if the trial is to end."""
        self.trial.report(result.validation["valid_accuracy"], result.epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"pruned after epoch {result.epoch}")


def _try(
    study: optuna.Study,
    trial: Trial,
    fixed: Mapping[str, Any],
    space: Mapping[str, FloatRange | tuple[int, ...]],
    splits: Splits,
) -> str:
    """Train once and tell the study; return a line on it."""
    settings = {name: _suggest(trial, name, values) for name, values in space.items()}
    line = f"Trial {trial.number:3d} | " + ", ".join(
        f"{name} {value:.3g}" for name, value in settings.items()
    )
    try:
        accuracy = _accuracy({**fixed, **settings}, splits, PruningCallback(trial))
    except (optuna.TrialPruned, DivergedError) as reason:
        study.tell(trial, state=TrialState.PRUNED)
        return f"{line} | {reason}"
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    study.tell(trial, accuracy)
    return f"{line} | val acc {100 * accuracy:.1f}%"


def _suggest(trial: Trial, name: str, values: FloatRange | tuple[int, ...]) -> float:
    if isinstance(values, FloatRange):
        return trial.suggest_float(name, values.low, values.high, log=values.log)
    return trial.suggest_categorical(name, values)


def _accuracy(settings: Mapping[str, Any], splits: Splits, watch: PruningCallback) -> float:
    """Train as a run does; return the best epoch's validation accuracy."""
    spec, config = resolve(settings)
    seed_everything(config.seed)
    new = make_model(spec, splits, config)
    with tempfile.TemporaryDirectory() as folder:
        trained = fit(new, splits, config, Path(folder), watch, save_every_s=math.inf)
    if trained.interrupted:
        raise KeyboardInterrupt
    return trained.best.validation["valid_accuracy"]


def _finished(study: optuna.Study) -> int:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=states))


def _write_best(study: optuna.Study, fixed: Mapping[str, Any], file: Path) -> TuningResult | None:
    """Write the best settings so far; None where no trial came to its end."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    best = study.best_trial
    assert best.value is not None
    write_atomically(file, to_toml(*resolve({**fixed, **best.params})))
    return TuningResult(best.number, best.value, best.params, _finished(study), file)


def _nothing(file: Path) -> TuningResult:
    raise InputError(
        f"no trial of {file} came to its end: each was pruned or its loss stopped being a number; "
        "give more --trials, or a --learning-rate that works."
    )


@contextlib.contextmanager
def _opened(file: Path, shape: StudySpec, best: Path) -> Iterator[optuna.Study]:
    """Open the study in ``file``, or make it; raises ``InputError`` if it is another one."""
    if not file.exists():
        if best.exists():
            raise InputError(f"{best} exists already, without its study; choose another --study.")
        _create(file, shape)
    _check_tables(file)
    try:
        storage = _storage(file, skip_table_creation=True)
        study = optuna.load_study(study_name=NAME, storage=storage)
        found = msgspec.convert(study.user_attrs.get(SHAPE), StudySpec)
    except (KeyError, RuntimeError, msgspec.ValidationError):
        raise InputError(
            f"{file} holds no study of this trainkit and this Optuna; choose another --study."
        ) from None
    try:
        _check_shape(file, found, shape)
        yield study
    except optuna.exceptions.StorageInternalError as error:
        raise InputError(
            f"{file} cannot be read or written ({error.__cause__ or error}); what it held is kept."
        ) from None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _storage(file: Path, **settings: Any) -> RDBStorage:
    wait = {"connect_args": {"timeout": WAIT_S}}
    return RDBStorage(f"sqlite:///{file.resolve()}", engine_kwargs=wait, **settings)


def _create(file: Path, shape: StudySpec) -> None:
    """Make the study under another name, then link it: processes that begin at once share one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = _storage(partial)
        study = optuna.create_study(study_name=NAME, storage=storage, direction="maximize")
        study.set_user_attr(SHAPE, msgspec.to_builtins(shape))
        storage.remove_session()
        storage.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another process was first: its study is used
            file.hardlink_to(partial)
    except OSError as error:
        raise InputError(
            f"{file} cannot be made ({error.strerror}); choose another --study."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _check_tables(file: Path) -> None:
    """Refuse what is no study, without a write to it: Optuna would add its tables."""
    try:
        uri = f"{file.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=WAIT_S)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{file} is not an SQLite file ({error}); choose another --study."
        ) from None
    if not {"studies", "trials", "version_info"} <= tables:
        raise InputError(f"{file} is not an Optuna study; choose another --study.")


def _check_shape(file: Path, found: StudySpec, wanted: StudySpec) -> None:
    before, now = found.fixed, wanted.fixed
    changed = [
        f"{name} was {before.get(name, 'not given')} and is {now.get(name, 'not given')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if found.data_sha256 != wanted.data_sha256:
        changed.append("its data was other data")
    if found.searched != wanted.searched and not changed:
        changed.append(f"it chooses {', '.join(found.searched)}")
    if changed:
        raise InputError(
            f"{file} is the study of another search ({'; '.join(changed)}); go on with what it "
            "was begun with, or choose another --study."
        )
