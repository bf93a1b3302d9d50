"""Open Inference Protocol v2 with the binary tensor extension: bytes to typed requests and back.

Pure functions, no I/O: a body is decoded to texts or rows of tokens, logits are encoded to a body.
Every fault of a request is a ``ProtocolError`` of one sentence.
https://github.com/kserve/open-inference-protocol and Triton's ``extension_binary_data``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from trainkit.serve.encoding import Text, Tokens
from trainkit.serve.http.tensors import (
    LENGTH,
    InputTensor,
    ProtocolError,
    Signature,
    integers_of,
    quoted,
    rows_of,
    texts_of,
)
from trainkit.serve.types import FloatArray

Datatype = Literal["BYTES", "FP32"]
OUTPUTS: dict[str, Datatype] = {"label": "BYTES", "probabilities": "FP32", "logits": "FP32"}

# Each changes what a tensor means, so it must not be ignored.
REFUSED = ("shared_memory_region", "classification")


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


class DecodedRequest(NamedTuple):
    """N texts, or the N rows they were encoded to elsewhere; one of both is None.

    ``outputs`` holds the name of each output wanted and whether it is to be binary.
    """

    texts: list[Text] | None
    rows: list[Tokens] | None
    outputs: tuple[tuple[str, bool], ...]
    id: str | None = None
    timeout_s: float | None = None


_DECODER = msgspec.json.Decoder(InferRequest)


def decode(body: bytes, header_length: int | None, signature: Signature) -> DecodedRequest:
    """Read a request.

    ``header_length`` is Inference-Header-Content-Length; None without it: the body is JSON.
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
        texts = texts_of(*tensors["text"], signature)
    elif set(names) == set(signature.id_inputs):
        rows = rows_of({name: integers_of(*tensors[name], signature) for name in names})
    else:
        raise ProtocolError(
            f"inputs must be text alone, or {', '.join(signature.id_inputs)}; got "
            f"{', '.join(map(quoted, names)) or 'none'}."
        )
    return DecodedRequest(
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
        name = quoted(tensor.name)
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


def _outputs(
    wanted: Sequence[RequestedOutput] | None, all_binary: bool
) -> tuple[tuple[str, bool], ...]:
    if not wanted:
        return tuple((name, all_binary) for name in OUTPUTS)
    found: dict[str, bool] = {}
    for output in wanted:
        name = quoted(output.name)
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


def encode(
    request: DecodedRequest,
    model: tuple[str, str],
    labels: Sequence[str],
    logits: FloatArray,
    probabilities: FloatArray,
) -> tuple[bytes, int | None]:
    """Write the answer of a model's (name, version) for (N, C) logits and probabilities.

    Returns the body and, if binary data follows the JSON, the length of the JSON.
    """
    # By the logits: probabilities may round to the same number.
    best = [labels[column] for column in logits.argmax(axis=1)]
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
