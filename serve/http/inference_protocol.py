"""Open Inference Protocol v2 with the binary tensor extension: bytes to typed requests and back.

Pure functions, no I/O. In goes a body, out come texts or encoded rows; in go logits, out comes a
body. Every fault of a request is a ``ProtocolError`` of one sentence.
https://github.com/kserve/open-inference-protocol and Triton's ``extension_binary_data``.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from trainkit.serve.decision import FloatArray
from trainkit.serve.encoding import IntArray, Text, Tokens

__all__ = [
    "OUTPUTS",
    "InferRequest",
    "InferResponse",
    "InputTensor",
    "OutputTensor",
    "ProtocolError",
    "Request",
    "RequestedOutput",
    "Signature",
    "decode",
    "encode",
]

Datatype = Literal["BYTES", "FP32"]
OUTPUTS: dict[str, Datatype] = {"label": "BYTES", "probabilities": "FP32", "logits": "FP32"}

INTEGERS: dict[str, np.dtype[np.signedinteger[Any]]] = {
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
}
LENGTH = struct.Struct("<I")  # before every element of a BYTES tensor
# Each changes what a tensor means, so that to ignore one would be to answer something else.
REFUSED = ("shared_memory_region", "classification")


class ProtocolError(Exception):
    """The request is not one of this protocol, or not one that this model can answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class InputTensor(msgspec.Struct):
    """A tensor sent: in ``data``, flat or nested as its shape, or after the JSON as binary."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class RequestedOutput(msgspec.Struct):
    """A tensor wanted: ``label``, ``probabilities`` or ``logits``."""

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(msgspec.Struct):
    """The JSON of a request: ``text``, or ``input_ids`` and ``attention_mask``."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[RequestedOutput] | None = None


class OutputTensor(msgspec.Struct, omit_defaults=True):
    """A tensor of the answer, its values in ``data`` or after the JSON."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[str | float] | None = None


class InferResponse(msgspec.Struct, omit_defaults=True):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


class Signature(NamedTuple):
    """What a model takes: ids below ``vocabulary_size``, rows up to ``max_length`` tokens long.

    ``texts`` is the most rows of one request.
    """

    vocabulary_size: int
    max_length: int
    token_types: bool
    texts: int

    @property
    def id_inputs(self) -> tuple[str, ...]:
        """Return the names of the tensors that take the place of ``text``."""
        types = ("token_type_ids",) if self.token_types else ()
        return ("input_ids", "attention_mask", *types)


class Request(NamedTuple):
    """N texts, or the N rows they were encoded to elsewhere; one of both is None.

    ``outputs`` holds the name of each output wanted and whether it is to be binary.
    """

    texts: list[Text] | None
    rows: list[Tokens] | None
    outputs: tuple[tuple[str, bool], ...]
    id: str | None = None
    timeout_s: float | None = None


_DECODER = msgspec.json.Decoder(InferRequest)


def decode(body: bytes, header_length: int | None, signature: Signature) -> Request:
    """Read a request.

    ``header_length`` is Inference-Header-Content-Length, None where there was no such header: then
    all of the body is JSON.
    """
    if header_length is None:
        header_length = len(body)
    elif not 0 < header_length <= len(body):
        raise ProtocolError(
            f"Inference-Header-Content-Length is {header_length}, and the body has {len(body)} "
            "bytes; it must be the length of the JSON at the body's start."
        )
    request = _json(body[:header_length])
    parameters = request.parameters or {}
    tensors = _tensors(request.inputs, memoryview(body)[header_length:])
    names = tuple(tensors)
    texts = rows = None
    if names == ("text",):
        texts = _texts(*tensors["text"], signature)
    elif set(names) == set(signature.id_inputs):
        rows = _rows({name: _integers(*tensors[name], signature) for name in names})
    else:
        raise ProtocolError(
            f"inputs must be text alone, or {', '.join(signature.id_inputs)}; got "
            f"{', '.join(map(_quoted, names)) or 'none'}."
        )
    return Request(
        texts,
        rows,
        _outputs(request.outputs, _flag(parameters, "binary_data_output")),
        request.id,
        _timeout(parameters),
    )


def _json(header: bytes) -> InferRequest:
    try:
        return _DECODER.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the request is not the JSON of an inference: {error}.") from None
    except RecursionError:
        raise ProtocolError("the request's JSON is nested too deep.") from None


def _tensors(
    inputs: Sequence[InputTensor], binary: memoryview
) -> dict[str, tuple[InputTensor, memoryview | None]]:
    """Give every input its part of the binary data, in order; there may be none left over."""
    tensors: dict[str, tuple[InputTensor, memoryview | None]] = {}
    for tensor in inputs:
        name = _quoted(tensor.name)
        if tensor.name in tensors:
            raise ProtocolError(f"input {name} is there twice.")
        parameters = tensor.parameters or {}
        _refuse(parameters, f"input {name}")
        size = parameters.get("binary_data_size")
        part = None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary):
                raise ProtocolError(
                    f"binary_data_size of {name} must be a number of bytes, at most the "
                    f"{len(binary)} that are left after the JSON."
                )
            part, binary = binary[:size], binary[size:]
        if (part is None) == (tensor.data is None):
            raise ProtocolError(f"input {name} must have either data or binary_data_size.")
        tensors[tensor.name] = tensor, part
    if len(binary):
        raise ProtocolError(f"{len(binary)} bytes after the JSON belong to no input.")
    return tensors


def _shape(tensor: InputTensor, signature: Signature, widths: range, meaning: str) -> int:
    """Check a shape of (N,) or (N, width), and return N x width."""
    shape = tensor.shape
    if not shape or shape[0] < 1 or (len(shape) == 1 and 1 not in widths):
        raise ProtocolError(f"the shape of {tensor.name} must be {meaning}.")
    if len(shape) > 2 or (len(shape) == 2 and shape[1] not in widths):
        raise ProtocolError(f"the shape of {tensor.name} must be {meaning}.")
    if shape[0] > signature.texts:
        raise ProtocolError(
            f"{tensor.name} has {shape[0]} rows, and a request may have {signature.texts}; "
            "send fewer at a time.",
            422,
        )
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _texts(tensor: InputTensor, binary: memoryview | None, signature: Signature) -> list[Text]:
    if tensor.datatype != "BYTES":
        raise ProtocolError(f"the datatype of text must be BYTES, not {_quoted(tensor.datatype)}.")
    meaning = "[N] or [N, 1] for N texts, or [N, 2] for N pairs, with N at least 1"
    count = _shape(tensor, signature, range(1, 3), meaning)
    if binary is None:
        values: list[str] = _values(tensor, count, list[str])
    else:
        values = list(_strings(binary, count))
    if tensor.shape[1:] == [2]:
        return list(zip(values[::2], values[1::2], strict=True))
    return list(values)


def _strings(binary: memoryview, count: int) -> Iterator[str]:
    """Yield the elements of a BYTES tensor, each after its length in four bytes."""
    at = 0
    for number in range(1, count + 1):
        start = at + LENGTH.size
        if start > len(binary):
            raise ProtocolError(f"the binary data of text ends before element {number} of {count}.")
        at = start + LENGTH.unpack_from(binary, at)[0]
        if at > len(binary):
            raise ProtocolError(f"element {number} of text is longer than the binary data.")
        try:
            yield str(binary[start:at], "utf-8")
        except UnicodeDecodeError:
            raise ProtocolError(f"element {number} of text is not UTF-8.") from None
    if at != len(binary):
        raise ProtocolError(f"{len(binary) - at} bytes follow the {count} elements of text.")


def _integers(tensor: InputTensor, binary: memoryview | None, signature: Signature) -> IntArray:
    """Return a checked tensor, (N, S) int64."""
    name = tensor.name
    dtype = INTEGERS.get(tensor.datatype)
    if dtype is None:
        raise ProtocolError(
            f"the datatype of {name} must be INT64 or INT32, not {_quoted(tensor.datatype)}."
        )
    longest = signature.max_length
    if len(tensor.shape) != 2:
        raise ProtocolError(f"the shape of {name} must be [N, S].")
    meaning = f"[N, S], with N at least 1 and S from 1 to {longest}"
    count = _shape(tensor, signature, range(1, longest + 1), meaning)
    if binary is None:
        try:
            array = np.array(_values(tensor, count, list[int]), dtype=np.int64)
        except OverflowError:
            raise ProtocolError(f"{name} has a number that is not an INT64.") from None
    elif len(binary) != count * dtype.itemsize:
        raise ProtocolError(
            f"{name} has {len(binary)} bytes of binary data; its shape needs "
            f"{count * dtype.itemsize}."
        )
    else:
        array = np.frombuffer(binary, dtype).astype(np.int64)
    limit = signature.vocabulary_size if name == "input_ids" else 2
    if array.min() < 0 or array.max() >= limit:
        raise ProtocolError(f"{name} must be from 0 to {limit - 1}.")
    return array.reshape(tensor.shape)


def _values(tensor: InputTensor, count: int, kind: Any) -> Any:
    """Return the elements of ``data``, which may be flat or nested as its shape is."""
    data = tensor.data
    assert data is not None
    try:
        if data and isinstance(data[0], list):
            rows: list[Any] = msgspec.convert(data, list[kind])
            if [len(rows), *{len(row) for row in rows}] != tensor.shape:
                raise ProtocolError(f"data of {tensor.name} is nested unlike its shape.")
            return [value for row in rows for value in row]
        values = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"data of {tensor.name} is wrong: {error}.") from None
    if len(values) != count:
        raise ProtocolError(
            f"data of {tensor.name} has {len(values)} elements; its shape needs {count}."
        )
    return values


def _rows(arrays: Mapping[str, IntArray]) -> list[Tokens]:
    """Cut (N, S) tensors to rows without the padding at their right end."""
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    types = arrays.get("token_type_ids", np.zeros_like(ids))
    if not ids.shape == mask.shape == types.shape:
        raise ProtocolError(f"{', '.join(arrays)} must have one shape.")
    lengths = np.where(mask, np.arange(1, mask.shape[1] + 1), 0).max(axis=1)
    if not lengths.all():
        raise ProtocolError(f"row {int(lengths.argmin()) + 1} of attention_mask is all 0.")
    return [
        Tokens(
            ids[row, :length].tolist(),
            types[row, :length].tolist(),
            # Padding on the left or between: the row keeps its mask, for positions count from it.
            mask=None if mask[row, :length].all() else mask[row, :length].tolist(),
        )
        for row, length in enumerate(lengths.tolist())
    ]


def _outputs(
    wanted: Sequence[RequestedOutput] | None, all_binary: bool
) -> tuple[tuple[str, bool], ...]:
    if not wanted:
        return tuple((name, all_binary) for name in OUTPUTS)
    found: dict[str, bool] = {}
    for output in wanted:
        name = _quoted(output.name)
        if output.name not in OUTPUTS:
            raise ProtocolError(f"there is no output {name}; choose from {', '.join(OUTPUTS)}.")
        if output.name in found:
            raise ProtocolError(f"output {name} is wanted twice.")
        parameters = output.parameters or {}
        _refuse(parameters, f"output {name}")
        found[output.name] = _flag(parameters, "binary_data", all_binary)
    return tuple(found.items())


def _refuse(parameters: Mapping[str, Any], owner: str) -> None:
    for name in REFUSED:
        if parameters.get(name) is not None:
            raise ProtocolError(f"parameter {name} of {owner} is not supported; leave it out.")


def _flag(parameters: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter {name} must be true or false.")
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return Triton's ``timeout``, which is in microseconds, in seconds; 0 there means none."""
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ProtocolError("parameter timeout must be a whole number of microseconds.")
    return value / 1e6 or None


def _quoted(name: str) -> str:
    """Quote a name from a request, or its start: an error is one short sentence."""
    return repr(name if len(name) <= 40 else name[:40] + "…")


def encode(
    request: Request,
    model: tuple[str, str],
    labels: Sequence[str],
    logits: FloatArray,
    probabilities: FloatArray,
) -> tuple[bytes, int | None]:
    """Write the answer of a model's (name, version) for (N, C) logits and probabilities.

    Returns the body and, where binary data follows the JSON, the length of the JSON.
    """
    best = [labels[column] for column in probabilities.argmax(axis=1)]
    outputs, parts = [], []
    for name, binary in request.outputs:
        shape = [len(logits)] if name == "label" else list(logits.shape)
        output = OutputTensor(name, OUTPUTS[name], shape)
        floats = probabilities if name == "probabilities" else logits
        if binary:
            part = _label_bytes(best) if name == "label" else floats.astype("<f4").tobytes()
            output.parameters = {"binary_data_size": len(part)}
            parts.append(part)
        else:
            output.data = [*best] if name == "label" else [*floats.ravel().tolist()]
        outputs.append(output)
    header = msgspec.json.encode(InferResponse(*model, outputs, request.id))
    return b"".join((header, *parts)), len(header) if parts else None


def _label_bytes(labels: Sequence[str]) -> bytes:
    encoded = [label.encode() for label in labels]
    return b"".join(part for label in encoded for part in (LENGTH.pack(len(label)), label))
