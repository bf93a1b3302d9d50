"""What a model is, apart from its weights: saved as JSON beside them, unknown keys refused."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trainkit.serve.errors import InputError
from trainkit.serve.fields import check_fields
from trainkit.serve.fields import faults as field_faults

MINILM = "minilm"  # the one backbone that comes as a package
Kind = Literal["simple", "prefix", "finetune"]


Size = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Dropout = Annotated[float, Meta(ge=0, lt=1)]
Head = Literal["mean", "own"]


def kind_faults(kind: Kind, has_backbone: bool, head: Head) -> Iterator[str]:
    """Yield what contradicts itself in a kind of model, in terms of the options that name it."""
    if kind == "simple" and has_backbone:
        yield (
            "--model simple is trained from scratch and takes no backbone; use --model prefix or "
            "finetune with it"
        )
    if kind == "finetune" and not has_backbone:
        yield "--model finetune needs a backbone, for example: --backbone minilm"
    if head == "own" and (kind != "prefix" or not has_backbone):
        yield "--head own goes with --model prefix and a backbone; give both"


class TextCNNConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of a ``TextCNN``: ``filters`` per window size in tokens; ``pairs`` are bigrams."""

    vocabulary_size: Size
    unknown_id: Count
    pairs: Count
    embedding_size: Size = 128
    windows: tuple[Size, ...] = (2, 3, 4)
    filters: Size = 100
    word_dropout: Dropout = 0.1
    rare_word_dropout: Annotated[float, Meta(ge=0)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "This network cannot be built")
        if not self.windows:
            raise InputError("windows must have one size at least.")
        if self.unknown_id >= self.vocabulary_size:
            raise InputError(
                f"unknown_id must be one of {self.vocabulary_size} tokens, not {self.unknown_id}."
            )


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of a ``SmallTransformer``."""

    vocabulary_size: Size
    hidden_size: Size = 128
    layers: Size = 2
    heads: Size = 4
    feed_forward_size: Size = 256
    word_dropout: Dropout = 0.2

    def __post_init__(self) -> None:
        check_fields(self, "This transformer cannot be built")
        if self.hidden_size % self.heads:
            raise InputError(
                f"hidden size {self.hidden_size} is not a multiple of {self.heads} heads; "
                "change one of the two."
            )


class BackboneConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pretrained encoder a model stands on.

    ``architecture`` is the encoder's Hugging Face configuration, enough to build it without its
    folder. ``fingerprint`` is the sha256 of the pretrained weights: a model that keeps only its
    prefix refuses any other encoder.
    """

    name: str
    architecture: dict[str, object]
    fingerprint: str


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One text classifier.

    ``max_length`` counts tokens, special tokens included; ``prefix_length`` counts trained
    positions (0 except for ``prefix``). Exactly one of ``transformer``, ``text_cnn`` and
    ``backbone`` is set. ``head`` is a linear layer over the ``mean`` of the states, or the
    backbone's ``own``, as transformers and PEFT compute it: positions of the text are counted
    after the prefix.
    """

    kind: Kind
    labels: tuple[str, ...]
    max_length: Size
    pad_id: int
    dropout: Dropout = 0.1
    prefix_length: Count = 0
    transformer: TransformerConfig | None = None
    backbone: BackboneConfig | None = None
    head: Head = "mean"
    text_cnn: TextCNNConfig | None = None

    def __post_init__(self) -> None:
        faults = list(field_faults(self))
        faults += kind_faults(self.kind, self.backbone is not None, self.head)
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            faults.append(f"labels must be two or more distinct names, not {list(self.labels)}")
        if (self.kind == "prefix") != (self.prefix_length > 0):
            faults.append(f"kind {self.kind!r} does not go with prefix_length {self.prefix_length}")
        if [self.transformer, self.text_cnn, self.backbone].count(None) != 2:
            faults.append("exactly one of transformer, text_cnn and backbone must be given")
        if self.text_cnn is not None and self.kind != "simple":
            faults.append("text_cnn goes with kind 'simple'")
        if faults:
            raise InputError("This model cannot be built: " + "; ".join(faults) + ".")
