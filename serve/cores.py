"""How many cores this process may use: its affinity, and a container's quota of time."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Return how many threads can run at once without being stopped by a quota: at least 1."""
    quota = quota_cores()
    return affinity_cores() if quota is None else max(1, min(affinity_cores(), int(quota)))


def affinity() -> list[int]:
    """Return the cores that the system may run this process on; all if it does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def affinity_cores() -> int:
    """Return how many cores the system may run this process on."""
    return len(affinity())


def quota_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Read the CPU limit of cgroup v2, or of v1; None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0:  # v2 and v1 for "no limit"
        return None
    return int(quota) / int(period)
