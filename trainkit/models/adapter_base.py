"""The base model of a PEFT adapter: found, given as many labels as the adapter's head, and loaded.

An adapter brings its own head as a rule, and the base has none, or one for other labels. What the
base lacks is loaded as NaN, so that a weight which the adapter does not bring either is seen.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from trainkit.models.backbone import load_tokenizer, resolve
from trainkit.models.config import MINILM
from trainkit.models.loading import reset_outputs
from trainkit.models.safe_loading import fetch
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig


class BaseModel(NamedTuple):
    """A base model's name, as the user or the adapter gave it, and its checked folder."""

    name: str
    folder: Path


def find_base(
    place: Path, config: "PeftConfig", base: str | None, *, trust_remote_code: bool
) -> BaseModel:
    """Find the model that the adapter in ``place`` stands on; ``base`` goes before its own word.

    Raises ``InputError`` if it is not found or not a model.
    """
    name = base or config.base_model_name_or_path
    remedy = "give the folder or hub id of the adapter's base model with --base"
    if not name:
        raise InputError(f"adapter '{place}' does not name its base model; {remedy}.")
    if name == MINILM:
        return BaseModel(name, Path(resolve(name)))
    beside = base is None and (place / name).is_dir()
    folder = fetch(
        str(place / name) if beside else name,
        "base model",
        revision=config.revision if base is None else None,
        trust_remote_code=trust_remote_code,
        remedy=remedy,
    )
    # With an adapter in it, transformers would load that one's base instead of this.
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").exists():
        raise InputError(f"base model '{name}' is no Hugging Face model (config.json); {remedy}.")
    return BaseModel(name, folder)


def load_base(
    base: BaseModel, place: Path, weights: dict[str, Tensor], *, trust_remote_code: bool
) -> PreTrainedModel:
    """Load the base as a float32 classifier; weights that it lacks, such as a head's, are NaN.

    ``place`` is the adapter's folder, ``weights`` are what it holds. Random numbers in place of
    NaN, as transformers has them, would look like any others.
    """
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    _set_labels(config, place, weights, trust_remote_code)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        base.folder,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the base may have a head of its own, for other labels
        trust_remote_code=trust_remote_code,
    )
    made_up = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    for key, tensor in model.state_dict().items():
        if key in made_up and tensor.is_floating_point():
            tensor.fill_(torch.nan)
    model.config.use_cache = False  # a classifier reads a text once
    reset_outputs(model.config)
    if model.config.pad_token_id is None:  # a decoder must know it, to pool the last token
        home = place if (place / "tokenizer.json").is_file() else base.folder
        tokenizer = load_tokenizer(home, model, trust_remote_code=trust_remote_code)
        model.config.pad_token_id = tokenizer.pad_id
    loaded: PreTrainedModel = model
    return loaded


def _set_labels(
    config: Any, place: Path, weights: dict[str, Tensor], trust_remote_code: bool
) -> None:
    """Take the number of labels from the adapter's head, their names from who has that many."""
    names = [config.id2label]
    if (place / "config.json").is_file():  # PEFT writes none, but some trainers do
        given = msgspec.json.decode((place / "config.json").read_bytes()).get("id2label") or {}
        names.insert(0, {int(index): str(label) for index, label in given.items()})
    count = _count_labels(config, weights, trust_remote_code) or config.num_labels
    config.num_labels = count  # names them LABEL_0, LABEL_1 ... where there were more or fewer
    for id2label in names:
        if sorted(id2label) == list(range(count)):
            config.id2label = id2label
            config.label2id = {label: index for index, label in id2label.items()}
            return


def _count_labels(config: Any, weights: dict[str, Tensor], trust_remote_code: bool) -> int | None:
    """Find the weight whose first axis is the number of labels, and its size in the adapter."""
    config = copy.deepcopy(config)
    shapes = []
    for count in (5, 7):
        config.num_labels = count
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    few, more = shapes
    for name in (name for name in few if few[name] != more[name]):
        for key, tensor in weights.items():
            if key.endswith(f".{name}"):
                return int(tensor.shape[0])
    return None
