"""Remove what the exporter leaves of its machine: source paths, stack traces, module names."""

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from trainkit.export.rewrite.base import RewriteResult


def strip_metadata(model: ir.Model) -> RewriteResult:
    """Clear every ``metadata_props`` and ``doc_string`` in ``model``, and count those that were."""
    stripped = 0
    for part in _parts(model):
        if part.metadata_props or part.doc_string:
            part.metadata_props.clear()
            part.doc_string = None
            stripped += 1
    return RewriteResult(name="strip_metadata", rewritten=stripped)


def _parts(model: ir.Model) -> Iterator[Any]:
    yield model
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.graph.subgraphs()]
    for graph in (*graphs, *model.functions.values()):
        yield graph
        yield from graph.inputs
        for node in graph:
            yield node
            yield from node.outputs
    yield from model.graph.initializers.values()
