"""The machine and the libraries that a measurement was made with, without naming the machine.

It has no host name, user name or path, so that a report can be published as it is.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec

from trainkit import __version__
from trainkit.bench.measure.procfs import colon_separated, processor_flags
from trainkit.serve.cores import affinity_cores, quota_cores

NOISY_THEFT = 0.05

# What decides how fast a matrix product is on x86: vector width, and dot products of bytes.
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)
PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "onnx",
    "numpy",
    "tokenizers",
    "aiohttp",
)


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine at one moment.

    ``cores`` are those this process may run on; ``quota_cores`` is the cgroup's limit of CPU time,
    in cores, None without one. ``load_average`` is over 1, 5 and 15 minutes. A package that is not
    installed has version None. ``gpu`` is "none" or the names that nvidia-smi prints, with
    ``gpu_driver``'s version. ``governor`` is how the kernel sets the first core's clock, None where
    it does not say, as in most virtual machines. ``providers`` are ONNX Runtime's.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    quota_cores: float | None
    memory_bytes: int
    load_average: tuple[float, float, float]
    python: str
    platform: str
    versions: dict[str, str | None]
    gpu: str
    gpu_driver: str | None = None
    governor: str | None = None
    providers: tuple[str, ...] = ()


def cpu_steal_monitor() -> Callable[[], tuple[str, ...]]:
    """Begin to count what a hypervisor takes; what it returns says at the end whether it matters.

    In a virtual machine others may get the cores while programs here wait for them; the kernel
    counts that as stolen (``proc_stat(5)``). No reason where it does not.
    """
    stolen, wanted = _cpu_seconds()

    def reasons() -> tuple[str, ...]:
        stolen_now, wanted_now = _cpu_seconds()
        share = (stolen_now - stolen) / max(wanted_now - wanted, 1e-9)
        if share <= NOISY_THEFT:
            return ()
        return (f"other virtual machines took {100 * share:.0f}% of the CPU time wanted here",)

    return reasons


def _cpu_seconds() -> tuple[float, float]:
    """Return what was stolen from this machine since it started, and what it wanted in all."""
    import psutil  # of the extra `bench`; describing a machine needs only the base install

    times = psutil.cpu_times()
    stolen: float = getattr(times, "steal", 0.0)  # Linux counts it
    wanted = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return stolen, wanted + stolen


def describe() -> Environment:
    """Look at this machine as it is now."""
    cpuinfo = colon_separated(Path("/proc/cpuinfo"))
    present = processor_flags()
    return Environment(
        processor=cpuinfo.get("model name") or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in present),
        cores=affinity_cores(),
        quota_cores=quota_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=os.getloadavg(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={package: _version(package) for package in PACKAGES} | {"trainkit": __version__},
        gpu=_nvidia("name") or "none",
        gpu_driver=_nvidia("driver_version"),
        governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        providers=_providers(),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _nvidia(field: str) -> str | None:
    """Ask nvidia-smi about each GPU; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # the program is there without a driver, as in many containers
    return ", ".join(answer.stdout.split("\n")).strip(", ") or None
