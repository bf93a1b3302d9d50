"""Comparisons on results whose true speeds are known: equal ones stay equal, slow ones show."""

import json
from collections.abc import Sequence
from pathlib import Path

import click.testing
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from tests.bench import results
from trainkit.bench.measure.statistics import Ratio
from trainkit.bench.report.compare import (
    Comparison,
    check,
    compare,
    parse_share,
)
from trainkit.bench.result import Result, save
from trainkit.cli import cli
from trainkit.serve.errors import CheckFailedError, InputError

PAIR = (results.TORCH, results.ONNX)


def fails(comparison: Comparison, limit: float) -> bool:
    try:
        check(comparison, limit)
    except CheckFailedError:
        return True
    return False


def drawn(seed: int, factor: float = 1.0) -> Comparison:
    a = results.result([results.ONNX], seed=2 * seed)
    b = results.result([results.slower(results.ONNX, factor)], seed=2 * seed + 1)
    return compare(a, b)


def test_equal_engines_do_not_fail_and_their_interval_holds_one() -> None:
    compared = [drawn(seed) for seed in range(100)]
    assert sum(fails(comparison, 0.05) for comparison in compared) == 0
    # Without any allowance too: only 2.5 % of intervals should lie below 1.
    assert sum(fails(comparison, 0.0) for comparison in compared) <= 5
    assert sum(one.pairs[0].ratio.low <= 1 <= one.pairs[0].ratio.high for one in compared) >= 90


def test_a_true_slowdown_of_ten_percent_fails_at_five() -> None:
    compared = [drawn(seed, 1.1) for seed in range(40)]
    assert sum(fails(comparison, 0.05) for comparison in compared) >= 36
    assert all(one.pairs[0].verdict == "slower" for one in compared)
    # Texts a second by 1.1 is a ratio of 0.909: within a limit of 15 %.
    assert not any(fails(comparison, 0.15) for comparison in compared)
    assert drawn(0, 0.8).pairs[0].verdict == "faster"


def test_the_interval_is_that_of_two_independent_samples() -> None:
    """The reference: the ratio's distribution over many repeats of the whole experiment."""
    random = np.random.default_rng(3)

    def sample() -> list[float]:
        return random.normal(100, 5, size=41).tolist()

    truth = np.quantile(
        [np.median(sample()) / np.median(sample()) for _ in range(4000)], [0.025, 0.975]
    )
    widths = []
    for _ in range(40):
        ratio = Ratio.of_samples(sample(), sample())
        widths.append(ratio.high - ratio.low)
    assert np.mean(widths) == pytest.approx(truth[1] - truth[0], rel=0.2)
    assert Ratio.of_samples([3.0] * 9, [2.0] * 9) == Ratio(1.5, 1.5, 1.5)
    assert Ratio.of_samples([1.0, 2.0, 3.0], [2.0, 4.0]) == Ratio.of_samples(
        [1.0, 2.0, 3.0], [2.0, 4.0]
    )


def test_speeds_are_texts_a_second_and_under_a_load_the_inverse_latency() -> None:
    server = results.Work("server", 1, rate=20)
    made = results.result([results.ONNX], [results.OFFLINE, server])
    offline, loaded = made.workloads
    assert np.median(offline.speeds(offline.measurements[0])) == pytest.approx(
        offline.measurements[0].texts_per_s
    )
    true_ms = results.ONNX.call_ms + results.ONNX.token_us * results.TOKENS / 1e3
    inverse = 1000 / np.median(loaded.speeds(loaded.measurements[0]))
    assert inverse == pytest.approx(true_ms, rel=0.1)
    doubled = results.result([results.slower(results.ONNX, 2)], [server], seed=1)
    assert compare(made, doubled).pairs[0].ratio.median == pytest.approx(0.5, rel=0.1)


def matched(a: Sequence[results.Truth], b: Sequence[results.Truth]) -> list[tuple[str, str]]:
    one, two = results.result(a, rounds=3), results.result(b, rounds=3)
    return [(pair.engine_a, pair.engine_b) for pair in compare(one, two).pairs]


def test_engines_are_matched_by_runtime_source_and_threads() -> None:
    old = [results.TORCH, results.ONNX, results.INT8]
    moved = [truth._replace(source=truth.source.replace("latest", "new")) for truth in old]
    names = [truth.name for truth in old]
    assert matched(old, moved[::-1]) == list(zip(names, names, strict=True))
    # One of a kind in both: whatever the folder is called.
    assert matched([results.ONNX], [results.ONNX._replace(source="elsewhere")])
    one = results.ONNX._replace(threads=1)
    assert matched([one, results.ONNX], [results.ONNX, one]) == [
        ("ONNX Runtime, 1 thread", "ONNX Runtime, 1 thread"),
        ("ONNX Runtime, 2 threads", "ONNX Runtime, 2 threads"),
    ]
    with pytest.raises(InputError, match=r"only A has ONNX Runtime .*only B has ONNX Runtime"):
        matched([one], [results.ONNX])


def test_what_has_no_counterpart_is_named() -> None:
    grid = results.Work("grid", 8, length=64)
    a = results.result([results.TORCH, results.ONNX], [results.OFFLINE, grid])
    b = results.result([results.ONNX, results.WRONG])
    comparison = compare(a, b)
    assert [pair.engine_a for pair in comparison.pairs] == ["ONNX Runtime"]
    assert set(comparison.unmatched) == {
        "only A has PyTorch eager (runs/latest)",
        "only A has the workload grid, 8 x 64",
        "only B has TorchScript (runs/latest/torchscript)",
    }
    absent = msgspec.structs.replace(b.workloads[0], measurements=b.workloads[0].measurements[1:])
    fewer = msgspec.structs.replace(results.result(PAIR), workloads=(absent,))
    said = compare(results.result([*PAIR, results.WRONG]), fewer).unmatched
    assert "only A has PyTorch eager on texts, batch 32" in said


def test_other_environments_other_work_and_noise_are_named() -> None:
    made = results.result(PAIR)
    assert compare(made, made).warnings == ()
    other = results.environment_with(
        made, {"cores": 64, "versions": {**made.environment.versions, "torch": "9.9"}}
    )
    (warning,) = compare(made, other).warnings
    assert "cores" in warning
    assert "64 in B" in warning
    assert "torch" in warning
    assert "python" not in warning
    noisy = msgspec.structs.replace(made, noisy=True, noisy_because=("load 9",))
    assert compare(noisy, noisy).warnings[0].startswith("Both are noisy")
    assert compare(made, noisy).warnings == ("One is noisy (B: load 9).",)
    work = msgspec.structs.replace(made.workloads[0], tokens=7)
    shorter = msgspec.structs.replace(made, workloads=(work,))
    assert "7 in B" in compare(made, shorter).warnings[0]


def test_the_speed_of_wrong_outputs_is_no_verdict() -> None:
    right = results.WRONG._replace(wrong=False)
    comparison = compare(
        results.result([results.TORCH, right]),
        results.result([results.TORCH, results.slower(results.WRONG, 3)]),
    )
    assert [pair.verdict for pair in comparison.pairs] == ["no difference", "wrong outputs"]
    assert not fails(comparison, 0.05)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0%", 0), (" 2.5 % ", 0.025)])
def test_a_limit_is_a_percentage(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0.05", "5", "", "%", "-1%", "100%", "nan%", "five%"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write a percentage"):
        parse_share(text)


def saved(folder: Path, name: str, result: Result) -> str:
    save(result, folder / name)
    return str(folder / name)


def test_the_command_fails_only_beyond_the_limit(tmp_path: Path) -> None:
    a = saved(tmp_path, "a.json", results.result([results.ONNX]))
    b = saved(tmp_path, "b.json", results.result([results.slower(results.ONNX, 1.2)], seed=1))

    def run(*arguments: str) -> click.testing.Result:
        return CliRunner().invoke(cli, ["bench", "compare", *arguments])

    assert run(a, a, "--fail-if-slower", "5%").exit_code == 0
    assert run(a, b).exit_code == 0
    failed = run(a, b, "--fail-if-slower", "5%")
    assert failed.exit_code == 1
    assert "slower by more than 5%: ONNX Runtime on texts, batch 32" in failed.output
    assert run(a, b, "--fail-if-slower", "0.05").exit_code == 2
    document = json.loads(run(a, b, "--json").stdout)
    assert document["pairs"][0]["verdict"] == "slower"
    assert "bootstrap" in document["method"]
