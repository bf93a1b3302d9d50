"""How cores are shared; what becomes of fronts that do not start, or hang."""

import asyncio
import contextlib
import shutil
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.serve.bundle import Serving, write_serving
from trainkit.serve.errors import CheckFailedError, InputError
from trainkit.serve.http import model
from trainkit.serve.http import supervisor as supervisor_module
from trainkit.serve.http.run import WorkerConfig, WorkerReport
from trainkit.serve.http.settings import Settings
from trainkit.serve.http.sockets import bound, url
from trainkit.serve.http.supervisor import Supervisor, shares

pytestmark = pytest.mark.slow

PING_S, SILENT_S = 0.05, 1.0  # more elsewhere
WAIT_S = 60.0  # for what takes a second on an idle machine


@given(st.sets(st.integers(0, 255), min_size=1), st.integers(1, 64))
def test_every_worker_has_cores_and_none_is_left_over(cores, workers):
    found = shares(sorted(cores), workers)
    assert len(found) == workers
    assert {core for share in found for core in share} == (
        cores if workers <= len(cores) else {share[0] for share in found}
    )
    sizes = {len(share) for share in found}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if workers <= len(cores):  # none twice
        assert sum(map(len, found)) == len(cores)


@pytest.fixture
def supervisor(tmp_path):
    """Return a function that makes a supervisor of two fronts for these folders."""
    listener = bound("127.0.0.1", 0)

    def make(silent_s=10.0, **folders):
        config = WorkerConfig(
            folders=folders,
            settings=Settings(threads=1),
            drain_s=0,
            log_level="warning",
            ping_s=PING_S,
            silent_s=silent_s,
        )
        return Supervisor(config, listener, tmp_path, 2)

    yield make
    listener.close()


def test_fronts_that_refuse_to_start_give_their_sentence(supervisor, tmp_path):
    async def start():
        made = supervisor(questions=str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match="nowhere"):
            await made.start()
        assert [one.process.returncode is not None for one in made.workers] == [True, True]

    asyncio.run(start())


@contextlib.asynccontextmanager
async def running(made):
    """Start two fronts and keep them; every process is gone at the end."""
    try:
        await made.start()
        keeping = [asyncio.ensure_future(made.keep(one)) for one in made.workers]
        yield
        made.stop.signal()
        await made.end()
        await asyncio.gather(*keeping)
    finally:
        await made.kill()


async def ask(made):
    """Have a front answer: one that is stopped takes no connection, so the other does."""
    async with httpx.AsyncClient(base_url=url(made.listener), timeout=WAIT_S) as client:
        answer = await client.post("/classify", json={"texts": ["How far is Mars?"]})
    assert answer.status_code == 200


def family(pid):
    """Return a front's process and its inference process."""
    found = [psutil.Process(pid), *psutil.Process(pid).children()]
    assert len(found) == 2
    return found


def silent(caplog):
    return [record.message for record in caplog.records if "did not answer" in record.message]


def test_a_front_that_is_stopped_is_replaced_while_the_other_answers(supervisor, golden, caplog):
    """So is its inference process, which by itself would end with it, were it not stopped too."""

    async def main():
        made = supervisor(silent_s=SILENT_S, golden=str(golden))
        victim, other = made.workers
        async with running(made), asyncio.timeout(WAIT_S):
            pids = victim.process.pid, other.process.pid
            stopped = family(pids[0])
            for process in stopped:
                process.suspend()
            while victim.process.pid == pids[0] or not victim.ready:
                await ask(made)
            assert [one.ready for one in made.workers] == [True, True]
            assert other.process.pid == pids[1]
            _, alive = await asyncio.to_thread(psutil.wait_procs, stopped, WAIT_S)
            assert not alive
            family(victim.process.pid)

    asyncio.run(main())
    (told,) = silent(caplog)
    assert told.startswith("worker 0 (pid ")
    assert "did not answer for 1 s and is killed" in told


def test_without_the_watch_a_stopped_front_stays_as_it_is(supervisor, golden, caplog):
    async def main():
        made = supervisor(silent_s=1e9, golden=str(golden))
        async with running(made):
            pids = [one.process.pid for one in made.workers]
            (stopped, _) = family(pids[0])
            stopped.suspend()
            await asyncio.sleep(SILENT_S + 2)
            assert stopped.status() == psutil.STATUS_STOPPED
            assert [one.process.pid for one in made.workers] == pids
            stopped.resume()

    asyncio.run(main())
    assert silent(caplog) == []


def test_a_front_that_hangs_while_it_starts_is_given_up(supervisor, golden, caplog):
    """It is stopped before its event loop runs, and gets the time that a model has to load."""

    async def main():
        made = supervisor(golden=str(golden))
        settings = msgspec.structs.replace(made.config.settings, start_s=4.0)
        made.config = msgspec.structs.replace(made.config, settings=settings)
        starting = asyncio.ensure_future(made.start())
        while not all(one.process for one in made.workers):
            await asyncio.sleep(0)
        psutil.Process(made.workers[1].process.pid).suspend()
        with pytest.raises(CheckFailedError, match=r"worker \d ended unexpectedly"):
            await starting
        assert all(one.process.returncode is not None for one in made.workers)

    asyncio.run(main())
    told = silent(caplog)[-1]  # on a busy machine the other one may not be up by then either
    assert told.startswith("worker 1 (pid ")
    assert "did not answer for 4 s" in told


def test_fronts_that_opened_different_versions_are_not_served(supervisor, monkeypatch):
    async def start(self, plan, listener):
        return WorkerReport({"golden": str(self.number)})

    monkeypatch.setattr(supervisor_module.HTTPWorker, "start", start)
    with pytest.raises(InputError, match="changed while the workers opened it"):
        asyncio.run(supervisor(golden="anywhere").start())


def test_a_front_that_cannot_be_started_again_is_tried_until_it_can(
    supervisor, golden, monkeypatch, caplog
):
    """The others serve on meanwhile."""
    start, failures = supervisor_module.HTTPWorker.start, []

    async def failing(self, plan, listener):
        if self.process and len(failures) < 2:
            failures.append(self.number)
            raise OSError("Cannot allocate memory")
        return await start(self, plan, listener)

    async def main():
        made = supervisor(golden=str(golden))
        async with running(made), asyncio.timeout(WAIT_S):
            victim, other = made.workers
            pids = victim.process.pid, other.process.pid
            victim.kill()
            while victim.process.pid == pids[0] or not victim.ready:
                await ask(made)
            assert other.process.pid == pids[1]

    monkeypatch.setattr(supervisor_module.HTTPWorker, "start", failing)
    asyncio.run(main())
    assert failures == [0, 0]
    told = "worker 0 cannot be started: Cannot allocate memory"
    assert [record.message for record in caplog.records].count(told) == 2


def test_a_file_of_the_working_directory_is_no_library(supervisor, golden, tmp_path, monkeypatch):
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('taken for the library')")
    monkeypatch.chdir(tmp_path)

    async def main():
        made = supervisor(golden=str(golden))
        async with running(made):
            await ask(made)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("cores", "usable", "workers", "expected"),
    [
        (8, 8, 2, [4, 4]),
        (7, 7, 4, [1, 2, 2, 2]),  # without a quota as many as each has cores
        (8, 5, 2, [2, 2]),
        (8, 1, 2, [1, 1]),
    ],
)
def test_a_quota_is_shared_by_the_workers(tmp_path, monkeypatch, cores, usable, workers, expected):
    """As the most that a front may choose by itself: an option and the bundle may say less."""
    monkeypatch.setattr(supervisor_module, "affinity", lambda: list(range(cores)))
    monkeypatch.setattr(supervisor_module, "usable_cores", lambda: usable)
    with bound("127.0.0.1", 0) as listener:
        made = Supervisor(WorkerConfig(folders={}), listener, tmp_path, workers)
        configs = [one.config(made.config, listener) for one in made.workers]
    assert [config.settings.max_threads for config in configs] == expected
    assert {config.settings.threads for config in configs} == {0}


@pytest.mark.parametrize(("most", "serving", "expected"), [(0, 3, 3), (2, 3, 2), (2, 0, 2)])
def test_a_model_keeps_to_its_fronts_share(golden, tmp_path, monkeypatch, most, serving, expected):
    folder = Path(shutil.copytree(golden, tmp_path / "bundle"))
    if serving:
        provider = "CPUExecutionProvider"
        write_serving(folder, Serving(threads=serving, batch_size=32, provider=provider))
    monkeypatch.setattr(model, "usable_cores", lambda: 3)
    _, _, process = model._open(folder, Settings(max_threads=most))
    assert process.spec.threads == expected
    asyncio.run(process.close())
