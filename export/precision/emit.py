"""New nodes and constants for a graph, written down in order and put before an old node."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

MICROSOFT = "com.microsoft"


class Emitter:
    """Collects nodes; :meth:`place` puts them into the graph."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self._nodes: list[ir.Node] = []

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: int
    ) -> ir.Value:
        """Add a node with one output and return it."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: int,
    ) -> tuple[ir.Value, ...]:
        """Add a node and return its outputs."""
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, name: str, array: npt.ArrayLike) -> ir.Value:
        """Return the initializer ``name``, added with ``array`` where it is not there yet."""
        if name not in self.graph.initializers:
            # Not np.ascontiguousarray: it makes a vector of a scalar.
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            value = ir.Value(
                name=name,
                const_value=tensor,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(np.shape(array)),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def place(self, before: ir.Node) -> None:
        """Put what was collected before ``before`` and begin anew."""
        self.graph.insert_before(before, self._nodes)
        self._nodes = []


def replace(node: ir.Node, new: ir.Value) -> None:
    """Let every reader of ``node``'s only output read ``new``, under its old name and type."""
    (old,) = node.outputs
    name, old.name = old.name, f"{old.name}.replaced"
    new.name, new.type, new.shape = name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
