"""A bundle in optimum and in transformers' pipeline, against trainkit's own classifier."""

import json
import shutil

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, PretrainedConfig, pipeline


@pytest.fixture(scope="module")
def texts(texts, long_text):
    return [*texts, long_text]


def load(folder, is_hugging_faces):
    """Load the model; one from scratch, whose type nobody else knows, with its own config."""
    config = {} if is_hugging_faces else {"config": PretrainedConfig.from_pretrained(folder)}
    return ORTModelForSequenceClassification.from_pretrained(folder, **config)


@pytest.fixture(scope="module")
def model(folder, is_hugging_faces):
    return load(folder, is_hugging_faces)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_gives_the_classifiers_ids(tokenizer, classify, texts):
    assert tokenizer(texts, truncation=True)["input_ids"] == classify.encoder.token_ids(texts)


def test_the_logits_are_the_classifiers(model, tokenizer, classify, texts):
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits.numpy()
    np.testing.assert_allclose(logits, classify.logits(texts), rtol=1e-4, atol=1e-5)


def test_the_pipeline_gives_the_same_labels(model, tokenizer, classify, texts):
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer)(
        texts, truncation=True, batch_size=8
    )
    expected = classify(texts)
    assert [answer["label"] for answer in answers] == [answer.label for answer in expected]
    np.testing.assert_allclose(
        [answer["score"] for answer in answers], [answer.score for answer in expected], atol=1e-5
    )


def test_swapped_labels_would_be_noticed(
    folder, is_hugging_faces, tokenizer, classify, texts, tmp_path
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_bytes())
    labels = list(config["id2label"].values())
    config["id2label"] = {str(i): label for i, label in enumerate([*labels[1:], labels[0]])}
    (copy / "config.json").write_text(json.dumps(config))
    answers = pipeline(
        "text-classification", model=load(copy, is_hugging_faces), tokenizer=tokenizer
    )(texts[:4])
    expected = [answer.label for answer in classify(texts[:4])]
    assert all(a["label"] != label for a, label in zip(answers, expected, strict=True))
