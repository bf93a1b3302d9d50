"""PEFT adapters: an adapter's folder in, a classifier to export out, beside PEFT's own forward.

PEFT warns, or says nothing, where weights are missing in an adapter or left over, and transformers
fills a missing head with random numbers. Here all of that is an error: what comes out computes what
was trained, or nothing comes out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainkit.models.adapter_base import find_base, load_base
from trainkit.models.closeness import NO_CHANGE, SAME_STATES, probe, relative_difference
from trainkit.models.loading import as_input_error, quiet
from trainkit.models.merge_adapter import merge
from trainkit.models.safe_loading import fetch
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class LoadedAdapter(NamedTuple):
    """A base model with its adapter, twice, in float32 and evaluation mode.

    ``model`` is what to export: a Hugging Face sequence classifier with the adapter folded in,
    packed where ``padded_because`` is None. ``reference`` is PEFT's own model, its forward
    untouched. Both take (B, S) ``input_ids``, ``attention_mask`` and, where the base knows them,
    ``token_type_ids`` by these names and give an output with (B, C) ``logits``.
    ``base_folder`` is where the tokenizer is looked for when the adapter has none.
    ``kind`` is PEFT's name, such as ``LORA``. ``trained_parameters`` counts the numbers in the
    adapter's file, its head included. Of the positions that the base has, ``virtual_tokens`` are
    the adapter's: a text can be that much shorter at most.
    """

    model: PreTrainedModel
    reference: "PeftModel"
    base_name: str
    base_folder: Path
    kind: str
    trained_parameters: int
    virtual_tokens: int
    padded_because: str | None


def load_adapter(
    folder: Path | str, base: str | None = None, *, trust_remote_code: bool = False
) -> LoadedAdapter:
    """Load an adapter's folder or hub id on its base, and fold it in.

    ``base`` (a folder, hub id or ``minilm``) goes before what the adapter names, which may be
    relative to its folder. ``trust_remote_code`` is about the base: an adapter has no code. Raises
    ``InputError`` if PEFT is not installed, the base is not found or another one, the adapter is
    for another task, or weights would be left at random. Raises ``CheckFailedError`` if the folded
    model does not compute what PEFT does.
    """
    _need_peft()
    place = fetch(str(folder), "adapter", trust_remote_code=trust_remote_code)
    config = _read_config(place)
    found = find_base(place, config, base, trust_remote_code=trust_remote_code)
    unfit = f"adapter '{folder}' does not fit the base model '{found.name}'"
    with as_input_error(unfit, "give the model that it was trained on with --base"):
        weights = _read_weights(place)
        pretrained = load_base(found, place, weights, trust_remote_code=trust_remote_code)
        reference = _apply(pretrained, place, config, weights)
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        folded = merge(reference, kind)
    folded.model.requires_grad_(False).eval()
    _check_all_trained(folded.model, str(folder), found.name)
    with as_input_error(
        f"PEFT cannot run adapter '{folder}'", "train it as LoRA, or on another base"
    ):
        _check_same(folded.model, reference, kind)
    return LoadedAdapter(
        model=folded.model,
        reference=reference,
        base_name=found.name,
        base_folder=found.folder,
        kind=kind,
        trained_parameters=sum(tensor.numel() for tensor in weights.values()),
        virtual_tokens=getattr(config, "num_virtual_tokens", 0),
        padded_because=folded.padded_because,
    )


def adapter_effect(adapted: LoadedAdapter, batch: Batch) -> dict[str, float]:
    """Measure what the adapter does to a batch's logits, its trained head left in place.

    ``largest_logit_change`` is absolute, ``changed_label_share`` is of the rows whose largest logit
    is another one. Raises ``CheckFailedError`` if nothing changes: an adapter that was never
    trained.
    """
    inputs = {name: torch.from_numpy(array) for name, array in batch.tensors().items()}
    with torch.inference_mode():
        adapted_logits = adapted.reference(**inputs).logits
        with _without_adapter(adapted.reference) as plain:
            plain_logits = plain(**inputs).logits
    if relative_difference(adapted_logits, plain_logits) <= NO_CHANGE:
        raise CheckFailedError(
            f"the adapter changes nothing: with and without it, the logits of {len(plain_logits)} "
            "texts are the same; was it trained?"
        )
    changed = adapted_logits.argmax(dim=1) != plain_logits.argmax(dim=1)
    return {
        "largest_logit_change": float((adapted_logits - plain_logits).abs().max()),
        "changed_label_share": float(changed.float().mean()),
    }


@contextmanager
def _without_adapter(reference: "PeftModel") -> Iterator[nn.Module]:
    """Give the base with the adapter's own head, which PEFT's ``disable_adapter`` takes away."""
    from peft.utils import ModulesToSaveWrapper

    if reference.active_peft_config.is_prompt_learning:
        yield reference.get_base_model()
        return
    with reference.disable_adapter():
        for module in reference.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
        yield reference


def _need_peft() -> None:
    try:
        import peft  # noqa: F401  # only asks whether it can be imported
    except ImportError:
        raise InputError(
            "PEFT adapters need the package peft; run: pip install 'trainkit-onnx[peft]'"
        ) from None


def _read_config(place: Path) -> "PeftConfig":
    from peft import PeftConfig

    if not (place / "adapter_config.json").is_file():
        raise InputError(f"'{place}' has no adapter_config.json; give a PEFT adapter's folder.")
    remedy = "bring the original adapter_config.json back, or try another version of PEFT"
    with as_input_error(f"adapter '{place}' cannot be read", remedy):
        config: PeftConfig = PeftConfig.from_pretrained(str(place))
        settings = msgspec.json.decode((place / "adapter_config.json").read_bytes())
    unknown = sorted(key for key in settings.keys() - vars(config).keys() if settings[key])
    if unknown:  # which PEFT would leave out: the adapter may be another one without
        raise InputError(
            f"adapter '{place}' has settings that this version of PEFT does not know, first "
            f"'{unknown[0]}'; it was saved by {settings.get('peft_version', 'a newer one')}: run "
            "pip install --upgrade peft."
        )
    if config.task_type != "SEQ_CLS":
        raise InputError(
            f"adapter '{place}' was trained for the task {config.task_type}, and only SEQ_CLS, "
            "sequence classification, can be exported."
        )
    return config


def _read_weights(place: Path) -> dict[str, Tensor]:
    from peft.utils import load_peft_weights

    weights: dict[str, Tensor] = load_peft_weights(str(place), device="cpu")
    return weights


def _apply(
    pretrained: PreTrainedModel, place: Path, config: "PeftConfig", weights: dict[str, Tensor]
) -> "PeftModel":
    """Put the adapter on its base as PEFT does, and see that every weight found its place."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    own = pretrained.state_dict().keys()
    try:
        reference = PeftModel.from_pretrained(
            pretrained, str(place), config=config, torch_device="cpu"
        )
    except KeyError as error:  # how PEFT misses a head
        raise ValueError(f"it lacks {error}") from error
    expected = get_peft_model_state_dict(reference, save_embedding_layers=False).keys()
    lacking = sorted(expected - weights.keys())
    left_over = sorted(
        key for key in weights.keys() - expected if not any(key.endswith(f".{n}") for n in own)
    )
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} of the weights, first '{lacking[0]}'")
    if left_over:
        raise ValueError(f"it has no place for '{left_over[0]}', {len(left_over)} in all")
    reference.float().eval()
    return reference


def _check_all_trained(model: nn.Module, adapter: str, base: str) -> None:
    untrained = [name for name, tensor in model.state_dict().items() if tensor.isnan().any()]
    if untrained:
        raise InputError(
            f"neither adapter '{adapter}' nor its base model '{base}' has '{untrained[0]}' "
            f"({len(untrained)} such weights): they would be random, as they were in training, "
            "and were not saved; train again with them in modules_to_save."
        )


def _check_same(model: PreTrainedModel, reference: "PeftModel", kind: str) -> None:
    """Compare the folded model with PEFT's own forward on right, left, gapped and no padding."""
    inputs = probe(model.config.vocab_size).tensors().values()
    ids, mask = (torch.from_numpy(array) for array in inputs)
    with torch.inference_mode(), quiet():
        expected = reference(input_ids=ids, attention_mask=mask).logits
        folded = model(input_ids=ids, attention_mask=mask).logits
    difference = relative_difference(folded, expected)
    if difference > SAME_STATES:
        raise CheckFailedError(
            f"the folded {kind} adapter does not compute what PEFT does: "
            f"logits differ by {difference:.1e}; this base cannot be exported with it."
        )
