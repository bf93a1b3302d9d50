"""Settings of a run beside those of its training: which model, and on which data."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trainkit.data.columns import Columns
from trainkit.models.config import Kind, kind_faults
from trainkit.serve.errors import InputError
from trainkit.serve.fields import check_fields

PROJECTION_SIZE = 512


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model to train."""

    kind: Annotated[
        Kind,
        Meta(
            description="Model from scratch (simple), frozen encoder with trained prefixes "
            "(prefix), or all weights of an encoder (finetune).",
            extra={"option": "--model", "parameter": "model"},
        ),
    ]
    backbone: Annotated[
        str | None,
        Meta(description="Pretrained encoder: minilm, a Hugging Face folder, or a hub id."),
    ] = None
    prefix_length: Annotated[int, Meta(ge=1, description="Trained positions per layer.")] = 16
    prefix_projection: Annotated[
        bool,
        Meta(description="Train the prefix through an MLP, which is folded away at the end."),
    ] = False
    prefix_hidden: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description=f"Hidden units of that MLP.  [default: {PROJECTION_SIZE}]"),
    ] = None
    head: Annotated[
        Literal["mean", "own"],
        Meta(
            description="Classification head: linear over the mean of the states, or the "
            "backbone's own, which PEFT can load with a prefix."
        ),
    ] = "mean"
    max_length: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Length in tokens to which texts are truncated.  [default: the encoder's, "
            "up to 512; 128 from scratch]"
        ),
    ] = None
    dropout: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        Meta(
            description="Dropout probability; 0 also drops no words.  [default: 0.1 with a "
            "backbone, else 0.5]"
        ),
    ] = None
    min_count: Annotated[
        int,
        Meta(
            ge=1,
            description="Occurrences that put a word into the vocabulary of a model from scratch.",
        ),
    ] = 2

    def __post_init__(self) -> None:
        check_fields(self, "This model cannot be trained")
        for fault in kind_faults(self.kind, self.backbone is not None, self.head):
            raise InputError(f"{fault}.")
        if self.prefix_projection and (self.kind != "prefix" or self.backbone is None):
            raise InputError(
                "--prefix-projection goes with --model prefix and a backbone, whose layers get "
                "what it makes; leave it out, or give both."
            )
        if self.prefix_hidden is not None and not self.prefix_projection:
            raise InputError(
                "--prefix-hidden is the size of the MLP of --prefix-projection; give both."
            )

    @property
    def projection_size(self) -> int:
        """Hidden units of the MLP that makes the prefix; 0 where there is none."""
        return (self.prefix_hidden or PROJECTION_SIZE) if self.prefix_projection else 0


class DataSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the examples came from: absolute paths, or "sample"."""

    data: str
    test: str | None = None
    columns: Columns = Columns()
