"""What every classifier that trainkit trains has in common; :mod:`classifier` builds them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from trainkit.models.config import ModelConfig


class TextClassifier(nn.Module, ABC):
    """(B, S) int64 ``input_ids`` and ``attention_mask`` to (B, C) ``logits``, C labels.

    ``pooling`` says how the tokens' states become one per text, None for a backbone's own head;
    ``padded_because`` why the encoder is not packed, None if it is.
    """

    pooling: str | None = "masked mean"
    padded_because: str | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one row of logits per text."""

    @abstractmethod
    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that are trained at the head's learning rate."""

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes: all but a frozen backbone's, on the CPU."""
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if name not in frozen
        }

    def state_to_save(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, as :meth:`finalize` would leave them."""
        return self.trained_state()

    def finalize(self) -> None:  # most kinds have nothing to do
        """Drop what is for training only; the logits stay the same."""
