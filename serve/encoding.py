"""Text to token ids and attention mask: the only such code, for training and serving alike.

In go strings and a ``tokenizer.json`` of the ``tokenizers`` library; out come two int64 arrays
of shape (B, S), padded on the right.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trainkit.serve.errors import InputError

__all__ = ["Batch", "TextEncoder", "pad"]

IntArray = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """One padded batch; B texts, S tokens in the longest."""

    input_ids: IntArray  # (B, S)
    attention_mask: IntArray  # (B, S), 1 for a token of the text, 0 for padding


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Right-pad token ids to the longest row.

    The mask is made from the rows' lengths: a token whose id equals ``pad_id`` inside a text stays
    visible. A batch of empty rows gets length 1, so that no axis is ever empty.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    positions = np.arange(max(1, int(lengths.max(initial=0))))
    attention_mask = (positions < lengths[:, None]).astype(np.int64)
    input_ids = np.full(attention_mask.shape, pad_id, dtype=np.int64)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    return Batch(input_ids, attention_mask)


class TextEncoder:
    """A tokenizer with a length limit and a padding id.

    Padding and truncation stored in the file are ignored: many published ``tokenizer.json`` pad
    every text to 128 tokens. ``max_length`` counts special tokens too.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, pad_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_id = pad_id

    @classmethod
    def load(cls, path: Path, max_length: int, pad_id: int) -> "TextEncoder":
        """Read a ``tokenizer.json``; ``InputError`` where it is missing or not one."""
        if not path.is_file():
            raise InputError(f"{path} does not exist: the folder is not complete; make it again.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception on every parse error
            raise InputError(f"{path} is not a tokenizers file ({error}); make it again.") from None
        return cls(tokenizer, max_length, pad_id)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, cut to ``max_length``."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]

    def encode(self, texts: Sequence[str]) -> Batch:
        """Return the padded batch of these texts, in their order."""
        return pad(self.token_ids(texts), self.pad_id)
