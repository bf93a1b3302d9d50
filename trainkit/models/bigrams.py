"""A linear classifier over the words and pairs of a text: the half of ``simple`` that is solved.

Words and pairs of neighbours are weighted by tf-idf and brought to length 1 (Salton & Buckley 1988;
each occurrence counts), and logistic regression weighs them. :mod:`trainkit.trainer.tfidf` finds
the weights; none of them is trained by steps.

B batch, S sequence, V vocabulary, K pairs, C labels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.models.attention import MaskPlan

SLOTS_PER_PAIR = 16  # about 1 pair in 32 finds its slot taken by a commoner one


class BigramLinear(nn.Module):
    """Token ids and mask, (B, S) each, to logits (B, C).

    A pair is looked for in the one slot that its key names, which says at which row it would be:
    what no training text had is never taken for what one had. All is kept as buffers, (rows,) and
    (rows, C) for V words, K pairs and one row for what is unknown.
    """

    slots: Tensor
    keys: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, vocabulary: int, pairs: int, labels: int) -> None:
        super().__init__()
        self.vocabulary, self.pairs = vocabulary, pairs
        rows = vocabulary + pairs + 1
        empty = torch.full((SLOTS_PER_PAIR * pairs + 1,), pairs, dtype=torch.int32)
        self.register_buffer("slots", empty)
        self.register_buffer("keys", torch.full((pairs + 1,), -1))
        self.register_buffer("scale", torch.zeros(rows))
        self.register_buffer("weight", torch.zeros(rows, labels))
        self.register_buffer("bias", torch.zeros(labels))

    @property
    def absent(self) -> int:
        """The row of what has no weight."""
        return self.vocabulary + self.pairs

    def place(self, keys: Tensor) -> None:
        """Take the pairs with these keys (K,), the commonest first: a slot is the first one's."""
        self.keys[:-1] = keys
        self.slots.fill_(self.pairs)
        slots = (keys % len(self.slots)).numpy()[::-1]
        # Of several that are assigned to one place, numpy keeps the last.
        self.slots.numpy()[slots] = np.arange(self.pairs, dtype=np.int32)[::-1]

    def rows(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the row of each word, and of each pair by its first word: (B, 2 S)."""
        plan = MaskPlan(mask)
        keys = ids * self.vocabulary + F.pad(ids, (0, 1))[:, 1:]
        pairs = self.slots[keys % len(self.slots)].long()
        known = plan.mask & plan.shifted(1) & (self.keys[pairs] == keys)
        words = torch.where(plan.mask, ids, self.absent)
        return torch.cat([words, torch.where(known, self.vocabulary + pairs, self.absent)], dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, C); the bias alone where nothing in a text is known."""
        rows = self.rows(ids, mask)
        squares = self.scale[rows].square().sum(dim=1, keepdim=True)  # (B, 1): 0, or at least 0.003
        return self.weight[rows].sum(dim=1) / squares.clamp(min=1e-3).sqrt() + self.bias
