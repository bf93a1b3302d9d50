"""Examples to batches of tensors."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.data.readers import Example
from trainkit.serve.encoding import TextEncoder, pad

__all__ = ["Encoded", "encode", "shuffled"]


class Encoded(NamedTuple):
    """N examples as token ids (ragged) and label numbers (N,)."""

    rows: list[list[int]]
    labels: Tensor
    pad_id: int

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (B, S), mask (B, S) and labels (B,), int64 all, of the chosen examples."""
        ids, mask, _ = pad([self.rows[i] for i in chosen], self.pad_id)
        return torch.from_numpy(ids), torch.from_numpy(mask), self.labels[list(chosen)]


def encode(examples: Sequence[Example], encoder: TextEncoder, names: Sequence[str]) -> Encoded:
    """Tokenise once, before the first epoch. Every label must be in ``names``."""
    number = {name: i for i, name in enumerate(names)}
    return Encoded(
        encoder.token_ids([example.text for example in examples]),
        torch.tensor([number[example.label] for example in examples]),
        encoder.pad_id,
    )


def shuffled(data: Encoded, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of one epoch in an order that seed and epoch alone decide.

    Lengths are mixed freely: the model packs, so padding costs it nothing.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data.rows)).tolist()
    for start in range(0, len(order), size):
        yield data.batch(order[start : start + size])


def in_order(data: Encoded, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches in the examples' own order."""
    for start in range(0, len(data.rows), size):
        yield data.batch(range(start, min(start + size, len(data.rows))))
