"""The ``simple`` classifier: a convolutional network beside a linear model of words and bigrams.

Convolutions over word embeddings, of which each filter keeps its highest value in the text (Kim
2014). The linear model (:mod:`trainkit.models.bigrams`) is fitted before the training and not
changed by its steps. The two err on different texts; on few texts, together they do better than
attention does (bench/studies/README.md).

B batch, S sequence, T packed tokens, H embedding size, K window, F filters, C labels.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.models.attention import MaskPlan
from trainkit.models.base import TextClassifier
from trainkit.models.bigrams import BigramLinear
from trainkit.models.config import ModelConfig


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
        parts = plan.zero_padding(plan.unpack(self.parts(words)))  # (B, S, K F)
        parts = F.pad(parts, (0, 0, edge, edge)).unflatten(2, (self.window, self.filters))
        places = plan.mask.shape[1] + edge
        summed = parts[:, :places, 0]
        for step in range(1, self.window):
            summed = summed + parts[:, step : step + places, step]
        values = torch.relu(summed + self.bias) * plan.windows(self.window).unsqueeze(-1)
        return values.amax(dim=1)


class TextCNN(TextClassifier):
    """Convolutions with a linear head, and ``bigrams``, whose logits are averaged with theirs.

    In training the logits are those of the convolutions alone, which thus get a loss of their own.
    """

    pooling = "highest value of each filter"
    drop_share: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.text_cnn is not None
        self.sizes = sizes = config.text_cnn
        self.tokens = nn.Embedding(sizes.vocabulary_size, sizes.embedding_size)
        self.convolutions = nn.ModuleList(
            Convolution(sizes.embedding_size, window, sizes.filters) for window in sizes.windows
        )
        self.bigrams = BigramLinear(sizes.vocabulary_size, sizes.pairs, len(config.labels))
        self.word_dropout = nn.Dropout1d(sizes.word_dropout)
        nn.init.normal_(self.tokens.weight, std=0.02)
        # Only for training and counted from its texts, so not saved.
        self.register_buffer("drop_share", torch.zeros(sizes.vocabulary_size), persistent=False)
        self.head = nn.Linear(sizes.filters * len(sizes.windows), len(config.labels))

    def count(self, rows: Sequence[Sequence[int]]) -> None:
        """Count how often each token occurs in the training texts (ragged ids).

        In training, a token seen n times is replaced by the unknown one with probability
        a / (a + n) (Kiperwasser & Goldberg 2016): no rare word decides alone, and the unknown word
        is trained too.
        """
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        counts = np.bincount(ids, minlength=self.sizes.vocabulary_size)
        a = self.sizes.rare_word_dropout
        if a:
            self.drop_share.copy_(torch.from_numpy(a / (a + counts)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the geometric mean of both probabilities (a product of experts, Hinton 2002)."""
        logits: Tensor = self.head(self.dropout(self.features(input_ids, attention_mask)))
        if self.training:
            return logits
        linear: Tensor = self.bigrams(input_ids, attention_mask)
        return (logits + linear) / 2

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the highest value of each filter in a text, (B, F)."""
        plan = MaskPlan(mask)
        if self.training:
            rare = torch.rand(ids.shape, device=ids.device) < self.drop_share[ids]
            ids = ids.masked_fill(rare & plan.mask, self.sizes.unknown_id)
        words = self.dropout(self.word_dropout(self.tokens(ids)))  # (B, S, H)
        packed = plan.pack(words)  # (1, T, H)
        return torch.cat([convolve(packed, plan) for convolve in self.convolutions], dim=1)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Return the head's parameters."""
        return self.head.parameters()
