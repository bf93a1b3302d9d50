"""Variants of what is shipped: each is what it says, and computes the same."""

import shutil

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from tests.bench.engine_process import save_classifier
from trainkit.bench import result
from trainkit.bench.engines.base import EngineUnavailableError
from trainkit.bench.engines.registry import Spec
from trainkit.bench.race import runner
from trainkit.bench.report.tables import markdown
from trainkit.bench.result import BenchmarkSettings
from trainkit.bench.studies import ablation
from trainkit.bench.studies.ablation_worker import (
    AHEAD,
    BATCHINGS,
    SESSIONS,
    SHIPPED,
    open_variant,
)
from trainkit.data.splits import Splits, load_sample
from trainkit.export.bundle_writer import prepare, write_bundle
from trainkit.export.graph_file import operators
from trainkit.export.rewrite.table import REWRITES
from trainkit.export.settings import ExportSettings
from trainkit.export.source import open_source
from trainkit.serve.bundle import open_bundle, write_manifest
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.forward_pool import CPU_TOKENS
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec

EXAMPLES = load_sample()[:60]
QUICK = BenchmarkSettings(batch_sizes=(60,), threads=(2,), min_seconds=0.0, min_rounds=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def made(home):
    """Return the variants of a small BERT by name, and the reasons of those that it cannot have."""
    texts = [example.text for example in EXAMPLES]
    source = open_source(str(save_classifier(home / "bert", texts)))
    shipped = write_bundle(prepare(source), home / "shipped", ExportSettings()).folder
    specs, absent = ablation.variants(source, shipped, home)
    return {spec.runtime: spec for spec in specs}, absent


@pytest.fixture(scope="module")
def batch(made):
    found = open_bundle(made[0][SHIPPED].source).encoder().encode([one.text for one in EXAMPLES])
    assert found.input_ids.size > CPU_TOKENS  # else no batch is ever in parts
    return found


def stages(spec):
    return [stage["name"] for stage in open_bundle(spec.source).manifest.stages]


def graph(spec):
    return ir.load(open_bundle(spec.source).model_path)


def raced(specs, absent=None):
    return runner.run(specs, EXAMPLES, QUICK, worker=ablation.worker(absent or {}))


def test_every_rewrite_of_the_exporter_has_its_variant(made):
    specs, absent = made
    names = [name for name, _ in REWRITES]
    assert ablation.GRAPHS["no rewrites"] == tuple(names)
    assert stages(specs["no rewrites"]) == []
    for name in names:
        variant = f"without {name}"
        others = [one for one in names if one != name]
        assert variant in absent or stages(specs[variant]) == others
    assert set(specs) == {SHIPPED, *ablation.GRAPHS, *SESSIONS, *BATCHINGS}


def test_a_rewrite_that_does_nothing_to_a_model_is_absent_with_its_reason(made, splits, tmp_path):
    _, absent = made
    same = "the graph is the same with it: "
    assert absent == {"without fold_constants": f"{same}nothing is left to fold"}
    # A model that averages all tokens: no layer can be narrowed.
    few = Splits(splits.train[:60], splits.valid[:20], splits.test[:20])
    choice = ModelSpec(kind="prefix", prefix_length=2)
    run = train(choice, few, TrainConfig(epochs=1), tmp_path / "run").folder
    source = open_source(str(run))
    shipped = write_bundle(prepare(source), tmp_path / "shipped", ExportSettings()).folder
    specs, absent = ablation.variants(source, shipped, tmp_path)
    assert absent["without narrow_last_layer"].startswith(f"{same}the head does not take one token")
    assert "without fuse_attention" not in absent
    assert {*absent} <= {spec.runtime for spec in specs}


def test_the_graph_with_nothing_left_out_is_the_shipped_one(made, home):
    specs, _ = made
    shipped = operators(graph(specs[SHIPPED]))
    assert operators(graph(Spec("complete", home / "complete"))) == shipped
    for name in ("fuse_attention", "flatten_tokens"):
        assert operators(graph(specs[f"without {name}"])) != shipped, name


def test_every_variant_computes_what_is_shipped(made, batch):
    specs, absent = made
    shipped = open_variant(*specs[SHIPPED], threads=2).run(batch)
    for name, spec in specs.items():
        if name not in absent:
            engine = open_variant(*spec, threads=2)
            assert engine.name == name
            np.testing.assert_allclose(engine.run(batch), shipped, atol=1e-5, err_msg=name)


def test_what_is_optimised_ahead_has_a_file_of_its_own(made):
    specs, _ = made
    shipped = open_bundle(specs[SHIPPED].source).model_path
    for name in AHEAD:
        assert name in SESSIONS
        saved = open_bundle(specs[name].source).model_path
        assert saved.read_bytes() != shipped.read_bytes()
    saved = open_bundle(specs["optimised ahead, .ort"].source).model_path
    assert saved.read_bytes()[4:8] == b"ORTM"  # how the format begins


def test_a_variant_that_a_bundle_cannot_have_says_why(made, copied):
    specs, _ = made
    with pytest.raises(EngineUnavailableError, match="with one thread"):
        open_variant(*specs["a worker a core"], threads=1)
    folder = copied("onnx")
    manifest = open_bundle(folder).manifest
    write_manifest(folder, msgspec.structs.replace(manifest, equal_lengths=True))
    for name in BATCHINGS:
        with pytest.raises(EngineUnavailableError, match="reads its padding"):
            open_variant(name, folder, 2)


def test_a_race_has_ratios_and_lists_what_is_absent(made):
    specs, _ = made
    names = [SHIPPED, "no rewrites", "without flatten_tokens", "a worker a core"]
    measured = raced([specs[name] for name in names], {"without flatten_tokens": "no such product"})
    result.check(measured)
    (workload,) = measured.workloads
    engines = [engine.name for engine in measured.engines]
    assert engines == [SHIPPED, "no rewrites", "a worker a core"]
    assert [one.ratio is None for one in workload.measurements] == [True, False, False]
    assert [one.runtime for one in measured.unavailable] == ["without flatten_tokens"]
    assert "Not measured: without flatten_tokens: no such product" in markdown(measured)


def test_a_variant_with_other_outputs_is_marked_wrong_and_fails_the_check(made, tmp_path):
    specs, _ = made
    broken = Spec("without flatten_tokens", tmp_path / "broken")
    shutil.copytree(specs["without flatten_tokens"].source, broken.source)
    bundle = open_bundle(broken.source)
    model = onnx.load(bundle.model_path)
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, bundle.model_path)
    write_manifest(broken.source, bundle.manifest)
    measured = raced([specs[SHIPPED], broken])
    assert [one.wrong for one in measured.workloads[0].measurements] == [False, True]
    with pytest.raises(CheckFailedError, match="without flatten_tokens"):
        result.check(measured)


def test_the_program_writes_its_result(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "GRAPHS", {"no rewrites": ablation.GRAPHS["no rewrites"]})
    monkeypatch.setattr(ablation, "SESSIONS", {})
    monkeypatch.setattr(ablation, "BATCHINGS", {})
    rows = [msgspec.json.encode({"text": one.text, "label": one.label}) for one in EXAMPLES]
    data = tmp_path / "questions"
    data.mkdir()
    for name in ("train", "valid", "test"):
        (data / f"{name}.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    arguments = [str(tiny_run), "--data", str(data), "--texts", "4", "--batch-size", "4"]
    arguments += ["--min-rounds", "1", "--min-seconds", "0"]
    arguments += [
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "ablation-questions.json"),
    ]
    done = CliRunner().invoke(ablation.STUDY.command, arguments)
    assert done.exit_code == 0, done.output
    measured = result.load(tmp_path / "ablation-questions.json")
    assert [engine.name for engine in measured.engines] == [SHIPPED, "no rewrites"]
    assert (measured.data, measured.workloads[0].texts) == ("questions", 4)
