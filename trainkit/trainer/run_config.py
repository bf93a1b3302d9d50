"""Settings of a run beside those of its training: which model, and on which data."""

from typing import Literal

import msgspec

from trainkit.data.columns import Columns
from trainkit.models.config import Kind
from trainkit.serve.errors import InputError

__all__ = ["DataSpec", "ModelSpec"]

PROJECTION_SIZE = 512


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model to train; ``max_length`` (tokens) None: the encoder's, up to 512."""

    kind: Kind
    backbone: str | None = None
    prefix_length: int = 16
    prefix_projection: bool = False
    """Train the prefix through an MLP, which is folded away at the end."""
    prefix_hidden: int | None = None
    """Units of that MLP's hidden layer; None for 512, as in Li & Liang's code."""
    head: Literal["mean", "own"] = "mean"
    """A linear one over the states' mean, or the backbone's own, as PEFT has it."""
    max_length: int | None = None
    dropout: float | None = None
    min_count: int = 2
    """How often a word must occur to be in the vocabulary of a model from scratch."""

    def __post_init__(self) -> None:
        for name in ("max_length", "min_count", "prefix_length", "prefix_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        if self.kind == "simple" and self.backbone is not None:
            raise InputError(
                "--model simple is trained from scratch and takes no backbone; "
                "use --model prefix or finetune with it."
            )
        if self.kind == "finetune" and self.backbone is None:
            raise InputError("--model finetune needs a backbone, for example: --backbone minilm")
        if self.head == "own" and (self.kind != "prefix" or self.backbone is None):
            raise InputError("--head own goes with --model prefix and a backbone; give both.")
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
