"""The linear half of simple: against scikit-learn's logistic regression on the same features."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from trainkit.data.vocabulary import UNK_ID, word_tokenizer
from trainkit.models.bigrams import BigramLinear
from trainkit.trainer.tfidf import fit_bigrams, frequent_pairs


@pytest.fixture(scope="module")
def questions(splits):
    """Token ids and label numbers of the sample's questions, and how many words there are."""
    texts = [example.text for example in splits.train]
    tokenizer = word_tokenizer(texts)
    names = splits.label_names
    labels = torch.tensor([names.index(example.label) for example in splits.train])
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return rows, labels, tokenizer.get_vocab_size()


def fitted(questions, **settings):
    rows, labels, vocabulary = questions
    pairs = frequent_pairs(rows, vocabulary, UNK_ID)
    model = BigramLinear(vocabulary, len(pairs), int(labels.max()) + 1)
    fit_bigrams(model, rows, pairs, labels, UNK_ID, **settings)
    return model


def answers(model, rows):
    """One text at a time: no padding."""
    return torch.cat(
        [model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in rows]
    )


def features(rows, kept):
    """tf-idf of the kept words and pairs, of length 1, by hand: (N, features)."""
    found = [[f for f in (*row, *pairwise(row)) if f in kept] for row in rows]
    texts = Counter(feature for row in found for feature in set(row))
    columns = {feature: number for number, feature in enumerate(texts)}
    dense = np.zeros((len(rows), len(columns)))
    for number, row in enumerate(found):
        weights = [np.log((1 + len(rows)) / (1 + texts[feature])) + 1 for feature in row]
        for feature, weight in zip(row, weights, strict=True):
            dense[number, columns[feature]] += weight / np.linalg.norm(weights)
    return csr_array(dense)


@pytest.mark.parametrize("balanced", [False, True])
def test_it_answers_as_scikit_learns_logistic_regression(questions, balanced, monkeypatch):
    monkeypatch.setattr("trainkit.trainer.tfidf.TOLERANCE", 1e-6)  # both at the minimum
    rows, labels, vocabulary = questions
    counts = torch.bincount(labels)
    weights = len(labels) / (len(counts) * counts) if balanced else None
    model = fitted(questions, class_weights=weights)
    slotted = set(model.slots.tolist()) - {model.pairs}
    kept = {divmod(key, vocabulary) for key in model.keys[sorted(slotted)].tolist()}
    known = set(range(vocabulary)) - {UNK_ID}
    peer = LogisticRegression(
        C=30, max_iter=5000, tol=1e-8, class_weight="balanced" if balanced else None
    )
    inputs = features(rows, kept | known)
    peer.fit(inputs, labels.numpy())
    expected = peer.predict_proba(inputs)
    found = answers(model, rows).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    other = LogisticRegression(C=3, max_iter=2000).fit(inputs, labels.numpy())
    assert np.abs(found - other.predict_proba(inputs)).max() > 0.05  # the comparison can fail


def test_pairs_are_those_of_known_neighbours_in_two_texts_or_more():
    rows = [[5, 6, 7], [6, 7, 5, 6], [6, 7], [1, 5, 1, 5], [1, 5], [8, 9, 8, 9], [4]]
    keys = frequent_pairs(rows, 10, UNK_ID).tolist()
    assert [divmod(key, 10) for key in keys] == [(6, 7), (5, 6)]
    assert not frequent_pairs([[4], []], 10, UNK_ID).tolist()


def test_what_no_text_had_has_no_weight(questions):
    model = fitted(questions)
    unknown = torch.tensor([[UNK_ID, UNK_ID]])
    torch.testing.assert_close(model(unknown, torch.ones_like(unknown))[0], model.bias)


def test_where_the_minimum_is_not_reached_it_is_said(questions, monkeypatch, caplog):
    fitted(questions)
    assert not caplog.messages
    monkeypatch.setattr("trainkit.trainer.tfidf.MAX_ITERATIONS", 5)
    fitted(questions)
    assert "not at the minimum of their loss" in caplog.text


def test_the_same_texts_give_the_same_weights_to_the_bit(questions):
    assert torch.equal(fitted(questions).weight, fitted(questions).weight)
