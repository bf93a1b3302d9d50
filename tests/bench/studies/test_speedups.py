"""Against whom trainkit is measured, and that a missed goal is called missed."""

import msgspec
import numpy as np
import pytest

from tests.bench import results
from tests.bench.results import Truth, Work
from trainkit.bench.engines.registry import RUNTIMES
from trainkit.bench.result import Result
from trainkit.bench.studies import speedups

HF = Truth("Hugging Face eager", "huggingface", "runs/hf", 0.0, 100.0)
COMPILED = Truth("torch.compile", "compile", "runs/hf", 0.0, 80.0)
OPTIMUM8 = Truth("optimum int8", "optimum-int8", "runs/hf", 0.0, 60.0, "int8")
OPENVINO = Truth("OpenVINO", "openvino", "runs/onnx", 0.0, 1.0)  # runs trainkit's own graph
ONNX = Truth("ONNX Runtime", "onnx", "runs/onnx", 0.0, 32.0)
INT8 = Truth("ONNX Runtime int8", "onnx", "runs/int8", 0.0, 20.0, "int8")
ENGINES = (HF, COMPILED, OPTIMUM8, OPENVINO, ONNX, INT8)
NAME = "suite-minilm-newsgroups20"


def made(
    *engines: Truth,
    data: str = "newsgroups20",
    size: int = 24,
    share: float = 0.9,
    noise: float = 0,
) -> Result:
    result = results.result(
        engines or ENGINES, [Work("offline", size)], rounds=5, noise=noise, data=data
    )
    work = result.workloads[0]
    shares = tuple(msgspec.structs.replace(m, roofline_share=share) for m in work.measurements)
    work = msgspec.structs.replace(work, measurements=shares)
    return msgspec.structs.replace(result, workloads=(work,))


def row(result: Result) -> list[str]:
    line = speedups.markdown({NAME: result}).splitlines()[2]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_precision_stands_against_the_fastest_that_trainkit_did_not_make() -> None:
    assert row(made()) == [
        "minilm, newsgroups20, 24",
        "2.50 (2.50 to 2.50), torch.compile; goal 2.5",
        "4.00 (4.00 to 4.00), torch.compile; goal 4",
        "3.00 (3.00 to 3.00), optimum int8; goal 2",
        "90%; goal 85%",
    ]
    assert speedups.markdown({NAME: made()}).endswith("0 of 4 goals are missed.")


def test_a_goal_that_is_just_missed_is_missed_and_reads_so() -> None:
    shown = row(
        made(*ENGINES[:-2], results.slower(ONNX, 1.001), results.slower(INT8, 1.6), share=0.849)
    )
    assert shown[1] == "2.49 (2.49 to 2.50), torch.compile; goal 2.5, **missed**"
    assert shown[2].endswith("goal 4, **missed**")
    assert shown[3].endswith("goal 2, **missed**")
    assert shown[4] == "84%; goal 85%, **missed**"


@pytest.mark.parametrize(
    ("data", "size", "goals"),
    [
        ("trec", 32, ["2.2", "3", "", "85%"]),
        ("trec", 1, ["1.15", "1.6", "", ""]),
        ("newsgroups20", 1, ["1.15", "1.6", "", ""]),
        ("banking77", 32, ["", "", "", "85%"]),
    ],
)
def test_goals_are_those_of_the_texts_and_the_batch(data: str, size: int, goals: list[str]) -> None:
    cells = row(made(data=data, size=size))[1:]
    assert [cell.partition("goal ")[2].removesuffix(", **missed**") for cell in cells] == goals


def test_the_ratio_is_that_of_the_rounds() -> None:
    result = made(noise=0.1)
    work = result.workloads[0]
    rates = [work.speeds(m) for m in work.measurements]
    expected = np.median(np.divide(rates[4], rates[1]))
    assert float(row(result)[1].split()[0]) == pytest.approx(expected, abs=0.01)
    assert expected != pytest.approx(np.median(rates[4]) / np.median(rates[1]), abs=1e-4)


def test_wrong_engines_do_not_count_and_are_named() -> None:
    result = made(HF, COMPILED._replace(wrong=True), OPTIMUM8, ONNX, INT8._replace(wrong=True))
    shown = row(result)
    assert shown[1].startswith("3.12 ")
    assert "Hugging Face eager" in shown[1]
    assert shown[2] == "not measured; goal 4, **missed**"
    said = speedups.markdown({NAME: result})
    assert "wrong outputs: torch.compile (minilm, newsgroups20, 24), ONNX Runtime int8 (" in said
    assert said.count("**missed**") == 2
    assert "2 of 4 goals are missed." in said


def test_workers_count_where_they_are_faster() -> None:
    workers = results.slower(ONNX, 0.8)._replace(runtime="onnx-workers")
    assert row(made(*ENGINES, workers))[1].startswith("3.12 (3.12 to 3.1")
    workers = results.slower(ONNX, 1.2)._replace(runtime="onnx-workers")
    assert row(made(*ENGINES, workers))[1].startswith("2.50 (2.50 to 2.50), ")


def test_a_share_above_the_peak_shows_nothing() -> None:
    assert row(made(share=1.21))[4] == (
        "121%, so the peak was measured too low; goal 85%, **missed**"
    )


def test_noisy_runs_are_named_and_other_scenarios_left_out() -> None:
    noisy = results.result(ENGINES, [Work("grid", 8, length=16)], noisy=True, data="trec")
    assert speedups.markdown({"suite-base-trec": noisy}).splitlines()[2:] == [
        "",
        "0 of 0 goals are missed.",
        "",
        "Noisy, for the reasons below their tables: base, trec.",
    ]


def test_each_runtime_is_trainkits_or_anothers() -> None:
    trainkits = {"eager", "torchscript", "pt2", "aoti", *speedups.OURS, "openvino"}
    on_gpu = {"eager-cuda", "onnx-cuda", "onnx-tensorrt"}
    assert {*RUNTIMES} == trainkits | on_gpu | {*speedups.OTHERS}


def test_the_headline_is_of_the_defaults() -> None:
    workers = results.slower(ONNX, 0.8)._replace(runtime="onnx-workers")
    base = {"suite-base-newsgroups20": made()}
    assert speedups.headline({NAME: made(*ENGINES, workers), **base}) == speedups.headline(
        {NAME: made(), **base}
    )


def test_the_headline_has_a_row_a_batch_size_and_hides_no_loss() -> None:
    slow = made(*ENGINES[:-2], results.slower(ONNX, 3.0), size=1)
    shown = speedups.headline({NAME: made(), "suite-base-newsgroups20": slow})
    first, second, *_ = shown.splitlines()[2:]
    assert first.startswith("| MiniLM-L6, batches of 24 | 2.50 (2.50 to 2.50), ")
    assert second.startswith("| BERT-base's size, single texts | 0.83 (0.83 to 0.83), ")
