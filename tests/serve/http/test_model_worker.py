"""The inference process by itself, over its socket: answers, pings, refusals and its end."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.encoding import Tokens
from trainkit.serve.http import model_worker
from trainkit.serve.http.model_worker import LENGTH, PROGRAM, ProcessSpec, Reply, RowBatch, frame

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle"
TEXTS = [example.text for example in load_sample()[:20]]


@pytest.fixture(scope="module")
def classify():
    return Classifier.load(GOLDEN, threads=1)


class Peer:
    """This end of the sockets to a process that was started by hand."""

    def __init__(self, model=GOLDEN / "model.onnx"):
        self.socket, theirs = socket.socketpair()
        self.heartbeat, their_heartbeat = socket.socketpair()
        for ours in (self.socket, self.heartbeat):
            ours.settimeout(30)
        with theirs, their_heartbeat, model.open("rb") as file:
            spec = ProcessSpec(
                model=str(model),
                ping_s=0.02,
                threads=1,
                providers=("CPUExecutionProvider",),
                pad_id=0,
                token_types=False,
            )
            inherited = (theirs.fileno(), their_heartbeat.fileno(), file.fileno())
            self.process = subprocess.Popen(
                [*PROGRAM, msgspec.json.encode(spec).decode(), *map(str, inherited)],
                pass_fds=inherited,
            )
        self.stream = self.socket.makefile("rb")

    def send(self, message):
        self.socket.sendall(frame(message))

    def next(self):
        (length,) = LENGTH.unpack(self.stream.read(LENGTH.size))
        return msgspec.msgpack.decode(self.stream.read(length), type=Reply)

    def run_for_long(self):
        """Send a batch of half a million tokens, and wait until the session works on it."""
        process = psutil.Process(self.process.pid)
        before_s = process.cpu_times().user
        self.send(batch_of([Tokens([5] * 24, [0] * 24)] * 20_000))
        while process.cpu_times().user < before_s + 0.1:
            time.sleep(0.01)

    def beats(self):
        return self.heartbeat.recv(1) == b"."

    def close(self):
        self.stream.close()
        self.socket.close()
        self.heartbeat.close()


@contextlib.contextmanager
def started(**how):
    peer = Peer(**how)
    try:
        yield peer
    finally:
        peer.close()
        peer.process.kill()
        peer.process.wait()


@pytest.fixture(scope="module")
def peer():
    with started() as peer:
        assert peer.next() == Reply()
        yield peer


def batch_of(rows):
    return RowBatch.of(rows, token_types=False)


def array_of(answer):
    assert not answer.error
    return np.frombuffer(answer.values, np.float32).reshape(answer.shape)


def test_its_logits_are_the_classifiers(peer, classify):
    peer.send(batch_of(classify.tokens(TEXTS)))
    np.testing.assert_allclose(array_of(peer.next()), classify.logits(TEXTS), atol=1e-5)


def test_a_row_of_no_tokens_gets_an_answer(peer, classify):
    peer.send(batch_of([Tokens([], []), *classify.tokens(TEXTS[:1])]))
    np.testing.assert_allclose(array_of(peer.next())[1:], classify.logits(TEXTS[:1]), atol=1e-5)


def test_what_a_mask_hides_is_not_read(peer, classify):
    """A gap and what is right of the text hold any ids at all; the logits stay."""
    (row,) = classify.tokens(TEXTS[:1])
    wider = Tokens([*row.ids, 5, 6], [0] * (len(row.ids) + 2), mask=[1] * len(row.ids) + [0, 0])
    peer.send(batch_of([wider, row]))
    hidden, plain = array_of(peer.next())
    np.testing.assert_allclose(hidden, plain, atol=1e-5)
    peer.send(batch_of([wider._replace(mask=None)]))
    assert np.abs(array_of(peer.next())[0] - plain).max() > 1e-3  # or the mask would prove nothing


def test_types_and_masks_travel_where_they_are_there():
    rows = [Tokens([1, 2], [0, 1]), Tokens([], []), Tokens([3], [1], mask=[0])]
    run = RowBatch.of(rows, token_types=True)
    sent = [run.lengths, run.ids, run.type_ids, run.masks]
    found = [np.frombuffer(values, np.int64).tolist() for values in sent]
    assert found == [[2, 0, 1], [1, 2, 3], [0, 1, 1], [1, 1, 0]]
    plain = batch_of(rows[:2])
    assert plain.type_ids is None
    assert plain.masks is None


def test_an_error_of_the_session_is_told_and_the_process_goes_on(peer, classify):
    peer.send(batch_of([Tokens([10**6], [0])]))
    failed = peer.next()
    assert "Gather" in failed.error
    assert "\n" not in failed.error
    peer.send(batch_of(classify.tokens(TEXTS)))
    np.testing.assert_allclose(array_of(peer.next()), classify.logits(TEXTS), atol=1e-5)


def test_it_sends_heartbeats_while_a_batch_runs(peer):
    peer.run_for_long()
    while select.select([peer.heartbeat], [], [], 0)[0]:
        peer.beats()  # those from before
    assert peer.beats()
    assert not select.select([peer.socket], [], [], 0)[0]  # its logits are not there yet
    assert peer.next().values


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_it_to_the_front(number, peer, classify):
    peer.process.send_signal(number)
    peer.send(batch_of(classify.tokens(TEXTS[:1])))
    assert peer.next().values


def test_it_ends_when_the_sockets_close_also_in_the_middle_of_a_batch():
    with started() as peer:
        peer.next()
        peer.run_for_long()
        peer.close()
        assert peer.process.wait(5) == 0


def test_it_ends_when_the_sockets_close_while_the_model_loads():
    with started() as peer:
        peer.close()
        assert peer.process.wait(20) == 0


def test_a_model_that_cannot_be_opened_is_refused_by_its_name(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    with started(model=model) as peer:
        refused = peer.next()
        assert str(model) in refused.error
        assert "/fd/" not in refused.error
        assert peer.process.wait(20) == 0


FRONT = """
import asyncio, sys
from pathlib import Path
from trainkit.serve.http.model import Model
from trainkit.serve.http.settings import Settings

async def main():
    model = await Model.load("golden", Path(sys.argv[1]), Settings(threads=1))
    print(model.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="a process that is no child is watched")
def test_it_does_not_outlive_a_front_that_is_killed():
    command = [sys.executable, "-c", FRONT, str(GOLDEN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front:
        try:
            watched = os.pidfd_open(int(front.stdout.readline()))
        finally:
            front.kill()
    try:
        assert select.select([watched], [], [], 5)[0]  # readable once it has ended
    finally:
        os.close(watched)


@pytest.mark.parametrize("module", ["model_worker", "model_process", "batching", "model"])
def test_neither_the_web_nor_training_is_imported(module):
    heavy = ("starlette", "uvicorn", "torch", "transformers", "onnx")
    program = (
        f"import sys, trainkit.serve.http.{module}\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_the_front_does_not_load_the_runtime():
    program = "import sys, trainkit.serve.http.model; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "False"


def test_heartbeats_outlast_a_parent_that_reads_none(monkeypatch):
    exited = threading.Event()
    monkeypatch.setattr(model_worker.os, "_exit", lambda code: exited.set())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(b"." * 4096)
        thread = threading.Thread(target=model_worker._beat, args=(theirs, 0.01), daemon=True)
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        ours.close()
        assert exited.wait(5)
