"""What Linux tells in ``/proc``, read with the standard library: workers of all environments do."""

from pathlib import Path


def processor_flags() -> set[str]:
    """Return what the processor can do, as Linux names it; nothing where it does not say."""
    return {*colon_separated(Path("/proc/cpuinfo")).get("flags", "").split()}


def peak_rss_bytes() -> int | None:
    """Return the most memory this process ever had resident; None where the system has no /proc.

    Not ``getrusage``: on Linux its maximum survives ``exec``, so that a small child of a large
    parent would report the parent's.
    """
    return _memory_bytes("VmHWM")


def rss_bytes() -> int | None:
    """Return the memory that this process has resident now; None where the system has no /proc."""
    return _memory_bytes("VmRSS")


def _memory_bytes(field: str) -> int | None:
    value = colon_separated(Path("/proc/self/status")).get(field)  # "123 kB", which means KiB
    return None if value is None else int(value.split()[0]) * 1024


def colon_separated(path: Path) -> dict[str, str]:
    """Read ``key : value`` lines, of a key that repeats the first; {} where it cannot be read."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
