"""Graphs of real families on random weights, and the comparison of their answers."""

import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.graphs.make import Graph, read
from trainkit.export.parity_cases import masks
from trainkit.export.rewrite.table import REWRITES

BATCH_SIZES, LENGTHS = (1, 2, 7), (1, 2, 17, 60)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a function from family, layout, opset and attention to a graph of tests/graphs."""
    folder = tmp_path_factory.mktemp("graphs")

    def export(*graph):
        path = folder / f"{Graph(*graph)}.onnx"
        if not path.exists():
            ir.save(read(Graph(*graph)), path)
        return path

    return export


def session(path, level="ORT_ENABLE_ALL"):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(str(path), options)


def cases(names):
    """Yield every kind of mask in every size, with random ids behind hidden positions too."""
    random = np.random.default_rng(0)
    for length in LENGTHS:
        for batch in BATCH_SIZES:
            ids = random.integers(3, 200, (batch, length))
            types = random.integers(0, 2, (batch, length))
            for kind, mask in masks(batch, length):
                feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
                yield f"{batch} x {length}, {kind}", {name: feeds[name] for name in names}


@pytest.fixture(scope="session")
def answers():
    """Return a function from an ONNX file to its logits on every case, by ONNX Runtime."""

    def run(path, level="ORT_ENABLE_ALL"):
        opened = session(path, level)
        names = [tensor.name for tensor in opened.get_inputs()]
        return {case: opened.run(None, feeds)[0] for case, feeds in cases(names)}

    return run


@pytest.fixture(scope="session")
def journey(exported, answers, tmp_path_factory):
    """Return a function from a graph to what each rewrite did to it, one after the other.

    A dict from the rewrite's name to its outcome, how often it fires again, and the file then.
    """
    made = {}
    folder = tmp_path_factory.mktemp("rewritten")

    def run(*graph):
        if graph not in made:
            model, steps = ir.load(exported(*graph)), {}
            for name, rewrite in REWRITES:
                outcome = rewrite(model)
                path = folder / f"{'-'.join(map(str, graph))}-{name}.onnx"
                ir.save(model, path)
                onnx.checker.check_model(path, full_check=True)
                steps[name] = (outcome, rewrite(model).rewritten, path)
            made[graph] = steps
        return made[graph]

    return run


@pytest.fixture
def run_model(tmp_path):
    """Return a function that runs a model in memory on feeds, without and with ORT's optimiser."""

    def run(model, feeds):
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
        plain, optimised = (session(path, level).run(None, feeds) for level in LEVELS)
        for one, other in zip(plain, optimised, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
        return plain

    return run


KINDS = {"float32": "float", "int64": "int64", "bool": "bool"}


@pytest.fixture(scope="session")
def graph_of():
    """Return a function that reads a graph from text; arrays given by name are its weights."""

    def parse(inputs, outputs, nodes, opset=17, **arrays):
        declared = [
            f"{KINDS[str(a.dtype)]}{list(a.shape) or ''} {name}" for name, a in arrays.items()
        ]
        model = ir.from_onnx_text(
            f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
            f"g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {nodes} }}"
        )
        for value in list(model.graph.inputs):
            if value.name in arrays:
                value.const_value = ir.tensor(arrays[value.name], name=value.name)
                model.graph.inputs.remove(value)
                model.graph.register_initializer(value)
        return model

    return parse


@pytest.fixture(scope="session")
def operators():
    """Return a function that names a graph's operators in their order."""
    return lambda model: [node.op_type for node in model.graph]


@pytest.fixture(autouse=True)
def quiet():
    """Keep the folder's notes on what it skips out of the tests' reports."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
