"""Model files in formats of PyTorch as functions from a padded batch to (B, C) logits."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError, first_line
from trainkit.serve.formats import Format
from trainkit.serve.types import FloatArray, Runner


def torch_runner(path: Path, format: Format) -> Runner:
    """Open a TorchScript module, a torch.export program or machine code of AOTInductor.

    Opening machine code runs it, as with any library.
    """
    try:
        module = _load(path, format)
    except Exception as error:  # zip, JSON and schema errors share no base class
        raise InputError(
            f"{path} cannot be opened by torch {torch.__version__} ({first_line(error)}); "
            "export the bundle again."
        ) from None

    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array) for array in batch.tensors().values()]
            logits: FloatArray = module(*tensors).numpy()
        return logits

    return run


def _load(path: Path, format: Format) -> Callable[..., Tensor]:
    if format == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module: Callable[..., Tensor] = torch.jit.load(str(path), map_location="cpu")
        return module
    if format == "pt2":
        # Its guards refuse lengths that the tracer had no reason to refuse (MobileBERT's two
        # tokens); that the program is right at them, the parity matrix has shown.
        return torch.export.load(path).module(check_guards=False)
    compiled: Callable[..., Tensor] = torch._inductor.aoti_load_package(str(path))
    return compiled


def check_machine(folder: Path, compiled_for: Mapping[str, Any]) -> None:
    """Raise InputError if ``folder`` was compiled for another kind of machine."""
    from trainkit.export.program import this_machine

    here = this_machine()
    other = [name for name in here if here[name] != compiled_for.get(name)]
    if other:
        name = other[0]
        raise InputError(
            f"{folder} was compiled for {name} {compiled_for.get(name)}, this machine has "
            f"{here[name]}; export it again here, or use --format pt2."
        )
