"""Batches of random ids with known padding: one long row, and equal rows beside it."""

from collections.abc import Sequence
from itertools import chain

import msgspec
import numpy as np

from trainkit.bench.race.protocol import Work
from trainkit.bench.race.workload import Workload
from trainkit.serve.encoding import Batch, TextEncoder, pad
from trainkit.serve.errors import InputError

MAX_LENGTH = 512
ROWS = 32
SHARES = (0.0, 0.5, 0.75, 0.875)
BATCH_SIZES = (4, 8, 16, 32, 64)
MEAN_LENGTH, BATCH_SHARE = 16, 0.5
SEED = 0


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A batch of ``rows`` texts: one has ``longest`` tokens, each other ``rest``."""

    rows: int
    longest: int
    rest: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return self.longest + (self.rows - 1) * self.rest

    @property
    def positions(self) -> int:
        """Return the number of tokens and padding."""
        return self.rows * self.longest

    @property
    def padding_share(self) -> float:
        """Return the share of positions that hold padding."""
        return 1 - self.tokens / self.positions


def shapes(max_length: int) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Return shapes by tokens and by rows, of which none has a row above 512 or ``max_length``.

    By tokens: 32 rows; for each number of tokens one shape for each of ``SHARES``. By rows: half of
    the positions are padding, and a row has 16 tokens in the mean.

    Raises ``InputError`` if a model's texts are too short for them.
    """
    if max_length < 128:
        raise InputError(f"the model's longest text has {max_length} tokens; take one with 128.")
    # With the largest share of padding the last has one row of max_length.
    tokens = [min(MAX_LENGTH, max_length) * factor // 2 for factor in (1, 2, 4, 8)]
    by_tokens = tuple(_shape(ROWS, count, share) for count in tokens for share in SHARES)
    by_rows = tuple(_shape(rows, rows * MEAN_LENGTH, BATCH_SHARE) for rows in BATCH_SIZES)
    return by_tokens, by_rows


def _shape(rows: int, tokens: int, padding_share: float) -> Shape:
    longest = round(tokens / (rows * (1 - padding_share)))
    return Shape(rows, longest, max(1, round((tokens - longest) / (rows - 1))))


def workload(all_shapes: Sequence[Shape], encoder: TextEncoder) -> Workload:
    """Fill the shapes with random ids, three batches each."""
    random = np.random.default_rng(SEED)
    lengths = chain.from_iterable(
        ([one.longest, *rest], [one.longest], rest)
        for one in all_shapes
        for rest in [[one.rest] * (one.rows - 1)]
    )
    batches = [_batch(rows, encoder, random) for rows in lengths]
    return Workload(
        name="random ids, padded and not", scenario="grid", batch_size=ROWS, work=Work(batches, [])
    )


def _batch(lengths: Sequence[int], encoder: TextEncoder, random: np.random.Generator) -> Batch:
    vocabulary = encoder.tokenizer.get_vocab_size()
    rows = [random.integers(0, vocabulary, length) for length in lengths]
    types = [np.zeros(length, np.int64) for length in lengths] if encoder.token_types else None
    return pad(rows, encoder.pad_id, type_rows=types)
