import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trainkit.data.readers import Columns
from trainkit.data.splits import load
from trainkit.data.vocabulary import PAD, PAD_ID, UNK, UNK_ID, word_tokenizer
from trainkit.serve.errors import InputError

TEXTS = [
    "How far is it from Denver to Aspen ?",
    "What county is Modesto , California in ?",
    "Who was Galileo ?",
    "What is an atom ?",
    "When did Hawaii become a state ?",
    "how far is Pelé's Café from the café ?",
]


def test_words_are_counted_and_ordered_by_count_then_alphabet() -> None:
    tokenizer = word_tokenizer(TEXTS)
    ids = tokenizer.get_vocab()
    vocabulary = sorted(ids, key=lambda word: ids[word])
    assert vocabulary == [PAD, UNK, "?", "is", "cafe", "far", "from", "how", "what"]
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(UNK)) == (PAD_ID, UNK_ID) == (0, 1)


def test_the_counts_agree_with_the_tokenizers_own_splitting() -> None:
    texts = [example.text for example in load("sample", Columns()).train]
    tokenizer = word_tokenizer(texts, min_count=1)
    counts = Counter(token for text in texts for token in tokenizer.encode(text).tokens)
    assert UNK not in counts
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[2:]
    by_id = [counts[word] for word, _ in words]
    assert by_id == sorted(by_id, reverse=True)
    assert sum(count >= 2 for count in by_id) == word_tokenizer(texts).get_vocab_size() - 2


def test_words_are_split_from_punctuation_lowercased_and_stripped_of_accents() -> None:
    assert word_tokenizer(TEXTS).encode("HOW,far? Café Kyoto").tokens == [
        *("how", UNK, "far", "?", "cafe", UNK)
    ]


def test_max_size_counts_the_special_tokens_and_keeps_the_commonest() -> None:
    tokenizer = word_tokenizer(TEXTS, min_count=1, max_size=4)
    assert tokenizer.get_vocab() == {PAD: 0, UNK: 1, "?": 2, "is": 3}


def test_a_users_text_cannot_name_the_padding_token() -> None:
    ids = word_tokenizer(TEXTS).encode(f"How {PAD} far {UNK} ?").ids
    assert PAD_ID not in ids
    assert len(ids) == 9  # the brackets are tokens of their own


def test_no_word_left_is_refused() -> None:
    with pytest.raises(InputError, match="min_count"):
        word_tokenizer(["each word once"])
    with pytest.raises(InputError, match="max_size=2"):
        word_tokenizer(TEXTS, max_size=2)
    with pytest.raises(InputError, match="0 texts"):
        word_tokenizer([])


def test_the_tokenizer_survives_its_file() -> None:
    tokenizer = word_tokenizer(TEXTS)
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.encode(TEXTS[-1]).ids == tokenizer.encode(TEXTS[-1]).ids


def test_ids_do_not_depend_on_hash_randomisation() -> None:
    program = (
        "from trainkit.data.vocabulary import word_tokenizer;"
        f"print(word_tokenizer({TEXTS!a}, min_count=1).to_str())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_encodes_to_ids_of_the_vocabulary(text: str) -> None:
    tokenizer = word_tokenizer(TEXTS)
    ids = tokenizer.encode(text).ids
    assert all(PAD_ID < i < tokenizer.get_vocab_size() for i in ids)
