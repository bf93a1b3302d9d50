"""The training loop: epochs, early stopping, the best epoch kept, resumable state.

Several processes may train together (see :mod:`trainkit.trainer.distributed`): all make every step,
and the main one writes.
"""

import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.data.splits import Splits
from trainkit.models.base import TextClassifier
from trainkit.models.classifier import UntrainedModel
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.trainer import checkpoint, state
from trainkit.trainer.batches import (
    BATCH_TOKENS,
    BatchShard,
    EncodedExamples,
    encode,
    in_order,
    shuffled,
)
from trainkit.trainer.callbacks import Epoch, NoCallback, TrainingCallback
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.setup import (
    choose_device,
    make_schedule,
    seed_everything,
)
from trainkit.trainer.state import TrainingPosition
from trainkit.trainer.train_step import DivergedError, make_context, train_step

HISTORY = "history.json"
SAVE_EVERY_S = 60.0  # and after each epoch


class TrainingResult(NamedTuple):
    """The model with its best weights loaded, and how it came to them."""

    model: TextClassifier
    history: list[Epoch]
    best: Epoch
    interrupted: bool


def fit(
    new: UntrainedModel,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: TrainingCallback | None = None,
    save_every_s: float = SAVE_EVERY_S,
    group: ProcessGroup = SINGLE,
    until: int | None = None,
) -> TrainingResult:
    """Train ``new`` and keep its best epoch in ``folder``.

    If the folder holds the state of an unfinished training of the same model, data and settings, it
    is resumed, to the same weights to the bit (on a CPU, with the same number of threads).
    Processes of a ``group`` reach the weights of one process that has no dropout, to rounding.

    Best is the highest validation accuracy, then the lowest validation loss, or the last epoch if a
    refit follows and gets there. With ``until`` it is that epoch, the training ends with it, and
    validation texts are not used. An interrupt (Ctrl-C) ends the training of one process as if it
    were finished. The state is kept: the caller deletes it when the run is complete. Raises
    ``DivergedError`` if the loss is not finite, ``InputError`` if the state cannot be written.
    """
    # Not the same numbers in each process: dropout would drop the same units of their texts.
    seed_everything((config.seed + group.rank) % 2**32)
    new.model.to(choose_device(config.device))
    loop = _Loop(new, splits, config, folder, progress or NoCallback(), save_every_s, group, until)
    interrupted = False
    try:
        while loop.has_more():
            loop.epoch()
    except KeyboardInterrupt:
        # Nothing to keep, other processes go on, or the best weights are being replaced.
        if loop.best is None or group.size > 1 or checkpoint.read(folder).epoch != loop.best.epoch:
            raise
        interrupted = True
    return loop.finish(interrupted=interrupted)


class _Loop:
    """A training, where it is now, and what it is watched, scored and saved by."""

    def __init__(
        self,
        new: UntrainedModel,
        splits: Splits,
        config: TrainConfig,
        folder: Path,
        progress: TrainingCallback,
        save_every_s: float,
        group: ProcessGroup,
        until: int | None,
    ) -> None:
        model, self.encoder = new
        self.config, self.folder, self.group = config, folder, group
        self.progress, self.save_every_s, self.until = progress, save_every_s, until
        self.train_data = encode(splits.train, self.encoder, model.config.labels)
        self.valid_data = encode(splits.valid, self.encoder, model.config.labels)
        self.batch_tokens = config.batch_tokens
        self.steps = math.ceil(len(self.train_data.rows) / config.batch_size)  # an epoch
        self.context = make_context(model, self.train_data, config, group)
        self.position, self.history = state.restore(folder, self.context, group)
        done = (self.position.epoch - 1) * self.steps + self.position.done
        self.context.schedule = make_schedule(
            self.context.optimizer, config, self.steps * config.epochs, done
        )
        self.saved_at = time.monotonic()

    @property
    def best(self) -> Epoch | None:
        """The best epoch so far."""
        return next((epoch for epoch in reversed(self.history) if epoch.best), None)

    def has_more(self) -> bool:
        """Tell whether to go on: not after ``patience_epochs`` without a better epoch."""
        best, ended = self.best, self.position.epoch - 1
        if self.until is not None:
            return ended < self.until
        patient = best is None or ended - best.epoch < self.config.patience_epochs
        return ended < self.config.epochs and patient

    def epoch(self) -> None:
        """Go through what is left of an epoch, score it, and save what it came to."""
        self._train()
        result = self._scored()
        self._keep(result)
        self.history.append(result)
        self.position = TrainingPosition(result.epoch + 1)
        self._save()
        self.progress.epoch(result)

    def _train(self) -> None:
        """Make the epoch's steps that are not done yet; save on the way when it is time."""
        self.context.model.train()
        batches = shuffled(
            self.train_data,
            self.config.batch_size,
            self.config.seed,
            self.position.epoch,
            self.batch_tokens,
            self.group,
        )
        for shard in itertools.islice(batches, self.position.done, None):
            self._step(shard)
            is_due = time.monotonic() - self.saved_at >= self.save_every_s
            # If it is for any process: all take part in saving.
            if any(self.group.all_sum(is_due)) and self.position.done < self.steps:
                self._save()

    def _step(self, shard: BatchShard) -> None:
        """Make one step and report the epoch's mean loss and accuracy so far."""
        now = self.position
        try:
            loss, hits = train_step(self.context, shard)
        except DivergedError as error:
            raise DivergedError(f"epoch {now.epoch}, step {now.done + 1}: {error}") from None
        now = self.position = now.after(loss, hits, len(shard.whole))
        self.progress.step(
            now.epoch, now.done, self.steps, now.loss_sum / now.seen, now.correct / now.seen
        )

    def _candidate(self) -> TextClassifier:
        """Return the model that is scored and kept: the average, where there is one."""
        averaged = self.context.averaged
        return self.context.model if averaged is None else cast(TextClassifier, averaged.module)

    def _scored(self) -> Epoch:
        """Score the validation texts, and compare with the best epoch so far."""
        now = self.position
        reached = now.epoch, now.loss_sum / now.seen, now.correct / now.seen
        if self.until is not None:
            return Epoch(*reached, None, None, best=now.epoch == self.until)
        loss, accuracy = score(self._candidate(), self.valid_data, self.batch_tokens, self.group)
        result = Epoch(*reached, loss, accuracy, best=True)
        # A refit ends its whole schedule: its scores and temperature are those of such a model.
        whole = self.config.refit and now.epoch == self.config.epochs
        if whole or self.best is None or result.rank > self.best.rank:
            return result
        return msgspec.structs.replace(result, best=False)

    def _keep(self, result: Epoch) -> None:
        """Write the checkpoint of a best epoch, and the history."""
        if not self.group.is_main:
            return
        if result.best:
            checkpoint.save(
                self.folder,
                self._candidate(),
                self.encoder,
                seed=self.config.seed,
                epoch=result.epoch,
                metrics=result.validation,
            )
        write_atomically(self.folder / HISTORY, pretty_json([*self.history, result]))

    def _save(self) -> None:
        """Write the state, from which a training that is cut off goes on."""
        state.save(self.folder, self.context, self.position, self.history, self.group)
        self.saved_at = time.monotonic()

    def finish(self, *, interrupted: bool) -> TrainingResult:
        """Load the best weights into the model."""
        best, model = self.best, self.context.model
        assert best is not None  # there is at least one epoch, and the first is the best so far
        model.finalize()
        if self.group.is_main:
            checkpoint.restore(model, checkpoint.weights_path(self.folder))
        return TrainingResult(model.eval(), self.history, best, interrupted)


@torch.inference_mode()
def score(
    model: TextClassifier,
    data: EncodedExamples,
    batch_tokens: int = BATCH_TOKENS,
    group: ProcessGroup = SINGLE,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over all examples; each process scores its part."""
    model.eval()
    device = next(model.parameters()).device
    loss_sum = correct = 0.0
    for ids, mask, labels in in_order(data, batch_tokens, group):
        labels = labels.to(device)
        logits: Tensor = model(ids.to(device), mask.to(device))
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    loss_sum, correct = group.all_sum(loss_sum, correct)
    return loss_sum / len(data.rows), correct / len(data.rows)
