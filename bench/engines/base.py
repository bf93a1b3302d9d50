"""What every engine of the benchmark has in common.

The environments of the peers (:mod:`trainkit.bench.engines.peers`) import this: no more than
serving's packages.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from trainkit.models.sources import detect
from trainkit.serve.bundle import read_manifest
from trainkit.serve.encoding import Text
from trainkit.serve.formats import Format
from trainkit.serve.types import FloatArray, Runner

Kind: TypeAlias = Format | Literal["run", "classifier", "adapter"]
"""What a source is: a bundle by its format, a trainkit run, or a folder of Hugging Face's."""

KINDS: dict[Kind, str] = {
    "run": "a trainkit run",
    "classifier": "a Hugging Face classifier's folder",
    "adapter": "a PEFT adapter's folder",
    "onnx": "an ONNX bundle",
    "torchscript": "a TorchScript bundle",
    "pt2": "a torch.export bundle",
    "aoti": "an AOTInductor bundle",
}
ON_TORCH: tuple[Kind, ...] = ("run", "classifier", "adapter")


class Engine(NamedTuple):
    """What computes: its name for the reader, and a function from a padded batch to logits.

    A runtime with its own tokenizer has ``classify`` instead of ``run``: texts to (B, C) logits,
    in one batch, with columns in the order of the source's labels. ``precision`` is a key of
    ``export.parity.TOLERANCES``; ``versions`` are those of the libraries that compute.
    """

    name: str
    run: Runner | None
    classify: Callable[[Sequence[Text]], FloatArray] | None = None
    precision: str = "fp32"
    versions: Mapping[str, str] = {}


class EngineUnavailableError(Exception):
    """A runtime that this machine or environment does not have: why, and how to get it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def kind_of(source: Path) -> Kind:
    """Return what a source is; raises ``InputError`` if no engine takes it."""
    kind = detect(source)
    if kind == "bundle":
        return read_manifest(source).format
    assert kind != "hub id"  # which is only looked for on request
    return kind


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages by their names."""
    return {package: metadata.version(package) for package in packages}


def limit_torch(threads: int) -> None:
    """Set PyTorch's threads, inside an operation and between them: once, before anything runs."""
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != threads:  # it may be set once only
        torch.set_num_interop_threads(threads)
