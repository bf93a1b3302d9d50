"""A run's folder: what the trainer keeps, and how a model comes back from it.

``checkpoint.json`` names the weights file and its sha256, so that replacing this one small file
switches from one complete checkpoint to the next: a crash leaves the old or the new, never half.
Weights are safetensors; those of a frozen backbone are not copied.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError

from trainkit import __version__
from trainkit.models.base import TextClassifier
from trainkit.models.classifier import build
from trainkit.models.config import ModelConfig
from trainkit.models.sources import CHECKPOINT
from trainkit.serve.classifier import Classifier
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.files import Checksummed, FileInfo, file_info, pretty_json, write_atomically

LATEST = "latest"
FORMAT_VERSION = 1


class Checkpoint(
    Checksummed, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """The content of ``checkpoint.json``. ``metrics`` are those of the epoch that it keeps.

    ``temperature`` is set at the end of the training, where one is best.
    Checksummed, because a label that was changed in it would be exported, and pass every check.
    """

    format_version: int
    model: ModelConfig
    seed: int
    epoch: int
    metrics: dict[str, float]
    versions: dict[str, str]
    weights: str
    weights_facts: FileInfo
    tokenizer_facts: FileInfo
    temperature: float | None = None


class LoadedRun(NamedTuple):
    """A model in evaluation mode with its trained weights, and the encoder of its texts."""

    model: TextClassifier
    encoder: TextEncoder
    checkpoint: Checkpoint

    def classifier(self) -> Classifier:
        """Return it as a classifier of texts that computes in PyTorch."""
        from trainkit.models.classifier import torch_runner

        kept = self.checkpoint.temperature
        return Classifier(
            self.encoder,
            torch_runner(self.model),
            self.checkpoint.model.labels,
            temperature=1.0 if kept is None else kept,
        )


def save(
    folder: Path,
    model: TextClassifier,
    encoder: TextEncoder,
    *,
    seed: int,
    epoch: int,
    metrics: dict[str, float],
) -> Checkpoint:
    """Write the checkpoint of ``epoch`` into the run's folder, then remove the one before."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        write_atomically(tokenizer, encoder.tokenizer.to_str(pretty=True).encode())
    weights = folder / f"weights-{epoch:03d}.safetensors"
    write_atomically(weights, safetensors.torch.save(model.state_to_save()))
    checkpoint = Checkpoint(
        format_version=FORMAT_VERSION,
        model=model.config,
        seed=seed,
        epoch=epoch,
        metrics=metrics,
        versions={"trainkit": __version__, "torch": str(torch.__version__)},
        weights=weights.name,
        weights_facts=file_info(weights),
        tokenizer_facts=file_info(tokenizer),
    )
    checkpoint = checkpoint.with_checksum()
    write_atomically(folder / CHECKPOINT, pretty_json(checkpoint))
    for old in folder.glob("weights-*.safetensors"):
        if old != weights:
            old.unlink()
    return checkpoint


def calibrate(folder: Path, temperature: float | None, metrics: dict[str, float]) -> None:
    """Put the temperature, and what it does to the validation texts, into the checkpoint."""
    kept = read(folder)
    kept = msgspec.structs.replace(
        kept, temperature=temperature, metrics={**kept.metrics, **metrics}
    )
    write_atomically(folder / CHECKPOINT, pretty_json(kept.with_checksum()))


def load(folder: Path) -> LoadedRun:
    """Read a run's folder; ``InputError`` says what is missing or damaged in it."""
    path = folder / CHECKPOINT
    checkpoint = read(folder)
    for name, expected in (
        (checkpoint.weights, checkpoint.weights_facts),
        ("tokenizer.json", checkpoint.tokenizer_facts),
    ):
        file = folder / name
        if not file.is_file() or file_info(file) != expected:
            raise InputError(
                f"{file} is missing or damaged (not the file whose sha256 {path.name} names); "
                "train again."
            )
    encoder = TextEncoder.load(
        folder / "tokenizer.json", checkpoint.model.max_length, checkpoint.model.pad_id
    )
    model = build(checkpoint.model)
    restore(model, folder / checkpoint.weights)
    return LoadedRun(model.eval(), encoder, checkpoint)


def restore(model: TextClassifier, weights: Path) -> None:
    """Load saved weights into ``model``; every trained tensor must be there, and nothing else."""
    try:
        state = safetensors.torch.load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} is damaged ({error}); train again.") from None
    expected = set(model.trained_state())
    if set(state) != expected:
        missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected)
        raise InputError(
            f"{weights} has other tensors than its model: missing {missing[:3]}, "
            f"unknown {unknown[:3]}; train again with this version."
        )
    model.load_state_dict(state, strict=False)  # strict would ask for the frozen backbone's too


def weights_path(folder: Path) -> Path:
    """Return the weights file that the run's checkpoint names."""
    return folder / read(folder).weights


def read(folder: Path) -> Checkpoint:
    """Read ``checkpoint.json``; raises ``InputError`` if it is missing or damaged."""
    path = folder / CHECKPOINT
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path.parent} is not a trainkit run: {path.name} cannot be read there "
            f"({error.strerror}); train one with: trainkit train --data sample"
        ) from None
    try:
        version = msgspec.json.decode(content, type=dict[str, Any]).get("format_version")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); train again.") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {version}, this trainkit reads {FORMAT_VERSION}; "
            "use the trainkit that made it, or train again."
        )
    try:
        checkpoint = msgspec.json.decode(content, type=Checkpoint)
    except (msgspec.DecodeError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path} is damaged ({error}); train again.") from None
    if not checkpoint.is_valid:
        raise InputError(f"{path} was changed after the training; train again.")
    return checkpoint


def point_latest(run: Path) -> None:
    """Make the link ``latest`` beside the run's folder point at it."""
    partial = run.parent / f".{LATEST}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(run.name)
    partial.replace(run.parent / LATEST)
