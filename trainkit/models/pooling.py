"""From one hidden state per token to one per text. B batch, S sequence, H hidden size."""

from torch import Tensor

__all__ = ["masked_mean"]


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average the states (B, S, H) of the tokens that ``attention_mask`` (B, S) shows: (B, H).

    A row without tokens gives zeros, never NaN.
    """
    weights = attention_mask.to(states.dtype).unsqueeze(-1)  # (B, S, 1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
