"""Chains of reshaping operators become one, or none."""

import onnx_ir as ir

from trainkit.export.rewrite.graph import Builder, dims, drop_unused, infer_shapes, producer

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def unshaped(value: ir.Value) -> ir.Value:
    """Return what ``value`` holds in the same order under other axes."""
    while (node := producer(value, *RESHAPES)) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def merge_reshapes(model: ir.Model) -> None:
    """Reshape(Reshape(x)) -> Reshape(x), or x where it ends with the axes that it began with.

    None of these operators moves an element, so only the last one's axes matter.
    """
    infer_shapes(model)
    for node in list(model.graph):
        output = node.outputs[0]
        if node.domain or node.op_type not in RESHAPES or output.is_graph_output():
            continue
        source = unshaped(output)
        after = dims(output)
        if after is not None and _same(dims(source), after):
            output.replace_all_uses_with(source)
        elif source is not node.inputs[0] and after is not None:
            fixed = [dim if isinstance(dim, int) else -1 for dim in after]
            if fixed.count(-1) <= 1:
                merged = Builder(node)("Reshape", source, fixed, shape=after)
                output.replace_all_uses_with(merged)
    drop_unused(model)


def _same(before: tuple[int | str | None, ...] | None, after: tuple[int | str | None, ...]) -> bool:
    """Compare axes; one may be unknown, since the number of elements is the same anyway."""
    if before is None or len(before) != len(after):
        return False
    differing = sum(one != other or one is None for one, other in zip(before, after, strict=True))
    return differing <= 1
