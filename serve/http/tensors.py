"""The input tensors of an inference request: each checked, and read to texts or rows of tokens.

Pure functions, no I/O. In go a tensor of the JSON, its part of the binary data if it has one, and
what the model takes; every fault is a ``ProtocolError`` of one sentence.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trainkit.serve.encoding import IntArray, Text, Tokens

INTEGERS: dict[str, np.dtype[np.signedinteger[Any]]] = {
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
}
LENGTH = struct.Struct("<I")  # before every element of a BYTES tensor


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


def texts_of(tensor: InputTensor, binary: memoryview | None, signature: Signature) -> list[Text]:
    """Return texts, or pairs of texts, from a tensor of strings; N of either."""
    if tensor.datatype != "BYTES":
        raise ProtocolError(f"the datatype of text must be BYTES, not {quoted(tensor.datatype)}.")
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


def integers_of(tensor: InputTensor, binary: memoryview | None, signature: Signature) -> IntArray:
    """Return a checked tensor, (N, S) int64."""
    name = tensor.name
    dtype = INTEGERS.get(tensor.datatype)
    if dtype is None:
        raise ProtocolError(
            f"the datatype of {name} must be INT64 or INT32, not {quoted(tensor.datatype)}."
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


def rows_of(arrays: Mapping[str, IntArray]) -> list[Tokens]:
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


def quoted(name: str) -> str:
    """Quote a name from a request, or its start: an error is one short sentence."""
    return repr(name if len(name) <= 40 else name[:40] + "…")
