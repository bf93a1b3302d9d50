"""When requests of an open loop are due: a rate and a count or a time go in, seconds come out.

Pure functions. Constant arrivals are a metronome; Poisson arrivals are what many independent users
make together: the gaps are exponential, so that requests come in bursts (MLPerf's server scenario).
"""

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrivals: TypeAlias = Literal["constant", "poisson"]


def arrivals(
    kind: Arrivals, rate: float, count: int, seed: int = 0
) -> NDArray[np.float64]:  # (count,)
    """Return ``count`` due times in seconds, ascending from 0, at ``rate`` requests/s.

    More of them begin with the same ones. ``ValueError`` for a rate that is not above 0 or a count
    below 0.
    """
    if not 0 < rate < math.inf or count < 0:
        raise ValueError(f"a rate above 0 and a count of 0 or more, not {rate} and {count}")
    if kind == "constant":
        return np.arange(count) / rate
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(count - 1, 0))
    return np.concatenate([[0.0], np.cumsum(gaps)])[:count]


def arrivals_within(
    kind: Arrivals, rate: float, seconds: float, seed: int = 0
) -> NDArray[np.float64]:
    """Return the due times before ``seconds``, the same that :func:`arrivals` gives."""
    count = math.ceil(rate * seconds) + 1
    while (due := arrivals(kind, rate, count, seed))[-1] < seconds:
        count *= 2
    return due[due < seconds]
