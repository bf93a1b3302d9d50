"""The state of a training that is not over: after a crash it goes on as if there had been none.

``state.json`` names the file of tensors and its sha256; as with a checkpoint, replacing this one
small file goes from one complete state to the next. In go the model, the running average of its
weights, the optimizer and the random numbers' state; they come back to the bit.
"""

from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from trainkit.models.base import TextClassifier
from trainkit.serve.errors import InputError
from trainkit.serve.files import Checksummed, FileInfo, file_info, pretty_json, write_atomically
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.train_step import TrainContext

__all__ = ["STATE", "Step", "delete", "restore", "save"]

STATE = "state.json"
FORMAT_VERSION = 1
MODEL, AVERAGE, OPTIMIZER = "model.", "average.", "optimizer."
RANDOM_CPU, RANDOM_CUDA = "random.cpu.", "random.cuda."  # and the rank


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far it is: ``done`` steps of ``epoch``, and the sums over the examples ``seen`` in it."""

    epoch: int = 1
    done: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: float = 0.0

    def after(self, mean_loss: float, hits: float, count: int) -> "Step":
        """Return the position after one more step, over ``count`` examples."""
        return Step(
            self.epoch,
            self.done + 1,
            self.loss_sum + mean_loss * count,
            self.correct + hits,
            self.seen + count,
        )


class State(Checksummed, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``state.json``."""

    format_version: int
    position: Step
    history: tuple[Epoch, ...]
    tensors: str
    tensors_facts: FileInfo
    backbone: str | None = None
    """The fingerprint of a backbone, whose frozen weights are not in the state."""


def save(
    folder: Path,
    training: TrainContext,
    position: Step,
    history: list[Epoch],
    group: ProcessGroup = SINGLE,
) -> None:
    """Write the state, then remove the one before; ``InputError`` where the disk is full.

    Every process of the group calls it, for its random numbers; the one that leads writes.
    """
    numbers = _random_numbers(training, group)
    if not group.is_main:
        return
    tensors = folder / f"state-{position.epoch:03d}-{position.done:06d}.safetensors"
    try:
        write_atomically(tensors, safetensors.torch.save(_tensors(training) | numbers))
        state = State(
            format_version=FORMAT_VERSION,
            position=position,
            history=tuple(history),
            tensors=tensors.name,
            tensors_facts=file_info(tensors),
            backbone=_backbone(training),
        )
        write_atomically(folder / STATE, pretty_json(state.with_checksum()))
    except OSError as error:
        raise InputError(
            f"the training's state cannot be written to {folder} ({error.strerror}); what was "
            f"saved before is kept. Make room, then: trainkit train --resume {folder}"
        ) from None
    _remove(folder, keep=tensors.name)


def restore(
    folder: Path, training: TrainContext, group: ProcessGroup = SINGLE
) -> tuple[Step, list[Epoch]]:
    """Load the saved state into ``training``; the start of a training where none was saved.

    ``InputError`` where it is damaged, is of another number of processes, or is not the same for
    all processes of the group, which wait for each other here.
    """
    position, history = _restore(folder, training, group)
    mine = torch.tensor([position.epoch, position.done])
    if any(not torch.equal(mine, other) for other in group.all_gather(mine)):
        raise InputError(
            f"the processes find different states in {folder}; it must be one folder that all "
            "machines share."
        )
    return position, history


def _restore(folder: Path, training: TrainContext, group: ProcessGroup) -> tuple[Step, list[Epoch]]:
    path = folder / STATE
    if not path.exists():
        return Step(), []
    state = _read(path)
    if state.backbone is not None and state.backbone != _backbone(training):
        raise InputError(
            f"{folder} was started on another backbone; give that one, or train again."
        )
    file = folder / state.tensors
    if not file.is_file() or file_info(file) != state.tensors_facts:
        raise InputError(f"{file} is missing or damaged; train again.")
    try:
        tensors = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}); train again.") from None
    saved = len(_part(tensors, RANDOM_CPU))
    if saved != group.size:
        raise InputError(
            f"{folder} was begun by {saved} processes and can only go on with as many, not "
            f"{group.size}."
        )
    _load(training, tensors, group.rank)
    return state.position, list(state.history)


def delete(folder: Path) -> None:
    """Remove the state: the training is over."""
    (folder / STATE).unlink(missing_ok=True)
    _remove(folder)


def _remove(folder: Path, keep: str = "") -> None:
    for old in folder.glob("state-*.safetensors"):
        if old.name != keep:
            old.unlink()


def _tensors(training: TrainContext) -> dict[str, Tensor]:
    """Return everything as tensors by name, on the CPU."""
    model, averaged, optimizer = training.model, training.averaged, training.optimizer
    found = {MODEL + name: value for name, value in model.trained_state().items()}
    if averaged is not None:
        found |= {AVERAGE + name: value for name, value in _averaged(averaged).items()}
        found[AVERAGE + "n_averaged"] = averaged.n_averaged
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"{OPTIMIZER}{number}.{name}": value for name, value in values.items()}
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}


def _random_numbers(training: TrainContext, group: ProcessGroup) -> dict[str, Tensor]:
    """Return the states of all processes' random numbers."""
    found = {RANDOM_CPU: torch.get_rng_state()}
    if (device := _cuda(training)) is not None:
        found[RANDOM_CUDA] = torch.cuda.get_rng_state(device)
    return {
        f"{name}{rank}": value
        for name, mine in found.items()
        for rank, value in enumerate(group.all_gather(mine))
    }


def _cuda(training: TrainContext) -> torch.device | None:
    device = next(training.model.parameters()).device
    return device if device.type == "cuda" else None


def _backbone(training: TrainContext) -> str | None:
    config = training.model.config.backbone
    return None if config is None else config.fingerprint


def _averaged(averaged: AveragedModel) -> dict[str, Tensor]:
    module = averaged.module
    assert isinstance(module, TextClassifier)
    return module.trained_state()


def _load(training: TrainContext, tensors: dict[str, Tensor], rank: int) -> None:
    model, averaged, optimizer = training.model, training.averaged, training.optimizer
    model.load_state_dict(_part(tensors, MODEL), strict=False)  # without the frozen backbone's
    if averaged is not None:
        average = _part(tensors, AVERAGE)
        averaged.n_averaged.copy_(average.pop("n_averaged"))
        averaged.module.load_state_dict(average, strict=False)
    values: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, OPTIMIZER).items():
        number, key = name.split(".")
        values.setdefault(int(number), {})[key] = value
    fresh: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({"state": values, "param_groups": fresh["param_groups"]})
    torch.set_rng_state(tensors[f"{RANDOM_CPU}{rank}"])
    device = _cuda(training)
    if device is not None and f"{RANDOM_CUDA}{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RANDOM_CUDA}{rank}"], device)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _read(path: Path) -> State:
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); train again.") from None
    if state.format_version != FORMAT_VERSION:
        raise InputError(
            f"{path} has state format {state.format_version}, this trainkit reads "
            f"{FORMAT_VERSION}; finish with the trainkit that began, or train again."
        )
    if not state.is_valid:
        raise InputError(f"{path} was changed; train again.")
    return state
