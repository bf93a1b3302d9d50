"""Builds the classifiers that trainkit trains: new ones, and those that a configuration describes.

Three kinds behind one class, :class:`trainkit.models.base.TextClassifier`: a convolutional network,
a small transformer, and a pretrained encoder with a head.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import nn
from transformers import PreTrainedModel

from trainkit.data.vocabulary import UNK_ID
from trainkit.models import backbone
from trainkit.models.backbone_classifier import BackboneClassifier
from trainkit.models.base import TextClassifier
from trainkit.models.config import Kind, ModelConfig, TextCNNConfig, TransformerConfig
from trainkit.models.text_cnn import TextCNN
from trainkit.models.transformer import SmallTransformer
from trainkit.serve.encoding import Batch, TextEncoder
from trainkit.serve.types import FloatArray, Runner


class UntrainedModel(NamedTuple):
    """A model before its training, with the encoder of its texts."""

    model: TextClassifier
    encoder: TextEncoder


def from_scratch(
    kind: Kind,
    labels: Sequence[str],
    vocabulary: TextEncoder,
    *,
    bigrams: int = 0,
    prefix_length: int = 16,
    max_length: int | None = None,
    dropout: float = 0.1,
) -> UntrainedModel:
    """Return an untrained ``TextCNN`` for "simple", else a transformer with a learned prefix.

    ``bigrams`` is how many the linear half of a ``TextCNN`` has room for. ``max_length`` (tokens)
    can only lower that of ``vocabulary``. With ``dropout`` 0 no words are dropped either.
    """
    size = vocabulary.tokenizer.get_vocab_size()
    limits = [vocabulary.max_length] if max_length is None else [vocabulary.max_length, max_length]
    encoder = TextEncoder(vocabulary.tokenizer, min(limits), vocabulary.pad_id)
    text_cnn = transformer = None
    if kind == "simple":
        text_cnn = TextCNNConfig(vocabulary_size=size, unknown_id=UNK_ID, pairs=bigrams)
        if not dropout:
            text_cnn = msgspec.structs.replace(text_cnn, word_dropout=0.0, rare_word_dropout=0.0)
    else:
        transformer = TransformerConfig(vocabulary_size=size)
        if not dropout:
            transformer = msgspec.structs.replace(transformer, word_dropout=0.0)
    config = ModelConfig(
        kind=kind,
        labels=tuple(labels),
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        dropout=dropout,
        prefix_length=prefix_length if kind == "prefix" else 0,
        text_cnn=text_cnn,
        transformer=transformer,
    )
    return UntrainedModel(build(config), encoder)


def on_backbone(
    kind: Kind,
    labels: Sequence[str],
    name: str,
    *,
    prefix_length: int = 16,
    projection_size: int = 0,
    max_length: int | None = None,
    dropout: float = 0.1,
    head: Literal["mean", "own"] = "mean",
) -> UntrainedModel:
    """Return an untrained classifier on the pretrained encoder ``name``.

    ``max_length`` (tokens, 512 if None) can only lower the encoder's own limit. With
    ``projection_size`` > 0, an MLP of that many hidden units makes the prefix in training.
    """
    pretrained, described = backbone.load_pretrained(name)
    reserved = prefix_length if head == "own" else 0  # positions that the prefix takes
    encoder = backbone.load_tokenizer(name, pretrained, max_length=max_length, reserved=reserved)
    backbone.check_vocabulary(name, encoder.tokenizer, pretrained)
    config = ModelConfig(
        kind=kind,
        labels=tuple(labels),
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        dropout=dropout,
        prefix_length=prefix_length if kind == "prefix" else 0,
        backbone=described,
        head=head,
    )
    return UntrainedModel(_with_head(pretrained, config, projection_size), encoder)


def build(config: ModelConfig) -> TextClassifier:
    """Build the model that ``config`` describes; a frozen backbone is loaded, the rest untrained.

    Raises ``InputError`` if the frozen backbone is not the one that the prefix was trained on.
    """
    if config.text_cnn is not None:
        return TextCNN(config)
    if config.transformer is not None:
        return SmallTransformer(config)
    assert config.backbone is not None  # ModelConfig has exactly one of the three
    load = backbone.load_same if config.prefix_length else backbone.build
    return _with_head(load(config.backbone), config)


def _with_head(
    pretrained: PreTrainedModel, config: ModelConfig, projection_size: int = 0
) -> BackboneClassifier:
    if config.head == "own":
        pretrained = backbone.with_own_head(pretrained, len(config.labels), config.dropout)
    return BackboneClassifier(pretrained, config, projection_size)


def torch_runner(model: nn.Module) -> Runner:
    """Wrap a model as a function from padded batch to (B, C) float32 logits in numpy."""
    device = next(model.parameters()).device

    def run(batch: Batch) -> FloatArray:
        model.eval()
        with torch.inference_mode():
            logits = model(
                *(torch.from_numpy(array).to(device) for array in batch.tensors().values())
            )
        array: FloatArray = logits.float().cpu().numpy()
        return array

    return run
