"""What an export is compared on: a matrix of batch sizes, lengths and masks, and real sentences.

Each case is an input with the reference's logits. The cases are kept in the bundle, and read again
without torch.
"""

import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainkit.serve.encoding import Batch, IntArray, TextEncoder
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.types import FloatArray, Runner

ProgressCallback = Callable[[str], None]

PARITY_FILE = "parity.npz"
BATCH_SIZES = (1, 2, 7)
LENGTHS = (1, 2, 17)  # and the model's maximum
# Seven rows of 512 tokens cost more than all the rest together, and show what two of them show.
POSITIONS = 900
TEXT_BATCH = 8
SENTENCES = "texts"
BRIEF_TEXTS = 2  # batches of sentences


class Case(NamedTuple):
    """One input of the matrix, and the reference's logits (B, C) for it."""

    name: str
    batch: Batch
    expected: FloatArray


def masks(batch: int, length: int) -> Iterator[tuple[str, IntArray]]:
    """Yield each kind of padding as a (B, S) mask; rows differ in how much of it they have."""
    tokens = np.maximum(1, length - np.arange(batch) * length // batch)  # (B,), first row full
    right = (np.arange(length) < tokens[:, None]).astype(np.int64)
    if batch == 1 and length > 1:
        right[0, length // 2 + 1 :] = 0  # a row alone must be padded too
    gapped = np.ones((batch, length), dtype=np.int64)
    gapped[:, 1::3] = 0
    blank = right.copy()
    blank[-1] = 0
    yield "full", np.ones((batch, length), dtype=np.int64)
    yield "right", right
    yield "left", right[:, ::-1].copy()
    yield "gapped", gapped
    yield "one row blank", blank


def make_cases(
    encoder: TextEncoder, texts: Sequence[str], seed: int = 0
) -> Iterator[tuple[str, Batch]]:
    """Yield the matrix of random ids, then ``texts`` in batches of eight.

    Hidden positions hold random ids too, not padding: a mask that got lost cannot go unnoticed.
    Token types, if the model takes them, are random as well.
    """
    random = np.random.default_rng(seed)
    vocabulary = encoder.tokenizer.get_vocab_size()
    lengths = sorted({min(length, encoder.max_length) for length in (*LENGTHS, encoder.max_length)})
    for length, batch in itertools.product(lengths, BATCH_SIZES):
        if batch != 2 and batch * length > POSITIONS:
            continue
        ids = random.integers(0, vocabulary, size=(batch, length), dtype=np.int64)
        types = random.integers(0, 2, size=ids.shape) if encoder.token_types else None
        for kind, mask in masks(batch, length):
            yield f"{batch} x {length}, {kind}", Batch(ids, mask, types)
    rows = encoder.tokens(texts)
    for start in range(0, len(rows), TEXT_BATCH):
        chosen = rows[start : start + TEXT_BATCH]
        yield f"{SENTENCES} {start + 1} to {start + len(chosen)}", encoder.pad(chosen)


def representative(cases: Sequence[Case]) -> list[Case]:
    """Leave out what costs most: the maximum length if that is long, and most sentences.

    For the stages between the untouched export and the finished bundle, which both get all.
    """
    sentences = [case.name for case in cases if case.name.startswith(SENTENCES)]
    return [case for case in without_longest(cases) if case.name not in sentences[BRIEF_TEXTS:]]


def without_longest(cases: Sequence[Case]) -> list[Case]:
    """Leave out the cases of the maximum length if that is long."""
    return [case for case in cases if case.batch.input_ids.size <= POSITIONS // 2]


def run_reference(
    reference: Runner,
    inputs: Iterator[tuple[str, Batch]],
    on_progress: ProgressCallback = lambda name: None,
) -> list[Case]:
    """Run the reference over the inputs; ``CheckFailedError`` if it gives anything but numbers."""
    cases = []
    for name, batch in inputs:
        on_progress(name)
        expected = reference(batch)
        wrong = ~np.isfinite(expected).all(axis=1)
        if wrong.any():
            blank = not batch.attention_mask[wrong].any()
            why = "its mask makes them of a row without tokens" if blank else "train it again"
            raise CheckFailedError(
                f"the model itself gives NaN or infinity on case '{name}'; {why}."
            )
        cases.append(Case(name, batch, expected))
    return cases


def save_cases(path: Path, cases: Sequence[Case]) -> None:
    """Keep the cases as compressed arrays: each case's ids, mask, expected logits and name."""
    arrays: dict[str, Any] = {}
    for number, (name, batch, expected) in enumerate(cases):
        arrays[f"{number}/ids"] = batch.input_ids.astype(np.int32)
        arrays[f"{number}/mask"] = batch.attention_mask.astype(np.bool_)
        if batch.token_type_ids is not None:
            arrays[f"{number}/types"] = batch.token_type_ids.astype(np.int8)
        arrays[f"{number}/logits"] = expected
        arrays[f"{number}/name"] = np.array(name)
    np.savez_compressed(path, **arrays)


def load_cases(path: Path) -> list[Case]:
    """Read what :func:`save_cases` wrote; never unpickles."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.endswith("/name")]
            return [_load_case(arrays, number) for number in range(len(names))]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); export the bundle again.") from None


def _load_case(arrays: Any, number: int) -> Case:
    types = f"{number}/types"
    batch = Batch(
        arrays[f"{number}/ids"].astype(np.int64),
        arrays[f"{number}/mask"].astype(np.int64),
        arrays[types].astype(np.int64) if types in arrays.files else None,
    )
    return Case(str(arrays[f"{number}/name"]), batch, arrays[f"{number}/logits"])
