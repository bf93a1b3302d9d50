"""The state of an unfinished training, from which it resumes to the bit.

One safetensors file: model, running average, optimizer and random number generators as tensors, the
position in the training and a checksum in its header.
"""

import hashlib
from pathlib import Path
from typing import cast

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainkit.models.base import TextClassifier
from trainkit.serve.errors import InputError
from trainkit.serve.files import write_atomically
from trainkit.trainer.callbacks import Epoch
from trainkit.trainer.distributed import SINGLE, ProcessGroup
from trainkit.trainer.train_step import TrainContext

STATE = "state.safetensors"
FORMAT_VERSION = 2
MODEL, AVERAGE, OPTIMIZER = "model.", "average.", "optimizer."
RANDOM_CPU, RANDOM_CUDA = "random.cpu.", "random.cuda."  # and the rank


class TrainingPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``done`` steps of ``epoch``, and sums over the examples ``seen`` in it."""

    epoch: int = 1
    done: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: float = 0.0

    def after(self, mean_loss: float, hits: float, count: int) -> "TrainingPosition":
        """Return the position after one more step, over ``count`` examples."""
        return TrainingPosition(
            self.epoch,
            self.done + 1,
            self.loss_sum + mean_loss * count,
            self.correct + hits,
            self.seen + count,
        )


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the header holds; ``backbone`` is the fingerprint of one whose weights are not saved."""

    format_version: int
    position: TrainingPosition
    history: tuple[Epoch, ...]
    backbone: str | None


def save(
    folder: Path,
    context: TrainContext,
    position: TrainingPosition,
    history: list[Epoch],
    group: ProcessGroup = SINGLE,
) -> None:
    """Replace the saved state; raises ``InputError`` if the disk is full.

    All processes of the group call it, for their random numbers; the main one writes.
    """
    numbers = _random_numbers(context, group)
    if not group.is_main:
        return
    state = State(
        format_version=FORMAT_VERSION,
        position=position,
        history=tuple(history),
        backbone=_backbone(context),
    )
    header = msgspec.json.encode(state).decode()
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in (_tensors(context) | numbers).items()
    }
    metadata = {"state": header, "sha256": _digest(header, tensors)}
    try:
        write_atomically(folder / STATE, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise InputError(
            f"the training's state cannot be written to {folder} ({error.strerror}); what was "
            f"saved before is kept. Make room, then: trainkit train --resume {folder}"
        ) from None


def restore(
    folder: Path, context: TrainContext, group: ProcessGroup = SINGLE
) -> tuple[TrainingPosition, list[Epoch]]:
    """Load the saved state into ``context``; without one, return the start of a training.

    Raises ``InputError`` if the state is damaged, was saved by another number of processes, or is
    not the same for all processes of the group, which wait for each other here.
    """
    position, history = TrainingPosition(), list[Epoch]()
    if (folder / STATE).exists():
        state, tensors = _read(folder / STATE)
        if state.backbone != _backbone(context):
            raise InputError(
                f"{folder} was started on another backbone; give that one, or train again."
            )
        saved = len(_part(tensors, RANDOM_CPU))
        if saved != group.size:
            raise InputError(
                f"{folder} was started by {saved} processes and cannot be resumed by "
                f"{group.size}; use the same number."
            )
        _load(context, tensors, group.rank)
        position, history = state.position, list(state.history)
    mine = torch.tensor([position.epoch, position.done])
    if any(not torch.equal(mine, other) for other in group.all_gather(mine)):
        raise InputError(
            f"the processes find different states in {folder}; it must be one folder that all "
            "machines share."
        )
    return position, history


def delete(folder: Path) -> None:
    """Remove the state of a training that is finished."""
    (folder / STATE).unlink(missing_ok=True)


def _read(path: Path) -> tuple[State, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = msgspec.json.decode(metadata.get("state", ""), type=State)
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); train again.") from None
    if metadata.get("sha256") != _digest(metadata["state"], tensors):
        raise InputError(f"{path} is damaged (its checksum is another); train again.")
    if state.format_version != FORMAT_VERSION:
        raise InputError(
            f"{path} has state format {state.format_version}, this trainkit reads "
            f"{FORMAT_VERSION}; resume with the trainkit that started it, or train again."
        )
    return state, tensors


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(context: TrainContext) -> dict[str, Tensor]:
    found = {MODEL + name: value for name, value in context.model.trained_state().items()}
    if context.averaged is not None:
        module = cast(TextClassifier, context.averaged.module)
        found |= {AVERAGE + name: value for name, value in module.trained_state().items()}
        found[AVERAGE + "n_averaged"] = context.averaged.n_averaged
    for number, values in context.optimizer.state_dict()["state"].items():
        found |= {f"{OPTIMIZER}{number}.{name}": value for name, value in values.items()}
    return found


def _random_numbers(context: TrainContext, group: ProcessGroup) -> dict[str, Tensor]:
    """Return the states of all processes' random number generators."""
    mine = {RANDOM_CPU: torch.get_rng_state()}
    if context.device.type == "cuda":
        mine[RANDOM_CUDA] = torch.cuda.get_rng_state(context.device)
    return {
        f"{name}{rank}": value
        for name, state in mine.items()
        for rank, value in enumerate(group.all_gather(state))
    }


def _backbone(context: TrainContext) -> str | None:
    config = context.model.config.backbone
    return None if config is None else config.fingerprint


def _load(context: TrainContext, tensors: dict[str, Tensor], rank: int) -> None:
    # Not strict: the frozen backbone's are not there.
    context.model.load_state_dict(_part(tensors, MODEL), strict=False)
    if context.averaged is not None:
        average = _part(tensors, AVERAGE)
        context.averaged.n_averaged.copy_(average.pop("n_averaged"))
        context.averaged.module.load_state_dict(average, strict=False)
    values: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, OPTIMIZER).items():
        number, key = name.split(".")
        values.setdefault(int(number), {})[key] = value
    groups = context.optimizer.state_dict()["param_groups"]
    context.optimizer.load_state_dict({"state": values, "param_groups": groups})
    torch.set_rng_state(tensors[f"{RANDOM_CPU}{rank}"])
    if context.device.type == "cuda" and f"{RANDOM_CUDA}{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RANDOM_CUDA}{rank}"], context.device)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
