"""Text to token ids and attention mask: the only such code, for training and serving alike.

Takes texts, or pairs of texts, and a ``tokenizer.json`` of the ``tokenizers`` library, and returns
int64 arrays of shape (B, S), padded on the right.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from trainkit.serve.errors import InputError

IntArray = npt.NDArray[np.int64]

Row: TypeAlias = Sequence[int] | IntArray
"""One number for each token of a text."""

Text: TypeAlias = str | tuple[str, str]
"""One text, or two that are classified together, such as a premise and a hypothesis."""


def characters(text: Text) -> int:
    """Return how long a text is, or a pair together."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


class Batch(NamedTuple):
    """One padded batch; B texts, S tokens in the longest. The fields are a model's inputs."""

    input_ids: IntArray  # (B, S)
    attention_mask: IntArray  # (B, S), 1 for a token of the text, 0 for padding
    token_type_ids: IntArray | None = None  # (B, S), 1 for the second of a pair; not all models

    def tensors(self) -> dict[str, IntArray]:
        """Return the inputs that are there by their names, in the order of the model's inputs."""
        return {name: array for name, array in self._asdict().items() if array is not None}


class Tokens(NamedTuple):
    """One encoded text: its token ids and, as long, which of two texts each belongs to.

    ``truncated``: the text has more tokens than these, which the length limit cut off. ``mask``, as
    long as ``ids``, is 1 for each token that the model may read; None stands for all of them.
    """

    ids: list[int]
    type_ids: list[int]
    truncated: bool = False
    mask: list[int] | None = None


def pad(
    rows: Sequence[Row],
    pad_id: int,
    type_rows: Sequence[Row] | None = None,
    masks: Sequence[Row | None] | None = None,
) -> Batch:
    """Right-pad token ids, and token types where given, to the longest row.

    The mask is made from the rows' lengths: a token whose id equals ``pad_id`` inside a text stays
    visible. ``masks`` gives some rows one of their own, as long as the row: padding on the left, or
    gaps. A batch of empty rows gets length 1, so that no axis is ever empty.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    positions = np.arange(max(1, int(lengths.max(initial=0))))
    attention_mask = (positions < lengths[:, None]).astype(np.int64)
    if masks is not None:
        for target, row, mask in zip(attention_mask, rows, masks, strict=True):
            if mask is not None:
                target[: len(row)] = mask
    types = None if type_rows is None else _filled(attention_mask.shape, type_rows, 0)
    return Batch(_filled(attention_mask.shape, rows, pad_id), attention_mask, types)


def by_length(
    lengths: Sequence[int], batch_size: int, max_tokens: int, *, equal_lengths: bool = False
) -> Iterator[list[int]]:
    """Yield the numbers of texts of similar length, or of one length, shortest first.

    No batch has more than ``batch_size`` texts, or more than ``max_tokens`` tokens and padding;
    a longer text is alone.
    """
    batch: list[int] = []
    # Shortest first: the text that comes next is the longest of the batch, which is padded to it.
    for number in np.argsort(lengths, kind="stable").tolist():
        padded_tokens = (len(batch) + 1) * lengths[number]
        if batch and (
            len(batch) == batch_size
            or padded_tokens > max_tokens
            or (equal_lengths and lengths[number] != lengths[batch[0]])
        ):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _filled(shape: tuple[int, ...], rows: Sequence[Row], rest: int) -> IntArray:
    array = np.full(shape, rest, dtype=np.int64)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return array


class TextEncoder:
    """A tokenizer with a length limit, a padding id, and whether its model takes token types.

    Padding and the length limit stored in the file are ignored: many published ``tokenizer.json``
    pad every text to 128 tokens. The side from which a long text is cut is kept. ``max_length``
    counts special tokens too; of a pair, the longer text is cut first.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, pad_id: int, *, token_types: bool = False
    ) -> None:
        stored = tokenizer.truncation or {}
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction=stored.get("direction", "right"))
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_id = pad_id
        self.token_types = token_types

    @classmethod
    def load(
        cls, path: Path, max_length: int, pad_id: int, *, token_types: bool = False
    ) -> "TextEncoder":
        """Read a ``tokenizer.json``; ``InputError`` if it is missing or invalid."""
        if not path.is_file():
            raise InputError(f"{path} does not exist: the folder is not complete; make it again.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception on every parse error
            raise InputError(f"{path} is not a tokenizers file ({error}); make it again.") from None
        return cls(tokenizer, max_length, pad_id, token_types=token_types)

    def tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Encode each text or pair, special tokens included, cut to ``max_length``."""
        if len(texts) == 1:  # not worth waking the tokenizer's threads, which then spin for a while
            first, second = (texts[0], None) if isinstance(texts[0], str) else texts[0]
            return [self._tokens(self.tokenizer.encode(first, second))]
        return [self._tokens(row) for row in self.tokenizer.encode_batch_fast(list(texts))]

    def _tokens(self, encoding: Encoding) -> Tokens:
        ids = encoding.ids
        # What was cut off lies in `overflowing`, which copies all of it: asked only of full rows.
        truncated = len(ids) >= self.max_length and bool(encoding.overflowing)
        return Tokens(ids, encoding.type_ids, truncated)

    def token_ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Return the ids alone of :meth:`tokens`."""
        return [row.ids for row in self.tokens(texts)]

    def pad(self, rows: Sequence[Tokens]) -> Batch:
        """Right-pad what :meth:`tokens` gave; token types are there if the model takes them."""
        types = [row.type_ids for row in rows] if self.token_types else None
        return pad([row.ids for row in rows], self.pad_id, types, [row.mask for row in rows])

    def encode(self, texts: Sequence[Text]) -> Batch:
        """Return the padded batch of these texts, in their order."""
        return self.pad(self.tokens(texts))
