"""torch.export's programs and AOTInductor's machine code behind the one calling convention."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError, first_line
from trainkit.serve.types import FloatArray, Runner


def program_runner(path: Path) -> Runner:
    """Open a torch.export program; returns a function from a padded batch to (B, C) logits."""
    try:
        # Its guards refuse lengths that the tracer had no reason to refuse (MobileBERT's two
        # tokens); whether the program is right at them, the parity matrix has shown.
        module = torch.export.load(path).module(check_guards=False)
    except Exception as error:  # zip, JSON and schema errors share no base class
        raise _unreadable(path, error) from None
    return _runner(module)


def compiled_runner(path: Path) -> Runner:
    """Open machine code that AOTInductor compiled; opening it runs it, as any library does."""
    try:
        module = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # likewise
        raise _unreadable(path, error) from None
    return _runner(module)


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


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be opened by torch {torch.__version__} ({first_line(error)}); "
        "export it again."
    )


def _runner(module: Callable[..., Tensor]) -> Runner:
    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array) for array in batch.tensors().values()]
            logits: FloatArray = module(*tensors).numpy()
        return logits

    return run
