"""Words and phrases to a text's features: what ``simple`` is trained as, from scratch.

Convolutions over word embeddings, of which each filter keeps its highest value in the text (Kim
2014), beside a linear classifier of words and pairs, which is not trained with them but solved
(:mod:`trainkit.models.bigrams`): the two err on different texts. On few texts this does better than
attention does (bench/studies/README.md).

B batch, S sequence, T packed tokens, H embedding size, K window, F filters, C labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.models.attention import MaskPlan
from trainkit.models.bigrams import BigramLinear
from trainkit.models.config import TextCNNConfig

__all__ = ["TextCNN"]


class Convolution(nn.Module):
    """One window size: the highest value of each filter over a text, (1, T, H) to (B, F).

    Each token is multiplied by all K parts of the filters, packed; the parts are then added up
    along the text, so that no product touches padding.
    """

    def __init__(self, size: int, window: int, filters: int) -> None:
        super().__init__()
        self.window, self.filters = window, filters
        self.parts = nn.Linear(size, window * filters, bias=False)
        self.bias = nn.Parameter(torch.empty(filters))
        bound = (size * window) ** -0.5  # that of torch.nn.Conv1d
        nn.init.uniform_(self.parts.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, words: Tensor, plan: MaskPlan) -> Tensor:
        """Only windows with a token of the text count: padding never changes the result."""
        edge = self.window - 1
        real = F.pad(plan.mask, (edge, edge), value=False)  # (B, S + 2 (K - 1))
        parts = plan.unpack(self.parts(words)) * plan.mask.unsqueeze(-1)  # (B, S, K F)
        parts = F.pad(parts, (0, 0, edge, edge)).unflatten(2, (self.window, self.filters))
        places = plan.mask.shape[1] + edge
        summed, seen = parts[:, :places, 0], real[:, :places]
        for step in range(1, self.window):
            summed = summed + parts[:, step : step + places, step]
            seen = seen | real[:, step : step + places]
        values = torch.relu(summed + self.bias) * seen.unsqueeze(-1)
        return values.amax(dim=1)


class TextCNN(nn.Module):
    """Token ids and mask, (B, S) each, to features (B, ``hidden_size``), for a head.

    ``linear`` is the other half, from the same ids to logits (B, C).
    """

    drop_share: Tensor

    def __init__(self, config: TextCNNConfig, labels: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.filters * len(config.windows)
        self.tokens = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.convolutions = nn.ModuleList(
            Convolution(config.embedding_size, window, config.filters) for window in config.windows
        )
        self.linear = BigramLinear(config.vocabulary_size, config.pairs, labels)
        self.dropout = nn.Dropout(dropout)
        self.word_dropout = nn.Dropout1d(config.word_dropout)
        nn.init.normal_(self.tokens.weight, std=0.02)
        # Of training alone, and made from its texts: not a part of what is saved.
        self.register_buffer("drop_share", torch.zeros(config.vocabulary_size), persistent=False)

    def count(self, rows: Sequence[Sequence[int]]) -> None:
        """Learn how often each token occurs in the training texts (ragged ids).

        While it is trained, a token seen n times is then taken for the unknown one with probability
        a / (a + n) (Kiperwasser & Goldberg 2016): no rare word decides alone, and the unknown word
        has been seen in its place.
        """
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        counts = np.bincount(ids, minlength=self.config.vocabulary_size)
        a = self.config.rare_word_dropout
        if a:
            self.drop_share.copy_(torch.from_numpy(a / (a + counts)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the features."""
        plan = MaskPlan(attention_mask)
        ids = input_ids
        if self.training:
            rare = torch.rand(ids.shape, device=ids.device) < self.drop_share[ids]
            ids = ids.masked_fill(rare & plan.mask, self.config.unknown_id)
        words = self.dropout(self.word_dropout(self.tokens(ids)))  # (B, S, H)
        packed = plan.pack(words)  # (1, T, H)
        return torch.cat([convolve(packed, plan) for convolve in self.convolutions], dim=1)
