"""The untrained model of a run, with its vocabulary, fitted linear half or initial prefix."""

import random

import torch

from trainkit.data.splits import Splits
from trainkit.data.vocabulary import PAD_ID, UNK_ID, word_tokenizer
from trainkit.models import classifier
from trainkit.models.classifier import UntrainedModel
from trainkit.models.prefix import begin_as_tokens
from trainkit.models.text_cnn import TextCNN
from trainkit.serve.encoding import TextEncoder
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.losses import balanced_weights
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.tfidf import fit_bigrams, frequent_pairs

SCRATCH_MAX_LENGTH = 128


def make_model(
    spec: ModelSpec, splits: Splits, config: TrainConfig | None = None
) -> UntrainedModel:
    """Return the untrained model that ``spec`` describes, with a vocabulary if it needs one.

    The linear half of ``simple`` is fitted already, with the class weights of ``config``. A prefix
    on a backbone starts as tokens of training texts, chosen by the seed.
    """
    if spec.backbone is None:
        balanced = config is not None and config.class_weights == "balanced"
        return _from_scratch(spec, splits, balanced)
    new = classifier.on_backbone(
        spec.kind,
        splits.label_names,
        spec.backbone,
        prefix_length=spec.prefix_length,
        projection_size=spec.projection_size,
        max_length=spec.max_length,
        dropout=0.1 if spec.dropout is None else spec.dropout,
        head=spec.head,
    )
    if spec.kind == "prefix" and not spec.projection_size:
        choose = random.Random(0 if config is None else config.seed)
        texts = [choose.choice(splits.train).text for _ in range(spec.prefix_length)]
        begin_as_tokens(new.model, new.encoder.token_ids(texts), choose)
    return new


def _from_scratch(spec: ModelSpec, splits: Splits, balanced: bool) -> UntrainedModel:
    texts = [example.text for example in splits.train]
    limit = SCRATCH_MAX_LENGTH if spec.max_length is None else spec.max_length
    vocabulary = TextEncoder(word_tokenizer(texts, spec.min_count), limit, PAD_ID)
    rows = vocabulary.token_ids(texts)
    pairs = frequent_pairs(rows, vocabulary.tokenizer.get_vocab_size(), UNK_ID)
    new = classifier.from_scratch(
        spec.kind,
        splits.label_names,
        vocabulary,
        bigrams=len(pairs),
        prefix_length=spec.prefix_length,
        # Few texts are seen: without more dropout, a model from scratch overfits.
        dropout=0.5 if spec.dropout is None else spec.dropout,
    )
    if isinstance(new.model, TextCNN):
        new.model.count(rows)
        number = {name: i for i, name in enumerate(splits.label_names)}
        labels = torch.tensor([number[example.label] for example in splits.train])
        weights = balanced_weights(labels, len(number)) if balanced else None
        fit_bigrams(new.model.bigrams, rows, pairs, labels, UNK_ID, weights)
    return new
