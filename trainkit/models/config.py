"""What a model is, apart from its weights: saved as JSON beside them, unknown keys refused."""

from typing import Literal

import msgspec

from trainkit.serve.errors import InputError

__all__ = ["MINILM", "BackboneConfig", "Kind", "ModelConfig", "TextCNNConfig", "TransformerConfig"]

MINILM = "minilm"  # the one backbone that comes as a package
Kind = Literal["simple", "prefix", "finetune"]


def _check_sizes(config: msgspec.Struct, *names: str) -> None:
    for name in names:
        if (size := getattr(config, name)) < 1:
            raise InputError(f"{name} must be at least 1, not {size}.")


class TextCNNConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the encoder of words and phrases that is trained from scratch.

    ``windows`` are the convolutions' sizes in tokens, each with as many ``filters``; the linear
    half weighs the words and so many ``pairs``.
    """

    vocabulary_size: int
    unknown_id: int
    pairs: int
    embedding_size: int = 128
    windows: tuple[int, ...] = (2, 3, 4)
    filters: int = 100
    word_dropout: float = 0.1
    rare_word_dropout: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self, "vocabulary_size", "embedding_size", "filters")
        if self.pairs < 0:
            raise InputError(f"pairs must be at least 0, not {self.pairs}.")
        if not self.windows or min(self.windows) < 1:
            raise InputError(f"windows must be sizes of at least 1, not {list(self.windows)}.")
        if not 0 <= self.word_dropout < 1:
            raise InputError(f"word_dropout must be in [0, 1), not {self.word_dropout}.")
        if not self.rare_word_dropout >= 0:
            raise InputError(f"rare_word_dropout must be 0 or more, not {self.rare_word_dropout}.")
        if not 0 <= self.unknown_id < self.vocabulary_size:
            raise InputError(
                f"unknown_id must be one of {self.vocabulary_size} tokens, not {self.unknown_id}."
            )


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the transformer that is trained from scratch."""

    vocabulary_size: int
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward_size: int = 256
    word_dropout: float = 0.2

    def __post_init__(self) -> None:
        _check_sizes(self, "vocabulary_size", "hidden_size", "layers", "heads", "feed_forward_size")
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
    max_length: int
    pad_id: int
    dropout: float = 0.1
    prefix_length: int = 0
    transformer: TransformerConfig | None = None
    backbone: BackboneConfig | None = None
    head: Literal["mean", "own"] = "mean"
    text_cnn: TextCNNConfig | None = None

    def __post_init__(self) -> None:
        faults = []
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            faults.append(f"labels must be two or more distinct names, not {list(self.labels)}")
        if self.max_length < 1:
            faults.append(f"max_length must be at least 1, not {self.max_length}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), not {self.dropout}")
        if (self.kind == "prefix") != (self.prefix_length > 0):
            faults.append(f"kind {self.kind!r} does not go with prefix_length {self.prefix_length}")
        if [self.transformer, self.text_cnn, self.backbone].count(None) != 2:
            faults.append("exactly one of transformer, text_cnn and backbone must be given")
        if self.text_cnn is not None and self.kind != "simple":
            faults.append("text_cnn goes with kind 'simple'")
        if self.kind == "simple" and self.backbone is not None:
            faults.append("kind 'simple' is trained from scratch and takes no backbone")
        if self.kind == "finetune" and self.backbone is None:
            faults.append("kind 'finetune' needs a backbone, for example --backbone minilm")
        if self.head == "own" and (self.kind != "prefix" or self.backbone is None):
            faults.append("head 'own' goes with kind 'prefix' and a backbone")
        if faults:
            raise InputError("This model cannot be built: " + "; ".join(faults) + ".")
