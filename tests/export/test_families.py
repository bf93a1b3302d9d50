"""Every family, every format, every mask, against Hugging Face's own forward.

Each export goes the whole way: traced, compared, rewritten and compared again, written as a bundle
and compared from there. What is asserted here beside the checks' own refusal is what they cannot
know: that packing and every rewrite still fire.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from tests.families import FAMILIES, random_classifier, random_source
from trainkit.export import batch_invariance, bundle_writer, parity
from trainkit.export.settings import ExportSettings
from trainkit.models.classifier import torch_runner
from trainkit.models.hub_classifier import Forward
from trainkit.serve import Classifier

pytestmark = pytest.mark.slow

PACKED = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mobilebert"}
TOKEN_TYPES = PACKED - {"distilbert"} | {"albert", "fnet"}
# Rotary positions are relative, so it does not matter where a decoder's text begins.
FREE_OF_ITS_PLACE = {"qwen2", "llama", "gemma3_text"}


@pytest.fixture(scope="module")
def prepared():
    """Return a function from a family to its prepared source, made once each."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = bundle_writer.prepare(random_source(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_hugging_faces_own_forward(family, prepared):
    source, cases = prepared(family).source, prepared(family).cases
    untouched = random_classifier(family, source.encoder.tokenizer.get_vocab_size())
    assert parity.compare(cases, torch_runner(Forward(untouched))).max_abs == 0
    assert (source.facts["padded_because"] is None) == (family in PACKED)
    assert source.encoder.token_types == (family in TOKEN_TYPES)


FORMATS = {
    "onnx-23": ExportSettings(opset=23),
    "onnx-18": ExportSettings(opset=18),
    "torchscript": ExportSettings(format="torchscript"),
    "pt2": ExportSettings(format="pt2"),
}
# Each family in one format, each format with three families, and BERT in every one; `cross` has
# the rest.
CELLS = [
    pytest.param(
        family,
        format,
        marks=[] if family == "bert" or which % len(FORMATS) == place else pytest.mark.cross,
    )
    for which, family in enumerate(FAMILIES)
    for place, format in enumerate(FORMATS)
]


@pytest.mark.parametrize(("family", "format"), CELLS)
def test_an_export_passes_every_check(family, format, prepared, tmp_path):
    exported = bundle_writer.write_bundle(prepared(family), tmp_path / "bundle", FORMATS[format])
    assert exported.parity.passed
    assert exported.parity.label_agreement == 1
    free = {check.name: check.applies for check in _checks(exported)}
    assert free[batch_invariance.LEFT] == (family in FREE_OF_ITS_PLACE)
    assert free[batch_invariance.RIGHT] == (family != "fnet")
    assert free["order"]
    assert any("deprecated" in note for note in exported.manifest.notes) == (
        format == "torchscript"
    )
    if format.startswith("onnx"):
        check_graph(tmp_path / "bundle" / "model.onnx", family, FORMATS[format].opset)


def check_graph(path, family, opset):
    """Compare opset, inputs and outputs with what the bundle's format promises."""
    graph = onnx.load(path)
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [opset]
    names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = graph.graph.input
    assert [tensor.name for tensor in inputs] == names[: 3 if family in TOKEN_TYPES else 2]
    for tensor in inputs:
        axes = [axis.dim_param for axis in tensor.type.tensor_type.shape.dim]
        assert axes == ["batch", "sequence"]
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.INT64
    (output,) = graph.graph.output
    assert output.name == "logits"
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def _checks(exported):
    return [batch_invariance.InvarianceCheck(**check) for check in exported.manifest.independence]


@pytest.mark.parametrize("family", ["bert", pytest.param("qwen2", marks=pytest.mark.cross)])
def test_machine_code(family, prepared, tmp_path):
    exported = bundle_writer.write_bundle(
        prepared(family), tmp_path / "bundle", ExportSettings(format="aoti")
    )
    assert exported.parity.passed
    assert exported.manifest.machine["torch"] == str(torch.__version__)
    archive = (tmp_path / "bundle" / "model.aoti.pt2").read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in archive
    assert cache_dir().encode() not in archive


@pytest.fixture(scope="module")
def fnet(prepared, tmp_path_factory):
    """FNet mixes all positions and has no mask: a longer neighbour changes the answer."""
    folder = tmp_path_factory.mktemp("fnet") / "bundle"
    return bundle_writer.write_bundle(prepared("fnet"), folder, ExportSettings())


def test_a_model_that_reads_its_padding_says_so(fnet, prepared):
    assert [check.applies for check in _checks(fnet)] == [False, True, False, False]
    assert any("other answers when a text is padded" in note for note in fnet.manifest.notes)
    assert prepared("bert").source.equal_lengths is False


def test_and_its_texts_are_never_padded(fnet, prepared, splits):
    classify = Classifier.load(fnet.folder)
    texts = [example.text for example in splits.test[:40]]
    rows = classify.encoder.tokens(texts)
    alone = [prepared("fnet").source.reference(classify.encoder.pad([row])) for row in rows]
    assert np.allclose(classify.logits(texts), np.concatenate(alone), atol=1e-4)
    classify.equal_lengths = False
    assert not np.allclose(classify.logits(texts), np.concatenate(alone), atol=1e-2)


@pytest.mark.parametrize(
    ("problem_type", "labels"), [("multi_label_classification", 4), ("regression", 1)]
)
def test_other_problems(problem_type, labels, tmp_path):
    source = random_source("bert", problem_type=problem_type, num_labels=labels)
    assert source.problem_type == problem_type
    bundle_writer.write_bundle(bundle_writer.prepare(source), tmp_path / "bundle", ExportSettings())
    classify = Classifier.load(tmp_path / "bundle")
    texts = ["How far is Mars?", ("Who wrote the Odyssey?", "Homer did.")]
    logits = source.classifier().logits(texts)
    expected = torch.from_numpy(logits)
    if problem_type == "multi_label_classification":
        expected = expected.sigmoid()
    assert np.allclose(classify.predict_proba(texts), expected, atol=1e-5)
    assert classify(texts)[1].label == source.labels[int(logits[1].argmax())]
