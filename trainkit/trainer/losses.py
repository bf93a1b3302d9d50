"""What a training makes small: cross entropy, with weights for rare classes and for hard examples.

N examples, C classes: logits (N, C) and labels (N,) in, one number out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.trainer.config import TrainConfig


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Return n / (C * n_c) for each class c (C,): together, all classes then weigh the same.

    After King & Zeng (2001); every class must occur in ``labels``, which are those of train.
    """
    counts = torch.bincount(labels, minlength=classes)
    assert bool((counts > 0).all())
    return len(labels) / (classes * counts.float())


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Return the mean focal loss (Lin et al. 2017), which at ``focal_gamma`` 0 is cross entropy.

    Each example's cross entropy is multiplied by (1 - p)^gamma, where p is the probability of its
    label: what is right already counts less. ``weights`` (C,) are the paper's alpha. As in PyTorch,
    the mean is over the examples' weights.
    """
    if not focal_gamma:
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=label_smoothing)
    each = F.cross_entropy(
        logits, labels, weight=weights, label_smoothing=label_smoothing, reduction="none"
    )
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]  # (N,)
    # Not 0: below gamma 1 the gradient of a power is infinite there.
    wrong = -torch.expm1(log_p).clamp_max(-torch.finfo(logits.dtype).eps)
    total = len(labels) if weights is None else weights[labels].sum()
    return (wrong**focal_gamma * each).sum() / total


class Objective(NamedTuple):
    """A loss of logits (N, C) and labels (N,), with its settings."""

    weights: Tensor | None
    label_smoothing: float
    focal_gamma: float

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the examples' weights."""
        return classification_loss(
            logits,
            labels,
            weights=self.weights,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
        )

    def weight(self, labels: Tensor) -> float:
        """Return what the mean divides by."""
        return len(labels) if self.weights is None else float(self.weights[labels].sum())


def objective(config: TrainConfig, labels: Tensor, classes: int, device: torch.device) -> Objective:
    """Return the loss that ``config`` asks for; ``labels`` are train's."""
    weights = None
    if config.class_weights == "balanced":
        weights = balanced_weights(labels, classes).to(device)
    return Objective(weights, config.label_smoothing, config.focal_gamma)
