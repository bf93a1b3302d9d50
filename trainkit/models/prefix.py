"""A prefix's keys and values made by a small network while they are trained, and plain after that.

Prefix-Tuning (Li & Liang 2021) trains them through an MLP, because training them directly was
unstable there; P-Tuning v2 (Liu et al. 2022, section 3.3) finds that it helps on some tasks and
hurts on others. Nothing of the network is left in a checkpoint or an export.

L layers, P prefix, A attention heads, D head size, H = A * D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainkit.models.attention import KeyValuePrefix

__all__ = ["PrefixProjection"]


class PrefixProjection(nn.Module):
    """An embedding of P positions through linear, tanh, linear: keys and values of all L layers."""

    def __init__(self, layers: int, heads: int, head_size: int, length: int, hidden: int) -> None:
        super().__init__()
        width = heads * head_size
        self.shape = (length, layers, 2, heads, head_size)
        self.prefix = nn.Parameter(torch.empty(length, width).normal_())
        self.network = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * width)
        )

    def forward(self) -> Tensor:
        """Return keys and values, (L, 2, A, P, D)."""
        made: Tensor = self.network(self.prefix).view(self.shape).permute(1, 2, 3, 0, 4)
        return made

    def take_over(self, prefixes: Sequence[KeyValuePrefix]) -> None:
        """Remove their own parameters, in whose place :meth:`fill` puts what is made here."""
        for prefix in prefixes:
            del prefix.key, prefix.value

    def fill(self, prefixes: Sequence[KeyValuePrefix]) -> None:
        """Give each layer its keys and values, through which gradients come back."""
        for prefix, (key, value) in zip(prefixes, self(), strict=True):
            prefix.key, prefix.value = key, value

    @torch.no_grad()
    def fold(self, prefixes: Sequence[KeyValuePrefix]) -> None:
        """Give each layer its keys and values for good, as parameters of its own."""
        for prefix, (key, value) in zip(prefixes, self(), strict=True):
            prefix.key = nn.Parameter(key.clone(memory_format=torch.contiguous_format))
            prefix.value = nn.Parameter(value.clone(memory_format=torch.contiguous_format))
