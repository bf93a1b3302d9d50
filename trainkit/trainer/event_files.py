"""Event files of a training, which TensorBoard draws."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.serve.errors import InputError
from trainkit.trainer.callbacks import Epoch, TrainingCallback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events"


class EventFiles:
    """Training callback that writes TensorBoard event files and forwards to another callback.

    After every step ``step/loss`` and ``step/accuracy``, of the epoch so far; after every epoch
    ``loss`` and ``accuracy`` of both splits. Raises ``InputError`` if TensorBoard is not installed.
    """

    def __init__(self, run: Path, then: TrainingCallback) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ModuleNotFoundError:
            raise InputError(
                "--tensorboard needs TensorBoard, which is not installed; "
                "run: pip install 'trainkit-onnx[tensorboard]'"
            ) from None
        self.folder = run / EVENTS
        self.then = then
        self.writer: SummaryWriter | None = None
        self.prefix = ""

    def __enter__(self) -> "EventFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            try:
                self.writer.close()
            except FileNotFoundError:
                if self.folder.exists():
                    raise
                # Else a training that was cut off in its first epoch took the run's folder along.

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """Write the epoch's means so far."""
        number = (epoch - 1) * total + done
        writer = self._open(number)
        writer.add_scalar(f"{self.prefix}step/loss", loss, number)
        writer.add_scalar(f"{self.prefix}step/accuracy", accuracy, number)
        writer.flush()  # so that the writer's own thread has nothing left to do at the end
        self.then.step(epoch, done, total, loss, accuracy)

    def epoch(self, result: Epoch) -> None:
        """Write what the epoch reached."""
        writer = self._open(0)
        for split in ("train", "valid"):
            for name in ("loss", "accuracy"):
                value = getattr(result, f"{split}_{name}")
                if value is not None:
                    writer.add_scalar(f"{self.prefix}{name}/{split}", value, result.epoch)
        writer.flush()
        self.then.epoch(result)

    def refit(self) -> None:
        """Write what follows under names of its own, ``refit/loss/train`` and so on.

        In a folder of its own too: where a refit is gone on with, only its steps are overwritten.
        """
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        self.folder = self.folder / "refit"
        self.prefix = "refit/"
        self.then.refit()

    def _open(self, number: int) -> "SummaryWriter":
        """Open the file at the first step, when the run's folder is there.

        A training that goes on repeats steps which the one before it wrote: from this one on,
        TensorBoard shows the newer ones.
        """
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=number)
        return self.writer
