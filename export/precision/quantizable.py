"""Where a graph multiplies by a weight or looks up an embedding: what int8 can change.

Finds nodes by what they compute, never by their names or the model's family. In goes a graph; out
come products, lookups, and the nodes that look like one and are left alone, each with the reason.
"""

from collections.abc import Hashable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from trainkit.serve.types import FloatArray

# Quantising the (M, K) input of a product costs about as much as a few columns of it: with fewer
# than these there is nothing to win. A classifier's head is such a product.
LEAST_COLUMNS = 32
STANDARD_DOMAINS = ("", "ai.onnx")


class Weight(NamedTuple):
    """A constant matrix; ``key`` is the same for each use of one matrix, ``name`` its own."""

    array: FloatArray
    key: Hashable
    name: str


class Product(NamedTuple):
    """``node`` multiplies its input (..., K) by ``weight`` (K, N) and adds ``bias``, if any.

    ``added`` is the Add that alone reads a product without a bias and gives it one, a constant (N).
    """

    node: ir.Node
    weight: Weight
    bias: ir.Value | None
    added: ir.Node | None = None

    @property
    def row(self) -> ir.Value | None:
        """The constant (N) that is added to each row, here or by ``added``; None without one."""
        values = [self.bias] if self.added is None else self.added.inputs
        return next((v for v in values if _is_row(v, self.weight.array.shape[1])), None)


class Lookup(NamedTuple):
    """``node`` gathers rows of the table ``weight`` (V, H)."""

    node: ir.Node
    weight: Weight


class NotQuantizable(NamedTuple):
    """``node`` stays as it is, because of ``reason``."""

    node: ir.Node
    reason: str


QuantizableNode: TypeAlias = Product | Lookup | NotQuantizable


def find_quantizable(model: ir.Model) -> Iterator[QuantizableNode]:
    """Yield every product with a weight and every lookup of the main graph, in its order."""
    for node in model.graph:
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            yield NotQuantizable(node, f"what stands inside {node.op_type} is left as it is")
        if node.domain not in STANDARD_DOMAINS:
            continue
        if node.op_type == "MatMul":
            yield from _product(node)
        elif node.op_type == "Gemm":
            yield from _gemm(node)
        elif node.op_type == "Gather":
            yield from _lookup(node)


def quantizable_names(model: ir.Model) -> tuple[str, ...]:
    """Return the names of what can be quantised: those of the sites' outputs, unique in a graph."""
    return tuple(
        str(site.node.outputs[0].name)
        for site in find_quantizable(model)
        if not isinstance(site, NotQuantizable)
    )


def _product(node: ir.Node) -> Iterator[QuantizableNode]:
    left, right = node.inputs
    if _constant(left) is not None:
        yield NotQuantizable(node, "its weight stands on the left")
    elif (weight := _constant(right)) is not None:
        yield _checked(node, weight, None)


def _gemm(node: ir.Node) -> Iterator[QuantizableNode]:
    weight = _constant(node.inputs[1])
    if weight is None:
        return
    value = {name: attribute.value for name, attribute in node.attributes.items()}
    if value.get("transA", 0) or value.get("alpha", 1.0) != 1 or value.get("beta", 1.0) != 1:
        yield NotQuantizable(node, "a Gemm with transA, alpha or beta")
        return
    if value.get("transB", 0) and weight.array.ndim == 2:
        weight = Weight(weight.array.T, (weight.key, "transB"), weight.name)
    yield _checked(node, weight, node.inputs[2] if len(node.inputs) > 2 else None)


def _checked(node: ir.Node, weight: Weight, bias: ir.Value | None) -> Product | NotQuantizable:
    reason = _unfit(weight)
    if reason is None and weight.array.shape[1] < LEAST_COLUMNS:
        reason = f"{weight.array.shape[1]} columns are too few to win anything"
    if reason is not None:
        return NotQuantizable(node, reason)
    added = _bias_after(node, weight.array.shape[1]) if bias is None else None
    return Product(node, weight, bias, added)


def _bias_after(node: ir.Node, columns: int) -> ir.Node | None:
    (output,) = node.outputs
    readers = [use.node for use in output.uses()]
    if len(readers) != 1 or output.is_graph_output() or readers[0].op_type != "Add":
        return None
    constant = any(_is_row(value, columns) for value in readers[0].inputs)
    return readers[0] if constant and readers[0].domain in STANDARD_DOMAINS else None


def _is_row(value: ir.Value | None, columns: int) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and tensor.shape == (columns,) and tensor.dtype == ir.DataType.FLOAT


def _lookup(node: ir.Node) -> Iterator[QuantizableNode]:
    table = _constant(node.inputs[0])
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    if table is None or table.array.ndim != 2 or axis != 0 or table.array.dtype.kind in "iub":
        return  # shapes and positions are gathered too; those are no embeddings
    if table.array.shape[1] == 1:
        return  # one number a row: the scales of a table that is in bytes already
    reason = _unfit(table)
    yield Lookup(node, table) if reason is None else NotQuantizable(node, reason)


def _unfit(weight: Weight) -> str | None:
    """Say why an array cannot be quantised; None if it can."""
    array = weight.array
    if array.dtype != np.float32:
        return f"{weight.name} is {array.dtype}, not float32"
    if array.ndim != 2:
        return f"{weight.name} has {array.ndim} axes, not 2"
    if not np.isfinite(array).all():
        return f"{weight.name} holds NaN or infinity"
    return None if array.size else f"{weight.name} is empty"


def _constant(value: ir.Value | None) -> Weight | None:
    """Read the constant behind ``value``: an initializer, a Constant, or a Transpose of one."""
    if value is None:
        return None
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        return Weight(tensor.numpy(), id(tensor), str(value.name))
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Identity"):
        return None
    found = _constant(node.inputs[0])
    if found is None or node.op_type == "Identity":
        return found
    perm = tuple(node.attributes["perm"].value) if "perm" in node.attributes else None
    return Weight(found.array.transpose(perm), (found.key, perm), found.name)
