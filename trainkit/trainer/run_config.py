"""What decides a run's result, kept in its folder: its settings, and the hash of its data."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from trainkit.data.columns import Columns
from trainkit.models.config import Kind
from trainkit.serve.errors import InputError
from trainkit.serve.fields import check_fields
from trainkit.serve.files import Checksummed, pretty_json, write_atomically
from trainkit.trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainkit.data.splits import Splits

__all__ = [
    "PLAN",
    "DataSpec",
    "ModelSpec",
    "RunConfig",
    "check_own_test",
    "fingerprint",
    "read",
]

PLAN = "settings.json"
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


class RunConfig(Checksummed, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``settings.json``; ``source`` is None where the caller gave the examples."""

    model: ModelSpec
    training: TrainConfig
    data_sha256: str
    source: DataSpec | None = None

    def check_resumed(self, folder: Path) -> None:
        """Raise ``InputError`` where ``folder`` holds a run of other settings or data."""
        earlier = read(folder)
        if earlier.data_sha256 != self.data_sha256:
            raise InputError(
                f"the data is not what {folder} was trained on; give that data, or train anew."
            )
        changed = [
            f"{name} was {before!r} and is {now!r}"
            for mine, theirs in ((self.model, earlier.model), (self.training, earlier.training))
            for name in mine.__struct_fields__
            if (before := getattr(theirs, name)) != (now := getattr(mine, name))
        ]
        if changed:
            raise InputError(
                f"{folder} goes on with the settings that it was begun with: {'; '.join(changed)}."
            )

    def write(self, folder: Path) -> None:
        """Keep it in the run's folder."""
        write_atomically(folder / PLAN, pretty_json(self.with_checksum()))


def check_own_test(folder: Path, data: str, split: str | None) -> None:
    """Raise ``InputError`` where a run's test set is a file, and another is about to be split off.

    ``folder`` is a run, or lies in one as its bundles do; ``split`` is what is taken of ``data``.
    """
    for run in (folder, folder.resolve().parent):
        own = read(run).source if (run / PLAN).is_file() else None
        made = split == "test" or (split is None and not Path(data).is_file())
        same = own is not None and own.data in (data, str(Path(data).resolve()))
        if own is not None and own.test is not None and same and made:
            raise InputError(
                f"{run} was trained with --test {own.test}, and so on what would be split off "
                f"{data}; give --data {own.test}."
            )


def fingerprint(splits: "Splits") -> str:
    """Hash every text and label of the three splits, in their order."""
    content = [
        [(example.text, example.label) for example in split]
        for split in (splits.train, splits.valid, splits.test)
    ]
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def read(folder: Path) -> RunConfig:
    """Read a run's settings; ``InputError`` where there are none, or they were changed."""
    path = folder / PLAN
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=RunConfig)
    except OSError as error:
        raise InputError(
            f"{folder} is not a run that can go on: {path.name} cannot be read there "
            f"({error.strerror})."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path} is damaged ({error}); train anew.") from None
    if not plan.is_valid:
        raise InputError(f"{path} was changed since the training began; train anew.")
    return plan
