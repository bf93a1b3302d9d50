"""One training run from start to end: a folder, a model, its training, its score on test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from trainkit.data.splits import Splits
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.models import classifier
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, remove_empty, write_atomically
from trainkit.trainer import checkpoint
from trainkit.trainer.adapter import write_adapter
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.loop import SAVE_EVERY_S, Trained, seed_everything, train
from trainkit.trainer.metrics import Evaluation, evaluate
from trainkit.trainer.plan import PLAN, DataSource, ModelChoice, Plan, fingerprint
from trainkit.trainer.progress import Progress
from trainkit.trainer.state import STATE

if TYPE_CHECKING:
    from trainkit.trainer.range_test import RangeTest  # which needs matplotlib

__all__ = ["EVALUATION", "ModelChoice", "Run", "start"]

EVALUATION = "test.json"
SCRATCH_MAX_LENGTH = 128
COMPARED_TEXTS = 16  # of the test set, between a prefix and its PEFT adapter


class Run(NamedTuple):
    """A finished run: its folder, what training gave, the score on the test split, and notes."""

    folder: Path
    trained: Trained
    test: Evaluation
    notes: tuple[str, ...] = ()


def start(
    choice: ModelChoice,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: Progress | None = None,
    *,
    source: DataSource | None = None,
    resume: bool = False,
    save_every_s: float = SAVE_EVERY_S,
    tested: "RangeTest | None" = None,
) -> Run:
    """Train into ``folder``, score test once, point ``latest`` at it.

    ``folder`` must not exist, or with ``resume`` hold a run of the same settings and data that did
    not come to its end. An error or interrupt before the first saved state leaves no new folder.
    ``source`` is kept beside the settings, for whoever resumes, and the curve of ``tested``, by
    which the rate in ``config`` was chosen, in the folder.
    """
    plan = Plan(model=choice, training=config, data_sha256=fingerprint(splits), source=source)
    if resume:
        _check_unfinished(folder)
        plan.check_resumed(folder)
        return _run(choice, splits, config, folder, progress, save_every_s)
    with _fresh(folder):
        plan.write(folder)
        if tested is not None:
            tested.write(folder)
        return _run(choice, splits, config, folder, progress, save_every_s)


def _run(
    choice: ModelChoice,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: Progress | None,
    save_every_s: float,
) -> Run:
    seed_everything(config.seed)
    new = make_model(choice, splits)
    trained = train(new, splits, config, folder, progress, save_every_s)
    answer = Classifier(
        new.encoder, classifier.torch_runner(trained.model), new.model.config.labels
    )
    texts = [example.text for example in splits.test]
    test = evaluate(answer.logits(texts), [example.label for example in splits.test], answer.labels)
    write_atomically(folder / EVALUATION, pretty_json(test))
    note = write_adapter(folder, trained.model, new.encoder, texts[:COMPARED_TEXTS])
    checkpoint.point_latest(folder)
    return Run(folder, trained, test, () if note is None else (note,))


def _check_unfinished(folder: Path) -> None:
    if not (folder / PLAN).is_file():
        raise InputError(f"{folder} is not a run (no {PLAN}); name one with --resume.")
    if (folder / EVALUATION).is_file() and not (folder / STATE).is_file():
        raise InputError(f"{folder} is finished; there is nothing to go on with.")


def make_model(choice: ModelChoice, splits: Splits) -> classifier.NewModel:
    """Make the untrained model that ``choice`` names, with a vocabulary where it needs one."""
    vocabulary = None
    if choice.backbone is None:
        texts = [example.text for example in splits.train]
        limit = SCRATCH_MAX_LENGTH if choice.max_length is None else choice.max_length
        vocabulary = TextEncoder(word_tokenizer(texts, choice.min_count), limit, PAD_ID)
    # A model from scratch sees few texts and forgets to generalise without more dropout.
    dropout = choice.dropout if choice.dropout is not None else 0.1 if choice.backbone else 0.5
    return classifier.new(
        choice.kind,
        splits.label_names,
        backbone_name=choice.backbone,
        vocabulary=vocabulary,
        prefix_length=choice.prefix_length,
        prefix_hidden=choice.projection_size,
        max_length=choice.max_length,
        dropout=dropout,
        head="own" if choice.head == "own" else msgspec.UNSET,
    )


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
        if not any((folder / name).exists() for name in (checkpoint.CHECKPOINT, STATE)):
            shutil.rmtree(folder)
            remove_empty(made)
