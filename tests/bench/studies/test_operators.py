"""Where a forward's time goes: the sums by hand, and a real bundle in ONNX Runtime's profiler."""

import onnx
import pytest
from click.testing import CliRunner

from trainkit.bench.studies import operators
from trainkit.bench.studies.operators import STUDY, Event, markdown, shares


def passes(*durations):
    """Return the events of a forward a pass, of two MatMul and an Add; the last takes the rest."""
    events, now = [Event("model_loading_array", 0, 500)], 1000
    for add_us in durations:
        for name, operator, dur in (
            ("m1_kernel_time", "MatMul", 30),
            ("m1_fence_after", "MatMul", 7),
            ("m2_kernel_time", "MatMul", 50),
            ("a_kernel_time", "Add", add_us),
        ):
            events.append(Event(name, now, dur, {"op_name": operator}))
            now += dur
        events.append(Event("model_run", now - 87 - add_us, 2 * (80 + add_us)))
        now += 1000
    return events


def test_time_is_added_up_by_operator_without_the_first_pass():
    found = shares(passes(9000, 20, 20, 20, 20))
    assert found.forwards == 4
    assert found.shares == pytest.approx({"MatMul": 0.8, "Add": 0.2})
    assert list(found.shares) == ["MatMul", "Add"]
    assert found.calls == {"MatMul": 2, "Add": 1}
    assert found.inside == pytest.approx(0.5)


def test_a_real_bundle_has_the_operators_of_its_graph(tiny_bundles, tmp_path):
    out = tmp_path / "operators.json"
    arguments = [str(tiny_bundles["onnx"]), "--data", "sample", "--texts", "12", "--out", str(out)]
    done = CliRunner().invoke(operators.STUDY.command, [*arguments, "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    (one,) = STUDY.load(out).profiles
    assert (one.precision, one.data, one.batch_size) == ("fp32", "sample", 4)
    assert one.forwards == 3 * (operators.PASSES - 1)
    assert sum(one.shares.values()) == pytest.approx(1)
    assert 0 < one.inside <= 1
    graph = onnx.load(tiny_bundles["onnx"] / "model.onnx").graph
    assert set(one.shares) & {node.op_type for node in graph.node}
    table = markdown(STUDY.load(out))
    assert table in done.output
    rows = [line.split("|") for line in table.splitlines()[2:] if line]
    assert rows[-2][1] == " others "
    assert sum(float(row[2].split("%")[0]) for row in rows[:-1]) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("option", ["--texts", "--batch-size"])
def test_none_of_something_is_one_sentence(option, tiny_bundles):
    arguments = [str(tiny_bundles["onnx"]), "--data", "sample", option, "0"]
    done = CliRunner().invoke(operators.STUDY.command, arguments)
    assert done.exit_code == 2
    assert option in done.output


@pytest.mark.parametrize("kind", ["torchscript", "nowhere"])
def test_a_folder_that_cannot_be_profiled_is_one_sentence(kind, copied, tmp_path):
    folder = copied("torchscript") if kind == "torchscript" else tmp_path / "nowhere"
    done = CliRunner().invoke(operators.STUDY.command, [str(folder), "--data", "sample"])
    assert done.exit_code == 2
    assert str(folder) in done.output
    assert "Traceback" not in done.output
