"""A model over 2 GB: its weights lie beside the graph, and move with it."""

import onnx
import pytest

from trainkit.bench.families import random_source
from trainkit.export import export as exporter
from trainkit.export.model_file import Settings
from trainkit.export.verify import verify

GIB = 2**30


@pytest.mark.slow
def test_over_two_gigabytes_the_weights_lie_beside_the_graph(tmp_path):
    # One table of 560,000 words holds nearly all of it: the rest stays as quick as it is.
    source = random_source("bert", vocab_size=560_000, hidden_size=1024, num_attention_heads=16)
    exported = exporter.export(exporter.prepare(source), tmp_path / "bundle", Settings())
    sizes = {name: facts.size_bytes for name, facts in exported.manifest.files.items()}
    assert sizes["model.onnx.data"] > 2 * GIB
    assert sizes["model.onnx"] < GIB // 100
    # The parity of the final place was checked there; a second move changes nothing either.
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    assert verify(moved).passed
    onnx.checker.check_model(moved / "model.onnx", full_check=True)
