"""The types of the keyword options, for editors and type checkers.

Each class has the fields of a settings struct, where their ranges, defaults and meanings stand; a
test compares them.
"""

from typing import Literal, TypedDict

from trainkit.serve.formats import Precision


class TrainOptions(TypedDict, total=False):
    """The fields of ``ModelSpec`` and ``TrainConfig``; None is the default of the model's kind."""

    backbone: str | None
    prefix_length: int | None
    prefix_projection: bool | None
    prefix_hidden: int | None
    head: Literal["mean", "own"] | None
    max_length: int | None
    dropout: float | None
    min_count: int | None
    epochs: int | None
    batch_size: int | None
    learning_rate: float | Literal["auto"] | None
    head_learning_rate: float | None
    weight_decay: float | None
    warmup_share: float | None
    max_gradient_norm: float | None
    label_smoothing: float | None
    class_weights: Literal["none", "balanced"] | None
    focal_gamma: float | None
    average_decay: float | None
    patience_epochs: int | None
    refit: bool | None
    batch_tokens: int | None
    precision: Literal["fp32", "bf16"] | None
    compile: bool | None
    seed: int | None
    device: Literal["auto", "cpu", "cuda"] | None


class ExportOptions(TypedDict, total=False):
    """The fields of ``ExportSettings``."""

    precision: Precision
    max_accuracy_drop: float
    min_label_agreement: float
    opset: int
    optimize: bool
    external_data: bool
