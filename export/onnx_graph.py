"""A classifier to ONNX: batch and sequence dynamic, no trace of the machine that made it."""

from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from trainkit.export.example import example_batch
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.strip import strip_metadata
from trainkit.models.classifier import TextClassifier

__all__ = ["OPSET", "export_onnx"]

OPSET = 23  # the first with a standard Attention operator, which SDPA becomes
# A protobuf message ends at 2 GiB; larger weights lie beside the graph.
INLINE_LIMIT_BYTES = 2**31 - 2**20


def export_onnx(model: TextClassifier, path: Path) -> dict[str, int]:
    """Write ``model`` to ``path``; returns the number of nodes by operator.

    Inputs ``input_ids`` and ``attention_mask``, int64 (batch, sequence); output ``logits``,
    float32 (batch, C). The file passes ``onnx.checker`` with full checks.
    """
    axes = {0: "batch", 1: "sequence"}
    with quiet_exporter():
        program = torch.onnx.export(
            model.eval(),
            example_batch(model),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(axes, axes),
            verbose=False,
        )
    assert program is not None  # None only where torch.onnx.export writes the file itself
    graph = program.model
    strip_metadata(graph)
    weights_bytes = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    external = f"{path.name}.data" if weights_bytes > INLINE_LIMIT_BYTES else None
    ir.save(graph, path, external_data=external)
    onnx.checker.check_model(path, full_check=True)
    counts: dict[str, int] = {}
    for node in graph.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
