"""Unmodified Hugging Face encoders on the one attention function, their hidden states packed.

Two registered functions and two hooks: transformers asks the first for a mask and gets a
:class:`MaskPlan`, hands it down to every layer as ``attention_mask``, and calls the second for
attention; a hook packs the first layer's input, another unpacks the last one's output. Embeddings,
poolers and heads never notice. :func:`pack_encoder` proves on a probe that the result is the same,
and leaves a family for which it is not (own attention, rotary caches, shared layers) as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainkit.models.attention import MaskPlan, attend

__all__ = ["AttentionSite", "Packing", "pack_encoder"]

NAME = "trainkit"


class AttentionSite(NamedTuple):
    """A module that calls attention: where a layer's prefix is attached."""

    module: nn.Module
    heads: int
    head_size: int


class Packing(NamedTuple):
    """What :func:`pack_encoder` did: ``declined`` is None, or why the encoder stays padded."""

    sites: list[AttentionSite]
    declined: str | None


_recorded: ContextVar[list[AttentionSite] | None] = ContextVar("recorded sites", default=None)


def _mask(*, attention_mask: Tensor, **_: Any) -> MaskPlan:
    return MaskPlan(attention_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    if (sites := _recorded.get()) is not None:
        sites.append(AttentionSite(module, key.shape[1], key.shape[3]))
    prefix = getattr(module, "prefix", None)
    return attend(
        query, key, value, attention_mask, prefix=prefix, scale=scaling, dropout=dropout
    ), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _plan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskPlan:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, MaskPlan))


def _pack_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (_plan(args, kwargs).pack(args[0]), *args[1:]), kwargs


def _unpack_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    plan = _plan(args, kwargs)
    if isinstance(out, tuple):
        return (plan.unpack(out[0]), *out[1:])
    return plan.unpack(out)


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Find the stack of encoder layers: the module list as long as the configuration says."""
    depth = getattr(model.config, "num_hidden_layers", None)
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((stack for stack in stacks if len(stack) == depth), None)


@contextmanager
def _recording() -> Iterator[list[AttentionSite]]:
    sites: list[AttentionSite] = []
    token = _recorded.set(sites)
    try:
        yield sites
    finally:
        _recorded.reset(token)


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Make a batch with right, left and gapped padding: ids and mask, (4, 7)."""
    mask = torch.tensor(
        [[1] * 7, [1] * 4 + [0] * 3, [0] * 3 + [1] * 4, [1, 1, 0, 1, 0, 1, 0]],
        device=model.device,
    )
    ids = torch.arange(mask.numel(), device=model.device).reshape(mask.shape)
    return ids % model.config.vocab_size, mask


def pack_encoder(model: PreTrainedModel) -> Packing:
    """Route ``model`` through the one attention function, if that leaves its states the same.

    The model is changed in place, or left as it was with the reason in ``declined``.
    """
    layers = _layers(model)
    if layers is None:
        return Packing([], "no stack of encoder layers was found in it")
    own_attention = model.config._attn_implementation
    training = model.training
    model.eval()
    ids, mask = _probe(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation(NAME)
    hooks = [
        layers[0].register_forward_pre_hook(_pack_input, with_kwargs=True),
        layers[-1].register_forward_hook(_unpack_output, with_kwargs=True),
    ]
    sites: list[AttentionSite] = []
    try:
        with torch.inference_mode(), _recording() as sites:
            packed = model(input_ids=ids, attention_mask=mask).last_hidden_state
        declined = _difference(expected, packed, mask, len(sites), len(layers))
    except (
        Exception
    ) as error:  # the probe asks whether this family can be packed; any error is a no
        declined = f"its layers do not take packed states ({type(error).__name__})"
    if declined:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(own_attention)
        sites = []
    model.train(training)
    return Packing(sites, declined)


def _difference(
    expected: Tensor, packed: Tensor, mask: Tensor, calls: int, depth: int
) -> str | None:
    if calls != depth:
        return f"{calls} of its {depth} layers call transformers' attention interface"
    largest = float((expected - packed)[mask.bool()].abs().max())
    if not largest <= 1e-4 * max(1.0, float(expected.abs().max())):  # `not <=`: NaN declines too
        return f"packed states differ by {largest:.1e} from padded ones"
    return None
