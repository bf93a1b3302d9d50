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
from typing import Any, NamedTuple

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
from trainkit.serve.formats import MODEL_FILES, Format, Precision
from trainkit.serve.postprocess import ProblemType

FORMAT_VERSION = 2
MANIFEST = "trainkit.json"


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output: its name, dtype, and one name or size an axis."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class Serving(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The fastest settings that a benchmark found; defaults of ``Classifier.load``.

    ``threads`` is per worker. ``provider`` is ONNX Runtime's name, such as "CPUExecutionProvider".
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

    ``source`` describes the original model. ``stages`` lists the steps from the untouched export to
    the finished file, each with its parity report or the reason why it was skipped; ``parity`` is
    the report of the finished bundle, ``independence`` that of batch invariance, ``accuracy`` and
    ``search`` (of an int8 setting) those on the user's data. ``equal_lengths``: padding changes the
    model's answers, so a batch has texts of one length only. ``machine`` is the hardware of a
    compiled model, ``notes`` are for the user. ``serving`` comes from ``trainkit bench recommend
    --write``. ``temperature`` divides the logits before the softmax or sigmoid (Guo et al. 2017);
    the outputs of ``model.onnx`` are not divided.
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
    # Unset, not None: fields that are not set are left out of the JSON and of its hash.
    serving: Serving | msgspec.UnsetType = msgspec.UNSET
    temperature: float | msgspec.UnsetType = msgspec.UNSET
    files: dict[str, FileInfo]


class BundleFiles(NamedTuple):
    """A bundle whose files match its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """Return the path of the model file."""
        return self.folder / MODEL_FILES[self.manifest.format]

    @property
    def model_files(self) -> dict[str, FileInfo]:
        """Return the model file and, if there is one, that of its external weights, by name."""
        model = self.model_path.name
        names = (model, f"{model}.data")
        return {name: found for name, found in self.manifest.files.items() if name in names}

    def check_served(self) -> None:
        """Raise ``InputError`` if the model needs torch."""
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


def open_bundle(folder: Path) -> BundleFiles:
    """Read a bundle and check every file; ``InputError`` says what is wrong with it."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        check_file(folder / name, expected)
    return BundleFiles(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest; ``InputError`` if it is missing or damaged."""
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
    """Raise ``InputError`` if ``path`` is not this file."""
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
    """Write the manifest of the files in ``folder`` and return it with their hashes."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    manifest = msgspec.structs.replace(
        manifest, files={name: file_info(folder / name) for name in names}
    )
    manifest = manifest.with_checksum()
    (folder / MANIFEST).write_bytes(pretty_json(manifest))
    return manifest


def write_serving(folder: Path, serving: Serving) -> Manifest:
    """Store these settings in the manifest; ``InputError`` if the bundle is damaged."""
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
    """Raise ``InputError`` if a bundle may not be written to ``target``."""
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

    A half-written or unverified bundle never has its final name. An existing ``target`` raises
    ``InputError``; with ``force`` the finished bundle replaces it if it is a bundle too. ``accept``
    checks the bundle in its final place; if it raises, the old one is restored.
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
