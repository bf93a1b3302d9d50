"""Types that the runtimes, the classifier and the benchmarks share."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trainkit.serve.encoding import Batch

FloatArray: TypeAlias = npt.NDArray[np.float32]

Runner: TypeAlias = Callable[[Batch], FloatArray]
"""A runtime: takes a padded batch of B texts and returns their (B, C) float32 logits."""
