"""A small transformer that is trained from scratch, with or without a learned prefix.

Pre-LayerNorm blocks (Xiong et al. 2020), learned positions, all through
:mod:`trainkit.models.attention`. B batch, S sequence, T packed tokens, H hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainkit.models.attention import MaskPlan, attend
from trainkit.models.base import TextClassifier
from trainkit.models.config import ModelConfig, TransformerConfig


class Block(nn.Module):
    """One pre-LayerNorm transformer block over packed states (1, T, H)."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.hidden_size),
            nn.Linear(config.hidden_size, config.feed_forward_size),
            nn.GELU(),
            nn.Linear(config.feed_forward_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, plan: MaskPlan) -> Tensor:
        """(1, T, H) to (1, T, H)."""
        projected = self.query_key_value(self.attention_norm(states))  # (1, T, 3 H)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (1, A, T, D)
            for part in projected.chunk(3, dim=2)
        )
        context = attend(query, key, value, plan).flatten(2)  # (1, T, H)
        states = states + self.dropout(self.attention_out(context))
        out: Tensor = states + self.dropout(self.feed_forward(states))
        return out


class SmallTransformer(TextClassifier):
    """Transformer blocks, the mean of the states, and a linear head.

    Positions are counted along the mask, so a text gets the same states wherever its padding is.
    With ``prefix_length`` > 0, that many learned embeddings stand before every text; they are in
    the mask like any token, and their states are cut off at the end.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.transformer is not None
        sizes = config.transformer
        self.prefix_length = config.prefix_length
        self.tokens = nn.Embedding(sizes.vocabulary_size, sizes.hidden_size)
        self.positions = nn.Embedding(config.max_length, sizes.hidden_size)
        # Whole words go missing in training, so that no single one decides (Iyyer et al. 2015).
        self.word_dropout = nn.Dropout1d(sizes.word_dropout)
        self.blocks = nn.ModuleList(Block(sizes, config.dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden_size)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if self.prefix_length:
            self.prefix = nn.Parameter(
                torch.empty(self.prefix_length, sizes.hidden_size).normal_(std=0.02)
            )
        self.head = nn.Linear(sizes.hidden_size, len(config.labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the head's logits of the states' mean."""
        plan = MaskPlan(attention_mask)
        states = self.states(input_ids, plan)
        logits: Tensor = self.head(self.dropout(plan.mean(states)))
        return logits

    def states(self, ids: Tensor, plan: MaskPlan) -> Tensor:
        """Return the states of the text's own positions, (B, S, H)."""
        states = self.dropout(self.word_dropout(self.tokens(ids)) + self.positions(plan.position))
        if self.prefix_length:
            prefix = self.prefix.expand(ids.shape[0], -1, -1)
            states = torch.cat([prefix, states], dim=1)  # (B, P + S, H)
            plan = plan.with_prefix(self.prefix_length)
        states = plan.pack(states)
        for block in self.blocks:
            states = block(states, plan)
        return plan.unpack(self.norm(states))[:, self.prefix_length :]

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Return the head's parameters."""
        return self.head.parameters()
