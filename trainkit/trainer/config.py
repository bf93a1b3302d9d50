"""Settings of a training run: one frozen struct, saved beside the weights."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trainkit.models.config import Kind
from trainkit.serve.fields import check_fields


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train. Rates are AdamW's (Loshchilov & Hutter 2019), per step, at their peak."""

    epochs: Annotated[int, Meta(ge=1, description="Passes over the training texts.")] = 10
    batch_size: Annotated[int, Meta(ge=1, description="Texts per optimizer step.")] = 32
    learning_rate: Annotated[
        float,
        Meta(
            gt=0,
            description="Peak learning rate of the encoder or its prefix; auto runs a range test "
            "first (Smith 2017).",
            extra={
                "option": "--learning-rate/--lr",
                "metavar": "RATE|auto",
                "words": ("auto",),
            },
        ),
    ] = 1e-3
    head_learning_rate: Annotated[
        float, Meta(gt=0, description="Peak learning rate of the classification head.")
    ] = 1e-3
    weight_decay: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="AdamW's weight decay, not applied to biases, LayerNorm weights and "
            "prefixes.",
        ),
    ] = 0.01
    warmup_share: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="Fraction of steps used for linear warm-up; a cosine decay to 0 follows.",
        ),
    ] = 0.1
    max_gradient_norm: Annotated[
        float, Meta(gt=0, description="Norm to which larger gradients are scaled down.")
    ] = 1.0
    label_smoothing: Annotated[
        float,
        Meta(ge=0, lt=1, description="Probability spread evenly over all labels in the target."),
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        Meta(description="Weights of classes in the loss; balanced is n / (classes * n_class)."),
    ] = "none"
    focal_gamma: Annotated[
        float,
        Meta(
            ge=0,
            le=10,
            description="Focusing parameter of the focal loss (Lin et al. 2017), usually 2; 0 is "
            "cross entropy.",
        ),
    ] = 0.0
    average_decay: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="Decay per step of the running average of the weights (Polyak & Juditsky "
            "1992), which is then scored and saved; 0 turns it off.",
        ),
    ] = 0.0
    patience_epochs: Annotated[
        int,
        Meta(
            ge=1,
            description="Epochs without improvement in validation accuracy (ties: its loss) after "
            "which training stops.",
        ),
    ] = 5
    refit: Annotated[
        bool,
        Meta(
            description="Then train a new model on training and validation texts together, through "
            "the same schedule, and keep that one."
        ),
    ] = False
    batch_tokens: Annotated[
        int,
        Meta(
            ge=1,
            description="Tokens computed at once, padding included; larger batches are split and "
            "their gradients added up.",
        ),
    ] = 4096
    precision: Annotated[
        Literal["fp32", "bf16"],
        Meta(
            description="Precision of the forward pass; bf16 uses autocast, and weights stay in "
            "float32."
        ),
    ] = "fp32"
    compile: Annotated[
        bool,
        Meta(
            description="Compile the model with torch.compile, which needs a C++ compiler (Triton "
            "on a GPU)."
        ),
    ] = False
    seed: Annotated[
        int,
        Meta(ge=0, lt=2**32, description="Seed of weights, batches and the split of the data."),
    ] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="Device to train on; auto takes a CUDA GPU if there is one."),
    ] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "These training settings do not work")


# Those of prefix and finetune are from runs on TREC whose validation and test scores were both in
# view, so no unbiased choice; `trainkit train --help` shows how to change them. Fewer epochs do for
# simple where there are thousands of texts, and early stopping finds it; hundreds need these.
DEFAULTS: dict[Kind, TrainConfig] = {
    "simple": TrainConfig(
        epochs=20, learning_rate=1e-3, weight_decay=0.05, average_decay=0.995, patience_epochs=8
    ),
    "prefix": TrainConfig(epochs=15, learning_rate=1e-2, patience_epochs=6),
    "finetune": TrainConfig(epochs=5, learning_rate=5e-5),
}
