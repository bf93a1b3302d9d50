"""A PEFT adapter made part of its base model, so that nothing of PEFT is left to export.

Turns PEFT's own model into a Hugging Face classifier with the same forward: LoRA and similar
adapters are merged into the weights, a prefix's keys and values attached to attention, the virtual
tokens of a prompt become one constant. Packed if the family allows it.

Axes: B batch, S sequence, P virtual tokens, A attention heads, D head size, H embedding size.
"""

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from trainkit.models.attention import KeyValuePrefix, prepend
from trainkit.models.packing import AttentionLayer, pack_encoder
from trainkit.serve.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


class MergedAdapter(NamedTuple):
    """A classifier with its adapter inside; ``padded_because`` is None where it is packed."""

    model: PreTrainedModel
    padded_because: str | None


def merge(adapted: "PeftModel", kind: str) -> MergedAdapter:
    """Fold the adapter of ``kind``, a PEFT type such as ``LORA``, into a copy of its base.

    ``adapted`` is left as it was. Raises ``InputError`` if PEFT cannot merge this kind, or where it
    cannot be separated from its base's forward (a prefix on a decoder).
    """
    config = adapted.active_peft_config
    merges: dict[str, Callable[[PeftModel], MergedAdapter]] = {
        "PREFIX_TUNING": _merge_prefix,
        "P_TUNING": _merge_prompt,
        "PROMPT_TUNING": _merge_prompt,
    }
    # Multitask prompts want a task id with every text; the other prompts are for generation.
    if config.is_prompt_learning and kind not in merges:
        raise InputError(
            f"adapters of type {kind} cannot be exported; LoRA and its kin, "
            f"{', '.join(merges)} can."
        )
    return merges.get(kind, _merge_weights)(adapted)


def _merge_weights(adapted: "PeftModel") -> MergedAdapter:
    """Add LoRA's product (Hu et al. 2021), or what its kin has, to the weights of a copy."""
    merged = copy.deepcopy(adapted)
    _unwrap(merged, merged.active_adapter)  # PEFT's IA3 stumbles over a head of several layers
    try:
        model: Any = merged.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = type(adapted.base_model).__name__
        raise InputError(
            f"PEFT cannot merge the adapter of a {kind} into its base ({error}); "
            "train it as LoRA, a prefix or P-tuning."
        ) from None
    return MergedAdapter(model, pack_encoder(model.base_model).declined)


def _merge_prefix(adapted: "PeftModel") -> MergedAdapter:
    """Attach trained keys and values (Li & Liang 2021) where PEFT passes a cache."""
    model = _without_peft(adapted)
    cache: Any = adapted.get_prompt(batch_size=1)
    packing = pack_encoder(model.base_model)
    if packing.declined:
        raise InputError(
            f"a prefix cannot be joined to a {model.config.model_type}: {packing.declined}; "
            "train the adapter as LoRA or P-tuning, or on another base."
        )
    _check_sites(packing.sites, cache.layers)
    for site, layer in zip(packing.sites, cache.layers, strict=True):
        prefix = KeyValuePrefix(site.heads, layer.keys.shape[2], site.head_size)
        prefix.key.data.copy_(layer.keys[0])  # (A, P, D)
        prefix.value.data.copy_(layer.values[0])
        site.module.prefix = prefix.requires_grad_(False)
    shift_positions(model, cache.layers[0].keys.shape[2])
    return MergedAdapter(model, None)


def _check_sites(sites: list[AttentionLayer], layers: Any) -> None:
    """Compare the prefix with the base: PEFT drops what is too much without a word."""
    wanted = [(site.heads, site.head_size) for site in sites]
    given = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]
    if wanted != given:
        raise ValueError(
            f"its prefix is for {len(given)} layers of {given[0][0]} heads by {given[0][1]}, the "
            f"base has {len(wanted)} of {wanted[0][0]} by {wanted[0][1]}"
        )


def shift_positions(model: Any, length: int) -> None:
    """Count the text's positions from ``length`` on, as with a cache of that length.

    Each family counts in its own way (RoBERTa leaves padding where it is), but all take the length
    of the cache as this argument.
    """

    def shift(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"past_key_values_length": length}

    for module in model.base_model.modules():
        if "past_key_values_length" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(shift, with_kwargs=True)


def _merge_prompt(adapted: "PeftModel") -> MergedAdapter:
    """Prepend virtual tokens (Lester et al. 2021; P-tuning, Liu et al. 2021) to the embeddings.

    PEFT saves what the prompt's encoder, an MLP or LSTM, gives, and not the encoder itself.
    """
    model = _without_peft(adapted)
    virtual = adapted.get_prompt(batch_size=1)[0].detach().clone()  # (P, H)
    width = model.get_input_embeddings().weight.shape[1]
    if virtual.shape[1] != width:
        raise ValueError(
            f"its virtual tokens have size {virtual.shape[1]}, the base's embeddings {width}"
        )
    model.virtual_tokens = nn.Parameter(virtual, requires_grad=False)
    declined = pack_encoder(model.base_model).declined
    model.register_forward_pre_hook(_prepend, with_kwargs=True)
    return MergedAdapter(model, declined)


def _prepend(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Turn (B, S) ids, mask and types into (B, P + S, H) embeddings, mask and types.

    The virtual tokens are visible everywhere and of type 0. They come first: a head that pools the
    first position pools a virtual token, as it did in training.
    """
    virtual, ids = model.virtual_tokens, kwargs.pop("input_ids")
    texts = model.get_input_embeddings()(ids)  # (B, S, H)
    prompt = virtual.expand(ids.shape[0], -1, -1)
    kwargs["inputs_embeds"] = torch.cat([prompt, texts], dim=1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if kwargs.get(name) is not None:
            kwargs[name] = prepend(kwargs[name], virtual.shape[0], value)
    return args, kwargs


def _without_peft(adapted: "PeftModel") -> Any:
    """Copy the base of a prompt, with the head that was trained with it; weights are shared."""
    shared = {id(tensor): tensor for tensor in adapted.state_dict(keep_vars=True).values()}
    model = copy.deepcopy(adapted.get_base_model(), shared)
    _unwrap(model, adapted.active_adapter)
    return model


def _unwrap(model: nn.Module, adapter: str) -> None:
    """Put the trained modules, the head first of all, in the place of PEFT's wrappers."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = [n for n, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name in wrapped:
        wrapper: Any = model.get_submodule(name)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, wrapper.modules_to_save[adapter])
