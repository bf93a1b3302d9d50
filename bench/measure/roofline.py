"""How fast this machine could be: its matrix products and memory, measured; and the useful work.

An engine's share of the peak tells how much there is left to win (Williams, Waterman and Patterson,
"Roofline", 2009). ``python -m trainkit.bench.measure.roofline THREADS`` prints one
:class:`MachinePeak`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np

from trainkit.serve.errors import CheckFailedError
from trainkit.serve.types import FloatArray

__all__ = ["MachinePeak", "Roofline", "measure", "useful_flop"]

# Square float32 matrices. A small product is over in milliseconds, between two moments in which
# other work has the cores; a large one shows what the caches cost.
SIZES = (512, 1024)
BUFFER_BYTES = 64 * 2**20  # larger than a share of any last-level cache
SECONDS = 0.6

# What a layer of these computes follows from three sizes. Others have gates, bottlenecks or
# attention of their own.
PLAIN = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
SCRATCH = "trainkit-scratch"


class MachinePeak(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best of some repeats with so many threads.

    ``gemm_flops_per_s`` of a float32 matrix product in the fastest of numpy's BLAS, PyTorch's and
    ONNX Runtime's, where those are installed; ``bandwidth_bytes_per_s`` of a copy in memory, read
    and written bytes together as STREAM counts them (McCalpin 1995).
    """

    threads: int
    gemm_flops_per_s: float
    bandwidth_bytes_per_s: float

    def or_better(self, other: "MachinePeak") -> "MachinePeak":
        """Return the better of each figure."""
        return MachinePeak(
            self.threads,
            max(self.gemm_flops_per_s, other.gemm_flops_per_s),
            max(self.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s),
        )


class Roofline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One point a number of threads."""

    points: tuple[MachinePeak, ...]

    def peak(self, threads: int) -> float:
        """Return the floating-point operations a second that were reached with so many threads."""
        return next(point.gemm_flops_per_s for point in self.points if point.threads == threads)

    def or_better(self, again: "Roofline") -> "Roofline":
        """Return the better of two measurements of the same threads, at two times."""
        pairs = zip(self.points, again.points, strict=True)
        return Roofline(tuple(one.or_better(other) for one, other in pairs))


def measure(threads: Sequence[int]) -> Roofline:
    """Measure each number of threads in its own process: a BLAS sizes its pool at the start."""
    points = []
    for number in sorted(set(threads)):
        command = [sys.executable, "-P", "-m", "trainkit.bench.measure.roofline", str(number)]
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(number)
        )
        done = subprocess.run(
            command, env={**os.environ, **limits}, capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise CheckFailedError(f"the roofline could not be measured: {' '.join(said)}")
        points.append(msgspec.json.decode(done.stdout, type=MachinePeak))
    return Roofline(tuple(points))


def useful_flop(architecture: Mapping[str, Any], lengths: Sequence[int]) -> float | None:
    """Return the operations of an encoder's layers for texts of these lengths, in tokens.

    A multiplication and an addition count as two. Embeddings, norms and the head are left out, and
    so is all padding. None where the architecture does not follow from its sizes, or transformers,
    which knows their defaults, is not installed.
    """
    sizes = _sizes(architecture)
    if sizes is None:
        return None
    layers, hidden, inner = sizes
    tokens, pairs = sum(lengths), sum(length * length for length in lengths)
    return float(layers * (2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 4 * pairs * hidden))


def _sizes(architecture: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the number of layers, the hidden size and the feed-forward's inner size."""
    kind = architecture.get("model_type")
    if kind == SCRATCH:
        names = ("layers", "hidden_size", "feed_forward_size")
        layers, hidden, inner = (architecture[name] for name in names)
        return layers, hidden, inner
    if kind not in PLAIN:
        return None
    try:
        from transformers import AutoConfig
    except ImportError:
        return None
    rest = {name: value for name, value in architecture.items() if name != "model_type"}
    config = AutoConfig.for_model(kind, **rest)
    inner = config.hidden_dim if kind == "distilbert" else config.intermediate_size
    return config.num_hidden_layers, config.hidden_size, inner


def _point(threads: int) -> MachinePeak:
    products = [product for size in SIZES for product in _products(size, threads)]
    gemm_flops_per_s = max(flop / _best(multiply) for flop, multiply in products)
    sources = [np.ones(BUFFER_BYTES // 4, np.float32) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        copy_s = _best(lambda: list(pool.map(np.copyto, targets, sources)))
    return MachinePeak(threads, gemm_flops_per_s, 2 * BUFFER_BYTES * threads / copy_s)


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
    sys.stdout.buffer.write(msgspec.json.encode(_point(int(sys.argv[1]))))
