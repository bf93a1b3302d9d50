"""Unmodified Hugging Face encoders on the one attention function, their hidden states packed.

A forward of a packed encoder makes one :class:`MaskPlan`. The layers' attention goes to
:func:`attend` through transformers' attention interface; one hook packs the input of the first
layer, another unpacks what the last one returns. Embeddings, poolers and heads never notice.
:func:`pack_encoder` proves on a probe that the result is the same, and leaves a family for which it
is not (own attention, rotary caches, shared layers) unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainkit.models.attention import MaskPlan, attend
from trainkit.models.closeness import SAME_STATES, probe, relative_difference
from trainkit.models.loading import quiet

NAME = "trainkit"


class AttentionLayer(NamedTuple):
    """A layer that calls attention once: where its prefix is attached."""

    module: nn.Module
    heads: int
    head_size: int


class Packing(NamedTuple):
    """What :func:`pack_encoder` did: ``declined`` is None, or why the encoder stays padded."""

    sites: list[AttentionLayer]
    declined: str | None


class _PackedForward:
    """One forward of a packed encoder: its mask plan, and the layer that runs."""

    def __init__(self, attention_mask: Tensor) -> None:
        self.plan = MaskPlan(attention_mask)
        self.layer: nn.Module | None = None
        self.calls: list[AttentionLayer] = []

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """(1, A, T, D) each to (1, T, A, D)."""
        layer = self.layer
        assert layer is not None  # a family that asks elsewhere fails the probe
        self.calls.append(AttentionLayer(layer, key.shape[1], key.shape[3]))
        prefix = getattr(layer, "prefix", None)
        return attend(query, key, value, self.plan, prefix=prefix, scale=scale, dropout=dropout)


_running: ContextVar[_PackedForward] = ContextVar("packed forward that runs")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    return _running.get().attend(query, key, value, scaling, dropout), None


def _no_mask(**_: Any) -> None:
    """Make no mask: the plan stands for it."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def _packed(attention_mask: Tensor) -> Iterator[_PackedForward]:
    running = _PackedForward(attention_mask)
    token = _running.set(running)
    try:
        yield running
    finally:
        _running.reset(token)


def _forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Stand for the forward of a packed ``model``."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None:
        raise ValueError("a packed encoder needs an attention_mask")
    with _packed(mask):
        return type(model).forward(model, *args, **kwargs)


def _enter_layer(layer: nn.Module, _: Any) -> None:
    _running.get().layer = layer


def _pack_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
    return (_running.get().plan.pack(args[0]), *args[1:])


def _unpack_output(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    running = _running.get()
    running.layer = None
    if isinstance(out, tuple):
        return (running.plan.unpack(out[0]), *out[1:])
    return running.plan.unpack(out)


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Find the stack of encoder layers: the module list as long as the configuration says."""
    depth = getattr(model.config, "num_hidden_layers", None)
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((stack for stack in stacks if len(stack) == depth), None)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set it without a warning; the probe finds families that do not ask the interface."""
    with quiet():
        model.set_attn_implementation(name)


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
    inputs = probe(model.config.vocab_size).tensors().values()
    ids, mask = (torch.from_numpy(array).to(model.device) for array in inputs)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    _set_attention(model, NAME)
    hooks = [
        *(layer.register_forward_pre_hook(_enter_layer) for layer in layers),
        layers[0].register_forward_pre_hook(_pack_input),
        layers[-1].register_forward_hook(_unpack_output),
    ]
    sites: list[AttentionLayer] = []
    try:
        with torch.inference_mode(), _packed(mask) as running:
            packed = model(input_ids=ids, attention_mask=mask).last_hidden_state
        declined = _difference(expected, packed, mask, running.calls, layers)
        sites = running.calls
    except (
        Exception
    ) as error:  # the probe asks whether this family can be packed; any error is a no
        declined = f"its layers do not take packed states ({type(error).__name__})"
    if declined:
        for hook in hooks:
            hook.remove()
        _set_attention(model, own_attention)
        sites = []
    else:
        # A bound method: a deep copy of the model gets one of its own.
        model.forward = MethodType(_forward, model)
    model.train(training)
    return Packing(sites, declined)


def _difference(
    expected: Tensor,
    packed: Tensor,
    mask: Tensor,
    calls: list[AttentionLayer],
    layers: nn.ModuleList,
) -> str | None:
    if [call.module for call in calls] != list(layers):
        return f"its {len(layers)} layers call attention {len(calls)} times, not once each"
    shown = mask.bool()
    difference = relative_difference(packed[shown].cpu(), expected[shown].cpu())
    if difference > SAME_STATES:
        return f"packed states differ by {difference:.1e} from padded ones"
    return None
