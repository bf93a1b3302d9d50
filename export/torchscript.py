"""A classifier to TorchScript: traced with padding, frozen, no source paths inside."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trainkit.export.archive import copy_archive
from trainkit.export.quiet import quiet_exporter


def export_torchscript(model: nn.Module, example: Sequence[Tensor], path: Path) -> None:
    """Trace ``model`` and write it to ``path``; axes stay dynamic, as the parity matrix proves."""
    model = model.eval()
    with quiet_exporter(), torch.no_grad():
        traced = torch.jit.trace(model, tuple(example), check_trace=False)
        frozen = torch.jit.freeze(traced)
        partial = path.with_suffix(".traced")
        torch.jit.save(frozen, partial)
    # The debug records hold the paths of this machine's source files.
    copy_archive(partial, path, lambda name, record: None if ".debug_pkl" in name else record)
    partial.unlink()
