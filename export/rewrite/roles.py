"""The inputs of another exporter's classifier: which holds token ids, which the mask.

Found by what the graph does with an input, not by its name: ids look up the largest table of
embeddings, token types and positions look up others, and what looks up none is the mask.
"""

from typing import NamedTuple

import onnx_ir as ir

from trainkit.export.rewrite.graph import dims, size
from trainkit.serve.errors import InputError

RELABELLING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


class Roles(NamedTuple):
    """The inputs of a text classifier, by what they are for, and its output.

    ``vocabulary`` is how many rows the ids' table has; ``others`` has, for each further input that
    looks up a table, the number of rows of that. ``fixed`` is (B, S), None for a dynamic axis.
    """

    ids: ir.Value
    mask: ir.Value | None
    others: dict[ir.Value, int]
    vocabulary: int
    fixed: tuple[int | None, int | None]
    logits: ir.Value


def find_roles(model: ir.Model, name: str) -> Roles:
    """Read the roles off the graph; raises InputError if it is not a text classifier."""
    initializers = set(model.graph.initializers)
    inputs = [value for value in model.graph.inputs if value.name not in initializers]
    tables = {value: _table(value) for value in inputs}
    looking = sorted((value for value in inputs if tables[value]), key=lambda v: -tables[v])
    if not looking:
        raise InputError(
            f"{name} has no input that looks up a table of embeddings (its inputs: "
            f"{_listed(inputs)}); give the ONNX file of a text classifier that takes token ids."
        )
    ids, masks = looking[0], [value for value in inputs if not tables[value]]
    if len(masks) > 1 or any(len(dims(value) or ()) != 2 for value in (*looking, *masks)):
        raise InputError(
            f"{name} takes {_listed(inputs)}; expected are token ids, at most one mask, and token "
            "types or positions, each (batch, sequence)."
        )
    batch, sequence = dims(ids) or (None, None)
    return Roles(
        ids,
        masks[0] if masks else None,
        {value: tables[value] for value in looking[1:]},
        tables[ids],
        (
            batch if isinstance(batch, int) else None,
            sequence if isinstance(sequence, int) else None,
        ),
        _logits(model, name),
    )


def _table(value: ir.Value) -> int:
    """Return the rows of the largest constant table that ``value`` looks up; 0 for none."""
    rows = 0
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 1 and size(node.inputs[0]) is not None:
            shape = dims(node.inputs[0])
            if shape is not None and len(shape) == 2 and isinstance(shape[0], int):
                rows = max(rows, shape[0])
        elif node.op_type in RELABELLING and index == 0:
            rows = max(rows, _table(node.outputs[0]))
    return rows


def _logits(model: ir.Model, name: str) -> ir.Value:
    outputs = list(model.graph.outputs)
    if len(outputs) != 1 or len(dims(outputs[0]) or (None, None)) != 2:
        raise InputError(
            f"{name} gives {_listed(outputs)}; expected is one output, the logits: "
            "(batch, labels). Export the classifier alone, with its head."
        )
    if outputs[0].dtype not in (ir.DataType.FLOAT, None):
        raise InputError(
            f"the output '{outputs[0].name}' of {name} is {outputs[0].dtype}; expected are logits "
            "in float32. Optimise first, convert to a lower precision afterwards."
        )
    return outputs[0]


def _listed(values: list[ir.Value]) -> str:
    listed = [f"'{value.name}' {list(dims(value) or ['?'])}" for value in values]
    return ", ".join(listed) or "nothing"
