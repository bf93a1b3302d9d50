"""Reading and building the graph, in the few words that all rewrites share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# Constants up to this many elements are looked at element by element.
SMALL = 64


class Declined(Exception):  # noqa: N818  # not an error: the answer "not here", and why
    """Raised where a rewrite leaves a site as it is; the message is the reason."""


def array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the constant that ``value`` is, or None if it depends on the graph's inputs."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    # An initializer that is an input too may be given another content at every run.
    if tensor is None or (value is not None and value.is_graph_input()):
        return None
    return tensor.numpy()


def size(value: ir.Value | None) -> int | None:
    """Return the number of elements of a constant, without reading it; None if it is none."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None or value is None or value.is_graph_input() else tensor.size


def integers(value: ir.Value | None) -> list[int] | None:
    """Return a small constant of integers as a flat list; None if it is none."""
    if (count := size(value)) is None or count > SMALL:
        return None
    found = array(value)
    if found is None or not np.issubdtype(found.dtype, np.integer):
        return None
    return [int(number) for number in found.reshape(-1)]


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element as a float; None if it is none."""
    if size(value) != 1:
        return None
    found = array(value)
    return None if found is None else float(found.reshape(-1)[0])


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the standard operator that computes ``value``, if it is one of ``op_types``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the content of an attribute, or ``default`` where the node does not have it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def opset(model: ir.Model) -> int:
    """Return the version of the standard operators."""
    return model.opset_imports.get("", 1)


def drop_unused(model: ir.Model) -> None:
    """Remove the nodes and initializers that nothing reads any more."""
    RemoveUnusedNodesPass()(model)


def initializer(graph: ir.Graph, name: str, content: npt.ArrayLike) -> ir.Value:
    """Return the initializer ``name``, added with ``content`` if it is not there yet."""
    if name not in graph.initializers:
        # Not np.ascontiguousarray: it makes a vector of a scalar.
        tensor = ir.tensor(np.array(content, order="C"), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(np.shape(content))
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    return graph.initializers[name]


def replace(node: ir.Node, new: ir.Value) -> None:
    """Let every reader of ``node``'s only output read ``new``, under its old name and type."""
    (old,) = node.outputs
    name, old.name = old.name, f"{old.name}.replaced"
    new.name, new.type, new.shape = name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


class Builder:
    """Adds nodes before one node of the graph; constants become initializers named by content."""

    def __init__(self, before: ir.Node) -> None:
        assert isinstance(before.graph, ir.Graph)
        self.graph = before.graph
        self.before = before

    def constant(self, content: npt.ArrayLike, dtype: Any = np.int64) -> ir.Value:
        """Return a small constant, the same one for the same content."""
        made = np.asarray(content, dtype=dtype)
        return initializer(self.graph, f"{made.dtype}{made.tolist()}".replace(" ", ""), made)

    def weights(self, name: str, content: npt.NDArray[Any]) -> ir.Value:
        """Store an array under ``name``, or one like it where that is taken."""
        free, number = name, 0
        while free in self.graph.initializers:
            number += 1
            free = f"{name}.{number}"
        return initializer(self.graph, free, content)

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | Sequence[int] | None,
        shape: Iterable[Any] | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output; a list of integers among the inputs becomes a constant.

        ``shape`` and ``dtype`` describe the output; dtype is by default that of the first input.
        """
        values = [
            given if given is None or isinstance(given, ir.Value) else self.constant(given)
            for given in inputs
        ]
        node = ir.node(op_type, values, attributes, domain=domain)
        (output,) = node.outputs
        first = next((value for value in values if value is not None), None)
        if (known := dtype or (first.dtype if first is not None else None)) is not None:
            output.dtype = known
        output.shape = None if shape is None else ir.Shape(list(shape))
        self.graph.insert_before(self.before, node)
        return output


def dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """Return the known shape: a number or a symbol for each axis, None for an unknown one."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def same_rows(first: ir.Value, second: ir.Value) -> bool:
    """Tell whether both have the same axes but for the last one, as far as shapes are known."""
    left, right = dims(first), dims(second)
    if left is None or right is None:
        return False
    return left[:-1] == right[:-1] and None not in left[:-1]


def rename_axes(model: ir.Model, same: dict[str, int | str]) -> None:
    """Call an axis by the name or number that it was found to be the same as.

    A sum of two values that have the same axes now has them too.
    """
    for node in model.graph:
        for value in node.outputs:
            known = dims(value)
            if known is None or value.is_graph_output():
                continue
            renamed = [same.get(dim, dim) if isinstance(dim, str) else dim for dim in known]
            operands = {dims(given) for given in node.inputs}
            if node.op_type in ("Add", "Sub", "Mul", "Div") and len(operands) == 1:
                for old, new in zip(renamed, operands.pop() or (), strict=False):
                    if isinstance(old, str) and new is not None and old != new:
                        same[old] = new
                renamed = [same.get(dim, dim) if isinstance(dim, str) else dim for dim in renamed]
            if renamed != list(known):
                value.shape = ir.Shape(renamed)


def infer_shapes(model: ir.Model) -> None:
    """Give every value its shape, with one symbol for each length that is the same."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
