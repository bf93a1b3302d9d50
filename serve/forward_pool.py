"""Forward passes over rows of unequal length: split into parts of similar length, run, reassembled.

The library and the model process split rows that are not padded yet; :func:`split_batches` splits
a padded batch, as benchmarks have them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trainkit.serve.encoding import Batch, by_length
from trainkit.serve.types import FloatArray, Runner

# Tokens per forward pass, padding included, for PyTorch and GPUs, where every pass has a fixed
# cost. Measured on one core with MiniLM: 37% less time than without a budget on texts of very
# unequal lengths up to 512 tokens, 17% up to 128; 4096 gave 28% and 2%.
MAX_TOKENS = 2048
# The same for ONNX Runtime on a CPU, where a small pass stays in the cache and its attention has
# less padding: the study `ablation` measures it.
CPU_TOKENS = 512
CPU = "CPUExecutionProvider"
PROVIDERS = (CPU,)


class ForwardPool:
    """Runs the parts of a batch, ``workers`` at once, and returns their logits in row order."""

    def __init__(self, run: Runner, workers: int = 1) -> None:
        self.run, self.workers = run, workers
        self._pool = ThreadPoolExecutor(workers, "trainkit-forward") if workers > 1 else None

    def __call__(
        self,
        lengths: Sequence[int],
        make_batch: Callable[[Sequence[int]], Batch],
        *,
        max_tokens: int,
        batch_size: int | None = None,
        equal_lengths: bool = False,
    ) -> FloatArray:
        """Return the (N, C) logits of N rows, N at least 1.

        ``make_batch`` pads the rows with the given indices. A part has at most ``batch_size`` rows
        and ``max_tokens`` tokens, padding included; with ``equal_lengths``, rows of one length.
        """
        if len(lengths) == 1:
            return self.run(make_batch([0]))
        if self.workers > 1:  # a part as large as the whole would leave the other workers idle
            max_tokens = min(max_tokens, max(1, -(-sum(lengths) // self.workers)))
        size = batch_size or len(lengths)
        parts = list(by_length(lengths, size, max_tokens, equal_lengths=equal_lengths))

        def compute(part: Sequence[int]) -> FloatArray:
            return self.run(make_batch(part))

        if self._pool is None:
            found = [compute(part) for part in parts]
        else:  # the longest first, so that it is not the last to finish
            found = list(self._pool.map(compute, parts[::-1]))[::-1]
        logits = np.empty((len(lengths), *found[0].shape[1:]), dtype=found[0].dtype)
        for part, values in zip(parts, found, strict=True):
            logits[part] = values
        return logits


def split_batches(run: Runner, max_tokens: int = CPU_TOKENS, workers: int = 1) -> Runner:
    """Return a runner that splits each padded batch into parts of at most ``max_tokens``.

    With ``workers`` above 1 that many parts run at once, each in a thread, and no part is larger
    than an even share of the batch. A row is cut after the last token that its mask shows. Not for
    models that read their padding.
    """
    compute = ForwardPool(run, workers)

    def run_parts(batch: Batch) -> FloatArray:
        rows, width = batch.input_ids.shape
        if rows == 1 or (workers == 1 and rows * width <= max_tokens):
            return run(batch)
        # argmax over the reversed mask finds the last visible token; without one, 0: a whole row.
        lengths = width - batch.attention_mask[:, ::-1].argmax(axis=1)

        def cut(part: Sequence[int]) -> Batch:
            longest = int(lengths[part].max())
            return Batch._make(None if one is None else one[part, :longest] for one in batch)

        return compute(lengths.tolist(), cut, max_tokens=max_tokens)

    return run_parts
