"""The one attention function, and all that is done with masks.

A :class:`MaskPlan` is made once per forward from ``attention_mask``. Between the first encoder
layer's input and the last one's output, hidden states travel *packed*: real tokens only, (1, T, H),
so that every linear layer, LayerNorm and activation touches no padding. :func:`attend` lays them
out as (B, S) again just for the attention itself, and packs the result.

Axes: B batch, S sequence, T = tokens kept in the batch, P prefix, A attention heads, D head size,
H = A * D hidden size.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prepend(per_token: Tensor, length: int, value: bool | int) -> Tensor:
    """Put ``length`` times ``value`` before every row of a mask or of token types: (B, P + S)."""
    return F.pad(per_token, (length, 0), value=value)


class MaskPlan:
    """Where the tokens of one padded batch are, computed once per forward.

    ``attention_mask`` (B, S), int or bool: non-zero for a token of the text. Any pattern works:
    right, left or gapped padding, and rows with no token at all.

    Position 0 of every row is kept even where the mask hides it. Hugging Face computes a hidden
    state for it (as a query; no token attends to it), and heads that pool the first position read
    it: left out, a left-padded row would read another row's state.
    """

    def __init__(self, attention_mask: Tensor) -> None:
        self.mask = attention_mask.to(torch.bool)  # (B, S)
        self._visible: dict[int, Tensor] = {}

    def with_prefix(self, length: int) -> "MaskPlan":
        """Return the plan of the same rows behind ``length`` positions that are always visible."""
        return MaskPlan(prepend(self.mask, length, True))

    @cached_property
    def _keep(self) -> Tensor:
        first = torch.arange(self.mask.shape[1], device=self.mask.device) == 0
        return (self.mask | first).flatten()  # (B * S,)

    @cached_property
    def index(self) -> Tensor:
        """The flat position of each kept token: (T,)."""
        return self._keep.nonzero().squeeze(1)

    @cached_property
    def slot(self) -> Tensor:
        """For each flat position the kept token at or before it: (B * S,).

        At a hidden position that is some other token, which does no harm: its key is masked and
        its output never read.
        """
        return self._keep.to(torch.int64).cumsum(0) - 1

    @property
    def position(self) -> Tensor:
        """The number of each token in its text, wherever the padding is: (B, S)."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, S, ...) to (1, T, ...): drop the padding."""
        return padded.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, T, ...) to (B, S, ...): values at hidden positions are arbitrary but finite."""
        flat = packed.squeeze(0).index_select(0, self.slot)  # (B * S, ...)
        return flat.reshape(*self.mask.shape, *flat.shape[1:])

    def visible(self, prefix_length: int = 0) -> Tensor:
        """Return which keys may be attended to: (B, 1, S, P + S) bool, prefix positions included.

        Full size, although every query of a row sees the same keys: the ONNX ``Attention`` operator
        of ONNX Runtime's CPU provider rejects (B, 1, 1, S).
        """
        if prefix_length not in self._visible:
            mask = prepend(self.mask, prefix_length, True) if prefix_length else self.mask
            batch, length = self.mask.shape
            self._visible[prefix_length] = mask[:, None, None, :].expand(batch, 1, length, -1)
        return self._visible[prefix_length]

    def shifted(self, steps: int) -> Tensor:
        """Return whether a token stands ``steps`` positions further on: (B, S) bool."""
        return F.pad(self.mask, (0, steps), value=False)[:, steps:]

    def windows(self, size: int) -> Tensor:
        """Return which windows of ``size`` positions show a token: (B, S + size - 1) bool.

        The first window ends at the first position, the last one begins at the last.
        """
        places = self.mask.shape[1] + size - 1
        real = F.pad(self.mask, (size - 1, size - 1), value=False)
        seen = real[:, :places]
        for step in range(1, size):
            seen = seen | real[:, step : step + places]
        return seen

    def zero_padding(self, states: Tensor) -> Tensor:
        """Set (B, S, H) states at hidden positions to zero."""
        return states * self.mask.unsqueeze(-1)

    def mean(self, states: Tensor) -> Tensor:
        """Average the (B, S, H) states of each row's tokens: (B, H).

        A row without tokens gives zeros, never NaN.
        """
        weights = self.mask.to(states.dtype).unsqueeze(-1)  # (B, S, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class KeyValuePrefix(nn.Module):
    """Trained keys and values that every query of one layer sees beside the text's own.

    Deep prompts of Prefix-Tuning (Li & Liang 2021) and P-Tuning v2 (Liu et al. 2022).
    Parameters ``key`` and ``value``: (A, P, D) float.
    """

    def __init__(self, heads: int, length: int, head_size: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, length, head_size).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(heads, length, head_size).normal_(std=0.02))
        self.length = length

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before (B, A, S, D) keys and values: (B, A, P + S, D)."""
        batch = key.shape[0]
        return (
            torch.cat([self.key.expand(batch, -1, -1, -1), key], dim=2),
            torch.cat([self.value.expand(batch, -1, -1, -1), value], dim=2),
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan,
    *,
    prefix: KeyValuePrefix | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Bidirectional scaled dot-product attention (Vaswani et al. 2017) over packed tokens.

    ``query``, ``key``, ``value``: (1, A, T, D), packed by ``plan``. Returns (1, T, A, D), packed.
    A row without any visible key (fully masked, no prefix) attends to nothing and gets zeros.
    ``scale`` defaults to 1 / sqrt(D); ``dropout`` is the probability of dropping a weight.
    """
    # (1, A, T, D) -> (1, T, A, D) -> (B, S, A, D) -> (B, A, S, D)
    query, key, value = (
        plan.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)
    )
    if prefix is not None:
        key, value = prefix.join(key, value)
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=plan.visible(prefix.length if prefix is not None else 0),
        dropout_p=dropout,
        scale=scale,
    )
    return plan.pack(context.transpose(1, 2))
