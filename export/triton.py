"""A finished ONNX bundle to a model repository of the Triton Inference Server.

Writes ``<repository>/<name>`` with ``config.pbtxt``, ``1/model.onnx``, the
labels, a warm-up request, and beside them, for the client, which turns text into ids, the tokenizer
and the manifest; Triton reads neither. Texts of unequal length are batched where the client pads
them to one of a few lengths: Triton's ragged batching would join them to one row, which is another
model's input.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.data.splits import load_sample
from trainkit.serve.bundle import MANIFEST, BundleFiles, Tensor, check_target, staged
from trainkit.serve.encoding import IntArray
from trainkit.serve.errors import InputError

DATA_TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
}
LABELS = "labels.txt"
FOR_THE_CLIENT = ("tokenizer.json", "tokenizer_config.json", MANIFEST)
# A fraction of what one short text takes on one core; requests that come in it share a batch.
MAX_QUEUE_DELAY_US = 500


class _Enum(str):
    """A value that the text format writes without quotes."""

    __slots__ = ()


def write_repository(
    bundle: BundleFiles, out: Path, *, name: str, max_batch_size: int = 64, force: bool = False
) -> Path:
    """Write ``bundle`` as model ``name`` into the repository ``out``; returns the model's folder.

    ``name`` is in the address of every request. Other models in ``out`` stay as they are.
    Raises InputError if the bundle is not ONNX, a label or ``name`` cannot be written, or the model
    exists and ``force`` is not set; the folder is there whole, or not at all.
    """
    if bundle.manifest.format != "onnx":
        raise InputError(
            f"{bundle.folder} is a {bundle.manifest.format} bundle; a Triton repository is made of "
            "one in ONNX: trainkit export --format onnx"
        )
    if max_batch_size < 1:
        raise InputError(f"max_batch_size must be at least 1, not {max_batch_size}.")
    check_repository(out, name, bundle.manifest.labels, force=force)
    with staged(out / name, force=force) as stage:
        version = stage / "1"
        version.mkdir()
        for file in bundle.model_files:
            shutil.copyfile(bundle.folder / file, version / file)
        for file in FOR_THE_CLIENT:
            shutil.copyfile(bundle.folder / file, stage / file)
        labels = "".join(f"{label}\n" for label in bundle.manifest.labels)
        (stage / LABELS).write_text(labels, encoding="utf-8")
        example = _example(bundle)
        _write_warmup(stage / "warmup", example)
        config = _config(bundle, name, max_batch_size, example)
        # Last: a server that looks for new models finds none before.
        (stage / "config.pbtxt").write_text("\n".join(_lines(config)) + "\n", encoding="utf-8")
    return out / name


def check_repository(out: Path, name: str, labels: Sequence[str], *, force: bool) -> None:
    """Raise InputError if model ``name`` with these labels cannot be written to ``out``."""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(
            f"'{name}' cannot be a model's name in Triton; use letters, digits, '_', '.' and '-'."
        )
    check_target(out / name, force=force)
    for label in labels:
        if label.splitlines() != [label]:
            raise InputError(
                f"label {label!r} is not one line, as Triton's label file needs; rename it."
            )


def _example(bundle: BundleFiles) -> dict[str, IntArray]:
    """Encode a real question: each input of the model, (1, S)."""
    return bundle.encoder().encode([load_sample()[0].text]).tensors()


def _write_warmup(folder: Path, example: Mapping[str, IntArray]) -> None:
    folder.mkdir()
    for name, array in example.items():
        (folder / name).write_bytes(array.astype("<i8").tobytes())


def _config(
    bundle: BundleFiles, name: str, max_batch_size: int, example: Mapping[str, IntArray]
) -> dict[str, Any]:
    """Return Triton's ``ModelConfig`` as fields, for a model whose first axis is the batch."""
    manifest = bundle.manifest
    return {
        "name": name,
        "backend": "onnxruntime",
        "platform": "onnxruntime_onnx",
        "max_batch_size": max_batch_size,
        "input": [_tensor(tensor) for tensor in manifest.inputs],
        "output": [_tensor(tensor) | {"label_filename": LABELS} for tensor in manifest.outputs],
        # No preferred sizes: they would hold requests back for no gain with ONNX Runtime.
        "dynamic_batching": {"max_queue_delay_microseconds": MAX_QUEUE_DELAY_US},
        # The provider that the bundle was verified with.
        "instance_group": [{"count": 1, "kind": _Enum("KIND_CPU")}],
        "parameters": [
            _parameter("intra_op_thread_count", 0),  # 0: one a core, as in the verification
            _parameter("inter_op_thread_count", 1),
            _parameter("execution_mode", 0),  # one node after the other
        ],
        "model_warmup": [
            _warmup(f"batch of {size}", size, example) for size in sorted({1, max_batch_size})
        ],
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    batch, *rest = tensor.axes
    assert batch == "batch"  # of every input and output of a bundle
    return {
        "name": tensor.name,
        "data_type": _Enum(DATA_TYPES[tensor.dtype]),
        "dims": [-1 if isinstance(axis, str) else axis for axis in rest],
    }


def _parameter(key: str, value: int) -> dict[str, Any]:
    return {"key": key, "value": {"string_value": str(value)}}


def _warmup(name: str, batch_size: int, example: Mapping[str, IntArray]) -> dict[str, Any]:
    """Describe a request of ``batch_size`` copies of the example in ``warmup/``."""
    inputs = [
        {
            "key": key,
            "value": {
                "data_type": _Enum("TYPE_INT64"),
                "dims": list(array.shape[1:]),
                "input_data_file": key,
            },
        }
        for key, array in example.items()
    ]
    return {"name": name, "batch_size": batch_size, "inputs": inputs}


def _lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield protobuf's text format: a list is its field repeated, a mapping a message."""
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(item, indent + "  ")
                yield f"{indent}}}"
            elif isinstance(item, _Enum | int):
                yield f"{indent}{name}: {item}"
            else:
                yield f"{indent}{name}: {json.dumps(item, ensure_ascii=False)}"
