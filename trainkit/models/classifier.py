"""The classifier that is trained, saved and exported: encoder, masked mean, linear head.

Or, where its configuration says so, words and phrases without a mean, or an encoder and the head
that transformers builds on it.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainkit.data.vocabulary import UNK_ID
from trainkit.models import backbone
from trainkit.models.backbone import BackboneEncoder
from trainkit.models.config import Kind, ModelConfig, TextCNNConfig, TransformerConfig
from trainkit.models.pooling import masked_mean
from trainkit.models.text_cnn import TextCNN
from trainkit.models.transformer import SmallTransformer
from trainkit.serve.encoding import Batch, TextEncoder
from trainkit.serve.types import FloatArray, Runner

__all__ = ["TextClassifier", "UntrainedModel", "build", "new", "torch_runner"]


class TextClassifier(nn.Module):
    """(B, S) int64 ``input_ids`` and ``attention_mask`` to (B, C) ``logits``, C labels."""

    def __init__(
        self, encoder: BackboneEncoder | TextCNN | SmallTransformer, config: ModelConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.dropout = nn.Dropout(config.dropout)
        self.head: nn.Linear | None = None
        if config.head == "mean":
            self.head = nn.Linear(encoder.hidden_size, len(config.labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one row of logits a text."""
        if self.head is None:
            assert isinstance(self.encoder, BackboneEncoder)  # the configuration sees to it
            return self.encoder.logits(input_ids, attention_mask)
        logits: Tensor
        if isinstance(self.encoder, TextCNN):
            logits = self.head(self.dropout(self.encoder(input_ids, attention_mask)))
            if self.training:  # what is trained gets a loss of its own
                return logits
            # The geometric mean of both probabilities (a product of experts, Hinton 2002).
            weighed: Tensor = self.encoder.linear(input_ids, attention_mask)
            return (logits + weighed) / 2
        states = self.encoder(input_ids, attention_mask)  # (B, S, H)
        pooled = masked_mean(states, attention_mask)  # (B, H)
        logits = self.head(self.dropout(pooled))
        return logits

    @property
    def pooling(self) -> str | None:
        """Say how a text's states become one; None where the backbone's own head does it."""
        if self.head is None:
            return None
        if isinstance(self.encoder, TextCNN):
            return "highest value of each filter"
        return "masked mean"

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Return what is trained at the head's rate."""
        if self.head is not None:
            yield from self.head.parameters()
        elif isinstance(self.encoder, BackboneEncoder):
            for module in self.encoder.own_head().values():
                yield from module.parameters()

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint keeps: all, or without the frozen backbone's."""
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if name not in frozen
        }

    def folded_state(self) -> dict[str, Tensor]:
        """Return ``saved_state`` with a plain prefix in the place of one that a network makes."""
        state = self.saved_state()
        if not isinstance(self.encoder, BackboneEncoder) or self.encoder.projection is None:
            return state
        kept = {n: t for n, t in state.items() if not n.startswith("encoder.projection.")}
        folded = self.encoder.folded_state().items()
        return kept | {f"encoder.{name}": tensor for name, tensor in folded}

    def fold(self) -> None:
        """Make it a model as :func:`build` builds it: the prefix plain. Its answers stay."""
        if isinstance(self.encoder, BackboneEncoder):
            self.encoder.fold()


class UntrainedModel(NamedTuple):
    """A model before its training, with the encoder of its texts."""

    model: TextClassifier
    encoder: TextEncoder


def new(
    kind: Kind,
    labels: Sequence[str],
    *,
    backbone_name: str | None = None,
    vocabulary: TextEncoder | None = None,
    pairs: int = 0,
    prefix_length: int = 16,
    prefix_hidden: int = 0,
    max_length: int | None = None,
    dropout: float = 0.1,
    head: Literal["mean", "own"] = "mean",
) -> UntrainedModel:
    """Make an untrained classifier on a pretrained backbone, or from scratch on ``vocabulary``.

    ``pairs`` of words are weighed by ``simple``, which its encoder has still to be told.
    ``max_length`` (tokens) lowers the encoder's own limit; without it that is 512 at most.
    ``prefix_hidden`` > 0: a network with so many hidden units makes the prefix until it is folded.
    ``dropout`` 0: no words are dropped either.
    """
    transformer = pretrained = config = None
    text_cnn: TextCNNConfig | None = None
    if backbone_name is not None and kind != "simple":
        pretrained, config = backbone.load_pretrained(backbone_name)
        reserved = prefix_length if head == "own" else 0  # positions that the prefix takes
        encoder = backbone.load_tokenizer(
            backbone_name, pretrained, max_length=max_length, reserved=reserved
        )
    elif vocabulary is not None:
        encoder = vocabulary
        size = encoder.tokenizer.get_vocab_size()
        if kind == "simple":
            text_cnn = TextCNNConfig(vocabulary_size=size, unknown_id=UNK_ID, pairs=pairs)
            if not dropout:
                text_cnn = msgspec.structs.replace(
                    text_cnn, word_dropout=0.0, rare_word_dropout=0.0
                )
        else:
            transformer = TransformerConfig(vocabulary_size=size)
            if not dropout:
                transformer = msgspec.structs.replace(transformer, word_dropout=0.0)
    else:
        raise ValueError("give a backbone's name or a vocabulary")
    limits = [encoder.max_length] if max_length is None else [encoder.max_length, max_length]
    encoder = TextEncoder(encoder.tokenizer, min(limits), encoder.pad_id)
    settings = ModelConfig(
        kind=kind,
        labels=tuple(labels),
        max_length=encoder.max_length,
        pad_id=encoder.pad_id,
        dropout=dropout,
        prefix_length=prefix_length if kind == "prefix" else 0,
        transformer=transformer,
        backbone=config,
        head=head,
        text_cnn=text_cnn,
    )
    if pretrained is not None:
        return UntrainedModel(_on_backbone(pretrained, settings, prefix_hidden), encoder)
    return UntrainedModel(build(settings), encoder)


def build(config: ModelConfig) -> TextClassifier:
    """Build the model that ``config`` describes; a frozen backbone is loaded, the rest untrained.

    ``InputError`` where the frozen backbone is not the one that the prefix was trained on.
    """
    if config.text_cnn is not None:
        return TextClassifier(TextCNN(config.text_cnn, len(config.labels), config.dropout), config)
    if config.transformer is not None:
        encoder = SmallTransformer(
            config.transformer, config.max_length, config.dropout, config.prefix_length
        )
        return TextClassifier(encoder, config)
    assert config.backbone is not None  # ModelConfig holds one or the other
    if config.prefix_length:
        pretrained = backbone.load_same(config.backbone)
    else:
        pretrained = backbone.build(config.backbone)
    return _on_backbone(pretrained, config)


def _on_backbone(
    pretrained: PreTrainedModel, config: ModelConfig, prefix_hidden: int = 0
) -> TextClassifier:
    if config.head == "own":
        pretrained = backbone.with_own_head(pretrained, len(config.labels), config.dropout)
    return TextClassifier(BackboneEncoder(pretrained, config.prefix_length, prefix_hidden), config)


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
