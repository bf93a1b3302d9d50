"""The training loop: AdamW, warm-up and cosine, clipping, early stopping, the best epoch kept.

In go a new model and its splits; out comes a run's folder with the best checkpoint, and the model
with exactly those weights loaded. Several processes may do it together (see
:mod:`trainkit.trainer.group`): all go through every step, and the one that leads writes.
"""

import itertools
import math
import os
import random
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.data.splits import Splits
from trainkit.models.attention import KeyValuePrefix
from trainkit.models.classifier import NewModel, TextClassifier
from trainkit.serve.errors import InputError
from trainkit.serve.files import pretty_json, write_atomically
from trainkit.trainer import checkpoint, state
from trainkit.trainer.batches import BATCH_TOKENS, Encoded, Share, encode, in_order, shuffled
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.group import ALONE, Group
from trainkit.trainer.losses import Objective, objective
from trainkit.trainer.progress import Epoch, Progress, Unwatched
from trainkit.trainer.state import Position, Training

__all__ = ["DivergedError", "Epoch", "Progress", "Trained", "train"]

HISTORY = "history.json"
SAVE_EVERY_S = 60.0  # and after each epoch


class DivergedError(InputError):
    """The loss stopped being a number."""


class Trained(NamedTuple):
    """The model with its best weights loaded, and how it came to them."""

    model: TextClassifier
    history: list[Epoch]
    best: Epoch
    interrupted: bool


def train(
    new: NewModel,
    splits: Splits,
    config: TrainConfig,
    folder: Path,
    progress: Progress | None = None,
    save_every_s: float = SAVE_EVERY_S,
    group: Group = ALONE,
) -> Trained:
    """Train ``new`` and keep its best epoch in ``folder``.

    Where the folder holds the state of an unfinished training of the same model, data and settings,
    it goes on from there, to the same weights to the bit (on a CPU, with as many threads).
    Processes of a ``group`` come to the weights of one process that has no dropout, to rounding.

    Best is the highest validation accuracy, then the lowest validation loss. An interrupt (Ctrl-C)
    ends the training of one process as if it were over. The state is kept: whoever has done what
    comes after the training forgets it. ``DivergedError`` where the loss stops being a number,
    ``InputError`` where the state cannot be written.
    """
    model, encoder = new
    progress = progress or Unwatched()
    # Not the same numbers in each process: dropout would drop the same units of their texts.
    seed_everything((config.seed + group.rank) % 2**32)
    device = choose_device(config.device)
    model.to(device)
    names = model.config.labels
    train_data = encode(splits.train, encoder, names)
    valid_data = encode(splits.valid, encoder, names)
    loss_of = objective(config, train_data.labels, len(names), device)
    steps = math.ceil(len(train_data.rows) / config.batch_size)
    optimizer = make_optimizer(model, config)

    averaged = None
    if config.average_decay:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average_decay))
    candidate = model if averaged is None else cast(TextClassifier, averaged.module)

    training = Training(model, averaged, optimizer)
    position, history = state.restore(folder, training, group)
    compiled = torch.compile(model, dynamic=True) if config.compile is True else model
    forward = group.wrap(cast(nn.Module, compiled), device)
    batch_tokens = config.batch_tokens or BATCH_TOKENS
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    gradients = Gradients(forward, loss_of, device, half, group)
    begun = (position.epoch - 1) * steps + position.done
    schedule = make_schedule(optimizer, config, steps * config.epochs, begun)
    best = next((epoch for epoch in reversed(history) if epoch.best), None)
    saved_at = time.monotonic()
    interrupted = False
    try:
        for number in range(position.epoch, config.epochs + 1):
            if best is not None and number - 1 - best.epoch >= config.patience_epochs:
                break
            model.train()
            _, first, loss_sum, correct, seen = msgspec.structs.astuple(position)
            batches = shuffled(
                train_data, config.batch_size, config.seed, number, batch_tokens, group
            )
            todo = itertools.islice(batches, first, None)
            for done, share in enumerate(todo, start=first + 1):
                optimizer.zero_grad()
                mean_loss, hits, due = group.sums(
                    *gradients(share), time.monotonic() - saved_at >= save_every_s
                )
                if not math.isfinite(mean_loss):
                    raise DivergedError(
                        f"the loss became {mean_loss} in epoch {number}, step {done}; "
                        "train with a lower --learning-rate."
                    )
                nn.utils.clip_grad_norm_(trained_parameters(model), config.max_gradient_norm)
                optimizer.step()
                schedule.step()
                if averaged is not None:
                    averaged.update_parameters(model)
                seen += len(share.whole)
                loss_sum += mean_loss * len(share.whole)
                correct += hits
                progress.step(number, done, steps, loss_sum / seen, correct / seen)
                if done < steps and due:
                    position = Position(number, done, loss_sum, correct, seen)
                    state.save(folder, training, position, history, group)
                    saved_at = time.monotonic()
            valid_loss, valid_accuracy = score(candidate, valid_data, batch_tokens, group)
            rank = (valid_accuracy, -valid_loss)
            is_best = best is None or rank > (best.valid_accuracy, -best.valid_loss)
            result = Epoch(
                number, loss_sum / seen, correct / seen, valid_loss, valid_accuracy, is_best
            )
            history.append(result)
            if is_best:
                best = result
            if is_best and group.leads:
                metrics = {"valid_loss": valid_loss, "valid_accuracy": valid_accuracy}
                checkpoint.save(folder, candidate, encoder, config, epoch=number, metrics=metrics)
            if group.leads:
                write_atomically(folder / HISTORY, pretty_json(history))
            position = Position(number + 1)
            state.save(folder, training, position, history, group)
            saved_at = time.monotonic()
            progress.epoch(result)
    except KeyboardInterrupt:
        if best is None or group.size > 1:  # nothing to keep yet, or the others cannot be told
            raise
        interrupted = True
    assert best is not None  # there is at least one epoch, and the first is the best so far
    model.fold()
    if group.leads:
        checkpoint.restore(model, checkpoint.weights_path(folder))
    return Trained(model.eval(), history, best, interrupted)


class Gradients(NamedTuple):
    """Forward and backward of a batch: adds up the gradients of its mean loss."""

    forward: nn.Module
    loss_of: Objective
    device: torch.device
    autocast: AbstractContextManager[Any] = nullcontext()
    group: Group = ALONE

    def __call__(self, share: Share) -> tuple[float, int]:
        """Return what ``share`` adds to the mean loss of its batch, and how many are right in it.

        All parts of all processes add up to the mean, whatever the examples weigh.
        """
        whole = self.loss_of.weight(share.whole)
        loss_sum, hits = 0.0, 0
        for number, (ids, mask, labels) in enumerate(share.parts, start=1):
            labels = labels.to(self.device)
            last = number == len(share.parts)
            with nullcontext() if last else self.group.apart(self.forward):
                with self.autocast:
                    logits = self.forward(ids.to(self.device), mask.to(self.device))
                weight = self.loss_of.weight(labels) / whole if share.counted else 0.0
                loss = self.loss_of(logits.float(), labels) * weight
                (loss * self.group.size).backward()  # the mean over the processes is taken
            loss_sum += loss.item()
            hits += int((logits.argmax(1) == labels).sum()) if share.counted else 0
        return loss_sum, hits


def seed_everything(seed: int) -> None:
    """Make every random choice from here on repeatable."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """Take CUDA for ``auto`` where there is one; ``InputError`` if it was asked for in vain."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch finds no CUDA device; use cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one device for each of torchrun's processes
        return torch.device(name, int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def trained_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return (weight for weight in model.parameters() if weight.requires_grad)


def make_optimizer(model: TextClassifier, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases, norms and prefixes are not decayed, the head has its own rate."""
    undecayed = {
        id(weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, (nn.LayerNorm, KeyValuePrefix)) or name == "prefix"
    }
    head = {id(weight) for weight in model.head_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in trained_parameters(model):
        rate = config.head_learning_rate if id(weight) in head else config.learning_rate
        decay = 0.0 if id(weight) in undecayed else config.weight_decay
        groups.setdefault((rate, decay), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": rate, "weight_decay": decay}
            for (rate, decay), weights in groups.items()
        ]
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, begun: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine to zero (Loshchilov & Hutter 2017), from step ``begun`` on."""
    warmup = max(1, round(config.warmup_share * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # which a schedule that goes on asks for
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=begun - 1)


@torch.inference_mode()
def score(
    model: TextClassifier, data: Encoded, batch_tokens: int = BATCH_TOKENS, group: Group = ALONE
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
    loss_sum, correct = group.sums(loss_sum, correct)
    return loss_sum / len(data.rows), correct / len(data.rows)
