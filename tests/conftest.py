"""What the tests share: real sentences, tiny models that are quick to make, and the masks."""

from pathlib import Path

import pytest

from trainkit.data.columns import Columns
from trainkit.data.splits import load
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.serve.encoding import TextEncoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def splits():
    """Return the project's own questions, split with seed 0."""
    return load("sample", Columns())


@pytest.fixture
def word_encoder(splits):
    """Return a fresh word-level encoder of 32 tokens at most: tests may change its settings."""
    texts = [example.text for example in splits.train]
    return TextEncoder(word_tokenizer(texts), 32, PAD_ID)
