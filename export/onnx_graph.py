"""A classifier to ONNX: batch and sequence dynamic, no trace of the machine that made it."""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from trainkit.export.quiet import quiet_exporter
from trainkit.export.sdpa import TRANSLATIONS
from trainkit.export.settings import OPSET


def export_graph(
    model: nn.Module, example: Sequence[Tensor], names: Sequence[str], opset: int = OPSET
) -> ir.Model:
    """Export ``model`` as traced with ``example``: one tensor for each of ``names``.

    Inputs int64 (batch, sequence); output ``logits``, float32 (batch, C).
    """
    axes = {0: "batch", 1: "sequence"}
    with quiet_exporter():
        program = torch.onnx.export(
            model.eval(),
            tuple(example),
            dynamo=True,
            opset_version=opset,
            input_names=list(names),
            output_names=["logits"],
            dynamic_shapes=tuple(axes for _ in names),
            custom_translation_table={**TRANSLATIONS} if opset < OPSET else None,
            verbose=False,
        )
    assert program is not None  # None only where torch.onnx.export writes the file itself
    _give_rotary_caches_the_batch(program.model)
    return program.model


def _give_rotary_caches_the_batch(model: ir.Model) -> None:
    """Expand cosines and sines of one row to all rows, which is how the operator wants them.

    The exporter fuses RotaryEmbedding (opset 23) with caches of shape (1, S, D / 2); ONNX Runtime
    refuses them for any batch but one.
    """
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or len(node.inputs) > 3:  # the fourth: position ids
            continue
        shape = ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
        ones = ir.node("Constant", [], {"value_ints": [1, 1]})
        sizes = ir.node("Concat", [shape.outputs[0], ones.outputs[0]], {"axis": 0})
        caches = [ir.node("Expand", [node.inputs[index], sizes.outputs[0]]) for index in (1, 2)]
        model.graph.insert_before(node, [shape, ones, sizes, *caches])
        for index, cache in enumerate(caches, start=1):
            node.replace_input_with(index, cache.outputs[0])
