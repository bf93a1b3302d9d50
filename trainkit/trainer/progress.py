"""What a training has reached, and who is told of it."""

from typing import Protocol

import msgspec

__all__ = ["Epoch", "Progress", "Unwatched"]


class Epoch(msgspec.Struct, frozen=True):
    """What one epoch reached. Losses are means over examples, accuracies shares in [0, 1]."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    best: bool

    def __str__(self) -> str:
        return (
            f"Epoch {self.epoch:03d} | train loss {self.train_loss:.2f} "
            f"| train acc {100 * self.train_accuracy:.1f} % | val loss {self.valid_loss:.2f} "
            f"| val acc {100 * self.valid_accuracy:.1f} %"
        )


class Progress(Protocol):
    """Who is told how far the training is."""

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """One optimizer step was made; loss and accuracy are the epoch's so far."""

    def epoch(self, result: Epoch) -> None:
        """One epoch ended."""


class Unwatched:
    """Progress that nobody is told."""

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """Do nothing."""

    def epoch(self, result: Epoch) -> None:
        """Do nothing."""
