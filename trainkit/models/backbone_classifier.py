"""A classifier on a pretrained encoder: ``finetune``, or ``prefix`` with the encoder frozen."""

import logging
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainkit.models.attention import KeyValuePrefix, MaskPlan
from trainkit.models.base import TextClassifier
from trainkit.models.config import ModelConfig
from trainkit.models.merge_adapter import shift_positions
from trainkit.models.packing import pack_encoder
from trainkit.models.prefix import PrefixProjection
from trainkit.serve.errors import InputError

logger = logging.getLogger("trainkit")


class BackboneClassifier(TextClassifier):
    """A Hugging Face encoder, packed if the family allows it, and a head.

    ``model`` is an encoder, over whose mean state the head is linear; or, for ``config.head``
    "own", the sequence classifier of :func:`trainkit.models.backbone.with_own_head`, which then
    counts the text's positions after the prefix.

    With ``config.prefix_length`` > 0 the encoder is frozen, without dropout inside it, and each
    layer gets trained keys and values. With ``projection_size`` > 0 an MLP of that many hidden
    units makes them, until :meth:`finalize`. Raises ``InputError`` if a prefix cannot be joined.
    """

    def __init__(
        self, model: PreTrainedModel, config: ModelConfig, projection_size: int = 0
    ) -> None:
        super().__init__(config)
        body: Any = model.base_model
        if body is model and getattr(body, "pooler", None) is not None:
            # The head averages the states; the pooler would never be used.
            body.pooler = None  # type: ignore[assignment]
        self.model = model
        packing = pack_encoder(body)
        self.padded_because = packing.declined
        if packing.declined:
            logger.warning("%s runs padded: %s.", model.config.model_type, packing.declined)
        if config.prefix_length:
            if packing.declined:
                raise InputError(
                    f"a prefix cannot be joined to a {model.config.model_type} encoder: "
                    f"{packing.declined}; use --model finetune with it, or another backbone."
                )
            body.requires_grad_(False)
            if getattr(body, "pooler", None) is not None:  # part of the head
                body.pooler.requires_grad_(True)
            for site in packing.sites:
                site.module.prefix = KeyValuePrefix(
                    site.heads, config.prefix_length, site.head_size
                )
            if body is not model:
                shift_positions(model, config.prefix_length)
        self.projection: PrefixProjection | None = None
        if projection_size:
            _, heads, head_size = packing.sites[0]
            self.projection = PrefixProjection(
                len(packing.sites), heads, head_size, config.prefix_length, projection_size
            )
            self.projection.take_over(self.prefixes)
        self.head: nn.Linear | None = None
        if config.head == "mean":
            self.head = nn.Linear(int(model.config.hidden_size), len(config.labels))
        else:
            self.pooling = None

    @property
    def prefixes(self) -> list[KeyValuePrefix]:
        """The layers' keys and values, from the first layer to the last."""
        return [module for module in self.model.modules() if isinstance(module, KeyValuePrefix)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of the linear head, or of the backbone's own."""
        if self.projection is not None:
            self.projection.fill(self.prefixes)
        output: Any = self.model(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor
        if self.head is None:
            logits = output.logits
        else:
            pooled = MaskPlan(attention_mask).mean(output.last_hidden_state)  # (B, H)
            logits = self.head(self.dropout(pooled))
        return logits

    def train(self, mode: bool = True) -> "BackboneClassifier":
        """Set training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.prefix_length:
            self.model.base_model.eval()
        return self

    def own_head(self) -> dict[str, nn.Module]:
        """Return the trained modules of the backbone's own head, by their names in it."""
        body: Any = self.model.base_model
        modules = {
            name: module
            for name, module in self.model.named_children()
            if module is not body and any(True for _ in module.parameters())
        }
        if getattr(body, "pooler", None) is not None:
            modules["pooler"] = body.pooler
        return modules

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the linear head, or of the backbone's own."""
        if self.head is not None:
            return self.head.parameters()
        return chain.from_iterable(module.parameters() for module in self.own_head().values())

    def state_to_save(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: of a projection only the prefix that it makes."""
        state = self.trained_state()
        if self.projection is None:
            return state
        state = {n: t for n, t in state.items() if not n.startswith("projection.")}
        names = [name for name, m in self.named_modules() if isinstance(m, KeyValuePrefix)]
        merged = self.projection().detach()  # (L, 2, A, P, D)
        for name, pair in zip(names, merged, strict=True):
            for part, tensor in zip(("key", "value"), pair, strict=True):
                state[f"{name}.{part}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        return state

    def finalize(self) -> None:
        """Replace a projection by the prefix that it makes."""
        if self.projection is not None:
            self.projection.merge(self.prefixes)
            self.projection = None
