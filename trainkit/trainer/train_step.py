"""One step of a training: forward and backward of a batch, then clipping, AdamW and the schedule.

In goes this process's share of a batch; out come the mean loss and the hits that it adds, and all
that changes from step to step, see :class:`trainkit.trainer.state.Training`, is changed in place.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trainkit.models.classifier import TextClassifier
from trainkit.trainer.batches import BatchShard, EncodedExamples
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.losses import Objective, objective
from trainkit.trainer.setup import trained_parameters
from trainkit.trainer.state import TrainingState

__all__ = ["Gradients", "SparseEmbeddingGrads", "Stepper", "make_gradients"]


class Stepper(NamedTuple):
    """Both halves of a step, so that the loss can be looked at before the weights change."""

    training: TrainingState
    gradients: "Gradients"
    schedule: torch.optim.lr_scheduler.LRScheduler
    max_gradient_norm: float
    tables: "SparseEmbeddingGrads"

    def backward(self, share: BatchShard) -> tuple[float, int]:
        """Make the gradients of ``share``; see :class:`Gradients`."""
        self.training.optimizer.zero_grad()
        made = self.gradients(share)
        self.tables.fill()
        return made

    def update(self) -> None:
        """Clip the gradients, move the weights by them, and go on along the schedule."""
        model, averaged, optimizer = self.training
        nn.utils.clip_grad_norm_(trained_parameters(model), self.max_gradient_norm)
        optimizer.step()
        self.tables.clear()
        self.schedule.step()
        if averaged is not None:
            averaged.update_parameters(model)


class SparseEmbeddingGrads:
    """Gradients of embeddings whose memory is kept from step to step.

    A batch has tokens of few rows of a large table, but each backward would take fresh memory for
    all rows and fill it with zeros. Backward gives the rows alone (``sparse``), which are added
    into the kept gradient, and set back to zero after the step.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            table.sparse = True
        weights = {id(table.weight): table.weight for table in tables if table.weight.requires_grad}
        self.kept = [(weight, torch.zeros_like(weight)) for weight in weights.values()]
        self.rows: list[tuple[Tensor, Tensor]] = []

    def fill(self) -> None:
        """Put the kept gradients in the place of the rows'."""
        for weight, kept in self.kept:
            if weight.grad is not None and weight.grad.is_sparse:
                (rows,) = weight.grad._indices()
                kept.index_add_(0, rows, weight.grad._values())
                weight.grad = kept
                self.rows.append((kept, rows))

    def clear(self) -> None:
        """Set the rows to zero that were filled."""
        for kept, rows in self.rows:
            kept.index_fill_(0, rows, 0.0)
        self.rows.clear()


class Gradients(NamedTuple):
    """Forward and backward of a batch: adds up the gradients of its mean loss."""

    forward: nn.Module
    loss_of: Objective
    device: torch.device
    autocast: AbstractContextManager[Any] = nullcontext()
    group: ProcessGroup = SINGLE

    def __call__(self, share: BatchShard) -> tuple[float, int]:
        """Return what ``share`` adds to the mean loss of its batch, and how many are right in it.

        All parts of all processes add up to the mean, whatever the examples weigh.
        """
        whole = self.loss_of.weight(share.whole)
        loss_sum, hits = 0.0, 0
        for number, (ids, mask, labels) in enumerate(share.parts, start=1):
            labels = labels.to(self.device)
            last = number == len(share.parts)
            with nullcontext() if last else self.group.no_sync(self.forward):
                with self.autocast:
                    logits = self.forward(ids.to(self.device), mask.to(self.device))
                weight = self.loss_of.weight(labels) / whole if share.counted else 0.0
                loss = self.loss_of(logits.float(), labels) * weight
                (loss * self.group.size).backward()  # the mean over the processes is taken
            loss_sum += loss.item()
            hits += int((logits.argmax(1) == labels).sum()) if share.counted else 0
        return loss_sum, hits


def make_gradients(
    model: TextClassifier, data: EncodedExamples, config: TrainConfig, group: ProcessGroup
) -> Gradients:
    """Take the loss, the precision and the compiler that ``config`` names; ``data`` is train."""
    device = next(model.parameters()).device
    loss_of = objective(config, data.labels, len(model.config.labels), device)
    compiled = torch.compile(model, dynamic=True) if config.compile else model
    forward = group.wrap(cast(nn.Module, compiled), device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    return Gradients(forward, loss_of, device, half, group)
