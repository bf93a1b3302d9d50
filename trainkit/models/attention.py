"""The one attention function: masking, packing, prefixes and export meet here and nowhere else.

A :class:`MaskPlan` is made once per forward from ``attention_mask``. Between the first encoder
layer's input and the last one's output, hidden states travel *packed*: real tokens only, (1, T, H),
so that every linear layer, LayerNorm and activation touches no padding. :func:`attend` lays them
out as (B, S) again just for the attention itself, and packs the result.

Axes: B batch, S sequence, T = tokens kept in the batch, P prefix, A attention heads, D head size,
H = A * D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KeyValuePrefix", "MaskPlan", "attend"]


class MaskPlan:
    """Where the tokens of one padded batch are, computed once per forward.

    ``attention_mask`` (B, S), int or bool: non-zero for a token of the text. Any pattern works:
    right, left or gapped padding, and rows with no token at all.

    Position 0 of every row is kept even where the mask hides it. Hugging Face computes a hidden
    state for it (as a query; nobody attends to it), and heads that pool the first position read it:
    left out, a left-padded row would read another row's state.
    """

    def __init__(self, attention_mask: Tensor) -> None:
        self.mask = attention_mask.to(torch.bool)  # (B, S)
        first = torch.arange(self.mask.shape[1], device=self.mask.device) == 0
        keep = (self.mask | first).flatten()  # (B * S,)
        self.index = keep.nonzero().squeeze(1)  # (T,) flat position of each kept token
        # For each flat position the kept token at or before it. At a hidden position that is
        # some other token, which does no harm: its key is masked and its output never read.
        self.slot = keep.to(torch.int64).cumsum(0) - 1  # (B * S,)
        self._visible: dict[int, Tensor] = {}

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
            mask = F.pad(self.mask, (prefix_length, 0), value=True) if prefix_length else self.mask
            batch, length = self.mask.shape
            self._visible[prefix_length] = mask[:, None, None, :].expand(batch, 1, length, -1)
        return self._visible[prefix_length]


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
