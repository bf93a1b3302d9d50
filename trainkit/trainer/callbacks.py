"""Progress of a training: what an epoch reached, and the callbacks that receive it."""

from typing import Protocol

import msgspec


class Epoch(msgspec.Struct, frozen=True):
    """What one epoch reached. Losses are means over examples, accuracies shares in [0, 1].

    ``valid_loss`` and ``valid_accuracy`` are None where the validation texts are trained on.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None
    valid_accuracy: float | None
    best: bool

    @property
    def rank(self) -> tuple[float, float]:
        """Return what is greater for a better epoch: validation's accuracy, then its loss."""
        assert self.valid_accuracy is not None
        assert self.valid_loss is not None
        return self.valid_accuracy, -self.valid_loss

    @property
    def validation(self) -> dict[str, float]:
        """Return the figures of validation by name, none where there are none."""
        figures = {"valid_loss": self.valid_loss, "valid_accuracy": self.valid_accuracy}
        return {name: figure for name, figure in figures.items() if figure is not None}

    def __str__(self) -> str:
        line = (
            f"Epoch {self.epoch:03d} | train loss {self.train_loss:.2f} "
            f"| train acc {100 * self.train_accuracy:.1f}%"
        )
        if self.valid_loss is None or self.valid_accuracy is None:
            return f"{line} | on validation too"
        return f"{line} | val loss {self.valid_loss:.2f} | val acc {100 * self.valid_accuracy:.1f}%"


class TrainingCallback(Protocol):
    """Receives the progress of a training."""

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """One optimizer step was made; loss and accuracy are the epoch's so far."""

    def epoch(self, result: Epoch) -> None:
        """One epoch ended."""

    def refit(self) -> None:
        """The refit on train and validation together begins."""


class NoCallback:
    """A callback that does nothing."""

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """Do nothing."""

    def epoch(self, result: Epoch) -> None:
        """Do nothing."""

    def refit(self) -> None:
        """Do nothing."""
