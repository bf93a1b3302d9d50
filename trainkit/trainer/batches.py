"""Examples to batches of tensors."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.data.readers import Example
from trainkit.serve.encoding import TextEncoder, by_length, pad
from trainkit.trainer.distributed import SINGLE, ProcessGroup

BATCH_TOKENS = 4096  # padding counted; more would take longer where lengths differ, and more memory


class MicroBatch(NamedTuple):
    """Some texts: ids (B, S), mask (B, S) and labels (B,), int64 all."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class BatchShard(NamedTuple):
    """What one process computes of a batch, in parts; ``whole`` are the labels of all of it.

    Where the batch has fewer texts than there are processes, some compute one that another
    ``counted``.
    """

    parts: list[MicroBatch]
    whole: Tensor
    counted: bool = True


class EncodedExamples(NamedTuple):
    """N examples as token ids (ragged) and label numbers (N,)."""

    rows: list[list[int]]
    labels: Tensor
    pad_id: int

    def part(self, chosen: Sequence[int]) -> MicroBatch:
        """Return the chosen examples, padded to the longest."""
        ids, mask, _ = pad([self.rows[i] for i in chosen], self.pad_id)
        return MicroBatch(torch.from_numpy(ids), torch.from_numpy(mask), self.labels[list(chosen)])

    def parts(self, chosen: Sequence[int], max_tokens: int) -> list[MicroBatch]:
        """Return the chosen examples at once, or, where padded to one length they would be more
        than ``max_tokens`` tokens, in parts of similar length."""
        lengths = [len(self.rows[i]) for i in chosen]
        if len(chosen) * max(lengths) <= max_tokens:
            return [self.part(chosen)]
        found = by_length(lengths, len(chosen), max_tokens)
        return [self.part([chosen[place] for place in places]) for places in found]


def encode(
    examples: Sequence[Example], encoder: TextEncoder, names: Sequence[str]
) -> EncodedExamples:
    """Tokenise once, before the first epoch. Every label must be in ``names``."""
    number = {name: i for i, name in enumerate(names)}
    return EncodedExamples(
        encoder.token_ids([example.text for example in examples]),
        torch.tensor([number[example.label] for example in examples]),
        encoder.pad_id,
    )


def shuffled(
    data: EncodedExamples,
    size: int,
    seed: int,
    epoch: int,
    max_tokens: int,
    group: ProcessGroup = SINGLE,
) -> Iterator[BatchShard]:
    """Yield this process's share of one epoch's batches, in an order that seed and epoch decide.

    ``size`` is that of a whole batch, over all processes; ``max_tokens`` is for one part. Lengths
    are mixed freely: the model packs, so only attention computes padding.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data.rows)).tolist()
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        mine = group.shard(chosen, [len(data.rows[i]) for i in chosen])
        parts = data.parts(mine or chosen[:1], max_tokens)
        yield BatchShard(parts, data.labels[chosen], counted=bool(mine))


def in_order(
    data: EncodedExamples, max_tokens: int, group: ProcessGroup = SINGLE
) -> Iterator[MicroBatch]:
    """Yield this process's part of all examples, in batches of similar length."""
    lengths = [len(row) for row in data.rows]
    batches = by_length(lengths, len(lengths), max_tokens)
    for chosen in itertools.islice(batches, group.rank, None, group.size):
        yield data.part(chosen)
