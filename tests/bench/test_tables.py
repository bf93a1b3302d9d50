import io
from datetime import UTC, datetime

import msgspec
from rich.console import Console

from trainkit.bench import environment
from trainkit.bench.protocol import Turn, WarmUp
from trainkit.bench.result import EngineResult, Ratio, Result, Settings
from trainkit.bench.tables import markdown, table
from trainkit.export.parity import Report, Tolerance

TURN = Turn(batch_s=((0.010, 0.012),), cpu_s=0.02)


def report(failed: int) -> Report:
    return Report(
        precision="fp32",
        tolerance=Tolerance(2e-5, 2e-5),
        cases=2,
        rows=4,
        failed=failed,
        max_abs=0.3 if failed else 4e-7,
        max_rel=0.1,
        label_agreement=1.0,
        worst=(),
    )


def engine(name: str, ratio: Ratio | None, outputs: Report | None) -> EngineResult:
    return EngineResult(
        name=name,
        source=f"runs/[latest]/{name}",
        texts_per_s=1234.5,
        p50_ms=11.0 if ratio else None,
        p90_ms=None,
        p99_ms=None,
        ratio=ratio,
        outputs=outputs,
        wrong=outputs is not None and not outputs.passed,
        cores_used=0.9,
        peak_rss_bytes=123_000_000,
        load_s=1.5,
        folder_bytes=10,
        warm_up=WarmUp(TURN, stable=True),
        rounds=(TURN, TURN, TURN),
    )


RESULT = Result(
    command=("trainkit", "bench", "run"),
    date=datetime(2026, 11, 22, tzinfo=UTC),
    settings=Settings(threads=2),
    environment_before=environment.describe(),
    environment_after=environment.describe(),
    texts=500,
    batches=16,
    tokens=4000,
    padding_share=0.42,
    tokenisation_s=(0.01,),
    noisy=True,
    noisy_because=("the load average was 9.0",),
    engines=(
        engine("PyTorch eager", None, None),
        engine("ONNX Runtime", Ratio(2.1, 2.05, 2.16), report(0)),
        engine("TorchScript", Ratio(0.9, 0.8, 1.0), report(1)),
    ),
)


def test_markdown_has_one_row_an_engine_and_marks_the_wrong_one() -> None:
    lines = markdown(RESULT).splitlines()
    assert "500 texts in batches of 32, 42 % padding, 2 threads, 3 rounds" in lines[0]
    assert lines[4] == "| PyTorch eager | 1,234 | - | baseline | baseline | 123 | 1.50 |"
    assert lines[5] == "| ONNX Runtime | 1,234 | 11.00 | 2.10 (2.05 to 2.16) | 4e-07 | 123 | 1.50 |"
    assert "| WRONG |" in lines[6]
    assert lines[-1] == "Noisy: the load average was 9.0."


def test_a_quiet_result_says_nothing_about_noise() -> None:
    quiet = msgspec.structs.replace(RESULT, noisy=False, noisy_because=())
    assert "Noisy" not in markdown(quiet)


def test_the_terminal_table_says_the_same() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(table(RESULT))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for piece in ("2.10 (2.05 to 2.16)", "WRONG", "4e-07", "Noisy: the load average was 9.0."):
        assert piece in printed


def test_engines_of_one_kind_are_told_apart_by_their_source() -> None:
    twice = msgspec.structs.replace(RESULT, engines=(RESULT.engines[0],) * 2)
    console = Console(file=io.StringIO(), width=200)
    console.print(table(twice))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("PyTorch eager (runs/[latest]/PyTorch eager)") == 2
