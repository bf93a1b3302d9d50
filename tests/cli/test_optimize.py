"""``trainkit optimize`` on files of other exporters: proven, or nothing is written."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from trainkit.export import graph_file, optimize
from trainkit.export.quiet import quiet_exporter
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.table import REWRITES, Rewrite


class Logits(torch.nn.Module):
    """A classifier as somebody else wraps one, under names of their own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, visible, segments):
        return self.model(input_ids=tokens, attention_mask=visible, token_type_ids=segments).logits


def export(path, *, dtype=torch.int64, types=None, axes=True, states=False):
    """Write a random BERT with the older exporter: inputs ``tokens``, ``visible``, ``segments``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=3,
        )
        model = BertForSequenceClassification(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
    visible = torch.ones(3, 9, dtype=dtype)
    visible[1, 5:] = 0
    ids = torch.arange(27, dtype=dtype).reshape(3, 9)
    names = ["tokens", "visible", "segments"]
    free = {0: "rows", 1: "length"}
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            model if states else Logits(model),
            (ids, visible, (0 * ids).to(types or dtype)),
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["scores"],
            dynamic_axes={**dict.fromkeys(names, free), "scores": {0: "rows"}} if axes else None,
        )
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return export(tmp_path_factory.mktemp("foreign") / "model.onnx")


@pytest.fixture
def model(foreign, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(foreign.read_bytes())
    return path


def signature(path):
    graph = ir.load(path).graph
    return [(v.name, v.dtype, str(v.shape)) for v in (*graph.inputs, *graph.outputs)]


def run(path, tokens, visible):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options)
    return session.run(None, {"tokens": tokens, "visible": visible, "segments": 0 * tokens})[0]


def test_it_writes_a_faster_model_with_the_same_answers(model, trainkit, tree, tmp_path):
    before = model.read_bytes()
    result = trainkit("optimize", model, "--out", tmp_path / "fast.onnx")
    assert result.exit_code == 0, result.output
    assert set(tree(tmp_path)) == {"model.onnx", "fast.onnx"}
    assert model.read_bytes() == before
    assert signature(tmp_path / "fast.onnx") == signature(model)
    operators = {node.op_type for node in ir.load(tmp_path / "fast.onnx").graph}
    assert "MultiHeadAttention" in operators
    assert "Softmax" not in operators
    tokens = np.arange(20, dtype=np.int64).reshape(2, 10)
    visible = np.ones_like(tokens)
    visible[1, :4] = 0
    for given in (visible, visible[:, ::-1].copy(), 0 * visible):
        expected = run(model, tokens, given)
        np.testing.assert_allclose(run(tmp_path / "fast.onnx", tokens, given), expected, atol=2e-5)
    for name, _ in REWRITES:
        assert name in result.stdout


def test_the_report_can_be_read_by_a_program(model, trainkit, tmp_path):
    result = trainkit("optimize", model, "--json")
    report = json.loads(result.stdout)
    assert report["target"] == str(tmp_path / "model.optimized.onnx")
    assert report["cases"] == 45  # all but those of 60 tokens, for which it has no positions
    assert len(report["skipped"]) == 15
    steps = {step["name"]: step for step in report["steps"]}
    assert steps["fuse_attention"]["rewritten"] == 2
    assert 0 <= steps["fuse_attention"]["max_abs"] < 2e-5
    assert steps["strip_metadata"]["max_abs"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"dtype": torch.int32}, {"types": torch.int32}, {"axes": False}]
)
def test_dtypes_and_fixed_axes_stay(settings, trainkit, tmp_path):
    path = export(tmp_path / "model.onnx", **settings)
    result = trainkit("optimize", path, "--out", tmp_path / "fast.onnx")
    assert result.exit_code == 0, result.output
    assert signature(tmp_path / "fast.onnx") == signature(path)
    onnx.checker.check_model(tmp_path / "fast.onnx", full_check=True)


def test_weights_beside_the_graph_are_taken_in(model, trainkit, tmp_path):
    folder = tmp_path / "beside"
    folder.mkdir()
    ir.save(ir.load(model), folder / "model.onnx", external_data="weights.bin")
    assert (
        trainkit("optimize", folder / "model.onnx", "--out", tmp_path / "fast.onnx").exit_code == 0
    )
    tokens = np.arange(8, dtype=np.int64).reshape(1, 8)
    (folder / "weights.bin").unlink()
    np.testing.assert_allclose(
        run(tmp_path / "fast.onnx", tokens, tokens * 0 + 1),
        run(model, tokens, tokens * 0 + 1),
        atol=2e-5,
    )


def test_over_the_limit_the_new_weights_lie_beside_the_new_graph(
    model, trainkit, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(graph_file, "INLINE_LIMIT_BYTES", 1000)
    result = trainkit("optimize", model, "--out", tmp_path / "fast.onnx")
    assert result.exit_code == 0, result.output
    assert set(tree(tmp_path)) == {"model.onnx", "fast.onnx", "fast.onnx.data"}
    tokens = np.arange(8, dtype=np.int64).reshape(1, 8)
    np.testing.assert_allclose(
        run(tmp_path / "fast.onnx", tokens, tokens * 0 + 1),
        run(model, tokens, tokens * 0 + 1),
        atol=2e-5,
    )


def wrong(model):
    """Perturb one weight, as a rewrite with a mistake would."""
    value = next(v for v in model.graph.initializers.values() if len(v.shape) == 2)
    weights = value.const_value.numpy().copy()
    weights[:, 0] += 0.1
    value.const_value = ir.tensor(weights, name=value.name)
    return RewriteResult(name="wrong", rewritten=1)


def broken(model):
    """Make the graph one that no runtime takes."""
    model.graph.node(-1).op_type = "Gemmm"
    return RewriteResult(name="broken", rewritten=1)


def lost_mask(model):
    """Forget the mask: right for texts without padding, and for no others."""
    graph = model.graph
    graph.inputs[1].replace_all_uses_with(graph.inputs[0])
    return RewriteResult(name="lost_mask", rewritten=1)


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", [wrong, lost_mask])
def test_a_rewrite_that_changes_answers_is_refused(
    rewrite, model, trainkit, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimize, "REWRITES", (*REWRITES, Rewrite(rewrite.__name__, rewrite)))
    before = tree(tmp_path)
    result = trainkit("optimize", model)
    assert result.exit_code == 1
    assert f"rewrite {rewrite.__name__} changed the model's answers" in result.stderr
    assert tree(tmp_path) == before


def test_nothing_is_left_behind_where_a_rewrite_breaks_the_graph(
    model, trainkit, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimize, "REWRITES", (Rewrite("broken", broken),))
    before = tree(tmp_path)
    result = trainkit("optimize", model)
    assert result.exit_code == 1
    assert "rewrite broken" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_weights_that_lie_beside_the_target_are_not_lost(
    model, trainkit, refused, tree, tmp_path, monkeypatch
):
    """With force they are replaced, but not where they are those of the model itself."""
    monkeypatch.setattr(graph_file, "INLINE_LIMIT_BYTES", 1000)
    target, weights = tmp_path / "fast.onnx", tmp_path / "fast.onnx.data"
    weights.write_text("mine")
    before = tree(tmp_path)
    refused("optimize", model, "--out", target, told=["fast.onnx.data exists", "--force"])
    assert tree(tmp_path) == before
    assert trainkit("optimize", model, "--out", target, "--force").exit_code == 0
    assert weights.stat().st_size > 1000
    moved = target.rename(tmp_path / "base.onnx")
    before = tree(tmp_path)
    told = ["fast.onnx.data holds the model's own weights"]
    refused("optimize", moved, "--out", target, "--force", told=told)
    assert tree(tmp_path) == before


def test_functions_are_taken_apart_and_that_is_proved(model, trainkit, tmp_path, monkeypatch):
    """Whatever a rewrite counts: the graph that is written is the one that was compared."""
    found = onnx.load(model)
    (tanh,) = (node for node in found.graph.node if node.op_type == "Tanh")
    opset = [onnx.helper.make_opsetid("", 17)]
    body = [onnx.helper.make_node("Tanh", ["x"], ["t"]), onnx.helper.make_node("Abs", ["t"], ["y"])]
    function = onnx.helper.make_function("mine", "AbsTanh", ["x"], ["y"], body, opset)
    tanh.domain, tanh.op_type = "mine", "AbsTanh"
    found.functions.append(function)
    found.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    onnx.save(found, model)
    report = json.loads(trainkit("optimize", model, "--json").stdout)
    steps = {step["name"]: step for step in report["steps"]}
    assert steps["fold_constants"]["max_abs"] is not None
    fast = ir.load(tmp_path / "model.optimized.onnx")
    assert not fast.functions
    assert report["nodes_after"] == len(fast.graph)

    monkeypatch.setattr(optimize, "REWRITES", (Rewrite("silent", silent),))
    result = trainkit("optimize", model, "--force")
    assert result.exit_code == 1
    assert "all rewrites together changed the model's answers" in result.stderr


def silent(model):
    """Change an answer and say that nothing was done."""
    wrong(model)
    return RewriteResult(name="silent", rewritten=0)


def test_a_file_that_exists_is_replaced_with_force_only(model, trainkit, refused, tmp_path):
    target = tmp_path / "fast.onnx"
    target.write_text("mine")
    refused("optimize", model, "--out", target, told=["exists", "--force"])
    assert trainkit("optimize", model, "--out", target, "--force").exit_code == 0
    assert len(ir.load(target).graph) > 0


def test_the_model_itself_is_never_the_target(model, refused):
    refused("optimize", model, "--out", model, "--force", told=["is the model itself", "--out"])


def test_bad_files_are_refused_in_a_sentence(refused, tmp_path):
    refused("optimize", tmp_path / "none.onnx", told=["none.onnx", "is not a file"])
    text = tmp_path / "text.onnx"
    text.write_text("Not a model at all, but a text that somebody named wrongly.\n" * 9)
    refused("optimize", text, told=["text.onnx", "ONNX"])
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    refused("optimize", empty, told=["empty.onnx", "ONNX"])
    refused("optimize", text, "--out", tmp_path / "no" / "x.onnx", told=["is not a directory"])


SMALL = {
    "no ids": (
        "float[N, 4] x",
        "float[N, 2] y",
        "y = MatMul (x, w)",
        "has no input that looks up a table",
    ),
    "states, not logits": (
        "int64[N, S] ids",
        "float[N, S, 4] y",
        "y = Gather (table, ids)",
        "expected is one output, the logits",
    ),
    "two outputs": (
        "int64[N, S] ids",
        "float[N, 4] y, float[N, S, 4] e",
        "e = Gather (table, ids)  y = ReduceMean <axes = [1], keepdims = 0> (e)",
        "expected is one output, the logits",
    ),
    "two masks": (
        "int64[N, S] ids, float[N, S] a, float[N, S] b",
        "float[N, S] y",
        "e = Gather (table, ids)  r = ReduceMean <axes = [2], keepdims = 0> (e)  c = Add (r, a)"
        "  y = Add (c, b)",
        "at most one mask",
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_what_is_no_text_classifier_is_refused(case, refused, tmp_path):
    inputs, outputs, nodes, reason = SMALL[case]
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g '
        f"({inputs}) => ({outputs}) <float[5, 4] table, float[4, 2] w> {{ {nodes} }}"
    )
    for name, shape in (("table", (5, 4)), ("w", (4, 2))):
        model.graph.initializers.pop(name, None)
        tensor = ir.tensor(np.ones(shape, np.float32), name=name)
        value = next(
            (v for node in model.graph for v in node.inputs if v is not None and v.name == name),
            None,
        )
        if value is not None:
            value.const_value = tensor
            model.graph.register_initializer(value)
    ir.save(model, tmp_path / "model.onnx")
    refused("optimize", tmp_path / "model.onnx", told=["model.onnx", reason])
