"""A graph in int8: products in bytes, embeddings stored as bytes, everything else in float32.

Changes a float32 graph of standard operators in place.

``y = x W + b`` becomes ``(q_x - z_x) q_W s_x s_W + b``, the product in 32-bit integers and
therefore exact (Jacob et al. 2018, arXiv 1712.05877). An input that several products read is
quantised once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from trainkit.export.precision.arithmetic import quantise_table, quantise_weight
from trainkit.export.precision.calibration import Range
from trainkit.export.precision.int8_settings import Int8Settings
from trainkit.export.precision.quantizable import (
    Lookup,
    NotQuantizable,
    Product,
    Weight,
    find_quantizable,
)
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.graph import MICROSOFT, Builder, initializer, replace

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
    return _Quantization(model, settings, ranges or {}).run()


class _Quantization:
    """One graph on its way to int8: what is shared between its nodes is made once."""

    def __init__(
        self, model: ir.Model, settings: Int8Settings, ranges: Mapping[str, Range]
    ) -> None:
        self.model = model
        self.settings = settings
        self.ranges = ranges
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
        if any(node.domain == MICROSOFT for node in self.model.graph):
            self.model.opset_imports.setdefault(MICROSOFT, 1)
        common.RemoveUnusedNodesPass()(self.model)
        return RewriteResult(name=NAME, rewritten=rewritten, declined=tuple(declined))

    def _rewrite(self, site: Product | Lookup | NotQuantizable, output: str) -> str | None:
        """Replace the site's node; returns the reason if it stays."""
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
        build, base = Builder(site.node), self._base(site.weight, "weight")
        activation = self._activation(source, build)
        quantised = quantise_weight(site.weight.array, self.settings.weight_bits)
        # The operator adds a bias while it writes the product; an Add would read and write all of
        # it once more.
        inside = site.row if activation.rows is None else None
        result = build(
            "MatMulIntegerToFloat",
            activation.values,
            self._constant(f"{base}.int8", quantised.values),
            activation.scale,
            self._constant(f"{base}.scale", quantised.scale),
            activation.zero_point,
            self._constant(f"{base}.zero_point", np.zeros(quantised.scale.shape, np.int8)),
            *(() if inside is None else (inside,)),
            domain=MICROSOFT,
            dtype=ir.DataType.FLOAT,
        )
        if inside is not None:
            replace(site.added or site.node, result)
            return
        if activation.rows is not None:
            result = build("Mul", result, activation.rows)
        if site.bias is not None:
            result = build("Add", result, site.bias)
        replace(site.node, result)

    def _activation(self, source: ir.Value, build: Builder) -> Activation:
        """Quantise ``source`` once; its first reader stands before the others."""
        if source not in self.activations:
            static = self.settings.activations == "static"
            make = self._static if static else self._per_token
            self.activations[source] = make(source, build)
        return self.activations[source]

    def _per_token(self, source: ir.Value, build: Builder) -> Activation:
        one = self._constant("int8.one", np.float32(1))
        middle = self._constant("int8.middle", np.uint8(128))
        largest = build("ReduceMax", build("Abs", source), [-1], keepdims=1)
        step = build("Mul", largest, self._constant("int8.step", np.float32(1 / 127)))
        rows = build("Max", step, self._constant("int8.least", LEAST_SCALE))
        scaled = build("Div", source, rows)
        values = build("QuantizeLinear", scaled, one, middle, dtype=ir.DataType.UINT8)
        return Activation(values, middle, one, rows)

    def _static(self, source: ir.Value, build: Builder) -> Activation:
        known = self.ranges[str(source.name)]
        scale, zero_point = known.scale_and_zero_point()
        scale_value = self._constant(f"{source.name}.scale", scale)
        zero_value = self._constant(f"{source.name}.zero_point", zero_point)
        values = build("QuantizeLinear", source, scale_value, zero_value, dtype=ir.DataType.UINT8)
        return Activation(values, zero_value, scale_value)

    def _lookup(self, site: Lookup) -> None:
        build, base = Builder(site.node), self._base(site.weight, "table")
        table = quantise_table(site.weight.array)
        ids = site.node.inputs[1]
        rows = build("Gather", self._constant(f"{base}.int8", table.values), ids, axis=0)
        scale = build("Gather", self._constant(f"{base}.scale", table.scale), ids, axis=0)
        floats = build("Cast", rows, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT)
        replace(site.node, build("Mul", floats, scale))

    def _constant(self, name: str, content: npt.ArrayLike) -> ir.Value:
        return initializer(self.model.graph, name, content)

    def _base(self, weight: Weight, role: str) -> str:
        """Name a weight's constants: the same for each use of it."""
        key = (weight.key, role)
        if key not in self.names:
            taken = set(self.names.values())
            stem = weight.name if role == "weight" else f"{weight.name}.{role}"
            number = sum(name == stem or name.startswith(f"{stem}~") for name in taken)
            self.names[key] = f"{stem}~{number}" if number else stem
        return self.names[key]
