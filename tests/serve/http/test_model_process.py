"""The inference process may be killed, stopped or hung, and comes back; nothing is left behind."""

import asyncio
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.http.exceptions import InferenceError, UnavailableError
from trainkit.serve.http.model_process import ModelProcess
from trainkit.serve.http.model_worker import ProcessSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle"
TEXTS = [example.text for example in load_sample()[:20]]

# Ids that the texts do not hold; the model knows them, and POISONED does not survive them.
CRASH, HANG, SEIZE = (Tokens([number], [0]) for number in (150, 151, 152))

POISONED = f"""
import ctypes, os, signal, sys, time
from trainkit.serve import onnx_session
from trainkit.serve.http import model_worker

sound = onnx_session.onnx_runner

def onnx_runner(*arguments, **settings):
    run = sound(*arguments, **settings)

    def poisoned(batch):
        ids = set(batch.input_ids.flatten().tolist())
        if {CRASH.ids[0]} in ids:
            os.kill(os.getpid(), signal.SIGSEGV)  # as native code would
        if {HANG.ids[0]} in ids:
            time.sleep(600)
        if {SEIZE.ids[0]} in ids:
            ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
        return run(batch)

    return poisoned

onnx_session.onnx_runner = onnx_runner
model_worker.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def classify():
    return Classifier.load(GOLDEN, threads=1)


@pytest.fixture(scope="module")
def rows(classify):
    rows = classify.tokens(TEXTS)
    assert not {150, 151, 152} & {number for row in rows for number in row.ids}
    return rows


@pytest.fixture(scope="module")
def expected(classify):
    return classify.logits(TEXTS)


def spec(**changed):
    settings = {
        "model": str(GOLDEN / "model.onnx"),
        "pad_id": 0,
        "token_types": False,
        "threads": 1,
        "providers": ("CPUExecutionProvider",),
        "start_s": 30,
        "hang_s": 30,
        "return_s": 30,
    }
    return ProcessSpec(**settings | changed)


POISON = (sys.executable, "-c", POISONED)
FAST = {"ping_s": 0.05, "kill_s": 0.5}


def go(scenario, **changed):
    """Run a scenario with a started process, which leaves no process and no descriptor."""

    async def main():
        process = ModelProcess(spec(**changed))
        try:
            await process.start()
            assert process.ready
            return await scenario(process)
        finally:
            pid, file = process.pid, process._file
            await process.close()
            assert not process.ready
            if pid is not None:
                with pytest.raises(ProcessLookupError):  # a zombie would still be found
                    os.kill(pid, 0)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(file)

    return asyncio.run(main())


async def until(happens, within_s=10.0):
    """Wait for what has no event of its own; return how long it took, in seconds."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while not happens():
        assert loop.time() < begun + within_s
        await asyncio.sleep(0.01)
    return loop.time() - begun


def test_its_logits_are_the_classifiers(rows, expected):
    async def scenario(process):
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)
        several = await asyncio.gather(*(process.run([row]) for row in rows))
        np.testing.assert_allclose(np.concatenate(several), expected, atol=1e-5)

    go(scenario)


def test_a_batch_survives_the_death_of_its_process(rows, expected, caplog):
    """Killed twice under load: each batch is answered, and one line is logged each time."""

    async def scenario(process):
        many = [process.run(rows) for _ in range(300)]
        running = asyncio.gather(*many)
        for restarts in (1, 2):
            await asyncio.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda restarts=restarts: process.restarts == restarts)
        for found in await running:
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert process.ready

    with caplog.at_level(logging.WARNING, "trainkit.serve"):
        go(scenario)
    assert len(caplog.messages) == 2
    assert "signal 9, SIGKILL" in caplog.text
    assert not any(text in caplog.text for text in TEXTS)


def test_a_stopped_process_is_noticed_within_a_second_and_replaced(rows, expected):
    async def scenario(process):
        os.kill(process.pid, signal.SIGSTOP)
        answer = asyncio.create_task(process.run(rows))
        assert await until(lambda: not process.ready) < 1.1  # and a tenth, on a loaded machine
        np.testing.assert_allclose(await answer, expected, atol=1e-5)
        assert process.ready
        assert process.restarts == 1

    go(scenario)


def test_a_process_that_was_only_slow_is_kept(rows, expected):
    async def scenario(process):
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: not process.ready)
        os.kill(pid, signal.SIGCONT)
        await until(lambda: process.ready)
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)
        assert process.pid == pid

    go(scenario)


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        (CRASH, "lost on it 2 times: it ended"),
        (HANG, r"lost on it 2 times: a batch took longer than 0\.3 s"),
        pytest.param(SEIZE, "did not answer for 0.5 s", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_no_process_survives_is_given_up(poison, told, rows, expected):
    async def scenario(process):
        with pytest.raises(InferenceError, match=told):
            await process.run([rows[0], poison])
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)
        assert process.restarts == 2

    go(scenario, program=POISON, hang_s=30 if poison is SEIZE else 0.3, **FAST)


def test_an_error_of_the_session_costs_no_process(rows, expected):
    async def scenario(process):
        with pytest.raises(InferenceError, match="Gather"):
            await process.run([rows[0], Tokens([10**6], [0])])
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)
        assert process.restarts == 0

    go(scenario)


def test_it_comes_back_after_the_bundle_was_deleted(rows, expected, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "bundle")

    async def scenario(process):
        shutil.rmtree(folder)
        os.kill(process.pid, signal.SIGKILL)
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)

    go(scenario, model=str(folder / "model.onnx"))


def test_a_cancelled_batch_leaves_the_next_one_its_own_answer(rows, expected):
    async def scenario(process):
        gone = asyncio.create_task(process.run(rows[::-1]))
        await asyncio.sleep(0)
        gone.cancel()
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)

    go(scenario)


def test_while_no_process_comes_back_it_is_tried_for_ever(rows, expected, caplog):
    async def scenario(process):
        sound = process.spec
        process.spec = spec(
            program=(sys.executable, "-c", "raise SystemExit(3)"),
            return_s=0.2,
            pauses_s=(0.01, 0.02),
        )
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match=r"did not come back in 0\.2 s"):
            await process.run(rows)
        assert not process.ready
        await until(lambda: caplog.text.count("exit code 3") >= 2)
        process.spec = sound
        np.testing.assert_allclose(await process.run(rows), expected, atol=1e-5)

    go(scenario)


def test_closing_ends_a_batch_that_runs(rows):
    async def scenario(process):
        running = asyncio.create_task(process.run([HANG]))
        await asyncio.sleep(0.05)
        await process.close()
        with pytest.raises(UnavailableError):
            await running

    async def main():
        process = ModelProcess(spec(program=POISON))
        await process.start()
        await scenario(process)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"providers": ("NoSuchProvider",)}, "no NoSuchProvider, only .*CPUExecutionProvider"),
        ({"program": (sys.executable, "-c", "raise SystemExit(3)")}, r"ended while .*exit code 3"),
        (
            {"program": (sys.executable, "-c", "import time; time.sleep(60)"), "start_s": 0.2},
            r"was not loaded in 0\.2 s",
        ),
    ],
)
def test_a_process_that_does_not_start_is_one_sentence(changed, told):
    async def main():
        process = ModelProcess(spec(**changed))
        with pytest.raises(InputError, match=told) as caught:
            await process.start()
        assert "\n" not in str(caught.value)
        assert process.pid is None
        await process.close()

    asyncio.run(main())


def cpu_s(pid):
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_costs_less_than_a_hundredth_of_a_core(rows):
    async def scenario(process):
        await process.run(rows)
        await asyncio.sleep(0.3)
        pids = [os.getpid(), process.pid]
        before = sum(map(cpu_s, pids))
        await asyncio.sleep(2)
        assert sum(map(cpu_s, pids)) - before <= 0.02

    go(scenario)
