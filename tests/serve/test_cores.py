"""How many cores a process may use, as the system and a container's quota say."""

import pytest

from trainkit.serve import cores as cores_module
from trainkit.serve.cores import quota_cores, usable_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
    ],
)
def test_the_cpu_quota_of_both_cgroup_versions_is_read(tmp_path, files, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert quota_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"), [(4, None, 4), (4, 1.5, 1), (4, 0.5, 1), (2, 8.0, 2)]
)
def test_a_quota_is_not_exceeded_by_threads(affinity, quota, expected, monkeypatch):
    monkeypatch.setattr(cores_module, "affinity_cores", lambda: affinity)
    monkeypatch.setattr(cores_module, "quota_cores", lambda: quota)
    assert usable_cores() == expected
