"""Proof that an int8 graph is the float32 graph, but for its rounding.

The float32 graph has been compared with the source to the last digits. Int8 rounds far more than
that, and a tolerance wide enough for it would let a lost mask through. So the two graphs are
compared exactly, node by node and byte by byte; the parity matrix weighs what the runtime makes
of it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trainkit.export.precision.quantizable import Lookup, NotQuantizable, Product, find_quantizable
from trainkit.serve.types import FloatArray

# Half a step is what rounding does, and a zero point is rounded too.
MOST_STEPS = 1.001
AROUND = ("Mul", "Add")


def diff_graphs(fp32: ir.Model, int8: ir.Model) -> tuple[str, ...]:
    """Return every way in which ``int8`` is another graph than ``fp32``; empty if it is the same.

    Each product and lookup must compute from the same input with the same weight, to a step of its
    scale, and with the same bias, which the product may have taken over from an Add; every other
    node must be there unchanged. Values have the same names in both graphs.
    """
    return tuple(_faults(fp32, int8))


def _faults(fp32: ir.Model, int8: ir.Model) -> Iterator[str]:
    makers = {str(value.name): node for node in int8.graph for value in node.outputs}
    sites = {
        str(site.node.outputs[0].name): site
        for site in find_quantizable(fp32)
        if not isinstance(site, NotQuantizable)
    }
    # Sites that took their Add over, by the name that both outputs have had.
    joined = {
        str(site.added.outputs[0].name): site
        for name, site in sites.items()
        if isinstance(site, Product) and site.added is not None and name not in makers
    }
    taken = {id(site.node) for site in joined.values()}
    for node in fp32.graph:
        name = str(node.outputs[0].name)
        found = makers.get(name)
        if id(node) in taken:
            continue  # looked at where its Add stands
        if found is None:
            if node.op_type not in ("Transpose", "Constant", "Identity"):  # a weight was behind it
                yield f"{name}: {node.op_type} is gone"
        elif found.op_type == node.op_type and found.domain == node.domain:
            yield from _changed(node, found)
        elif name in joined:
            yield from (f"{name}: {fault}" for fault in _site_faults(joined[name], found))
        elif name in sites:
            yield from (f"{name}: {fault}" for fault in _site_faults(sites[name], found))
        else:
            yield f"{name}: {node.op_type} became {found.op_type}"
    if _names(fp32.graph.outputs) != _names(int8.graph.outputs):
        yield "the outputs are others"


def _changed(old: ir.Node, new: ir.Node) -> Iterator[str]:
    name = old.outputs[0].name
    if _names(old.inputs) != _names(new.inputs):
        yield f"{name}: its inputs are {_names(new.inputs)}, not {_names(old.inputs)}"
    if {k: _plain(a) for k, a in old.attributes.items()} != {
        k: _plain(a) for k, a in new.attributes.items()
    }:
        yield f"{name}: its attributes changed"
    for before, after in zip(old.inputs, new.inputs, strict=False):
        if not _same_constant(before, after):
            yield f"{name}: the constant {before.name if before else None} changed"


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    return value.numpy().tobytes() if isinstance(value, ir.TensorProtocol) else value


def _same_constant(before: ir.Value | None, after: ir.Value | None) -> bool:
    if before is None or after is None or before.const_value is None:
        return True
    return after.const_value is not None and np.array_equal(
        before.const_value.numpy(), after.const_value.numpy(), equal_nan=True
    )


def _names(values: Sequence[ir.Value | None]) -> list[str | None]:
    return [None if value is None else value.name for value in values]


class _Read(NamedTuple):
    """What an int8 site reads: its input, its weight as float32, the steps of it, what is added."""

    source: str | None
    weight: FloatArray
    step: FloatArray
    bias: ir.Value | None


def _site_faults(site: Product | Lookup, last: ir.Node) -> Iterator[str]:
    read = _read_product(last) if isinstance(site, Product) else _read_lookup(last)
    if isinstance(read, str):
        yield read
        return
    source = site.node.inputs[0 if isinstance(site, Product) else 1]
    if source is None or read.source != source.name:
        yield f"it reads {read.source}, not {source.name if source else None}"
    bias = None
    if isinstance(site, Product):
        bias = site.row if last.op_type == "MatMulIntegerToFloat" else site.bias
    if _names([read.bias]) != _names([bias]) or not _same_constant(bias, read.bias):
        yield f"it adds {_names([read.bias])[0]}, not {_names([bias])[0]} as it was"
    weight = site.weight.array
    if read.weight.shape != weight.shape:
        yield f"its weight has the shape {read.weight.shape}, not {weight.shape}"
    elif not (np.abs(read.weight - weight) <= MOST_STEPS * read.step).all():
        steps = float((np.abs(read.weight - weight) / read.step).max())
        yield f"its weight differs by up to {steps:.1f} steps of its scale"


def _read_product(last: ir.Node) -> _Read | str:
    """Walk back from a product's output to the integer product, and read its constants."""
    node = last
    bias: ir.Value | None = None
    factors: list[ir.Value] = []
    while node.op_type in AROUND:
        first, *rest = node.inputs
        if node.op_type == "Add":
            bias = rest[0]
        elif node.op_type == "Mul" and rest[0] is not None:
            factors.append(rest[0])
        before = first.producer() if first is not None else None
        if before is None:
            return "it ends at no product"
        node = before
    if node.op_type != "MatMulIntegerToFloat":
        return f"it ends at {node.op_type}, no integer product"
    quantised, values, activation_scale, scale, _, zero, *inside = node.inputs
    if inside and bias is not None:
        return "it adds two biases"
    source = _source(quantised, activation_scale, factors)
    if not isinstance(source, ir.Value):
        return source
    weight, step = _dequantised(values, scale, zero)
    return _Read(source.name, weight, step, inside[0] if inside else bias)


def _source(
    quantised: ir.Value | None, scale: ir.Value | None, factors: Sequence[ir.Value]
) -> ir.Value | str:
    """Return what was quantised, if its scale is the one that the result is multiplied by."""
    maker = quantised.producer() if quantised is not None else None
    if maker is None or scale is None:
        return "its input is not quantised"
    source = maker.inputs[0]
    before = source.producer() if source is not None else None
    if before is not None and before.op_type == "Div" and before.inputs[1] in factors:
        source = before.inputs[0]  # each row was divided by what the result is multiplied by
    if maker.inputs[1] is not scale or source is None:
        return "its input was quantised with another scale"
    return source


def _read_lookup(last: ir.Node) -> _Read | str:
    cast = last.inputs[0].producer() if last.inputs[0] is not None else None
    gather = cast.inputs[0].producer() if cast is not None and cast.inputs[0] is not None else None
    if last.op_type != "Mul" or gather is None or gather.op_type != "Gather":
        return "it is not a lookup in bytes"
    rows = last.inputs[1].producer() if last.inputs[1] is not None else None
    source = gather.inputs[1]
    if rows is None or rows.inputs[1] is not source:
        return "its scales are those of other rows"
    table, step = _dequantised(gather.inputs[0], rows.inputs[0], None)
    return _Read(source.name if source is not None else None, table, step, None)


def _dequantised(
    values: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None
) -> tuple[FloatArray, FloatArray]:
    step = _constant(scale).astype(np.float32)
    offset = np.float32(0) if zero is None else _constant(zero).astype(np.float32)
    return (_constant(values).astype(np.float32) - offset) * step, step


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
