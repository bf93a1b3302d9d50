"""Whole models: the faults of the document that this project began with, and padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.models import classifier
from trainkit.models.attention import MaskPlan
from trainkit.serve.encoding import pad
from trainkit.serve.errors import InputError

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
TEXTS = [
    "How far is Mars?",
    "Who painted the ceiling of the Sistine Chapel in Rome?",
    "Why?",
    "What does the abbreviation NASA stand for in the United States?",
]


@pytest.fixture(params=["simple", "prefix"])
def model(request, word_encoder):
    torch.manual_seed(3)
    made = classifier.from_scratch(request.param, LABELS, word_encoder, prefix_length=4)
    for weight in made.model.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # far from the symmetric start: faults show
    return made.model.eval()


def logits(model, ids, mask):
    with torch.inference_mode():
        return model(torch.as_tensor(ids), torch.as_tensor(mask))


def test_the_mask_is_used(model, word_encoder):
    ids, mask, _ = word_encoder.encode(TEXTS)
    assert not torch.allclose(logits(model, ids, mask), logits(model, ids, np.ones_like(mask)))


def test_texts_that_begin_alike_get_different_logits(model, word_encoder):
    """A causal mask with a pooled first token gave every text the same logits."""
    same_start = ["What is the capital of Peru?", "What is the boiling point of water?"]
    first, second = logits(model, *word_encoder.encode(same_start)[:2])
    assert (first - second).abs().max() > 1e-2


def test_rows_are_texts_and_columns_are_tokens(model, word_encoder):
    """Transposes that contradict batch_first mix texts: a row must not depend on its neighbours."""
    together = logits(model, *word_encoder.encode(TEXTS)[:2])
    for row, text in zip(together, TEXTS, strict=True):
        alone = logits(model, *word_encoder.encode([text])[:2])[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_words_matters(model, word_encoder):
    """Without positions, attention and a mean cannot tell these apart."""
    first, second = logits(model, *word_encoder.encode(["Who saw what?", "What saw who?"])[:2])
    assert (first - second).abs().max() > 1e-3


def test_the_mean_is_over_tokens_and_not_over_padding():
    states = torch.tensor([[[1.0], [3.0], [50.0]], [[7.0], [7.0], [7.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert MaskPlan(mask).mean(states).tolist() == [[2.0], [0.0]]


def test_the_prefix_of_a_scratch_model_reaches_the_logits(word_encoder):
    made = classifier.from_scratch("prefix", LABELS, word_encoder, prefix_length=4)
    model = made.model.eval()
    before = logits(model, *word_encoder.encode(TEXTS)[:2])
    with torch.no_grad():
        model.prefix.normal_()
    assert (logits(model, *word_encoder.encode(TEXTS)[:2]) - before).abs().max() > 1e-4


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    extra=st.integers(0, 6),
    left=st.booleans(),
)
def test_padding_never_changes_a_row(lengths, extra, left):
    """More padding, on either side, with anything in it: positions follow the mask."""
    model = _small_model()
    random = np.random.default_rng(0)
    rows = [random.integers(2, 50, size=length).tolist() for length in lengths]
    ids, mask, _ = pad(rows, 0)
    expected = logits(model, ids, mask)
    sides = ((0, 0), (extra, 0) if left else (0, extra))
    wider_mask = np.pad(mask, sides)
    wider = np.where(wider_mask, np.pad(ids, sides), random.integers(2, 50, wider_mask.shape))
    torch.testing.assert_close(logits(model, wider, wider_mask), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_of_a_batch_is_irrelevant(order):
    model = _small_model()
    rows = [[3] * n + [n] for n in range(6)]
    ids, mask, _ = pad(rows, 0)
    order = list(order)
    torch.testing.assert_close(
        logits(model, ids[order], mask[order]),
        logits(model, ids, mask)[order],
        rtol=1e-4,
        atol=1e-5,
    )


def _small_model():
    torch.manual_seed(0)
    from trainkit.models.config import ModelConfig, TransformerConfig

    config = ModelConfig(
        kind="simple",
        labels=LABELS,
        max_length=32,
        pad_id=0,
        transformer=TransformerConfig(
            vocabulary_size=50, hidden_size=16, heads=2, feed_forward_size=32
        ),
    )
    return classifier.build(config).eval()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "finetune"}, "needs a backbone"),
        ({"kind": "simple", "labels": ("A",)}, "two or more distinct"),
        ({"kind": "simple", "dropout": 1.5}, "dropout must be in"),
    ],
)
def test_a_contradiction_in_the_settings_is_named(settings, told, word_encoder):
    kind = settings.pop("kind")
    labels = settings.pop("labels", LABELS)
    with pytest.raises(InputError, match=told):
        classifier.from_scratch(kind, labels, word_encoder, **settings)
