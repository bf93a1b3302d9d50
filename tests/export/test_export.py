"""Exports of small models, and sabotaged ones: the broken are refused, and leave nothing."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.export import export as exporter
from trainkit.export import onnx_graph, parity, torchscript
from trainkit.export.torchscript_session import torchscript_runner
from trainkit.models import classifier
from trainkit.models.backbone import BackboneEncoder
from trainkit.models.config import BackboneConfig, ModelConfig
from trainkit.serve.bundle import open_bundle
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.onnx_session import onnx_runner

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
FAMILIES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "electra": transformers.ElectraConfig,
    "distilbert": transformers.DistilBertConfig,
    "mpnet": transformers.MPNetConfig,  # its own attention: exported padded
}


def tiny(family, vocabulary):
    if family == "distilbert":
        return FAMILIES[family](vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    return FAMILIES[family](
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
    )


def make(kind, word_encoder, family=None, prefix_length=0):
    """Make a model with large random weights: small ones would hide faults."""
    torch.manual_seed(11)
    if family is None:
        made = classifier.new(kind, LABELS, vocabulary=word_encoder, prefix_length=4).model
    else:
        settings = tiny(family, word_encoder.tokenizer.get_vocab_size())
        settings.initializer_range = 0.2
        encoder = BackboneEncoder(transformers.AutoModel.from_config(settings), prefix_length)
        config = ModelConfig(
            kind=kind,
            labels=LABELS,
            max_length=word_encoder.max_length,
            pad_id=word_encoder.pad_id,
            prefix_length=prefix_length,
            backbone=BackboneConfig(
                name=family, architecture=settings.to_diff_dict(), fingerprint="random"
            ),
        )
        made = classifier.TextClassifier(encoder, config)
    torch.nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


def matrix(model, encoder, splits):
    texts = [example.text for example in splits.test[:16]]
    return parity.reference_cases(classifier.torch_runner(model), parity.make_cases(encoder, texts))


MODELS = [("simple", None, 0), ("prefix", None, 0), ("prefix", "bert", 3)] + [
    ("finetune", family, 0) for family in FAMILIES
]


@pytest.mark.parametrize(("kind", "family", "prefix"), MODELS)
def test_onnx_computes_the_same_on_the_whole_matrix(
    kind, family, prefix, word_encoder, splits, tmp_path
):
    model = make(kind, word_encoder, family, prefix)
    operators = onnx_graph.export_onnx(model, tmp_path / "model.onnx")
    assert operators.get("Attention", 0) == (0 if family == "mpnet" else 2)
    report = parity.compare(
        matrix(model, word_encoder, splits), onnx_runner(tmp_path / "model.onnx", threads=1)
    )
    assert report.passed, report
    graph = onnx.load(tmp_path / "model.onnx")
    assert [opset.version for opset in graph.opset_import if not opset.domain] == [23]
    for tensor in graph.graph.input:
        axes = [axis.dim_param for axis in tensor.type.tensor_type.shape.dim]
        assert axes == ["batch", "sequence"]
    assert [tensor.name for tensor in graph.graph.output] == ["logits"]


@pytest.mark.parametrize(("kind", "family", "prefix"), MODELS)
def test_torchscript_computes_the_same_on_the_whole_matrix(
    kind, family, prefix, word_encoder, splits, tmp_path
):
    model = make(kind, word_encoder, family, prefix)
    torchscript.export_torchscript(model, tmp_path / "model.pt")
    run = torchscript_runner(tmp_path / "model.pt")
    report = parity.compare(matrix(model, word_encoder, splits), run)
    assert report.passed, report


def test_the_graph_keeps_nothing_of_the_machine(word_encoder, tmp_path):
    onnx_graph.export_onnx(make("simple", word_encoder), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def good(splits, tmp_path_factory):
    """Export one good model: its file, and its matrix."""
    encoder = TextEncoder(word_tokenizer([example.text for example in splits.train]), 32, PAD_ID)
    model = make("finetune", encoder, "bert")
    path = tmp_path_factory.mktemp("good") / "model.onnx"
    onnx_graph.export_onnx(model, path)
    return path, matrix(model, encoder, splits)


def perturb_one_weight(graph):
    weight = next(
        value
        for value in graph.graph.initializers.values()
        if value.const_value.shape.numpy() == (32, 64)
    )
    array = weight.const_value.numpy().copy()
    array[5, 7] += 0.1
    weight.const_value = ir.tensor(array, name=weight.name)


def drop_the_mask_of_one_layer(graph):
    attention = next(node for node in graph.graph if node.op_type == "Attention")
    attention.replace_input_with(3, None)


def swap_two_labels(graph):
    head = next(node for node in graph.graph if "logits" in [out.name for out in node.outputs])
    weight = head.inputs[1]
    array = weight.const_value.numpy()[[1, 0, 2, 3, 4, 5]]
    weight.const_value = ir.tensor(array, name=weight.name)


def make_one_weight_nan(graph):
    weight = next(v for v in graph.graph.initializers.values() if v.const_value.shape == [6])
    array = np.full(6, np.nan, np.float32)
    weight.const_value = ir.tensor(array, name=weight.name)


@pytest.mark.parametrize(
    "change", [perturb_one_weight, drop_the_mask_of_one_layer, swap_two_labels, make_one_weight_nan]
)
def test_a_sabotaged_graph_is_refused(change, good, tmp_path):
    path, cases = good
    graph = ir.load(path)
    change(graph)
    ir.save(graph, tmp_path / "model.onnx")
    report = parity.compare(cases, onnx_runner(tmp_path / "model.onnx", threads=1))
    assert report.failed > 0
    assert not any("Error" in result.reason for result in report.worst)  # it ran, and was wrong


def test_an_export_without_its_prefix_is_refused(word_encoder, splits, tmp_path):
    model = make("prefix", word_encoder, "bert", 3)
    bare = copy.deepcopy(model)
    for module in bare.modules():
        if hasattr(module, "prefix"):
            module.prefix = None
    onnx_graph.export_onnx(bare, tmp_path / "model.onnx")
    run = onnx_runner(tmp_path / "model.onnx", threads=1)
    assert not parity.compare(matrix(model, word_encoder, splits), run).passed


def test_a_trace_with_a_baked_in_mask_is_refused(word_encoder, splits, tmp_path, monkeypatch):
    """A mask that the tracer sees as a constant goes unnoticed on the example itself."""
    model = make("simple", word_encoder)
    forward = model.forward
    model.forward = lambda ids, mask: forward(ids, torch.ones(ids.shape, dtype=torch.int64))
    torchscript.export_torchscript(model, tmp_path / "model.pt")
    model.forward = forward
    run = torchscript_runner(tmp_path / "model.pt")
    assert not parity.compare(matrix(model, word_encoder, splits), run).passed


def test_a_refused_export_leaves_nothing_and_loses_nothing(run_folder, tmp_path, monkeypatch):
    source = exporter.prepare(run_folder)
    target = tmp_path / "bundle"
    kept = exporter.export(source, target, "onnx")
    right = onnx_graph.export_onnx

    def broken(model, path):
        broken_model = copy.deepcopy(model)
        with torch.no_grad():
            broken_model.head.weight[0, 0] += 0.01
        return right(broken_model, path)

    monkeypatch.setattr(exporter, "export_onnx", broken)
    for out in (target, tmp_path / "other"):
        with pytest.raises(parity.ParityError) as refused:
            exporter.export(source, out, "onnx", force=True)
        assert refused.value.exit_code == 1
        assert refused.value.report.worst
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(target).manifest == kept.manifest


def test_labels_on_the_users_data_must_survive(run_folder, splits, tmp_path, monkeypatch):
    source = exporter.prepare(run_folder)
    exported = exporter.export(source, tmp_path / "good", "torchscript", data=splits.test)
    assert exported.accuracy.count == len(splits.test)
    assert exported.manifest.accuracy["accuracy"] == exported.accuracy.accuracy
    # The matrix alone would pass here: only the user's own texts show the difference.
    monkeypatch.setattr(exporter.parity, "compare", lambda cases, run, told: exported.parity)
    right = exporter.runner
    monkeypatch.setattr(
        exporter, "runner", lambda bundle: lambda batch: right(bundle)(batch)[:, ::-1].copy()
    )
    with pytest.raises(CheckFailedError, match="labels on your data changed"):
        exporter.export(source, tmp_path / "bad", "torchscript", data=splits.test)
    assert not (tmp_path / "bad").exists()


def test_a_wrong_tokenizer_is_refused(run_folder, tmp_path, monkeypatch):
    source = exporter.prepare(run_folder)
    write = exporter._write_tokenizer

    def cased(stage, encoder):
        write(stage, encoder)
        path = stage / "tokenizer.json"
        path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))

    monkeypatch.setattr(exporter, "_write_tokenizer", cased)
    with pytest.raises(CheckFailedError, match="gives other token ids"):
        exporter.export(source, tmp_path / "bundle", "torchscript")
    assert list(tmp_path.iterdir()) == []
