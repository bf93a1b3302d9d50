"""The example that exporters trace: more than one row, and real padding in it.

With one row the exporter may take the batch axis for a constant; with an all-ones mask
``torch.jit.trace`` bakes the mask out of the graph.
"""

import torch
from torch import Tensor

from trainkit.models.classifier import TextClassifier

__all__ = ["example_batch"]


def example_batch(model: TextClassifier) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 (3, 9) or shorter, on the model's device."""
    length = min(9, model.config.max_length)
    device = next(model.parameters()).device
    tokens = torch.tensor([length, max(1, length - 4), max(1, length - 2)], device=device)
    mask = (torch.arange(length, device=device) < tokens[:, None]).to(torch.int64)
    ids = torch.full_like(mask, model.config.pad_id)
    return torch.where(mask.bool(), ids + 1, ids), mask
