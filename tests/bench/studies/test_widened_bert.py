"""A model grown from a small one: as large as BERT-base, and of the small one's opinion."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainkit.bench.studies import widened_bert
from trainkit.data.splits import load_sample
from trainkit.models.backbone import resolve
from trainkit.models.loading import quiet


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    with quiet():
        return AutoModelForSequenceClassification.from_pretrained(
            resolve("minilm"), num_labels=6, attn_implementation="sdpa"
        ).eval()


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
    texts = [example.text for example in load_sample()[:8]]
    return tokenizer(texts, padding=True, return_tensors="pt")


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def test_it_has_the_size_of_bert_base(small):
    config = widened_bert.grow(small).config
    assert (config.num_hidden_layers, config.hidden_size) == (12, 768)
    assert (config.intermediate_size, config.num_attention_heads) == (3072, 12)
    assert (small.config.num_hidden_layers, small.config.hidden_size) == (6, 384)


def test_a_wider_model_computes_the_same(small, inputs, monkeypatch):
    monkeypatch.setattr(widened_bert, "_deepened", lambda model: model)
    torch.testing.assert_close(logits(widened_bert.grow(small), inputs), logits(small, inputs))
    # Not because it reads one half only: the halves have weights of their own.
    monkeypatch.setattr(widened_bert, "_twice", lambda value, heads: torch.cat([value, 0 * value]))
    assert not torch.allclose(
        logits(widened_bert.grow(small), inputs), logits(small, inputs), atol=1e-2
    )


def test_a_deeper_model_nearly_does(small, inputs):
    expected, found = logits(small, inputs), logits(widened_bert.grow(small), inputs)
    centred = expected - expected.mean(0), found - found.mean(0)
    assert torch.corrcoef(torch.stack([one.flatten() for one in centred]))[0, 1] > 0.9


def test_the_new_layers_learn(small, inputs):
    model = widened_bert.grow(small)
    model(**inputs, labels=torch.arange(8) % 6).loss.backward()
    new = model.bert.encoder.layer[1]
    assert new.output.dense.weight.grad.abs().max() > 0
    halves = new.intermediate.dense.weight.chunk(2, dim=1)
    assert not torch.allclose(*halves, atol=1e-3)
