"""A classifier to TorchScript, and back: traced with padding, frozen, no source paths inside."""

import warnings
from pathlib import Path

import torch

from trainkit.export.example import example_batch
from trainkit.models.classifier import TextClassifier
from trainkit.serve.classifier import FloatArray, Runner
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError

__all__ = ["export_torchscript", "torchscript_runner"]


def export_torchscript(model: TextClassifier, path: Path) -> None:
    """Trace ``model`` and write it to ``path``; axes stay dynamic, as the parity matrix proves."""
    model = model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns at every Python number that it meets, PyTorch that TorchScript is
        # deprecated: the matrix shows whether a number was baked in, the manual says the rest.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example_batch(model), check_trace=False)
        frozen = torch.jit.freeze(traced)
        partial = path.with_suffix(".traced")
        torch.jit.save(frozen, partial)
    _copy_without_debug_records(partial, path)
    partial.unlink()


def _copy_without_debug_records(source: Path, target: Path) -> None:
    """Leave out the ``.debug_pkl`` records: they hold the paths of this machine's source files."""
    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    for name in reader.get_all_records():
        # The writer adds these two by itself.
        if name.endswith(".debug_pkl") or name in ("version", ".data/serialization_id"):
            continue
        record = reader.get_record(name)
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()


def torchscript_runner(path: Path) -> Runner:
    """Open ``path`` on the CPU; returns a function from a padded batch to (B, C) logits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened by torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); export the bundle again."
        ) from None

    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            logits: FloatArray = module(*(torch.from_numpy(array) for array in batch)).numpy()
        return logits

    return run
