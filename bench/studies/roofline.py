"""The peak of this machine's float32 matrix products.

An engine's share of it shows how much there is left to gain (Williams, Waterman and Patterson,
"Roofline", 2009).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np

from trainkit.bench.race.worker_process import last_line
from trainkit.serve.errors import CheckFailedError
from trainkit.serve.types import FloatArray

# Square float32 matrices. A small product is over in milliseconds, between two moments in which
# other work has the cores; a large one shows what the caches cost.
SIZES = (512, 1024)
SECONDS = 0.6


def measure(threads: int) -> float:
    """Return the floating-point operations/s that this machine reached, in a process of its own.

    It is the best float32 matrix product of numpy's BLAS, PyTorch and ONNX Runtime. A BLAS sizes
    its pool at the start of a process.
    """
    command = [sys.executable, "-P", "-m", "trainkit.bench.studies.roofline", str(threads)]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    limits = dict.fromkeys(names, str(threads))
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, check=False)
    if done.returncode:
        reason = last_line(done.stderr.decode(errors="replace"))
        raise CheckFailedError(f"the roofline could not be measured: {reason}")
    return float(done.stdout)


def _peak(threads: int) -> float:
    products = [product for size in SIZES for product in _products(size, threads)]
    return max(flop / _best(multiply) for flop, multiply in products)


def _products(size: int, threads: int) -> Iterator[tuple[int, Callable[[], object]]]:
    """Yield a product's operations and the product, in each library that is there.

    No library is the fastest on every processor: PyTorch's is slow on AMD's.
    """
    random = np.random.default_rng(0)
    first, second = (random.random((size, size), dtype=np.float32) for _ in range(2))
    product = np.empty_like(first)
    yield 2 * size**3, lambda: np.matmul(first, second, out=product)
    if find_spec("torch") is not None:
        yield 2 * size**3, _in_torch(first, second, threads)
    if find_spec("onnx") is not None:
        yield 2 * size**3, _in_onnxruntime(first, second, threads)


def _in_torch(first: FloatArray, second: FloatArray, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    factors = torch.from_numpy(first), torch.from_numpy(second)
    into = torch.empty_like(factors[0])
    return lambda: torch.mm(*factors, out=into)


def _in_onnxruntime(first: FloatArray, second: FloatArray, threads: int) -> Callable[[], object]:
    import onnx
    import onnxruntime as ort
    from onnx import helper

    # A constant, as a model's weights are: ONNX Runtime lays those out for its product beforehand.
    weights = onnx.numpy_helper.from_array(second, "B")
    ports = [helper.make_tensor_value_info(name, 1, first.shape) for name in ("A", "C")]
    node = helper.make_node("MatMul", ["A", "B"], ["C"])
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], [weights])
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"A": first})


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    begun = time.perf_counter()
    while time.perf_counter() < begun + SECONDS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    print(_peak(int(sys.argv[1])))
