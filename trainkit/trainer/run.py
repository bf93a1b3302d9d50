"""One training run from start to end: a folder, a model, its training, its score on test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from trainkit.data.splits import Splits
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.models import classifier
from trainkit.models.config import Kind
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, remove_empty, write_atomically
from trainkit.trainer import checkpoint
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.loop import Progress, Trained, seed_everything, train
from trainkit.trainer.metrics import Evaluation, evaluate

__all__ = ["EVALUATION", "ModelChoice", "Run", "start"]

EVALUATION = "test.json"
SCRATCH_MAX_LENGTH = 128


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which model to train; ``max_length`` (tokens) None for all that the encoder can take."""

    kind: Kind
    backbone: str | None = None
    prefix_length: int = 16
    max_length: int | None = None
    dropout: float | None = None
    min_count: int = 2
    """How often a word must occur to be in the vocabulary of a model from scratch."""

    def __post_init__(self) -> None:
        for name in ("max_length", "min_count", "prefix_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        if self.kind == "simple" and self.backbone is not None:
            raise InputError(
                "--model simple is trained from scratch and takes no backbone; "
                "use --model prefix or finetune with it."
            )
        if self.kind == "finetune" and self.backbone is None:
            raise InputError("--model finetune needs a backbone, for example: --backbone minilm")


class Run(NamedTuple):
    """A finished run: its folder, what training gave, and the score on the test split."""

    folder: Path
    trained: Trained
    test: Evaluation


def start(
    choice: ModelChoice,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: Progress | None = None,
) -> Run:
    """Train into ``folder`` (which must not exist), score test once, point ``latest`` at it.

    An error or interrupt before the first epoch's end leaves no folder.
    """
    with _fresh(folder):
        seed_everything(config.seed)
        new = make_model(choice, splits)
        trained = train(new, splits, config, folder, progress)
        answer = Classifier(
            new.encoder, classifier.torch_runner(trained.model), new.model.config.labels
        )
        texts = [example.text for example in splits.test]
        test = evaluate(
            answer.logits(texts), [example.label for example in splits.test], answer.labels
        )
        write_atomically(folder / EVALUATION, pretty_json(test))
    checkpoint.point_latest(folder)
    return Run(folder, trained, test)


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
        max_length=choice.max_length,
        dropout=dropout,
    )


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Make the run's folder; remove it again if no checkpoint came to be in it."""
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
        if not (folder / checkpoint.CHECKPOINT).exists():
            shutil.rmtree(folder)
            remove_empty(made)
