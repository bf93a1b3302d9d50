import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from trainkit.bench import result
from trainkit.bench.engines.registry import Spec
from trainkit.bench.measure.environment import Environment
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.race import runner, summary, worker_process
from trainkit.bench.race.protocol import Work
from trainkit.bench.race.workload import Workload, prepare
from trainkit.bench.result import BenchmarkSettings, Measurement, Result
from trainkit.data.readers import Example
from trainkit.data.vocabulary import word_tokenizer
from trainkit.serve.bundle import FORMAT_VERSION, Manifest, write_manifest
from trainkit.serve.errors import CheckFailedError, InputError

FAKE = Path(__file__).parents[1] / "fake_worker.py"
TEXTS = [
    "How far is it from Denver to Aspen ?",
    "Who was Galileo ?",
    "What is an atom ?",
    "When did Hawaii become a state ?",
    "What is Mars ?",
]
EXAMPLES = [Example(text, "A") for text in TEXTS]


def bundle(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    labels: tuple[str, ...] = ("A", "B"),
    precision: str = "fp32",
) -> Path:
    """Make a bundle that is sound except for its model."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"none")
    tokenizer = tokenizer or word_tokenizer(TEXTS, min_count=1)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    sizes = {"layers": 2, "hidden_size": 8, "feed_forward_size": 16}
    (folder / "config.json").write_text(json.dumps({"model_type": "trainkit-scratch", **sizes}))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        format="onnx",
        precision=precision,
        opset=23,
        inputs=(),
        outputs=(),
        labels=labels,
        pooling="masked mean",
        max_length=64,
        pad_id=0,
        source={},
        parity={},
        accuracy=None,
        problem_type="single_label_classification",
        stages=(),
        independence=(),
        files={},
    )
    write_manifest(folder, manifest)
    return folder


def fake(spec: Spec, threads: int) -> list[str]:
    return [sys.executable, "-P", str(FAKE), str(spec.source), str(threads)]


def quick(**changes: object) -> BenchmarkSettings:
    """Return settings of five rounds of one pass each, in batches of two."""
    settings = BenchmarkSettings(batch_sizes=(2,), threads=(1,), min_seconds=0.0, min_rounds=5)
    return msgspec.structs.replace(settings, **changes)


def bench(folder: Path, names: Sequence[str], **changes: object) -> Result:
    specs = [Spec("onnx", bundle(folder / name)) for name in names]
    samples = folder / "samples.npz"
    return runner.run(specs, EXAMPLES, quick(**changes), worker=fake, samples=samples)


def measurements(measured: Result) -> Sequence[Measurement]:
    """Return those of the only workload."""
    (workload,) = measured.workloads
    return workload.measurements


def alive(folder: Path) -> list[int]:
    """Return the workers that are still there; the parent has waited for those that are not."""
    found = []
    for path in folder.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), 0)
        except ProcessLookupError:
            continue
        found.append(int(path.read_text()))
    return found


def test_an_engine_that_takes_half_as_long_has_ratio_two(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-20", "sleep-10"], min_rounds=7)
    slow, fast = measurements(measured)
    assert slow.ratio is None
    assert fast.ratio is not None
    assert 1.6 < fast.ratio.median < 2.4
    assert fast.ratio.low <= fast.ratio.median <= fast.ratio.high
    assert slow.texts_per_s < fast.texts_per_s < len(TEXTS) / (3 * 0.010)
    assert slow.cores_used < 0.5  # it sleeps
    assert alive(tmp_path) == []


def test_equal_engines_have_a_ratio_of_about_one(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-20", "sleep-20-again"], min_rounds=7)
    ratio = measurements(measured)[1].ratio
    assert ratio is not None
    assert ratio.low < 1.15
    assert ratio.high > 0.85


def test_intervals_of_equal_engines_hold_one_in_90_of_100_runs() -> None:
    """The rates of a race whose rounds are noisy, as on a shared machine, without the waiting."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        machine = random.lognormal(0, 0.3, size=20)  # what a round does to both
        rates = [machine * random.lognormal(0, 0.05, size=20) for _ in range(2)]
        ratio = Ratio.of_rounds(*rates)
        held += ratio.low <= 1 <= ratio.high
    assert held >= 90


def test_an_engine_that_drifts_is_slower_in_every_round(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "drifts-40"], min_rounds=30)
    rates = [1 / turn.seconds for turn in measurements(measured)[1].rounds]
    assert np.median(rates[-10:]) < 0.75 * np.median(rates[:10])


def test_a_samples_file_that_cannot_be_written_is_named_before_the_race(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    specs = [Spec("onnx", bundle(tmp_path / "sleep-0"))]
    steps: list[str] = []
    with pytest.raises(InputError, match=r"samples\.npz cannot be written"):
        runner.run(
            specs,
            EXAMPLES,
            quick(),
            worker=fake,
            samples=tmp_path / "file" / "samples.npz",
            on_progress=steps.append,
        )
    assert steps == ["tokenise"]


def test_one_stall_changes_a_high_percentile_and_not_the_median(tmp_path: Path) -> None:
    # Rounds of 5 s: what is due in the second after the 300th call is due in the same round.
    changes = {"batch_sizes": (), "rates": (100.0,), "min_seconds": 10.0, "min_rounds": 2}
    measured = bench(tmp_path, ["sleep-1", "stalls-300"], **changes)
    steady, stalled = measurements(measured)
    assert steady.p50_ms is not None
    assert stalled.p50_ms is not None
    assert steady.p99_ms is not None
    assert stalled.p99_ms is not None
    assert stalled.p50_ms < 50
    assert steady.p99_ms < 200 < stalled.p99_ms
    samples = runner.load_samples(tmp_path / "samples.npz")
    name = measured.workloads[0].name
    late = [s for number in range(2) for s in samples[f"{name}/1/{number}"][0] if s > 0.1]
    assert len(late) > 50  # a closed loop would have seen one


def test_arrivals_are_the_same_for_each_engine_and_new_in_each_round(tmp_path: Path) -> None:
    workload = Workload("server", "server", 1, Work([], []), rate=50.0)
    turns = [runner._turn(workload, quick(min_seconds=10.0), done) for done in (0, 0, 1)]
    assert turns[0] == turns[1]
    assert turns[0] != turns[2]
    assert len(turns[0].due_s) == 100


def test_a_runtime_that_is_not_there_is_listed_and_the_baseline_must_be(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "absent"])
    (missing,) = measured.unavailable
    assert missing.reason == "it was never installed"
    assert [engine.name for engine in measured.engines] == ["Fake sleep"]
    with pytest.raises(InputError, match=r"baseline .* not available: it was never installed"):
        bench(tmp_path / "again", ["absent", "sleep-0"])


def test_a_runtime_that_takes_texts_does_them_and_no_token_ids(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "reader"], lengths=(8,))
    texts, grid = measured.workloads
    assert [m.wrong for m in texts.measurements] == [False, False]
    assert measured.engines[1].includes_tokenization
    assert [m.engine for m in grid.measurements] == [0]
    assert grid.unavailable[0].reason == "it takes texts, and these are token ids"
    assert (grid.length, grid.padding_share, grid.tokens) == (8, 0, 4 * 2 * 8)


def test_each_engine_is_measured_with_each_number_of_threads(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "sleep-1"], threads=(1, 2), min_rounds=2)
    assert [engine.threads for engine in measured.engines] == [1, 2, 1, 2]
    assert [m.engine for m in measurements(measured)] == [0, 1, 2, 3]


def test_accuracy_stands_beside_speed(tmp_path: Path) -> None:
    """The fake's logits are (sum of ids, -tokens): always the first label."""
    labels = ["A", "B", "A", "A", "B"]
    examples = [Example(text, label) for text, label in zip(TEXTS, labels, strict=True)]
    specs = [Spec("onnx", bundle(tmp_path / "sleep-0"))]
    measured = runner.run(specs, examples, quick(), worker=fake)
    assert measurements(measured)[0].accuracy == 0.6
    others = [Example(text, "Z") for text in TEXTS]
    measured = runner.run(specs, others, quick(), worker=fake)
    assert measurements(measured)[0].accuracy is None
    with pytest.raises(InputError, match="no label 'Z'"):
        runner.run(specs, [*examples, *others], quick(), worker=fake)


def test_useful_operations_are_those_of_the_layers_without_padding(tmp_path: Path) -> None:
    (workload,) = bench(tmp_path, ["sleep-0"]).workloads
    lengths = [len(text.split()) for text in TEXTS]
    a_token = 2 * (4 * 8 * 8 + 2 * 8 * 16)  # four projections, two products of the feed-forward
    scores = sum(2 * 2 * 8 * length * length for length in lengths)
    assert workload.useful_flop == 2 * (a_token * sum(lengths) + scores)


def test_texts_keep_their_order_and_the_last_batch_is_smaller(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0"])
    (workload,) = measured.workloads
    assert (workload.texts, workload.batches) == (5, 3)
    assert workload.tokens == sum(len(text.split()) for text in TEXTS)
    # Lengths 9, 4 | 5, 7 | 4: padded to 18, 14 and 4 positions.
    assert workload.padding_share == pytest.approx(1 - 29 / 36)
    (measurement,) = workload.measurements
    assert all(one.batches % 3 == 0 for one in measurement.rounds)
    samples = runner.load_samples(tmp_path / "samples.npz")
    assert set(samples) == {f"{workload.name}/0/{number}" for number in range(5)}
    for number, one in enumerate(measurement.rounds):
        times = samples[f"{workload.name}/0/{number}"]
        assert times.shape == (one.batches // 3, 3)
        assert one.median_s == pytest.approx(np.median(times), abs=1e-7)
        assert one.seconds == pytest.approx(times.sum(), abs=1e-6)
    assert len(workload.tokenisation_s) > 1
    engine = measured.engines[0]
    assert engine.file_bytes > 100
    assert engine.peak_rss_bytes is None or engine.peak_rss_bytes > 1e6
    assert engine.cold_start_s > engine.load_s > 0


def test_full_batches_are_made_of_the_texts_one_after_the_other(tmp_path: Path) -> None:
    source = bundle(tmp_path / "sleep-0")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    endless = [" ".join((TEXTS * 4)[first:]) for first in range(8)]
    _, workload = prepare([source], EXAMPLES, quick(lengths=(20,)))
    rows = [row.tolist() for batch in workload.work.batches for row in batch.input_ids]
    assert rows == [tokenizer.encode(text).ids[:20] for text in endless]
    assert all(batch.attention_mask.all() for batch in workload.work.batches)


def test_rounds_go_on_until_both_time_and_count_are_enough(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-1", "sleep-0"], min_rounds=3, min_seconds=0.3)
    for measurement in measurements(measured):
        assert len(measurement.rounds) >= 3
        assert sum(turn.seconds for turn in measurement.rounds) >= 0.3


def test_small_samples_carry_no_percentile(tmp_path: Path) -> None:
    (found,) = measurements(bench(tmp_path, ["sleep-10"], min_rounds=7))  # 21 batches
    assert found.p50_ms is not None
    assert found.p50_ms >= 10
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == (None, None, None)


@pytest.mark.parametrize("name", ["swapped", "off-1", "nan"])
def test_an_engine_with_other_outputs_is_marked_and_fails_the_check(
    tmp_path: Path, name: str
) -> None:
    measured = bench(tmp_path, ["sleep-0", name], min_rounds=1)
    assert [measurement.wrong for measurement in measurements(measured)] == [False, True]
    with pytest.raises(CheckFailedError, match=f"Fake {name.split('-')[0]}"):
        result.check(measured)


def test_an_engine_within_the_tolerance_passes_the_check(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "off-0"], min_rounds=1)
    assert not measurements(measured)[1].wrong
    result.check(measured)


def test_noise_on_rows_that_are_all_the_same_is_held_against_other_work(tmp_path: Path) -> None:
    """Full batches of one token, the same in each row, have no spread of their own."""
    examples = [example for example in EXAMPLES if example.text.startswith("What")]
    specs = [Spec("onnx", bundle(tmp_path / name)) for name in ("sleep-0", "int8-50", "int8-5000")]
    settings = quick(lengths=(1,), min_rounds=2)
    texts, full = runner.run(specs, examples, settings, worker=fake).workloads
    assert full.tokens == full.texts
    for workload in (texts, full):
        assert [measured.wrong for measured in workload.measurements] == [False, False, True]


def test_a_baseline_that_gives_nan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match="NaN"):
        bench(tmp_path, ["nan", "sleep-0"], min_rounds=1)


@pytest.mark.parametrize("batch", [2, 40])  # while warming up, and in a round
def test_a_worker_that_dies_is_a_clear_error_and_none_is_left(tmp_path: Path, batch: int) -> None:
    with pytest.raises(CheckFailedError, match=r"dies-\d+ died .*: RuntimeError: out of luck"):
        bench(tmp_path, ["sleep-0", f"dies-{batch}", "sleep-1"], min_rounds=40)
    assert list(tmp_path.glob("*.pid"))
    assert alive(tmp_path) == []


def test_a_worker_that_is_killed_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"killed by SIGKILL.*no message on standard error"):
        bench(tmp_path, ["killed-1"])


def test_prints_of_a_library_do_not_reach_the_protocol(tmp_path: Path) -> None:
    assert bench(tmp_path, ["prints"], min_rounds=1).engines[0].name == "Fake prints"


def test_garbage_in_the_protocol_is_a_clear_error_and_none_is_left(tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match="Welcome to my library"):
        bench(tmp_path, ["sleep-0", "garbage"])
    assert alive(tmp_path) == []


def test_an_input_error_of_a_worker_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^this model is not for you; take another\.$"):
        bench(tmp_path, ["refuses"])


def test_a_worker_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "STOP_SECONDS", 0.2)
    bench(tmp_path, ["stays"], min_rounds=1)
    assert alive(tmp_path) == []


def test_a_worker_ends_when_its_standard_input_is_closed(tmp_path: Path) -> None:
    command = fake(Spec("onnx", bundle(tmp_path / "sleep-0")), 1)
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert ended.returncode == 0


def test_engines_of_different_models_are_refused(tmp_path: Path) -> None:
    sources = [
        bundle(tmp_path / "sleep-0"),
        bundle(tmp_path / "tokens", tokenizer=word_tokenizer(["Who was it ?"], min_count=1)),
        bundle(tmp_path / "labels", labels=("A", "C")),
    ]
    for source, message in zip(sources[1:], ["tokens", "labels"], strict=True):
        specs = [Spec("onnx", sources[0]), Spec("onnx", source)]
        with pytest.raises(InputError, match=message):
            runner.run(specs, EXAMPLES, quick(), worker=fake)


def test_input_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    spec = Spec("onnx", bundle(tmp_path / "sleep-0"))
    with pytest.raises(InputError, match="at least one engine"):
        runner.run([], EXAMPLES, quick())
    with pytest.raises(InputError, match="at least one engine"):
        runner.run([spec], [], quick())
    with pytest.raises(InputError, match="text 2 of 2 is empty"):
        runner.run([spec], [Example("Who ?", "A"), Example(" ", "A")], quick())
    with pytest.raises(InputError, match="length 65 is beyond the model's 64"):
        runner.run([spec], EXAMPLES, quick(lengths=(65,)))
    deaf = bundle(tmp_path / "sleep-1", tokenizer=Tokenizer(BPE()))
    with pytest.raises(InputError, match="none of the texts has a token"):
        runner.run([Spec("onnx", deaf)], EXAMPLES, quick(lengths=(8,)))
    with pytest.raises(InputError, match="batch_sizes must be at least 1, not 0; min_rounds"):
        BenchmarkSettings(batch_sizes=(0,), threads=(1,), min_rounds=0)
    with pytest.raises(InputError, match="rates must be above 0"):
        BenchmarkSettings(rates=(0.0,), threads=(1,))
    with pytest.raises(InputError, match="nowhere"):
        runner.run([Spec("onnx", tmp_path / "nowhere")], EXAMPLES, quick())


def test_a_report_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "swapped"], min_rounds=2)
    path = tmp_path / "results" / "report.json"
    result.save(measured, path)
    assert result.load(path) == measured
    assert msgspec.json.decode(path.read_bytes())["schema"] == "trainkit-bench/3"


def test_a_report_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"schema": "trainkit-bench/9"}')
    with pytest.raises(InputError, match=r"not a report of this trainkit"):
        result.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        result.load(tmp_path / "none.json")


def test_a_loaded_machine_unequal_rounds_and_an_unsteady_engine_are_called_noisy(
    tmp_path: Path,
) -> None:
    measured = bench(tmp_path, ["sleep-0"], min_rounds=4)
    quiet = msgspec.structs.replace(measured.environment, cores=4, load_average=(0.1, 0.1, 0.1))
    turn = measurements(measured)[0].rounds[0]
    steady = msgspec.structs.replace(
        measurements(measured)[0], rounds=(turn,) * 4, warm_up_stable=True
    )

    def noise(environment: Environment, *found: Measurement) -> Sequence[str]:
        workload = msgspec.structs.replace(measured.workloads[0], measurements=found)
        return summary.noise_of([workload], measured.engines, environment)

    assert noise(quiet, steady) == ()
    loaded = msgspec.structs.replace(quiet, load_average=(2.5, 0.1, 0.1))
    assert "load average was 2.5 on 4 cores" in noise(loaded, steady)[0]
    longer = msgspec.structs.replace(turn, seconds=10 * turn.seconds)
    uneven = msgspec.structs.replace(steady, rounds=(turn, turn, longer, longer))
    assert "spreads over" in noise(quiet, uneven)[0]
    unsteady = msgspec.structs.replace(steady, warm_up_stable=False)
    assert "Fake sleep was not yet steady" in noise(quiet, steady, unsteady)[0]
