import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from trainkit.bench import process, race, result
from trainkit.bench.protocol import WarmUp
from trainkit.bench.result import Result
from trainkit.data.vocabulary import word_tokenizer
from trainkit.serve.bundle import FORMAT_VERSION, Manifest, write_manifest
from trainkit.serve.errors import CheckFailedError, InputError

FAKE = Path(__file__).with_name("fake_worker.py")
TEXTS = [
    "How far is it from Denver to Aspen ?",
    "Who was Galileo ?",
    "What is an atom ?",
    "When did Hawaii become a state ?",
    "What is Mars ?",
]


def bundle(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    labels: tuple[str, ...] = ("A", "B"),
    precision: str = "fp32",
) -> Path:
    """Make a bundle that is sound except for its model."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"none")
    tokenizer = tokenizer or word_tokenizer(TEXTS, min_count=1)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
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


def fake(source: Path, threads: int) -> list[str]:
    return [sys.executable, "-P", str(FAKE), str(source), str(threads)]


def bench(
    folder: Path, names: Sequence[str], min_rounds: int = 5, min_seconds: float = 0.0
) -> Result:
    sources = [bundle(folder / name) for name in names]
    return race.run(
        sources,
        TEXTS,
        batch_size=2,
        threads=1,
        min_rounds=min_rounds,
        min_seconds=min_seconds,
        worker=fake,
    )


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
    slow, fast = measured.engines
    assert slow.ratio is None
    assert fast.ratio is not None
    assert 1.6 < fast.ratio.median < 2.4
    assert fast.ratio.low <= fast.ratio.median <= fast.ratio.high
    assert slow.texts_per_s < fast.texts_per_s < len(TEXTS) / (3 * 0.010)
    assert slow.cores_used < 0.5  # it sleeps
    assert alive(tmp_path) == []


def test_equal_engines_have_a_ratio_of_about_one(tmp_path: Path) -> None:
    ratio = bench(tmp_path, ["sleep-20", "sleep-20-again"], min_rounds=7).engines[1].ratio
    assert ratio is not None
    assert ratio.low < 1.15
    assert ratio.high > 0.85


def test_texts_keep_their_order_and_the_last_batch_is_smaller(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0"])
    assert (measured.texts, measured.batches) == (5, 3)
    assert measured.tokens == sum(len(text.split()) for text in TEXTS)
    # Lengths 9, 4 | 5, 7 | 4: padded to 18, 14 and 4 positions.
    assert measured.padding_share == pytest.approx(1 - 29 / 36)
    assert all(len(one) == 3 for turn in measured.engines[0].rounds for one in turn.batch_s)
    assert len(measured.tokenisation_s) > 1
    assert measured.engines[0].folder_bytes > 100


def test_rounds_go_on_until_both_time_and_count_are_enough(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-1", "sleep-0"], min_rounds=3, min_seconds=0.3)
    for engine in measured.engines:
        assert len(engine.rounds) >= 3
        assert sum(turn.seconds for turn in engine.rounds) >= 0.3


def test_small_samples_carry_no_percentile(tmp_path: Path) -> None:
    engine = bench(tmp_path, ["sleep-10"], min_rounds=7).engines[0]  # 21 batches
    assert engine.p50_ms is not None
    assert engine.p50_ms >= 10
    assert (engine.p90_ms, engine.p99_ms) == (None, None)


@pytest.mark.parametrize("name", ["swapped", "off-1", "nan"])
def test_an_engine_with_other_outputs_is_marked_and_fails_the_check(
    tmp_path: Path, name: str
) -> None:
    measured = bench(tmp_path, ["sleep-0", name], min_rounds=1)
    assert [engine.wrong for engine in measured.engines] == [False, True]
    with pytest.raises(CheckFailedError, match=f"Fake {name.split('-')[0]}"):
        result.check(measured)


def test_an_engine_within_the_tolerance_passes_the_check(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "off-0"], min_rounds=1)
    assert not measured.engines[1].wrong
    result.check(measured)


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
    with pytest.raises(CheckFailedError, match=r"killed by SIGKILL.*nothing on standard error"):
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
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    bench(tmp_path, ["stays"], min_rounds=1)
    assert alive(tmp_path) == []


def test_a_worker_ends_when_its_standard_input_is_closed(tmp_path: Path) -> None:
    command = fake(bundle(tmp_path / "sleep-0"), 1)
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert ended.returncode == 0


def test_engines_of_different_models_are_refused(tmp_path: Path) -> None:
    sources = [
        bundle(tmp_path / "sleep-0"),
        bundle(tmp_path / "tokens", tokenizer=word_tokenizer(["Who was it ?"], min_count=1)),
        bundle(tmp_path / "labels", labels=("A", "C")),
    ]
    for source, message in zip(sources[1:], ["tokens", "labels"], strict=True):
        with pytest.raises(InputError, match=message):
            race.run([sources[0], source], TEXTS, threads=1, worker=fake)


def test_input_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    source = bundle(tmp_path / "sleep-0")
    with pytest.raises(InputError, match="at least one engine"):
        race.run([], TEXTS)
    with pytest.raises(InputError, match="at least one engine"):
        race.run([source], [])
    with pytest.raises(InputError, match="text 2 of 2 is empty"):
        race.run([source], ["Who ?", " "])
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0; min_rounds"):
        race.run([source], TEXTS, batch_size=0, min_rounds=0)
    with pytest.raises(InputError, match="nowhere"):
        race.run([tmp_path / "nowhere"], TEXTS)


def test_a_report_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    measured = bench(tmp_path, ["sleep-0", "swapped"], min_rounds=2)
    path = tmp_path / "results" / "report.json"
    result.save(measured, path)
    assert result.load(path) == measured
    assert msgspec.json.decode(path.read_bytes())["schema"] == "trainkit-bench/1"


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
    quiet = msgspec.structs.replace(
        measured.environment_before, cores=4, load_average=(0.1, 0.1, 0.1)
    )
    turn = measured.engines[0].rounds[0]
    engine = msgspec.structs.replace(
        measured.engines[0], rounds=(turn,) * 4, warm_up=WarmUp(turn, stable=True)
    )
    assert race._noise([engine], quiet) == ()
    loaded = msgspec.structs.replace(quiet, load_average=(2.5, 0.1, 0.1))
    assert "load average was 2.5 on 4 cores" in race._noise([engine], loaded)[0]
    longer = msgspec.structs.replace(turn, batch_s=((10.0, 10.0, 10.0),))
    uneven = msgspec.structs.replace(engine, rounds=(turn, turn, longer, longer))
    assert "spreads over" in race._noise([uneven], quiet)[0]
    unsteady = msgspec.structs.replace(engine, warm_up=WarmUp(turn, stable=False))
    assert "Fake sleep was not yet steady" in race._noise([engine, unsteady], quiet)[0]
