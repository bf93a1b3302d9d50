"""Whether two computations of the same numbers agree: one table of tolerances, and one probe.

Needs no torch, so that a bundle can be verified where it is served.
"""

from typing import Any

import msgspec
import numpy as np

from trainkit.serve.encoding import Batch
from trainkit.serve.types import FloatArray


class Tolerance(msgspec.Struct, frozen=True):
    """The largest difference of a number: ``absolute + relative * the row's largest |number|``.

    With ``same_decisions`` no label of any row may change, even inside that. With ``noise`` a
    parity matrix is judged as a whole instead: the root mean square of all differences may be that
    share of the logits' standard deviation.
    """

    absolute: float
    relative: float
    same_decisions: bool = False
    noise: float | None = None

    def limit(self, expected: FloatArray) -> FloatArray:
        """Return the largest difference of each row of ``expected`` (N, C): (N, 1)."""
        largest: FloatArray = np.abs(expected).max(axis=1, keepdims=True)
        return self.absolute + self.relative * largest


# Of exports, by precision. float32 has 24 bits (6e-8): a runtime may add the terms of a sum in
# another order, which came to 1.1e-5 at most (bench/results/trec.json). What the tests sabotage,
# down to one perturbed weight, lies outside.
TOLERANCES = {
    "fp32": Tolerance(absolute=2e-5, relative=2e-5, same_decisions=True),
    # float16 has 11 bits (5e-4), and a dozen layers round some thirty times one after the other.
    "fp16": Tolerance(absolute=2e-2, relative=1e-2),
    # int8 rounds by design: single logits of random ids move far, all of them together by 5 to 17%
    # of their spread (docs/precision.md). Beside this its graph is compared with fp32's node by
    # node, and a row must have the same answer in any company, to the digits of fp32.
    "int8": Tolerance(absolute=2e-5, relative=2e-5, noise=0.25),
}

# Of float32 models in PyTorch, as `relative_difference` measures it.
# The kernels of attention differ with the layout; a lost mask or prefix moves states by 0.1.
SAME_STATES = 1e-4
# The same kernels on the same layout: PEFT's forward with a run's own weights.
SAME_LOGITS = 1e-5
# An untrained adapter adds zeros; what rounding alone does is less than this.
NO_CHANGE = 1e-6


def relative_difference(found: Any, expected: Any) -> float:
    """Return the largest difference over the largest |expected|, or over 1 if that is larger.

    Takes arrays or tensors on the CPU. NaN counts as different: infinity.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    difference = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
    return float("inf") if np.isnan(difference) else float(difference)


def probe(vocabulary: int) -> Batch:
    """Return four rows of seven ids: without padding, padded right, left, and in the middle."""
    rows = ["1111111", "1111000", "0001111", "1101010"]
    mask = np.array([[int(shown) for shown in row] for row in rows])
    return Batch(np.arange(mask.size).reshape(mask.shape) % vocabulary, mask)
