"""One training step: forward and backward of a batch, clipping, AdamW, schedule and average."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainkit.models.base import TextClassifier
from trainkit.serve.errors import InputError
from trainkit.trainer.batches import BatchShard, EncodedExamples
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.losses import Objective, objective
from trainkit.trainer.setup import make_average, make_optimizer, trained_parameters


class DivergedError(InputError):
    """The loss is not a finite number."""


class SparseEmbeddingGrads:
    """Gradients of embedding tables whose memory is reused from step to step.

    A batch has tokens of few rows of a large table, but each dense backward would allocate a
    gradient of all rows and fill it with zeros. With ``sparse`` embeddings backward gives those
    rows alone: :meth:`fill` adds them to a dense buffer, which :meth:`clear` zeroes after the step.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            table.sparse = True
        weights = {id(table.weight): table.weight for table in tables if table.weight.requires_grad}
        self.buffers = [(weight, torch.zeros_like(weight)) for weight in weights.values()]
        self.rows: list[tuple[Tensor, Tensor]] = []

    def fill(self) -> None:
        """Replace the sparse gradients by the dense buffers."""
        for weight, buffer in self.buffers:
            if weight.grad is not None and weight.grad.is_sparse:
                (rows,) = weight.grad._indices()
                buffer.index_add_(0, rows, weight.grad._values())
                weight.grad = buffer
                self.rows.append((buffer, rows))

    def clear(self) -> None:
        """Zero the rows that were filled."""
        for buffer, rows in self.rows:
            buffer.index_fill_(0, rows, 0.0)
        self.rows.clear()


@dataclass
class TrainContext:
    """What a training step uses and changes.

    ``forward`` is the model as it is called: compiled, or wrapped for several processes.
    """

    model: TextClassifier
    forward: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None
    embedding_grads: SparseEmbeddingGrads
    max_gradient_norm: float
    device: torch.device
    autocast: AbstractContextManager[Any]
    group: ProcessGroup = SINGLE
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None


def make_context(
    model: TextClassifier, data: EncodedExamples, config: TrainConfig, group: ProcessGroup = SINGLE
) -> TrainContext:
    """Return the context of a training of ``model``, on its device, without a schedule yet.

    ``data`` is train, for the class weights.
    """
    device = next(model.parameters()).device
    compiled = torch.compile(model, dynamic=True) if config.compile else model
    # Dense gradients are what processes exchange, and what a compiler and CUDA are made for.
    use_sparse = group.size == 1 and device.type == "cpu" and not config.compile
    return TrainContext(
        model=model,
        forward=group.wrap(cast(nn.Module, compiled), device),
        objective=objective(config, data.labels, len(model.config.labels), device),
        optimizer=make_optimizer(model, config),
        averaged=make_average(model, config),
        embedding_grads=SparseEmbeddingGrads(model if use_sparse else nn.Module()),
        max_gradient_norm=config.max_gradient_norm,
        device=device,
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
        group=group,
    )


def train_step(context: TrainContext, shard: BatchShard) -> tuple[float, float]:
    """Make one optimizer step; return the batch's mean loss and how many answers were right.

    Both are over all processes. Raises ``DivergedError``, before any weight changes, if the loss is
    not finite.
    """
    context.optimizer.zero_grad()
    loss, hits = context.group.all_sum(*accumulate_gradients(context, shard))
    if not math.isfinite(loss):
        raise DivergedError(f"the loss became {loss}; train with a lower --learning-rate.")
    context.embedding_grads.fill()
    nn.utils.clip_grad_norm_(trained_parameters(context.model), context.max_gradient_norm)
    context.optimizer.step()
    context.embedding_grads.clear()
    if context.schedule is not None:
        context.schedule.step()
    if context.averaged is not None:
        context.averaged.update_parameters(context.model)
    return loss, hits


def accumulate_gradients(context: TrainContext, shard: BatchShard) -> tuple[float, int]:
    """Add up the gradients of this process's share of a batch, micro-batch by micro-batch.

    Returns what the share adds to the batch's mean loss, and its hits. All parts of all processes
    add up to the mean, for any class weights.
    """
    total_weight = context.objective.weight(shard.whole)
    loss_sum, hits = 0.0, 0
    for number, (ids, mask, labels) in enumerate(shard.parts, start=1):
        labels = labels.to(context.device)
        is_last = number == len(shard.parts)
        with nullcontext() if is_last else context.group.no_sync(context.forward):
            with context.autocast:
                logits = context.forward(ids.to(context.device), mask.to(context.device))
            weight = context.objective.weight(labels) / total_weight if shard.counted else 0.0
            loss = context.objective(logits.float(), labels) * weight
            (loss * context.group.size).backward()  # the mean over the processes is taken
        loss_sum += loss.item()
        hits += int((logits.argmax(1) == labels).sum()) if shard.counted else 0
    return loss_sum, hits
