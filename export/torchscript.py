"""A classifier to TorchScript: traced with padding, frozen, no source paths inside."""

from pathlib import Path

import torch

from trainkit.export.example import example_batch
from trainkit.export.quiet import quiet_exporter
from trainkit.models.classifier import TextClassifier

__all__ = ["export_torchscript"]


def export_torchscript(model: TextClassifier, path: Path) -> None:
    """Trace ``model`` and write it to ``path``; axes stay dynamic, as the parity matrix proves."""
    model = model.eval()
    with quiet_exporter(), torch.no_grad():
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
