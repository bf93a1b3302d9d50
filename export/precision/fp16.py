"""A graph in float16: weights and arithmetic in half the bytes, for GPUs above all.

Changes a float32 graph in place. Inputs stay as they are, outputs float32.
What cannot be in float16 stays in float32 and is reported, see
:mod:`trainkit.export.precision.fp32_nodes`.
"""

from collections import Counter
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trainkit.export.precision.fp32_nodes import LARGEST, find_fp32_nodes, infer_types
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import initializer
from trainkit.serve.types import FloatArray

NAME = "fp16"
# What hides a score. At the end of the range, a score or a bias added to it could make -inf of a
# whole row, and NaN of its softmax.
HIDDEN = LARGEST / 2
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_fp16(model: ir.Model, keep: Collection[str] = ()) -> RewriteResult:
    """Convert ``model`` in place; returns how many nodes compute in float16, and what does not.

    ``keep`` names values that leave float16's range, of
    :func:`~trainkit.export.precision.overflow.overflowing`. A graph with a float16 weight, or with
    graphs inside its nodes, is left as it is.
    """
    refused = _refused(model)
    if refused is not None:
        return RewriteResult(name=NAME, rewritten=0, declined=(refused,))
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_types(model)
    return _Fp16Conversion(model, keep).run()


def _refused(model: ir.Model) -> str | None:
    if any(value.dtype == HALF for value in model.graph.initializers.values()):
        return "the graph is in float16 already"
    inner = next(iter(model.graph.subgraphs()), None)
    return None if inner is None else "a node has a graph of its own inside"


class _Fp16Conversion:
    """One graph on its way to float16."""

    def __init__(self, model: ir.Model, keep: Collection[str]) -> None:
        self.model = model
        self.graph = model.graph
        self.reasons, self.mask_values = find_fp32_nodes(model, keep)
        self.limited: list[str] = []
        self.outputs = list(self.graph.outputs)
        # Which values were float32, before any of them changes.
        self.floats = {value for node in self.graph for value in node.inputs if _is_float(value)}
        self.floats |= {value for value in self.outputs if _is_float(value)}
        self.versions: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> RewriteResult:
        kept: Counter[tuple[str, str]] = Counter()
        rewritten = 0
        for node in list(self.graph):
            reason = self.reasons.get(node) or self._too_large(node)
            touches_floats = any(value in self.floats for value in (*node.inputs, *node.outputs))
            if reason is None:
                rewritten += touches_floats
            elif touches_floats:
                kept[node.op_type, reason] += 1
            self._convert(node, HALF if reason is None else FLOAT)
        self._outputs_in_float32()
        common.RemoveUnusedNodesPass()(self.model)
        stay = (f"{n} {op_type} in float32: {why}" for (op_type, why), n in kept.items())
        return RewriteResult(name=NAME, rewritten=rewritten, declined=(*self.limited, *stay))

    def _too_large(self, node: ir.Node) -> str | None:
        """Say which weight of ``node`` does not fit; it stays in float32 then, nothing is cut."""
        for value in node.inputs:
            if value is not None and value in self.floats and value.const_value is not None:
                array = value.const_value.numpy()
                if array.size > 1 and (np.abs(array[np.isfinite(array)]) > LARGEST).any():
                    return f"{value.name} holds values over {LARGEST:g}"
        return None

    def _convert(self, node: ir.Node, wanted: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.floats:
                node.replace_input_with(index, self._version(value, wanted, node))
        if node.op_type == "Cast" and node.attributes["to"].value == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", wanted)
        for value in node.outputs:
            if wanted == HALF and _is_float(value):
                value.type = ir.TensorType(HALF)

    def _version(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """Return ``value`` in the wanted type: itself, a constant beside it, or a Cast of it."""
        if value.dtype == wanted:
            return value
        if (value, wanted) not in self.versions:
            if value.const_value is not None:
                made = initializer(
                    self.graph, f"{value.name}.fp16", self._in_range(value).astype(np.float16)
                )
            else:
                made = self._cast(value, wanted, reader)
            self.versions[value, wanted] = made
        return self.versions[value, wanted]

    def _in_range(self, value: ir.Value) -> FloatArray:
        """Return a constant's array; a lone number beyond float16 becomes one inside.

        Masks are made with one (``torch.finfo(torch.float32).min``), of which only its being far
        below any score matters. Infinity stays, float16 has it.
        """
        assert value.const_value is not None
        array: FloatArray = value.const_value.numpy()
        if array.size != 1 or not LARGEST < np.abs(array).max() < np.inf:
            return array
        limited: FloatArray = np.clip(array, -HIDDEN, HIDDEN)
        self.limited.append(f"{value.name}: {array.item():.4g} became {limited.item():g}")
        return limited

    def _cast(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node | None) -> ir.Value:
        nodes = [ir.node("Cast", [value], {"to": wanted})]
        if (
            value in self.mask_values
        ):  # the cast alone would make -inf of it, and NaN of masked rows
            least = initializer(self.graph, "fp16.least", np.float32(-HIDDEN))
            nodes.insert(0, ir.node("Max", [value, least]))
            nodes[1].replace_input_with(0, nodes[0].outputs[0])
        made = nodes[-1].outputs[0]
        made.type, made.shape = ir.TensorType(wanted), value.shape
        if reader is None:
            self.graph.extend(nodes)
        else:
            self.graph.insert_before(reader, nodes)
        return made

    def _outputs_in_float32(self) -> None:
        for index, value in enumerate(self.outputs):
            if value in self.floats and value.dtype == HALF:
                name, value.name = value.name, f"{value.name}.fp16"
                made = self._cast(value, FLOAT, None)
                made.name = name
                self.graph.outputs[index] = made


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT
