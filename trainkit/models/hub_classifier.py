"""A Hugging Face sequence classifier: its own forward as the reference, and packed for export."""

import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trainkit.models import backbone
from trainkit.models.loading import as_input_error, reset_outputs
from trainkit.models.packing import pack_encoder
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.postprocess import ProblemType

logger = logging.getLogger("trainkit")


class Forward(nn.Module):
    """A sequence classifier of any kind as ids, mask (and token types) to logits, nothing else.

    All (B, S) int64 but the logits, (B, C) float32.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return one row of logits a text."""
        # Models without token types do not take the argument at all.
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).logits
        return logits


class HubClassifier(NamedTuple):
    """A classifier ready for export.

    ``reference`` is Hugging Face's own forward and shares its weights with ``model``, which is
    packed where ``padded_because`` is None. ``architecture`` is the content of ``config.json``.
    """

    model: nn.Module
    reference: nn.Module
    encoder: TextEncoder
    labels: tuple[str, ...]
    problem_type: ProblemType
    architecture: dict[str, Any]
    fingerprint: str
    padded_because: str | None


def load(
    name: str, *, max_length: int | None = None, trust_remote_code: bool = False
) -> HubClassifier:
    """Load a folder or hub id with its weights in float32, in evaluation mode.

    ``max_length`` (tokens, 512 where None) can only lower what tokenizer and positions allow.
    Raises ``InputError`` if there is no such classifier, weights are missing in it (transformers
    would fill them with random numbers), it has no tokenizer that serving can read or one with
    tokens that it has no embedding for, or its labels do not have one name each.
    """
    pretrained = _pretrained(name, trust_remote_code)
    encoder = backbone.load_tokenizer(
        name,
        pretrained,
        max_length=max_length,
        token_types=takes_token_types(pretrained),
        trust_remote_code=trust_remote_code,
    )
    backbone.check_vocabulary(name, encoder.tokenizer, pretrained)
    complete_padding(pretrained, encoder.pad_id, name)
    return pack(pretrained, encoder)


def pack(pretrained: PreTrainedModel, encoder: TextEncoder) -> HubClassifier:
    """Keep ``pretrained`` as the reference, and pack it."""
    shared = {id(tensor): tensor for tensor in pretrained.state_dict(keep_vars=True).values()}
    reference = copy.deepcopy(pretrained, shared)
    body: Any = pretrained.base_model
    return build(pretrained, reference, encoder, pack_encoder(body).declined)


def build(
    model: PreTrainedModel, reference: nn.Module, encoder: TextEncoder, padded_because: str | None
) -> HubClassifier:
    """Put a classifier together from what is exported and what it must compute."""
    config: Any = model.config
    architecture = config.to_diff_dict()
    architecture.pop("_name_or_path", None)  # a path of this machine
    if padded_because:
        logger.warning("%s is exported padded: %s.", config.model_type, padded_because)
    return HubClassifier(
        model=Forward(model).eval(),
        reference=Forward(reference).eval(),
        encoder=encoder,
        labels=_labels(config),
        problem_type=_problem_type(config),
        architecture=architecture,
        fingerprint=backbone.fingerprint(model),
        padded_because=padded_because,
    )


def _pretrained(name: str, trust_remote_code: bool) -> PreTrainedModel:
    unreadable = f"'{name}' cannot be loaded as a sequence classifier"
    with as_input_error(unreadable, "give a complete Hugging Face folder or hub id"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            backbone.resolve(name, trust_remote_code=trust_remote_code),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"'{name}' lacks {len(missing)} of the weights of a {type(model).__name__}, first "
            f"'{missing[0]}': they would be random; give a checkpoint that was trained as a "
            "classifier."
        )
    model.config.use_cache = False  # a classifier reads a text once
    reset_outputs(model.config)
    pretrained: PreTrainedModel = model.eval()
    return pretrained


def takes_token_types(model: PreTrainedModel) -> bool:
    """Tell whether the model tells the two texts of a pair apart."""
    return (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def complete_padding(model: PreTrainedModel, pad_id: int, name: str) -> None:
    """Decoders pool the last token that is not padding, so they must know its id."""
    known = model.config.pad_token_id
    if known is None:
        model.config.pad_token_id = pad_id
    elif known != pad_id:
        raise InputError(
            f"'{name}' pads with token {known} by its config.json and with {pad_id} by its "
            "tokenizer; make the two agree."
        )


def _labels(config: Any) -> tuple[str, ...]:
    """Return the names of the logits' columns; ``InputError`` if they are not one name each."""
    indexes = sorted(config.id2label)
    if indexes != list(range(config.num_labels)):
        raise InputError(
            f"id2label in config.json names the indexes {', '.join(map(str, indexes))}; the model "
            f"has {config.num_labels} labels, so name 0 to {config.num_labels - 1}, each once."
        )
    labels = tuple(str(config.id2label[index]) for index in indexes)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(
            f"id2label in config.json gives several indexes the name '{twice[0]}', so that an "
            "answer would not say which is meant; give each class a name of its own."
        )
    return labels


def _problem_type(config: Any) -> ProblemType:
    """Take the configuration's word, or else what transformers does: one label is a regression."""
    stated: ProblemType | None = config.problem_type
    if stated is not None:
        return stated
    return "regression" if config.num_labels == 1 else "single_label_classification"
