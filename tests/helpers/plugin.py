"""Schedule tests over processes: shared fixtures, tests that run alone, a limit on a test's time.

``python -m pytest --numprocesses 2 --dist loadfile`` (pytest-xdist) gives each process whole files,
so that a module's fixtures are made once.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A test may take this long unless it is marked ``slow`` or is left out of `make test`. Processor
# time hardly depends on what else the machine does; the wait for sleeps and other processes does.
CPU_LIMIT_S, WALL_LIMIT_S = 20, 60
NO_LIMIT = ("slow", "long", "cross", "browser", "install", "peers", "ray", "studies")
CHECK_LIMIT = "TRAINKIT_TEST_LIMIT"


@pytest.fixture(scope="session")
def once(tmp_path_factory, pytestconfig) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return ``once(name, make)``: a folder that one of the test processes makes for all of them.

    ``make(folder)`` creates the folder. Tests must not change it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if _is_worker(pytestconfig) else base) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with _locked(shared / f"{name}.lock", fcntl.LOCK_EX):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of studies by their folder, and put files with slow tests first.

    At the end of a run, one process would have to wait for the other.
    """
    slow = set()
    for item in items:
        path = item.nodeid.partition("::")[0]
        if "tests/bench/studies/" in path:
            item.add_marker(pytest.mark.studies)
        if item.get_closest_marker("slow"):
            slow.add(path)
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test marked ``timing`` while no other test process runs one.

    A test holds ``tests.lock`` shared, a timing test exclusively; each passes through
    ``next.lock`` first, so that a waiting timing test comes next.
    """
    if not _is_worker(item.config):
        return (yield)
    root = item.config._tmp_path_factory.getbasetemp().parent
    kind = fcntl.LOCK_EX if item.get_closest_marker("timing") else fcntl.LOCK_SH
    with contextlib.ExitStack() as held:
        with _locked(root / "next.lock", fcntl.LOCK_EX):
            held.enter_context(_locked(root / "tests.lock", kind))
        return (yield)


def _cpu_s() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Fail an unmarked test that takes too long, if the environment asks for it."""
    wall, cpu = time.monotonic(), _cpu_s()
    result = yield
    wall, cpu = time.monotonic() - wall, _cpu_s() - cpu
    if (
        os.environ.get(CHECK_LIMIT)
        and not any(map(pyfuncitem.get_closest_marker, NO_LIMIT))
        and (cpu > CPU_LIMIT_S or wall > WALL_LIMIT_S)
    ):
        pytest.fail(f"took {cpu:.0f} s of processor time, {wall:.0f} s in all; mark it as slow")
    return result
