"""What a prefix's keys and values begin as, and a small network that makes them in training.

Directly trained, they begin as those of real tokens: Prefix-Tuning (Li & Liang 2021, section 7.4)
finds that better than random ones where texts are few. It trains them through an MLP, because
training them directly was unstable there; P-Tuning v2 (Liu et al. 2022, section 3.3) finds that it
helps on some tasks and hurts on others. Nothing of the network is left in a checkpoint or an
export.

L layers, P prefix, A attention heads, D head size, H = A * D hidden size, S sequence.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainkit.models.attention import KeyValuePrefix


class _Recorder(KeyValuePrefix):
    """No prefix, in the place of one: notes the keys and values (1, A, S, D) of the text itself."""

    def __init__(self, instead: KeyValuePrefix) -> None:
        heads, _, size = instead.key.shape
        super().__init__(heads, 0, size)
        self.instead = [instead]  # in a list, so as not to be a part of this module

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.noted = key[0], value[0]
        return key, value

    def note(self, position: int, place: int) -> None:
        """Give the prefix, at ``position``, what the token at ``place`` of the text has."""
        key, value = self.noted
        self.instead[0].key[:, position] = key[:, place]
        self.instead[0].value[:, position] = value[:, place]


@torch.no_grad()
def begin_as_tokens(model: nn.Module, rows: Sequence[Sequence[int]], choose: random.Random) -> None:
    """Let position p of each layer's prefix begin as a token that ``choose`` takes from text p.

    ``rows`` has the ids of one text a position, none empty; ``model`` takes (1, S) ids and mask.
    The keys and values are those that the model has for that token without any prefix.
    """
    recorders = {
        module: _Recorder(prefix)
        for module in model.modules()
        if isinstance(prefix := getattr(module, "prefix", None), KeyValuePrefix)
    }
    model.eval()
    try:
        for module, recorder in recorders.items():
            module.prefix = recorder
        for position, row in enumerate(rows):
            ids = torch.tensor([row])
            model(ids, torch.ones_like(ids))
            place = choose.randrange(len(row))
            for recorder in recorders.values():
                recorder.note(position, place)
    finally:
        for module, recorder in recorders.items():
            module.prefix = recorder.instead[0]


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
    def merge(self, prefixes: Sequence[KeyValuePrefix]) -> None:
        """Give each layer its keys and values for good, as parameters of its own."""
        for prefix, (key, value) in zip(prefixes, self(), strict=True):
            prefix.key = nn.Parameter(key.clone(memory_format=torch.contiguous_format))
            prefix.value = nn.Parameter(value.clone(memory_format=torch.contiguous_format))
