"""The table of full batches: each shape against its own goals."""

import numpy as np

from tests.bench import results
from tests.bench.results import Truth, Work
from trainkit.bench.race import protocol
from trainkit.bench.race.workload import Workload
from trainkit.bench.studies import grid
from trainkit.serve.encoding import Batch

HF = Truth("Hugging Face eager", "huggingface", "runs/hf", 0.0, 100.0)
O2 = Truth("optimum O2", "optimum-o2", "runs/hf", 0.0, 50.0)
OPTIMUM8 = Truth("optimum int8", "optimum-int8", "runs/hf", 0.0, 30.0, "int8")
ONNX = Truth("ONNX Runtime", "onnx", "runs/onnx", 0.0, 50.0)
INT8 = Truth("ONNX Runtime int8", "onnx", "runs/int8", 0.0, 25.0, "int8")
SHAPES = ((8, 128), (1, 32), (1, 1))


def made(*engines):
    work = [Work("grid", size, length=length) for size, length in SHAPES]
    return results.result(engines or (HF, O2, OPTIMUM8, ONNX, INT8), work, rounds=5, noise=0)


def rows(result):
    lines = grid.markdown(result).splitlines()[2 : 2 + len(SHAPES)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_shape_has_its_own_goals_in_the_order_of_size():
    one, short, full = rows(made())
    assert [row[0] for row in (one, short, full)] == ["1 x 1", "1 x 32", "8 x 128"]
    assert one[1] == "1.00 (1.00 to 1.00), optimum O2; goal 0.97"
    assert short[1].endswith("goal 1.15, **missed**")
    assert full[1].endswith("goal 1.2, **missed**")
    assert one[2].endswith(" O2")  # no goal there
    assert (short[2][-3:], full[2][-3:]) == ("1.6", "1.8")
    assert {row[3] for row in (one, short, full)} == {"1.20 (1.20 to 1.20), optimum int8; goal 1"}
    assert "2 of 8 goals are missed." in grid.markdown(made())


def test_one_that_is_slower_anywhere_is_called_so():
    slow = made(HF, O2, OPTIMUM8, results.slower(ONNX, 1.05), results.slower(INT8, 1.25))
    for row in rows(slow):
        assert row[1].endswith("**missed**")
        assert row[3].endswith("goal 1, **missed**")


def test_of_long_batches_one_is_enough():
    batch = Batch(*(np.ones((64, 64), np.int64),) * 3)
    long = Workload(
        name="grid, 64 x 64",
        scenario="grid",
        batch_size=64,
        work=protocol.Work([batch] * 4, []),
        length=64,
        useful_flop=4e9,
    )
    short = grid._shortened(long)
    assert (len(short.work.batches), short.useful_flop) == (1, 1e9)
    assert grid._shortened(long._replace(batch_size=1, length=64)).texts == 256
