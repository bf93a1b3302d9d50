"""The example that exporters trace: more than one row, and real padding in it.

With one row the exporter may take the batch axis for a constant; with an all-ones mask
``torch.jit.trace`` bakes the mask out of the graph.
"""

import torch
from torch import Tensor

from trainkit.serve.encoding import TextEncoder

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The names and the order of a model's inputs; the last is there if the model takes it."""


def input_names(encoder: TextEncoder) -> tuple[str, ...]:
    """Return the names of the model's inputs."""
    return INPUTS if encoder.token_types else INPUTS[:2]


def example_inputs(encoder: TextEncoder) -> tuple[Tensor, ...]:
    """Return one int64 tensor (3, 9), or shorter, for each input."""
    length = min(9, encoder.max_length)
    tokens = torch.tensor([length, max(1, length - 4), max(1, length - 2)])
    mask = (torch.arange(length) < tokens[:, None]).to(torch.int64)
    ids = torch.full_like(mask, encoder.pad_id)
    # Ids next to the padding's: those of an unknown or a special token in any vocabulary.
    other = encoder.pad_id + 1 if encoder.pad_id == 0 else encoder.pad_id - 1
    ids = torch.where(mask.bool(), other, ids)
    types = (torch.arange(length) > length // 2).to(torch.int64) * mask
    return (ids, mask, types) if encoder.token_types else (ids, mask)
