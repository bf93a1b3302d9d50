"""A graph with values inside it as outputs: what flows through it on real texts."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.onnx_session import open_session
from trainkit.serve.types import FloatArray

FILE = "observed.onnx"


def observe(
    model: ir.Model, names: Iterable[str], batches: Sequence[Batch], scratch: Path
) -> Iterator[tuple[str, FloatArray]]:
    """Yield the named values of ``model`` on each batch, in ONNX Runtime on the CPU.

    The model itself is not changed; its copy is written to the folder ``scratch``.
    ``InputError`` without a batch.
    """
    if not batches:
        raise InputError("no texts to observe the model on; give some with --data.")
    wanted = list(dict.fromkeys(names))
    session = _session(model.clone(), wanted, scratch)
    inputs = {tensor.name for tensor in session.get_inputs()}
    for batch in batches:
        feed = {name: array for name, array in batch.tensors().items() if name in inputs}
        yield from zip(wanted, session.run(wanted, feed), strict=True)


def _session(copy: ir.Model, names: Sequence[str], scratch: Path) -> ort.InferenceSession:
    known = {str(value.name): value for node in copy.graph for value in node.outputs}
    known |= {str(value.name): value for value in copy.graph.inputs}
    outputs = (known[name] for name in names)
    copy.graph.outputs.extend(value for value in outputs if not value.is_graph_output())
    path = scratch / FILE
    weights = scratch / f"{FILE}.data"
    for old in (path, weights):
        old.unlink(missing_ok=True)  # a session may still map the last one's weights
    ir.save(copy, path, external_data=weights.name)
    return open_session(path)
