"""The bundle: a folder that holds an exported classifier and the proof of it.

This module owns the format; ``export`` writes through it. The layout is Hugging Face's, so that
other tools can read it too: ``config.json`` with ``id2label``, ``tokenizer.json``,
``tokenizer_config.json``, ``model.onnx`` or ``model.pt``; beside them ``trainkit.json``, the
manifest, and ``parity.npz``, the inputs and reference logits that the export was verified with.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import InputError
from trainkit.serve.files import (
    Checksummed,
    FileInfo,
    file_info,
    pretty_json,
    remove_empty,
    write_atomically,
)
from trainkit.serve.postprocess import ProblemType

FORMAT_VERSION = 2
MANIFEST = "trainkit.json"
Format = Literal["onnx", "torchscript", "pt2", "aoti"]
MODEL_FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "pt2": "model.pt2",
    "aoti": "model.aoti.pt2",
}
Precision = Literal["fp32", "fp16", "int8"]


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output: its name, dtype, and one name or size an axis."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class Serving(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How a benchmark found this bundle to serve best; defaults of ``Classifier.load``.

    ``threads`` are those of each of ``workers``. ``provider`` is ONNX Runtime's name of it, as
    "CPUExecutionProvider". A default is left out of the JSON: a bundle that was sealed before there
    was the field keeps its hash.
    """

    threads: int
    batch_size: int
    provider: str
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"serving {name} must be at least 1, not {getattr(self, name)}")


class Manifest(Checksummed, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``trainkit.json``.

    ``source`` says what the model came from. ``stages`` holds what was done to it in order, from
    the untouched export to the finished file, each with the report of its parity matrix or the
    reason why it declined; ``parity`` is the report of the finished bundle, ``independence`` that
    on neighbours, padding and order, ``accuracy`` and ``search`` (of an int8 setting) those on the
    user's data where it was given. ``equal_lengths``: the model itself gives other answers when a
    text is padded, so that only texts of one length go into a batch. ``machine`` names what a
    compiled model runs on, ``notes`` what a user must know. ``serving`` is what ``trainkit bench
    recommend --write`` found. ``temperature`` divides the logits before the softmax or sigmoid
    (Guo et al. 2017); ``model.onnx`` itself gives them undivided.
    """

    format_version: int
    format: Format
    precision: Precision
    opset: int | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...]
    problem_type: ProblemType
    pooling: str
    max_length: int
    pad_id: int
    source: dict[str, Any]
    stages: tuple[dict[str, Any], ...]
    parity: dict[str, Any]
    independence: tuple[dict[str, Any], ...]
    accuracy: dict[str, Any] | None
    search: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    equal_lengths: bool = False
    notes: tuple[str, ...] = ()
    # Unset and not None: they are then left out of the JSON, and a bundle that was sealed before
    # there were these fields keeps its hash.
    serving: Serving | msgspec.UnsetType = msgspec.UNSET
    temperature: float | msgspec.UnsetType = msgspec.UNSET
    files: dict[str, FileInfo]


class Bundle(NamedTuple):
    """A bundle whose files are what its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """Return the path of the model file."""
        return self.folder / MODEL_FILES[self.manifest.format]

    @property
    def model_files(self) -> dict[str, FileInfo]:
        """Return the model file, and that of its weights where they lie beside it, by name."""
        model = self.model_path.name
        names = (model, f"{model}.data")
        return {name: found for name, found in self.manifest.files.items() if name in names}

    def check_served(self) -> None:
        """Raise ``InputError`` where it takes torch to run it."""
        if self.manifest.format != "onnx":
            raise InputError(
                f"{self.folder} is a {self.manifest.format} bundle, which needs torch; serve one "
                "made with: trainkit export --format onnx"
            )

    def encoder(self) -> TextEncoder:
        """Load the text encoder."""
        return TextEncoder.load(
            self.folder / "tokenizer.json",
            self.manifest.max_length,
            self.manifest.pad_id,
            token_types=any(tensor.name == "token_type_ids" for tensor in self.manifest.inputs),
        )


class _Version(msgspec.Struct):
    format_version: int


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file; ``InputError`` says what is wrong with it."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        check_file(folder / name, expected)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read what a bundle says of itself; ``InputError`` where that is damaged."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read there "
            f"({getattr(error, 'strerror', None) or error}); make one with: trainkit export"
        ) from None
    try:
        version = msgspec.json.decode(content, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has bundle format {version}, this trainkit reads {FORMAT_VERSION}; "
                "use the trainkit that made it, or export again with this one."
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); export the bundle again.") from None
    if not manifest.is_valid:
        raise InputError(f"{path} was changed after the export; export the bundle again.")
    return manifest


def check_file(path: Path, expected: FileInfo) -> None:
    """Raise ``InputError`` where ``path`` is not this file."""
    try:
        found = file_info(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): the bundle is not complete; "
            "copy it again, or export again."
        ) from None
    if found != expected:
        raise InputError(
            f"{path} is not the file that was exported and verified (sha256 "
            f"{found.sha256[:12]}…, {found.size_bytes} bytes; expected {expected.sha256[:12]}…, "
            f"{expected.size_bytes} bytes); copy the bundle again, or export again."
        )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of the files that lie in ``folder``; returns it with all hashes."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    manifest = msgspec.structs.replace(
        manifest, files={name: file_info(folder / name) for name in names}
    )
    manifest = manifest.with_checksum()
    (folder / MANIFEST).write_bytes(pretty_json(manifest))
    return manifest


def write_serving(folder: Path, serving: Serving) -> Manifest:
    """Seal the manifest anew with these settings; no other file of the bundle is touched.

    ``InputError`` where it is no sound bundle, or cannot be written.
    """
    manifest = msgspec.structs.replace(
        open_bundle(folder).manifest, serving=serving
    ).with_checksum()
    try:
        write_atomically(folder / MANIFEST, pretty_json(manifest))
    except OSError as error:
        raise InputError(
            f"{folder / MANIFEST} cannot be written ({error.strerror}); copy the bundle elsewhere."
        ) from None
    return manifest


def check_target(target: Path, *, force: bool) -> None:
    """Raise ``InputError`` where a bundle may not be written to ``target``."""
    if not (target.is_symlink() or target.exists()):
        return
    if not force:
        raise InputError(
            f"{target} exists already; choose another --out, or replace it with --force."
        )
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise InputError(f"{target} is not a bundle and is not replaced; choose another --out.")


@contextmanager
def staged(
    target: Path, *, force: bool = False, accept: Callable[[Path], None] = lambda target: None
) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` when the block ends without an error.

    A half-written or unverified bundle so never has its final name. An existing ``target`` is an
    ``InputError``; with ``force`` it is replaced, and only then, by the finished one. A folder that
    is not a bundle is never replaced. ``accept`` looks at the bundle in its final place: where it
    raises, what was there before comes back.
    """
    check_target(target, force=force)
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); choose another --out."
        ) from None
    try:
        yield stage
        stage.chmod(0o755)  # mkdtemp makes it private; a bundle is read by other users too
        check_target(target, force=force)  # it may have come to be meanwhile
        _swap(stage, target, accept)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        remove_empty(made)


def _swap(stage: Path, target: Path, accept: Callable[[Path], None]) -> None:
    old = stage.with_name(stage.name + "-old")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        stage.rename(target)
        accept(target)
    except BaseException:  # after an interrupt too the target is what it was
        if target.exists():
            target.rename(stage)  # which the caller removes
        if replaces:
            old.rename(target)
        raise
    if replaces:
        shutil.rmtree(old)
