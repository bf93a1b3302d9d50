"""Recommendations from results whose best engine is known."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from tests.bench import results
from trainkit.bench.report.recommend import Recommendation, Wanted, check, recommend, text, write
from trainkit.bench.result import Result, save
from trainkit.cli import cli
from trainkit.serve import Classifier
from trainkit.serve.bundle import MANIFEST, Serving, open_bundle
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.files import file_info

SIZES = [results.Work("offline", size) for size in (1, 8, 64)]
# Batches take 0.6, 2.1 and 14.2 ms in int8, 1.0, 4.3 and 31.2 ms in float32.
MADE = results.result(works=SIZES)


def chosen(result: Result, **wanted: Any) -> Recommendation:
    found = recommend(result, Wanted(**wanted))
    check(found)
    assert found.choice is not None
    return found


def test_throughput_takes_the_fastest_and_never_a_wrong_engine() -> None:
    found = chosen(MADE)
    assert found.choice is not None
    assert (found.choice.name, found.choice.batch_size) == ("ONNX Runtime int8", 64)
    assert (found.choice.threads, found.choice.precision) == (2, "int8")
    assert found.runner_up is not None
    assert (found.runner_up.choice.name, found.runner_up.choice.batch_size) == ("ONNX Runtime", 64)
    true_ratio = (0.5 + 0.04 * 64 * results.TOKENS) / (0.4 + 0.018 * 64 * results.TOKENS)
    assert found.runner_up.ratio.low < true_ratio < found.runner_up.ratio.high
    assert "TorchScript (texts, batch 64): its outputs are WRONG" in found.excluded
    # The check can fail: were it right, it would be taken.
    right = [*results.ALL[:3], results.WRONG._replace(wrong=False)]
    better = chosen(results.result(right, SIZES)).choice
    assert better is not None
    assert better.name == "TorchScript"


def test_a_latency_limit_takes_the_largest_batch_that_keeps_it() -> None:
    for limit, size in ((50, 64), (10, 8), (1, 1)):
        choice = chosen(MADE, latency_below_ms=limit).choice
        assert choice is not None
        assert (choice.name, choice.batch_size) == ("ONNX Runtime int8", size)
        assert choice.latency_percentile == 99
        assert choice.latency_ms is not None
        assert choice.latency_ms < limit


def test_none_fits_and_the_nearest_is_named() -> None:
    found = recommend(MADE, Wanted(latency_below_ms=0.5))
    assert found.choice is None
    assert found.nearest is not None
    assert (found.nearest.name, found.nearest.batch_size) == ("ONNX Runtime int8", 1)
    with pytest.raises(CheckFailedError, match=r"below 0.5 ms; the nearest is ONNX Runtime int8"):
        check(found)


def test_a_small_sample_has_a_lower_percentile_or_none() -> None:
    work = [results.Work("offline", 32, batches=2)]
    choice = chosen(results.result(works=work, rounds=30), latency_below_ms=50).choice
    assert choice is not None
    assert choice.latency_percentile == 95  # 120 batches
    found = recommend(results.result(works=work, rounds=5), Wanted(latency_below_ms=50))
    assert found.choice is None
    with pytest.raises(CheckFailedError, match="too few batches to know p90"):
        check(found)


def test_equals_are_called_equal() -> None:
    twin = results.ONNX._replace(source="runs/twin/onnx")
    held = 0
    for seed in range(20):
        found = chosen(results.result([results.ONNX, twin], seed=seed))
        assert found.runner_up is not None
        rival, ratio = found.runner_up, found.runner_up.ratio
        assert rival.equal_within_noise == (ratio.low <= 1 <= ratio.high)
        assert ("Equal within noise" in text(found)) == rival.equal_within_noise
        held += rival.equal_within_noise
    assert held >= 17
    assert "Equal within noise" not in text(chosen(results.result([results.ONNX, results.INT8])))


def test_a_sentence_names_everything_to_deploy() -> None:
    said = text(chosen(MADE, latency_below_ms=50))
    assert said.startswith(
        "Deploy ONNX Runtime int8: runtime onnx, runs/latest/int8, 2 threads, batch size 64, int8."
    )
    assert "p99 " in said
    assert "Runner-up: ONNX Runtime (texts, batch 64)" in said
    assert "onnx-cuda: not measured" in said


def test_precision_and_accuracy_limit_the_choice() -> None:
    for wanted in ({"precision": "fp32"}, {"min_accuracy": 95}, {"max_accuracy_drop": 0.5}):
        choice = chosen(MADE, **wanted).choice
        assert choice is not None
        assert choice.name == "ONNX Runtime"
    choice = chosen(MADE, max_accuracy_drop=0.8).choice  # exactly what int8 loses
    assert choice is not None
    assert choice.name == "ONNX Runtime int8"
    with pytest.raises(CheckFailedError, match=r"no engine fits: .*accuracy 95.2%, below 99%"):
        check(recommend(MADE, Wanted(min_accuracy=99)))
    unlabelled = results.result([results.ONNX._replace(accuracy=None)])
    with pytest.raises(InputError, match="no accuracy for ONNX Runtime"):
        recommend(unlabelled, Wanted(min_accuracy=90))


def test_texts_come_before_full_batches_and_lengths_are_not_mixed() -> None:
    grid = [results.Work("grid", 8, length=length) for length in (4, 128)]
    choice = chosen(results.result(works=[*grid, *SIZES])).choice
    assert choice is not None
    assert choice.workload == "texts, batch 64"
    found = chosen(results.result(works=grid))
    assert found.choice is not None
    assert found.choice.workload == "grid, 8 x 128"
    assert "full batches, 128 tokens" in found.notes[0]
    loads = [results.Work("server", 1, batches=60, rate=rate) for rate in (20, 80)]
    loaded = chosen(results.result(works=loads), latency_below_ms=50)
    assert loaded.choice is not None
    assert loaded.choice.workload == "server, 80 requests/s"
    assert loaded.choice.name == "ONNX Runtime int8"


@pytest.mark.parametrize(
    "wanted",
    [
        {"latency_below_ms": 0},
        {"latency_below_ms": float("nan")},
        {"min_accuracy": 101},
        {"max_accuracy_drop": -1},
    ],
)
def test_limits_that_do_not_work_are_refused(wanted: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        Wanted(**wanted)  # type: ignore[arg-type]


def measured_on(folder: Path) -> Result:
    model = folder / "model.onnx"
    sha256 = file_info(model).sha256 if model.is_file() else None
    own = results.ONNX._replace(source=str(folder), threads=1, model_sha256=sha256)
    return results.result([results.TORCH._replace(threads=1), own], [results.Work("offline", 8)])


def test_writing_makes_it_the_default_of_loading(copied, monkeypatch):
    folder = copied("onnx")
    before = open_bundle(folder).manifest
    write(chosen(measured_on(folder)), folder)
    serving = Serving(threads=1, batch_size=8, provider="CPUExecutionProvider")
    after = open_bundle(folder).manifest
    assert after.serving == serving
    assert after.files == before.files
    opened = []
    import onnxruntime

    class Watched(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            opened.append((options.intra_op_num_threads, providers))
            super().__init__(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    classify = Classifier.load(folder)
    assert (opened[-1], classify.batch_size) == ((1, ["CPUExecutionProvider"]), 8)
    assert classify("How far is Mars?").label in classify.labels
    other = Classifier.load(folder, threads=2, batch_size=3)
    assert (opened[-1][0], other.batch_size) == (2, 3)


def test_workers_are_written_and_loaded(copied):
    folder = copied("onnx")
    measured = measured_on(folder)
    torch, onnx = measured.engines
    workers = msgspec.structs.replace(onnx, runtime="onnx-workers", threads=2)
    write(chosen(msgspec.structs.replace(measured, engines=(torch, workers))), folder)
    serving = Serving(threads=1, workers=2, batch_size=8, provider="CPUExecutionProvider")
    assert open_bundle(folder).manifest.serving == serving
    texts = ["How far is Mars?", "Who was Galileo?"]
    one = Classifier.load(folder, threads=1)
    assert Classifier.load(folder)(texts)[0].label == one(texts)[0].label


def test_only_the_recommended_bundle_is_written(copied, tiny_bundles, tmp_path):
    folder = copied("onnx")
    content = (folder / MANIFEST).read_bytes()
    with pytest.raises(InputError, match=r"the recommendation is .*, not "):
        write(chosen(measured_on(tiny_bundles["onnx"])), folder)
    with pytest.raises(InputError, match="is not a bundle"):
        write(chosen(measured_on(tmp_path)), tmp_path)
    earlier = results.ONNX._replace(source=str(folder), threads=1, model_sha256="0" * 64)
    with pytest.raises(InputError, match="another model than the one that was measured"):
        write(chosen(results.result([results.TORCH._replace(threads=1), earlier])), folder)
    eager = results.TORCH._replace(source=str(folder))
    with pytest.raises(InputError, match="takes ONNX bundles"):
        write(chosen(results.result([eager])), folder)
    assert (folder / MANIFEST).read_bytes() == content


def test_the_command_prints_writes_and_fails(copied, tmp_path):
    folder, path = copied("onnx"), tmp_path / "bench.json"
    save(measured_on(folder), path)

    def run(*options):
        return CliRunner().invoke(cli, ["bench", "recommend", str(path), *options])

    done = run("--latency-below", "50", "--write", str(folder))
    assert done.exit_code == 0, done.output
    assert "Deploy ONNX Runtime" in done.output
    assert open_bundle(folder).manifest.serving.batch_size == 8
    document = json.loads(run("--throughput", "--json").stdout)
    assert document["choice"]["threads"] == 1
    assert run("--latency-below", "0.1").exit_code == 1
    for options in ([], ["--throughput", "--latency-below", "5"]):
        assert run(*options).exit_code == 2
