"""TorchScript behind the one calling convention; needs torch, and nothing else of training."""

import warnings
from pathlib import Path

import torch

from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError, first_line
from trainkit.serve.types import FloatArray, Runner


def torchscript_runner(path: Path) -> Runner:
    """Open ``path`` on the CPU; returns a function from a padded batch to (B, C) logits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened by torch {torch.__version__} "
            f"({first_line(error)}); export the bundle again."
        ) from None

    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            logits: FloatArray = module(
                *(torch.from_numpy(array) for array in batch.tensors().values())
            ).numpy()
        return logits

    return run
