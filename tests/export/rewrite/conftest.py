"""Graphs of real families on random weights, and the comparison of their answers."""

import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.families import FAMILIES, SIZES
from trainkit.export.onnx_graph import export_graph
from trainkit.export.parity_cases import masks
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.table import REWRITES
from trainkit.models.attention import KeyValuePrefix
from trainkit.models.packing import pack_encoder

BATCH_SIZES, LENGTHS = (1, 2, 7), (1, 2, 17, 60)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")

COMMON = {"vocab_size": 200, "num_labels": 3, "pad_token_id": 0, **SIZES}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}


class Logits(torch.nn.Module):
    """A Hugging Face classifier that gives nothing but its logits."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def make(family, attention, prefix_length=0, packed=True):
    """Build a random classifier; weights wide enough that a wrong rewrite cannot go unnoticed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**COMMON, **SPECIAL, **FAMILIES[family]})
        if hasattr(config, "use_cache"):
            config.use_cache = False
        model = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=attention
        ).eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
            elif "bias" in name:
                torch.nn.init.normal_(weight, std=0.1)
        if packed:
            packing = pack_encoder(model.base_model)
            assert not packing.declined
            for site in packing.sites if prefix_length else ():
                site.module.prefix = KeyValuePrefix(site.heads, prefix_length, site.head_size)
    names = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return Logits(model, names)


def example(names):
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = 0
    ids = torch.arange(27).reshape(3, 9) + 3
    return tuple({"input_ids": ids, "attention_mask": mask}.get(n, 0 * ids) for n in names)


def legacy(model, path, opset):
    """Export as people did before torch 2.9, and as optimum still does."""
    axes = {0: "batch_size", 1: "sequence_length"}
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            model,
            example(model.names),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=model.names,
            output_names=["logits"],
            dynamic_axes={**dict.fromkeys(model.names, axes), "logits": {0: "batch_size"}},
        )


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a function from family, layout, attention and opset to an ONNX file, made once.

    Layouts: ``packed`` and ``prefix`` as trainkit exports them, ``padded`` as anybody does, and
    ``legacy`` by the older exporter.
    """
    folder = tmp_path_factory.mktemp("graphs")

    def export(family, layout, opset, attention="sdpa"):
        path = folder / f"{family}-{layout}-{attention}-{opset}.onnx"
        if not path.exists():
            model = make(
                family, attention, 5 * (layout == "prefix"), layout in ("packed", "prefix")
            )
            if layout == "legacy":
                legacy(model, path, opset)
            else:
                with torch.no_grad():
                    graph = export_graph(model, example(model.names), model.names, opset)
                ir.save(graph, path)
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
