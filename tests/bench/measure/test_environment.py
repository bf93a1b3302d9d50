import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from trainkit.bench.measure import environment, procfs
from trainkit.serve.cores import usable_cores


def test_the_environment_names_versions_and_no_person_or_place() -> None:
    found = environment.describe()
    assert found.versions["numpy"] is not None
    assert found.cores >= usable_cores() >= 1
    assert found.memory_bytes > 2**28
    encoded = msgspec.json.encode(found).decode()
    assert str(Path.home()) + "/" not in encoded
    assert platform.node() not in encoded
    if getpass.getuser() != "root":
        assert getpass.getuser() not in encoded
    assert msgspec.json.decode(encoded, type=environment.Environment) == found


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert environment._version("no-such-package-at-all") is None


def test_describing_the_environment_imports_no_torch() -> None:
    program = (
        "import sys; from trainkit.bench.measure.environment import describe; describe();"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert printed.stdout == "[]\n"


def test_a_driverless_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    program.chmod(0o755)
    assert environment._nvidia("name") is None
    program.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    assert environment._nvidia("name") == "NVIDIA H100, NVIDIA H100"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read in /proc")
def test_the_peak_of_a_small_child_is_not_that_of_its_large_parent() -> None:
    ballast = b"x" * 300_000_000
    program = "from trainkit.bench.measure.procfs import peak_rss_bytes; print(peak_rss_bytes())"
    printed = subprocess.check_output([sys.executable, "-P", "-c", program], text=True)
    assert 5_000_000 < int(printed) < 150_000_000
    peak = procfs.peak_rss_bytes()
    assert peak is not None
    assert peak > len(ballast)


def test_time_that_other_machines_took_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(10.0, 100.0), (11.0, 104.0), (10.0, 100.0), (10.1, 104.0)])
    monkeypatch.setattr(environment, "_cpu_seconds", lambda: next(seconds))
    assert environment.cpu_steal_monitor()() == (
        "other virtual machines took 25% of the CPU time wanted here",
    )
    assert environment.cpu_steal_monitor()() == ()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="compares with Linux's own counters")
def test_the_counters_are_the_kernels() -> None:
    before = environment._cpu_seconds()
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    after = environment._cpu_seconds()
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = (int(field) / ticks for field in fields)
    assert before[0] <= steal <= after[0]
    wanted = user + nice + system + irq + softirq + steal
    assert before[1] - 0.05 <= wanted <= after[1] + 0.05
