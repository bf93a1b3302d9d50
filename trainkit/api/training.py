"""``trainkit.train``: settings and data to a run."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from trainkit.api.inputs import Folder, note
from trainkit.api.models import Run
from trainkit.api.option_types import TrainOptions
from trainkit.api.signatures import takes_fields
from trainkit.data.columns import Columns, Labels
from trainkit.serve.errors import InputError
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run_config import DataSpec, ModelSpec

if TYPE_CHECKING:
    from trainkit.data.splits import Splits
    from trainkit.models.config import Kind
    from trainkit.trainer.callbacks import TrainingCallback
    from trainkit.trainer.range_test import RangeTest


class TrainingTask(NamedTuple):
    """A training to begin, or to resume; ``find_rate``: its learning rate is still to be found."""

    spec: ModelSpec
    config: TrainConfig
    splits: "Splits"
    source: DataSpec | None
    folder: Path
    find_rate: bool = False
    resumed: bool = False


@takes_fields(ModelSpec, TrainConfig, without=("kind",), later=True)
def train(
    data: Any = None,
    labels: Sequence[str | int] | None = None,
    *,
    model: "Kind | None" = None,
    test: Any = None,
    config: Folder | None = None,
    resume: Folder | None = None,
    runs: Folder = "runs",
    name: str | None = None,
    save_every_s: float = 60.0,
    tensorboard: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
    trec_labels: Labels = "coarse",
    on_progress: "TrainingCallback | None" = None,
    **options: Unpack[TrainOptions],
) -> Run:
    """Train a classifier into the folder ``runs/name``, and return the run.

    ``data`` is a file, a folder or "sample" (the project's own questions), a list of texts with
    their ``labels``, a pandas DataFrame, a datasets.Dataset or a DatasetDict; ``test`` is of the
    same kind, for lists a pair (texts, labels). Each split that is not given is a tenth of the
    training texts. ``text_column`` and ``label_column`` name the columns of a file or a table, and
    ``trec_labels`` the labels of a TREC file.

    ``model`` is "simple" (from scratch), "prefix" (a frozen encoder with trained prefixes) or
    "finetune". ``config`` is a TOML file of settings; options win over it, and what neither names
    has the default of its kind of model. ``resume`` continues the run in that folder with its own
    settings and data; its state is saved every ``save_every_s`` seconds. ``tensorboard`` writes
    event files.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("torchrun starts the command: torchrun ... -m trainkit train ...")
    columns = Columns(trec_labels, text_column, label_column)
    settings = {"model": model, **options}
    if resume is not None:
        own = {"data": data, "labels": labels, "test": test, "config": config, "name": name}
        own |= {"text_column": text_column, "label_column": label_column, **settings}
        if given := [key for key, value in own.items() if value is not None]:
            raise InputError(
                f"{', '.join(given)} cannot be given with resume: the run keeps its own settings."
            )
        task = resumed_task(Path(resume))
    else:
        task = new_task(data, settings, columns, labels, test, config, Path(runs), name)
    run = run_task(task, save_every_s, tensorboard, lambda epochs: _bar(epochs, on_progress))
    assert run is not None  # without torchrun
    return run


def new_task(
    data: Any,
    settings: Mapping[str, Any],
    columns: Columns,
    labels: Sequence[str | int] | None = None,
    test: Any = None,
    config: Folder | None = None,
    runs: Path = Path("runs"),
    name: str | None = None,
) -> TrainingTask:
    """Check the settings of a new training, of which None ones are not given, and read its data."""
    from trainkit.data.in_memory import splits_from
    from trainkit.trainer.settings import check_effect, resolve

    given = {key: value for key, value in settings.items() if value is not None}
    if data is None or ("model" not in given and config is None):
        raise InputError(
            "--data and --model are needed (or --config FILE in place of --model), or --resume RUN."
        )
    if find_rate := given.get("learning_rate") == "auto":
        del given["learning_rate"]
    spec, training = resolve(given, None if config is None else Path(config))
    check_effect(given, spec)
    source = None
    if isinstance(data, str | os.PathLike):
        data = _absolute(data)
        test = _absolute(test) if isinstance(test, str | os.PathLike) else test
        source = DataSpec(data=data, test=test, columns=columns)
    splits = splits_from(data, labels, columns=columns, test=test, seed=training.seed)
    folder = runs / (name or f"{spec.kind}-{datetime.now():%Y%m%d-%H%M%S}")
    return TrainingTask(spec, training, splits, source, folder, find_rate=find_rate)


def resumed_task(folder: Path) -> TrainingTask:
    """Read the settings and the data of a run that was cut off."""
    from trainkit.data.in_memory import splits_from
    from trainkit.trainer import run_folder

    folder = folder.resolve()  # not runs/latest, a link that will point elsewhere
    earlier = run_folder.read(folder)
    source, training = earlier.source, earlier.training
    if source is None:
        raise InputError(
            f"{folder} was trained on data in memory: it cannot be resumed; train again."
        )
    splits = splits_from(source.data, columns=source.columns, test=source.test, seed=training.seed)
    return TrainingTask(earlier.model, training, splits, source, folder, resumed=True)


def run_task(
    task: TrainingTask,
    save_every_s: float,
    tensorboard: bool,
    bar: "Callable[[int], AbstractContextManager[TrainingCallback]]",
) -> Run | None:
    """Train; None in a process of torchrun's that is not the main one.

    ``bar`` is called with the number of epochs, in the main process alone.
    """
    from trainkit.trainer.distributed import init
    from trainkit.trainer.run import train as train_in
    from trainkit.trainer.run import train_worker

    config, tested = _with_rate(task) if task.find_rate else (task.config, None)
    with init() as group:
        if not group.is_main:
            train_worker(task.spec, task.splits, config, task.folder, group)
            return None
        with (
            bar(config.epochs) as shown,
            _event_files(shown, task.folder, tensorboard) as callback,
        ):
            result = train_in(
                task.spec,
                task.splits,
                config,
                task.folder,
                callback,
                source=task.source,
                resume=task.resumed,
                save_every_s=save_every_s,
                tested=tested,
                report=True,
                group=group,
            )
    return Run(result)


def _absolute(path: "str | os.PathLike[str]") -> str:
    return "sample" if path == "sample" else str(Path(path).resolve())


def _with_rate(task: TrainingTask) -> "tuple[TrainConfig, RangeTest]":
    """Find the learning rate, and report it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "--learning-rate auto trains in one process: find the rate without torchrun first."
        )
    from trainkit.trainer.range_test import choose

    config, tested = choose(task.spec, task.splits, task.config)
    note(str(tested))
    return config, tested


def _bar(
    epochs: int, given: "TrainingCallback | None"
) -> "AbstractContextManager[TrainingCallback]":
    """Return the caller's callback, else a progress bar if standard error is a terminal."""
    if given is None and sys.stderr.isatty():
        from trainkit.console import TrainingBar

        return TrainingBar(epochs)
    from trainkit.trainer.callbacks import NoCallback

    return nullcontext(given or NoCallback())


def _event_files(
    callback: "TrainingCallback", folder: Path, tensorboard: bool
) -> "AbstractContextManager[TrainingCallback]":
    if not tensorboard:
        return nullcontext(callback)
    from trainkit.trainer.event_files import EventFiles

    return EventFiles(folder, callback)
