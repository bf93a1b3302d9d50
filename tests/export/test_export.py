"""Exports of small models, and sabotaged ones: the broken are refused, and leave nothing."""

import copy

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from trainkit.data.splits import load_sample
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.export import bundle_writer, graph_file, onnx_graph, parity, parity_cases, pipeline
from trainkit.export.example import example_inputs, input_names
from trainkit.export.rewrite.base import RewriteResult
from trainkit.export.rewrite.strip import strip_metadata
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.export.torch_sessions import torch_runner
from trainkit.export.torchscript import export_torchscript
from trainkit.models import classifier
from trainkit.models.backbone_classifier import BackboneClassifier
from trainkit.models.config import BackboneConfig, ModelConfig
from trainkit.serve.bundle import open_bundle
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.onnx_session import onnx_runner

pytestmark = pytest.mark.slow

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
        made = classifier.from_scratch(kind, LABELS, word_encoder, prefix_length=4).model
    else:
        settings = tiny(family, word_encoder.tokenizer.get_vocab_size())
        settings.initializer_range = 0.2
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
        made = BackboneClassifier(transformers.AutoModel.from_config(settings), config)
    torch.nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


def to_onnx(model, encoder, path):
    graph = onnx_graph.export_graph(model, example_inputs(encoder), input_names(encoder))
    strip_metadata(graph)
    graph_file.save_graph(graph, path)
    return graph_file.operators(graph)


def cases_of(model, encoder, splits):
    texts = [example.text for example in splits.test[:16]]
    return parity_cases.run_reference(
        classifier.torch_runner(model), parity_cases.make_cases(encoder, texts)
    )


def models(*families):
    """Return a parameter for each kind of model; fine-tuned ones of other families are `cross`."""
    return [
        *[("simple", None, 0), ("prefix", None, 0), ("prefix", "bert", 3)],
        *(
            pytest.param(
                *("finetune", family, 0), marks=[] if family in families else pytest.mark.cross
            )
            for family in FAMILIES
        ),
    ]


@pytest.mark.parametrize(("kind", "family", "prefix"), models("bert", "electra", "mpnet"))
def test_onnx_computes_the_same_on_the_whole_matrix(
    kind, family, prefix, word_encoder, splits, tmp_path
):
    model = make(kind, word_encoder, family, prefix)
    operators = to_onnx(model, word_encoder, tmp_path / "model.onnx")
    without = kind == "simple" or family == "mpnet"  # none, or one of its own
    assert operators.get("Attention", 0) == (0 if without else 2)
    report = parity.compare(
        cases_of(model, word_encoder, splits), onnx_runner(tmp_path / "model.onnx", threads=1)
    )
    assert report.passed, report
    graph = onnx.load(tmp_path / "model.onnx")
    assert [opset.version for opset in graph.opset_import if not opset.domain] == [23]
    for tensor in graph.graph.input:
        axes = [axis.dim_param for axis in tensor.type.tensor_type.shape.dim]
        assert axes == ["batch", "sequence"]
    assert [tensor.name for tensor in graph.graph.output] == ["logits"]


@pytest.mark.parametrize(("kind", "family", "prefix"), models("roberta", "distilbert"))
def test_torchscript_computes_the_same_on_the_whole_matrix(
    kind, family, prefix, word_encoder, splits, tmp_path
):
    model = make(kind, word_encoder, family, prefix)
    export_torchscript(model, example_inputs(word_encoder), tmp_path / "model.pt")
    run = torch_runner(tmp_path / "model.pt", "torchscript")
    report = parity.compare(cases_of(model, word_encoder, splits), run)
    assert report.passed, report


def test_the_graph_keeps_nothing_of_the_machine(word_encoder, tmp_path):
    to_onnx(make("simple", word_encoder), word_encoder, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def good(splits, tmp_path_factory):
    """Export one good model: its file, and its cases."""
    encoder = TextEncoder(word_tokenizer([example.text for example in splits.train]), 32, PAD_ID)
    model = make("finetune", encoder, "bert")
    path = tmp_path_factory.mktemp("good") / "model.onnx"
    to_onnx(model, encoder, path)
    return path, cases_of(model, encoder, splits)


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
    to_onnx(bare, word_encoder, tmp_path / "model.onnx")
    run = onnx_runner(tmp_path / "model.onnx", threads=1)
    assert not parity.compare(cases_of(model, word_encoder, splits), run).passed


def test_a_trace_with_a_baked_in_mask_is_refused(word_encoder, splits, tmp_path, monkeypatch):
    """A mask that the tracer sees as a constant goes unnoticed on the example itself."""
    model = make("simple", word_encoder)
    forward = model.forward
    model.forward = lambda ids, mask: forward(ids, torch.ones(ids.shape, dtype=torch.int64))
    export_torchscript(model, example_inputs(word_encoder), tmp_path / "model.pt")
    model.forward = forward
    run = torch_runner(tmp_path / "model.pt", "torchscript")
    assert not parity.compare(cases_of(model, word_encoder, splits), run).passed


@pytest.fixture(scope="module")
def prepared(run_folder):
    return bundle_writer.prepare(open_source(str(run_folder)))


TORCHSCRIPT = ExportSettings(format="torchscript")


def test_int8_settings_are_judged_by_what_they_compute_themselves(tiny_run, tmp_path):
    """And not by the model that they come from, whose labels are all right."""
    prepared = bundle_writer.prepare(open_source(str(tiny_run)), load_sample())
    settings = ExportSettings(precision="int8", max_accuracy_drop=100, min_label_agreement=0)
    told = []
    made = bundle_writer.write_bundle(
        prepared, tmp_path / "int8", settings, on_progress=told.append
    )
    manifest = made.manifest
    chosen = manifest.search["chosen"]
    assert chosen["max_abs"] == pytest.approx(manifest.accuracy["max_abs"], rel=1e-3)
    assert chosen["max_abs"] > 1e-4
    # Its noise is one figure of the whole matrix, in its final place too.
    assert len(told[told.index("verify in its final place") + 1 :]) == len(prepared.cases)


def test_a_refused_export_leaves_nothing_and_loses_nothing(prepared, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    kept = bundle_writer.write_bundle(prepared, target, ExportSettings())
    right = pipeline.export_graph

    def broken(model, *how):
        broken_model = copy.deepcopy(model)
        with torch.no_grad():
            broken_model.head.weight[0, 0] += 0.01
        return right(broken_model, *how)

    monkeypatch.setattr(pipeline, "export_graph", broken)
    for out in (target, tmp_path / "other"):
        with pytest.raises(parity.ParityError, match="failed after export") as refused:
            bundle_writer.write_bundle(prepared, out, ExportSettings(), force=True)
        assert refused.value.exit_code == 1
        assert refused.value.report.worst
        row = refused.value.report.worst_row
        assert len(row.inputs["input_ids"]) == len(row.inputs["attention_mask"])
        assert row.expected != row.found
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(target).manifest == kept.manifest


def test_a_graph_of_which_nothing_can_be_fp16_is_refused(prepared, tmp_path, monkeypatch):
    nothing = RewriteResult(name="fp16", rewritten=0, declined=("a node has a graph inside",))
    monkeypatch.setattr(pipeline, "to_fp16", lambda graph, keep: nothing)
    with pytest.raises(InputError, match=r"can be fp16 \(a node has a graph inside\); export fp32"):
        bundle_writer.write_bundle(prepared, tmp_path / "bundle", ExportSettings(precision="fp16"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_or_judged_is_refused_before_any_work(
    prepared, tmp_path, monkeypatch
):
    """Also where another target of the same command could be made."""

    def prepare(*_):
        raise AssertionError("it was computed")

    monkeypatch.setattr(bundle_writer, "prepare", prepare)
    source, fine = (
        prepared.source,
        bundle_writer.ExportTarget(tmp_path / "onnx", ExportSettings(), False, ""),
    )
    taken = bundle_writer.ExportTarget(tmp_path, ExportSettings(), True, "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    wrong = taken._replace(name="my model")
    int8 = fine._replace(out=tmp_path / "int8", settings=ExportSettings(precision="int8"))
    regression = source._replace(problem_type="regression")
    for last, of, data, told in (
        (taken, source, (), "exists"),
        (wrong, source, (), "cannot be a model's name"),
        (int8, source, (), "needs labelled texts"),
        (int8, regression, load_sample(), "a regression has none"),
    ):
        with pytest.raises(InputError, match=told):
            bundle_writer.export_all(of, [fine, last], data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_breaks_in_its_final_place_is_taken_back(prepared, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    kept = bundle_writer.write_bundle(prepared, target, TORCHSCRIPT)
    right = bundle_writer.runner

    def wrong_there(made):
        run = right(made)
        return (lambda batch: run(batch) + 1) if made.folder == target else run

    monkeypatch.setattr(bundle_writer, "runner", wrong_there)
    with pytest.raises(parity.ParityError, match="after the move to its final place"):
        bundle_writer.write_bundle(prepared, target, TORCHSCRIPT, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(target).manifest == kept.manifest


def test_a_broken_rewrite_is_refused_by_its_name(prepared, tmp_path, monkeypatch):
    def damage(graph):
        weight = next(v for v in graph.graph.initializers.values() if v.const_value.shape == [6])
        weight.const_value = ir.tensor(weight.const_value.numpy() + 0.01, name=weight.name)
        return RewriteResult(name="damage", rewritten=1)

    monkeypatch.setattr(pipeline, "REWRITES", (*pipeline.REWRITES, ("damage", damage)))
    with pytest.raises(parity.ParityError, match="failed after damage"):
        bundle_writer.write_bundle(prepared, tmp_path / "bundle", ExportSettings())
    assert list(tmp_path.iterdir()) == []


def test_labels_on_the_users_data_must_survive(run_folder, splits, tmp_path, monkeypatch):
    prepared = bundle_writer.prepare(open_source(str(run_folder)), splits.test)
    exported = bundle_writer.write_bundle(prepared, tmp_path / "good", TORCHSCRIPT)
    assert exported.accuracy.count == len(splits.test)
    assert exported.accuracy.agreement == 1
    assert exported.manifest.accuracy["accuracy"] == exported.accuracy.source_accuracy
    # The matrix alone would pass here: only the user's own texts show the difference.
    monkeypatch.setattr(bundle_writer.parity, "compare", lambda *_: exported.parity)
    right = bundle_writer.runner
    monkeypatch.setattr(
        bundle_writer, "runner", lambda bundle: lambda batch: right(bundle)(batch)[:, ::-1].copy()
    )
    with pytest.raises(CheckFailedError, match=r"on your data, .* of labels agree, under 100%"):
        bundle_writer.write_bundle(prepared, tmp_path / "bad", TORCHSCRIPT)
    assert not (tmp_path / "bad").exists()


def test_a_wrong_tokenizer_is_refused(prepared, tmp_path, monkeypatch):
    write = bundle_writer._write_tokenizer

    def cased(stage, encoder):
        write(stage, encoder)
        path = stage / "tokenizer.json"
        path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))

    monkeypatch.setattr(bundle_writer, "_write_tokenizer", cased)
    with pytest.raises(CheckFailedError, match="gives other token ids"):
        bundle_writer.write_bundle(prepared, tmp_path / "bundle", TORCHSCRIPT)
    assert list(tmp_path.iterdir()) == []


def test_a_swapped_label_map_is_refused(prepared, tmp_path, monkeypatch):
    write = bundle_writer._manifest

    def swapped(*how):
        manifest = write(*how)
        return msgspec.structs.replace(manifest, labels=manifest.labels[::-1])

    monkeypatch.setattr(bundle_writer, "_manifest", swapped)
    with pytest.raises(CheckFailedError, match="its label map was changed"):
        bundle_writer.write_bundle(prepared, tmp_path / "bundle", TORCHSCRIPT)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_depends_on_its_neighbours_is_refused(prepared, tmp_path, monkeypatch):
    right = bundle_writer.runner

    def mixes(made):
        run = right(made)
        # Right on every single case of the matrix that the reference saw, and on no other batch.
        known = {case.batch.input_ids.tobytes() for case in prepared.cases}

        def mixed(batch):
            logits = run(batch)
            return logits if batch.input_ids.tobytes() in known else logits + len(logits)

        return mixed

    monkeypatch.setattr(bundle_writer, "runner", mixes)
    with pytest.raises(CheckFailedError, match="change with other neighbours"):
        bundle_writer.write_bundle(prepared, tmp_path / "bundle", TORCHSCRIPT)


def test_the_manifest_tells_every_stage(prepared, tmp_path):
    manifest = bundle_writer.write_bundle(
        prepared, tmp_path / "bundle", ExportSettings(opset=19)
    ).manifest
    first = manifest.stages[0]
    assert first["name"] == "export"
    assert first["parity"]["cases"] == len(prepared.cases)
    assert all(stage["parity"] or stage["declined"] for stage in manifest.stages)
    assert {check["name"] for check in manifest.independence} == {
        "neighbours",
        "order",
        "padding on the right",
        "padding on the left",
    }
    assert manifest.parity["worst_row"]["inputs"]["input_ids"]
    graph = onnx.load(tmp_path / "bundle" / "model.onnx")
    assert [opset.version for opset in graph.opset_import if not opset.domain] == [19]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"opset": 17}, r"opset must be in \[18, 23\], not 17"),
        ({"format": "pt2", "precision": "int8"}, "--precision int8 goes with --format onnx"),
        ({"max_accuracy_drop": -1}, "max_accuracy_drop must be at least 0, not -1"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(InputError, match=said):
        ExportSettings(**settings)
