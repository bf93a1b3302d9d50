"""Weights beside the graph, over 2 GB or where asked for: same answers, and they move with it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.families import random_source
from trainkit.data.splits import load_sample
from trainkit.export import bundle_writer
from trainkit.export.graph_file import save_graph
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.export.verify import verify
from trainkit.serve import Classifier
from trainkit.serve.bundle import open_bundle
from trainkit.serve.errors import InputError

pytestmark = pytest.mark.slow

GIB = 2**30


@pytest.mark.long
def test_over_two_gigabytes_the_weights_lie_beside_the_graph(tmp_path):
    # One table of 560,000 words holds nearly all of it: the rest stays as quick as it is.
    source = random_source("bert", vocab_size=560_000, hidden_size=1024, num_attention_heads=16)
    exported = bundle_writer.write_bundle(
        bundle_writer.prepare(source), tmp_path / "bundle", ExportSettings()
    )
    sizes = {name: facts.size_bytes for name, facts in exported.manifest.files.items()}
    assert sizes["model.onnx.data"] > 2 * GIB
    assert sizes["model.onnx"] < GIB // 100
    # The parity of the final place was checked there; a second move changes nothing either.
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    assert verify(moved).passed
    onnx.checker.check_model(moved / "model.onnx", full_check=True)


QUESTIONS = [example.text for example in load_sample()[:40]]


def test_asked_for_they_lie_beside_a_small_graph_too(tiny_run, tiny_bundles, tmp_path):
    prepared = bundle_writer.prepare(open_source(str(tiny_run)))
    bundle_writer.write_bundle(prepared, tmp_path / "bundle", ExportSettings(external_data=True))
    bundle = open_bundle(tmp_path / "bundle")
    graph, weights = (facts.size_bytes for facts in bundle.model_files.values())
    assert graph + weights > open_bundle(tiny_bundles["onnx"]).model_path.stat().st_size
    assert graph < weights
    moved = bundle.folder.rename(tmp_path / "moved")
    assert verify(moved).passed
    np.testing.assert_array_equal(
        Classifier.load(moved, threads=1).logits(QUESTIONS),
        Classifier.load(tiny_bundles["onnx"], threads=1).logits(QUESTIONS),
    )
    (moved / "model.onnx.data").write_bytes(b"\0" * weights)
    with pytest.raises(InputError, match=r"model\.onnx\.data is not the file"):
        Classifier.load(moved)


def test_int8_weights_lie_beside_the_graph(tiny_run, tmp_path):
    source, out = str(tiny_run), tmp_path / "bundle"
    settings = ExportSettings(
        precision="int8", external_data=True, max_accuracy_drop=100, min_label_agreement=0
    )
    bundle_writer.write_bundle(
        bundle_writer.prepare(open_source(source), load_sample()), out, settings
    )
    assert set(open_bundle(out).model_files) == {"model.onnx", "model.onnx.data"}
    assert verify(out).passed


def test_other_formats_have_no_such_file():
    with pytest.raises(InputError, match="--external-data goes with --format onnx or triton"):
        ExportSettings(format="torchscript", external_data=True)


def test_weights_that_a_smaller_graph_does_not_need_do_not_stay(tiny_bundles, tmp_path):
    """As those of float32, over 2 GB, before it became int8."""
    graph = ir.load(open_bundle(tiny_bundles["onnx"]).model_path)
    save_graph(graph, tmp_path / "model.onnx", external_data=True)
    assert (tmp_path / "model.onnx.data").exists()
    save_graph(ir.load(tmp_path / "model.onnx"), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
