"""What a training starts with: random numbers, device, optimizer, schedule and average."""

import math
import os
import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit.models.attention import KeyValuePrefix
from trainkit.models.base import TextClassifier
from trainkit.serve.errors import InputError
from trainkit.trainer.config import TrainConfig


def seed_everything(seed: int) -> None:
    """Make every random spec from here on repeatable."""
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
        ],
        fused=True,  # one pass over the weights and moments, not one for each operation
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


def make_average(model: TextClassifier, config: TrainConfig) -> AveragedModel | None:
    """Return the running average of the weights, a copy now; None where it is not asked for."""
    if not config.average_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average_decay))
