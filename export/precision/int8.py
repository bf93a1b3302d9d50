"""A graph in int8: products in bytes, embeddings stored as bytes, everything else in float32.

In goes a float32 graph of standard operators, rewritten or as it was exported; it is changed in
place. ``y = x W + b`` becomes ``(q_x - z_x) (q_W - z_W) s_x s_W + b``, the product in 32-bit
integers and therefore exact (Jacob et al. 2018, arXiv 1712.05877). An input that several products
read is quantised once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from trainkit.export.precision.arithmetic import quantise_table, quantise_weight
from trainkit.export.precision.calibration import Range
from trainkit.export.precision.emit import MICROSOFT, Emitter, replace
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.quantizable import (
    Lookup,
    NotQuantizable,
    Product,
    Weight,
    find_quantizable,
)
from trainkit.export.rewrite.base import RewriteResult

NAME = "int8"
# Rows of nothing but zeros must not divide by zero; every float32 scale of interest is larger.
LEAST_SCALE = np.float32(1e-30)


class Activation(NamedTuple):
    """A product's input in uint8: ``(values - zero_point) * scale``, times ``rows`` if not None.

    ``rows`` (..., 1) is the scale of each row, of an input that was divided by it.
    """

    values: ir.Value
    zero_point: ir.Value
    scale: ir.Value
    rows: ir.Value | None = None


def to_int8(
    model: ir.Model,
    settings: Int8Settings | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> RewriteResult:
    """Quantise ``model`` in place; returns how many nodes were, and why others were not.

    ``ranges``, of :func:`~trainkit.export.precision.calibration.calibrate`, is what static
    activations need: the range of each product's input by its name. A graph that is quantised
    already has no float32 weights left and is returned as it is, with nothing rewritten.
    """
    settings = settings or Int8Settings()
    return _Conversion(model, settings, ranges or {}).run()


class _Conversion:
    """One graph on its way to int8: what is shared between its nodes is made once."""

    def __init__(
        self, model: ir.Model, settings: Int8Settings, ranges: Mapping[str, Range]
    ) -> None:
        self.model = model
        self.settings = settings
        self.ranges = ranges
        self.emit = Emitter(model)
        self.activations: dict[ir.Value, Activation] = {}
        self.names: dict[object, str] = {}

    def run(self) -> RewriteResult:
        rewritten, declined = 0, []
        for site in list(find_quantizable(self.model)):
            output = str(site.node.outputs[0].name)
            reason = self._rewrite(site, output)
            if reason is None:
                rewritten += 1
            else:
                declined.append(f"{output}: {reason}")
        common.RemoveUnusedNodesPass()(self.model)
        return RewriteResult(name=NAME, rewritten=rewritten, declined=tuple(declined))

    def _rewrite(self, site: Product | Lookup | NotQuantizable, output: str) -> str | None:
        """Replace the site's node; returns the reason where it stays."""
        if isinstance(site, NotQuantizable):
            return site.reason
        if output in self.settings.keep:
            return "kept in fp32 by the settings"
        if isinstance(site, Lookup):
            self._lookup(site)
            return None
        source = site.node.inputs[0]
        assert source is not None
        if self.settings.activations == "static" and str(source.name) not in self.ranges:
            return f"its input {source.name} was not calibrated"
        self._product(site, source)
        return None

    def _product(self, site: Product, source: ir.Value) -> None:
        emit, base = self.emit, self._base(site.weight, "weight")
        activation = self._activation(source)
        quantised = quantise_weight(site.weight.array, self.settings.weight_bits)
        # The operator adds a bias while it writes the product; an Add would read and write all of
        # it once more.
        inside = site.row if activation.rows is None else None
        result = emit.op(
            "MatMulIntegerToFloat",
            activation.values,
            emit.constant(f"{base}.int8", quantised.values),
            activation.scale,
            emit.constant(f"{base}.scale", quantised.scale),
            activation.zero_point,
            emit.constant(f"{base}.zero_point", np.zeros(quantised.scale.shape, np.int8)),
            *(() if inside is None else (inside,)),
            domain=MICROSOFT,
        )
        replaced = site.node
        if inside is not None:
            replaced = site.added or site.node
        else:
            if activation.rows is not None:
                result = emit.op("Mul", result, activation.rows)
            if site.bias is not None:
                result = emit.op("Add", result, site.bias)
        emit.place(site.node)
        replace(replaced, result)

    def _activation(self, source: ir.Value) -> Activation:
        """Quantise ``source`` once, whoever reads it; its first reader stands before the others."""
        if source not in self.activations:
            static = self.settings.activations == "static"
            self.activations[source] = (self._static if static else self._per_token)(source)
        return self.activations[source]

    def _per_token(self, source: ir.Value) -> Activation:
        emit = self.emit
        one = emit.constant("int8.one", np.float32(1))
        middle = emit.constant("int8.middle", np.uint8(128))
        last_axis = emit.constant("int8.last_axis", np.array([-1]))
        largest = emit.op("ReduceMax", emit.op("Abs", source), last_axis, keepdims=1)
        step = emit.op("Mul", largest, emit.constant("int8.step", np.float32(1 / 127)))
        rows = emit.op("Max", step, emit.constant("int8.least", LEAST_SCALE))
        values = emit.op("QuantizeLinear", emit.op("Div", source, rows), one, middle)
        return Activation(values, middle, one, rows)

    def _static(self, source: ir.Value) -> Activation:
        known = self.ranges[str(source.name)]
        scale, zero_point = known.scale_and_zero_point()
        scale_value = self.emit.constant(f"{source.name}.scale", scale)
        zero_value = self.emit.constant(f"{source.name}.zero_point", zero_point)
        values = self.emit.op("QuantizeLinear", source, scale_value, zero_value)
        return Activation(values, zero_value, scale_value)

    def _lookup(self, site: Lookup) -> None:
        emit, base = self.emit, self._base(site.weight, "table")
        table = quantise_table(site.weight.array)
        ids = site.node.inputs[1]
        rows = emit.op("Gather", emit.constant(f"{base}.int8", table.values), ids, axis=0)
        scale = emit.op("Gather", emit.constant(f"{base}.scale", table.scale), ids, axis=0)
        result = emit.op("Mul", emit.op("Cast", rows, to=ir.DataType.FLOAT), scale)
        emit.place(site.node)
        replace(site.node, result)

    def _base(self, weight: Weight, role: str) -> str:
        """Name a weight's constants: the same for each use of it, and nobody else's."""
        key = (weight.key, role)
        if key not in self.names:
            taken = set(self.names.values())
            stem = weight.name if role == "weight" else f"{weight.name}.{role}"
            number = sum(name == stem or name.startswith(f"{stem}~") for name in taken)
            self.names[key] = f"{stem}~{number}" if number else stem
        return self.names[key]
