"""Tables say what the JSON says: every figure, every absent engine, every wrong one."""

import csv as csv_module
import io

import msgspec
from rich.console import Console, RenderableType

from tests.bench import results
from trainkit.bench.report.html import html
from trainkit.bench.report.tables import csv, engine_labels, markdown, not_measured, sheets, table
from trainkit.bench.result import Unavailable


def printed(renderable: RenderableType, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def coloured(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


MADE = results.result(noisy=True, noisy_because=("the load average was 9.0",))
MEASURED = MADE.workloads[0].measurements


def test_markdown_has_one_row_an_engine_and_marks_the_wrong_one() -> None:
    lines = markdown(MADE).splitlines()
    assert lines[0] == "**texts, batch 32: 512 texts, 42% padding, 2 threads, 20 rounds**"
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[0] == "PyTorch eager"
    assert cells[1] == f"{MEASURED[0].texts_per_s:,.0f}"
    assert cells[2] == f"{MEASURED[0].p50_ms:.2f}"
    assert cells[4:] == ["baseline", "baseline", "95.2%", "25%", "123", "91", "4.75", "4.90"]
    ratio = MEASURED[2].ratio
    assert ratio is not None
    assert f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |" in lines[6]
    assert "| WRONG |" in lines[7]
    assert lines[-1] == "Noisy: the load average was 9.0."


def test_a_rate_of_a_few_texts_a_second_keeps_its_first_decimal() -> None:
    workload = MADE.workloads[0]
    slow = msgspec.structs.replace(MEASURED[0], texts_per_s=3.44)
    workload = msgspec.structs.replace(workload, measurements=(slow, *MEASURED[1:]))
    assert "| PyTorch eager | 3.4 |" in markdown(
        msgspec.structs.replace(MADE, workloads=(workload,))
    )


def test_a_wrong_engine_is_red_and_the_reason_stands_below() -> None:
    shown = coloured(table(MADE))
    (row,) = [line for line in shown.splitlines() if "WRONG" in line and "15" in line]
    assert "\x1b[31m" in row
    assert "TorchScript is WRONG" in shown
    assert "3 of 32 labels changed" in shown
    sound = results.result([results.TORCH, results.ONNX])
    assert "\x1b[31m" not in coloured(table(sound))
    assert "WRONG" not in markdown(sound)


def test_an_absent_engine_is_named_once_with_its_reason_in_every_form() -> None:
    told = "Not measured: onnx-cuda: this ONNX Runtime has no CUDAExecutionProvider."
    two = results.result(works=[results.OFFLINE, results.Work("grid", 8, length=64)])
    assert markdown(two).count("onnx-cuda") == 1
    assert told in markdown(two).splitlines()
    assert printed(table(two)).count(told) == html(two).count(f"<p>{told}</p>") == 1
    absent = [row for row in rows_of(csv(two)) if row["not_measured"]]
    assert [row["workload"] for row in absent] == [work.name for work in two.workloads]
    assert [row["runtime"] for row in absent] == ["onnx-cuda"] * 2
    assert not any(row["texts_per_s"] for row in absent)


def test_one_sentence_a_reason_names_a_source_only_where_another_fared_otherwise() -> None:
    def of(runtime: str, source: str, reason: str) -> Unavailable:
        return Unavailable(runtime=runtime, source=source, reason=reason)

    absent = (
        of("onnx-cuda", "a/onnx", "no GPU"),
        of("eager-cuda", "a", "no GPU"),
        of("onnx-cuda", "a/int8", "no GPU"),
        of("openvino", "a/onnx", "opset 23"),
        of("openvino", "a/int8", "no int8"),
        of("onnx", "a/odd", "no GPU"),  # and two others were measured
    )
    assert not_measured(results.result(unavailable=absent), absent) == [
        "Not measured: onnx-cuda, eager-cuda, onnx (a/odd): no GPU.",
        "Not measured: openvino (a/onnx): opset 23.",
        "Not measured: openvino (a/int8): no int8.",
    ]


def test_what_cannot_do_one_workload_is_absent_there_alone() -> None:
    no_ids = msgspec.structs.replace(results.CUDA, runtime="pipeline", reason="it takes texts")
    made = results.result(
        works=[results.OFFLINE, results.Work("grid", 8, length=64)], unavailable=()
    )
    grid = msgspec.structs.replace(made.workloads[1], unavailable=(no_ids,))
    made = msgspec.structs.replace(made, workloads=(made.workloads[0], grid))
    sentence = "Not measured: pipeline: it takes texts."
    assert [sentence in sheet.notes for sheet in sheets(made)] == [False, True]
    assert markdown(made).count(sentence) == printed(table(made)).count(sentence) == 1


def test_a_column_without_figures_is_left_out() -> None:
    headings = next(sheets(MADE)).columns
    assert {"accuracy", "roofline share", "p99 ms per batch", "cold start s"} <= set(headings)
    bare = [results.TORCH._replace(accuracy=None), results.ONNX._replace(accuracy=None)]
    few = results.result(bare, [results.Work("offline", 32, batches=2)], rounds=5)
    headings = next(sheets(few)).columns
    assert not {"accuracy", "p99 ms per batch"} & set(headings)
    assert "p50 ms per batch" in headings  # 20 batches
    assert "| - |" not in markdown(few)


def test_a_quiet_result_says_nothing_about_noise() -> None:
    assert "Noisy" not in markdown(results.result())
    assert "Noisy: the load average was 9.0." in printed(table(MADE))


def test_the_terminal_table_fits_eighty_columns_whole() -> None:
    shown = printed(table(MADE), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for measured in MEASURED:
        assert f"{measured.texts_per_s:,.0f}" in shown
        assert f"{measured.p50_ms:.2f}" in shown


def test_names_are_no_markup() -> None:
    odd = results.ONNX._replace(name="[/red]ONNX", source="runs/[latest]/onnx")
    shown = printed(table(results.result([odd, odd._replace(source="runs/[new]/onnx")])))
    assert "[/red]ONNX (runs/[latest]/onnx)" in shown


def test_engines_are_told_apart_by_source_and_threads() -> None:
    one = results.ONNX._replace(threads=1)
    assert engine_labels(results.result([one, results.ONNX])) == [
        "ONNX Runtime, 1 thread",
        "ONNX Runtime, 2 threads",
    ]
    other = results.ONNX._replace(source="runs/new/onnx")
    assert engine_labels(results.result([results.ONNX, other])) == [
        "ONNX Runtime (runs/latest/onnx)",
        "ONNX Runtime (runs/new/onnx)",
    ]
    assert len(set(engine_labels(results.result([results.ONNX] * 3)))) == 3


def test_an_engine_that_tokenises_is_said_to() -> None:
    pipeline = results.TORCH._replace(name="pipeline", includes_tokenization=True)
    shown = markdown(results.result([results.TORCH, pipeline]))
    assert "Times include tokenization for: pipeline." in shown
    assert "include tokenization" not in markdown(MADE)


def test_an_engine_that_exports_first_is_said_to() -> None:
    peer = results.TORCH._replace(name="optimum", runtime="optimum")
    shown = markdown(results.result([results.TORCH, peer]))
    assert "include the model conversion for: optimum." in shown
    assert "model conversion" not in markdown(MADE)


def rows_of(content: str) -> list[dict[str, str]]:
    return list(csv_module.DictReader(io.StringIO(content)))


def test_the_csv_holds_every_figure_of_the_json_in_full() -> None:
    full = results.full()
    document = msgspec.json.decode(msgspec.json.encode(full))
    rows = [row for row in rows_of(csv(full)) if not row["not_measured"]]
    pairs = [
        (work, measured) for work in document["workloads"] for measured in work["measurements"]
    ]
    assert len(rows) == len(pairs) == 4 * len(full.workloads)
    for row, (work, measured) in zip(rows, pairs, strict=True):
        engine = document["engines"][measured["engine"]]
        assert row["workload"] == work["name"]
        assert row["engine"] == engine["name"]
        ratio = measured["ratio"] or {}
        flat = {
            **{name: value for name, value in work.items() if name in row},
            **{name: value for name, value in engine.items() if name in row},
            **{name: value for name, value in measured.items() if name in row},
            **{f"ratio_{name}": ratio.get(name) for name in ("median", "low", "high")},
        }
        del flat["rounds"]
        flat.pop("engine")
        assert row["rounds"] == str(len(measured["rounds"]))
        for name, value in flat.items():
            if value is None:
                assert row[name] == "", name
            elif isinstance(value, float):
                assert float(row[name]) == value, name  # not a digit is lost
            else:
                assert row[name] == str(value), name
