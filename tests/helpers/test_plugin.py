"""The plugin of these tests: a test that takes too long fails, and timing tests run alone."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SLEEP = """
import pytest, time

{mark}
def test_it():
    time.sleep(0.3)
"""
SPAN = """
import pytest, time
from pathlib import Path

@pytest.mark.parametrize("number", range(4))
{mark}
def test_it(number, once):
    begin = time.monotonic()
    time.sleep(0.1)
    with Path({log!r}).open("a") as file:
        file.write(f"{{begin}} {{time.monotonic()}}\\n")
"""


def run(folder, *arguments, **environment):
    (folder / "conftest.py").write_text(
        "from tests.helpers import plugin\nplugin.WALL_LIMIT_S = 0.2\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    timing\n    studies\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "xdist.plugin",
        "-p",
        "tests.helpers.plugin",
        *arguments,
        folder,
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    plain = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **plain, **environment}
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("mark", "limit", "code"),
    [("", "1", 1), ("@pytest.mark.slow", "1", 0), ("", "", 0)],
)
def test_an_unmarked_test_has_a_time_limit(mark, limit, code, tmp_path):
    (tmp_path / "test_sleep.py").write_text(SLEEP.format(mark=mark))
    environment = {"TRAINKIT_TEST_LIMIT": limit}
    status, output = run(tmp_path, **environment)
    assert status == code, output
    assert ("mark it as slow" in output) == bool(code)


@pytest.mark.parametrize("mark", ["@pytest.mark.timing", ""])
def test_a_timing_test_runs_alone(mark, tmp_path):
    log = tmp_path / "log"
    for name, marks in (("one", mark), ("two", "")):
        text = SPAN.format(mark=marks, log=str(log))
        (tmp_path / f"test_{name}.py").write_text(text)
    status, output = run(tmp_path, "--numprocesses", "2", "--dist", "loadfile")
    assert status == 0, output
    spans = sorted(tuple(map(float, line.split())) for line in log.read_text().splitlines())
    assert len(spans) == 8
    if mark:
        ends = [end for _, end in spans[:-1]]
        assert all(end <= begin for end, (begin, _) in zip(ends, spans[1:], strict=True))
