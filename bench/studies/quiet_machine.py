"""Wait until other virtual machines leave this one its cores."""

import time
from collections.abc import Callable

import numpy as np

from trainkit.bench.measure.environment import cpu_steal_monitor

BUSY_S, PAUSE_S = 2.0, 15.0


def wait_until_quiet(within_s: float, told: Callable[[str], None]) -> None:
    """Wait until others take little of this machine, ``within_s`` seconds at most.

    It multiplies matrices on all cores for a moment: CPU time is only stolen from a busy machine.
    A machine that is still busy after that time is measured; the result then says why it is noisy.
    """
    until = time.monotonic() + within_s
    square = np.ones((512, 512), dtype=np.float32)
    while time.monotonic() < until:
        theft, busy_until = cpu_steal_monitor(), time.monotonic() + BUSY_S
        while time.monotonic() < busy_until:
            square @ square
        reasons = theft()
        if not reasons:
            return
        told(f"waiting for a quiet machine: {reasons[0]}")
        time.sleep(min(PAUSE_S, max(0.0, until - time.monotonic())))
