"""Small graphs with known answers, and a runtime for them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

IMPORTS = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]


def build(nodes, constants, inputs, shape=None):
    """Make a model of nodes ``(op_type, inputs, outputs, attributes)`` and named arrays.

    ``shape`` is that of ``logits``, where ONNX cannot infer it.
    """
    graph = helper.make_graph(
        [helper.make_node(op, list(i), list(o), **a) for op, i, o, a in nodes],
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=IMPORTS, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model, **feed):
    """Check the graph in full and run it in ONNX Runtime."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return session.run([model.graph.outputs[0].name], feed)[0]


def run_in_halves(model, **feed):
    """Run the graph in the reference implementation of ONNX, which rounds every float16 value.

    ONNX Runtime's CPU provider has no kernels for most float16 operators: it computes them in
    float32, and leaves out the casts between them.
    """
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0]


def counts(model):
    """Count the operators of a graph."""
    found = {}
    for node in model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def encoder_parts(rng):
    """Return the arrays of a one-layer encoder with additive masking and 40 labels."""

    def normal(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    return {
        "table": normal(50, 32),
        "w_q": normal(32, 32),
        "w_k": normal(32, 32),
        "w_v": normal(32, 32),
        "one": np.float32(1),
        "far": np.float32(np.finfo(np.float32).min),
        "last": np.array([1]),
        "head": normal(40, 32),
        "bias": normal(40),
        "b_v": normal(32),
    }


@pytest.fixture
def tiny_encoder(encoder_parts):
    """Return a function that makes the encoder again: ids and mask (B, S) to logits (B, 40)."""
    nodes = [
        ("Gather", ("table", "input_ids"), ("x",), {}),
        ("MatMul", ("x", "w_q"), ("q",), {}),
        ("MatMul", ("x", "w_k"), ("k",), {}),
        ("MatMul", ("x", "w_v"), ("v",), {}),
        ("Add", ("v", "b_v"), ("values",), {}),
        ("Transpose", ("k",), ("k_t",), {"perm": [0, 2, 1]}),
        ("MatMul", ("q", "k_t"), ("scores",), {}),
        ("Cast", ("attention_mask",), ("mask",), {"to": TensorProto.FLOAT}),
        ("Sub", ("one", "mask"), ("hidden",), {}),
        ("Mul", ("hidden", "far"), ("added",), {}),
        ("Unsqueeze", ("added", "last"), ("row",), {}),
        ("Add", ("scores", "row"), ("masked",), {}),
        ("Softmax", ("masked",), ("share",), {"axis": -1}),
        ("MatMul", ("share", "values"), ("context",), {}),
        ("ReduceMean", ("context", "last"), ("pooled",), {"keepdims": 0}),
        ("Gemm", ("pooled", "head", "bias"), ("logits",), {"transB": 1}),
    ]
    inputs = {
        name: (TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")
    }
    return lambda: build(nodes, encoder_parts, inputs)


@pytest.fixture
def tokens(rng):
    """Return ids and a mask (4, 9): full, right and left padding, and one hidden row."""
    mask = np.ones((4, 9), dtype=np.int64)
    mask[1, 5:] = 0
    mask[2, :4] = 0
    mask[3] = 0
    return {"input_ids": rng.integers(0, 50, (4, 9)), "attention_mask": mask}


@pytest.fixture
def product(rng):
    """Return a function that makes ``logits = x W``, x (M, K): its graph, W (48, 64) and x."""
    weight = rng.normal(0, 0.1, (48, 64)).astype(np.float32)
    weight[:, 7] = 0  # a column of nothing
    x = rng.normal(0, 1, (5, 48)).astype(np.float32)
    x[3] = 0  # a row of nothing
    inputs = {"x": (TensorProto.FLOAT, ["rows", 48])}

    def make(array=weight):
        return build([("MatMul", ("x", "w"), ("logits",), {})], {"w": array}, inputs)

    return make, weight, x


@pytest.fixture
def onnx_graph():
    """Return the tools of this file: tests import nothing from a conftest."""
    return type("Tools", (), {**globals()})
