"""A front as its supervisor sees it: started, watched, given orders, ended.

They talk over a socket of their own, in the words of :mod:`trainkit.serve.http.run`. It closes when
the supervisor ends in whatever way, and then the front ends too. A front whose event loop answers
no ping, since it hangs or was stopped, is killed: its supervisor sees it die and replaces it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from trainkit.serve.http.run import LINE_BYTES, FromFront, Load, Ping, Report, ToFront, WorkerConfig

__all__ = ["HTTPWorker"]

PING_S = 1.0
SILENT_S = 10.0  # a front is given up then; one that is short of cores answers sooner

log = logging.getLogger("trainkit.serve")


class HTTPWorker:
    """One front's process and the channel to it; started again, another process and channel."""

    def __init__(self, number: int, cores: tuple[int, ...], threads: int, metrics: Path) -> None:
        self.number = number
        self.cores = cores
        self.threads = threads  # at most, where nobody says how many
        self.metrics = metrics
        self.process: asyncio.subprocess.Process | None = None
        self.ready = False
        self._turn = asyncio.Lock()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._has_answered = False  # its interpreter is up
        self._answered = False  # the last ping

    async def start(self, plan: WorkerConfig, listener: socket.socket) -> Report:
        """Start the process; returns what became of it. Its error, or its end, is in the report.

        ``OSError`` where the system makes no process.
        """
        ours, theirs = socket.socketpair()
        self.reader, self.writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        try:
            with theirs:
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # a file of the working directory must not stand in for a library
                    "-m",
                    "trainkit.serve.http.run",
                    str(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), listener.fileno()),
                    env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(self.metrics)},
                    start_new_session=True,  # Ctrl-C in a terminal is the supervisor's alone
                )
        except OSError:
            self.writer.close()
            raise
        self._reports = asyncio.Queue()
        self._has_answered = False
        self._send(self.plan(plan, listener))
        self._tasks = [
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._watch(plan.settings.start_s)),
        ]
        report = await self._report()
        self.ready = report.error is None
        return report

    def plan(self, plan: WorkerConfig, listener: socket.socket) -> WorkerConfig:
        """Return this front's own plan."""
        # Of a quota it cannot see its share by itself, nor of cores where it is bound to none.
        settings = msgspec.structs.replace(plan.settings, max_threads=self.threads)
        return msgspec.structs.replace(
            plan, settings=settings, cores=self.cores, listener=listener.fileno()
        )

    async def load(self, order: Load) -> Report:
        """Have one model loaded anew."""
        async with self._turn:
            self._send(order)
            return await self._report()

    def _send(self, message: WorkerConfig | ToFront) -> None:
        self.writer.write(msgspec.json.encode(message) + b"\n")

    async def _report(self) -> Report:
        """Wait for the answer to an order; the end of the channel is one too."""
        report = asyncio.ensure_future(self._reports.get())
        try:
            await asyncio.wait({report, self._tasks[0]}, return_when=asyncio.FIRST_COMPLETED)
            if report.done():
                return report.result()
            return Report(error=f"worker {self.number} ended unexpectedly.", exit_code=1)
        finally:
            report.cancel()

    async def _listen(self) -> None:
        """Take what the front says, until it closes the channel."""
        decoder: msgspec.json.Decoder[FromFront] = msgspec.json.Decoder(FromFront)
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                message = decoder.decode(line)
                if isinstance(message, Report):
                    self._reports.put_nowait(message)
                else:
                    self._answered = self._has_answered = True

    async def _watch(self, start_s: float) -> None:
        """Ping the front for as long as it lives, and kill it when it stays silent.

        What counts is the seconds that this process was awake for: where it was stopped too, what
        the front said meanwhile is seen first.
        """
        silent_s = 0.0
        while silent_s < (bound_s := SILENT_S if self._has_answered else start_s):
            if not silent_s:
                self._answered = False
                self._send(Ping())
            await asyncio.sleep(PING_S)
            silent_s = 0.0 if self._answered else silent_s + PING_S
        assert self.process
        log.error(
            "worker %d (pid %d) did not answer for %.0f s and is killed",
            self.number,
            self.process.pid,
            bound_s,
        )
        self.kill()

    def kill(self) -> None:
        """Kill the process and its model processes, which may be stopped as it is."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the process to end; returns its exit code, or minus the signal."""
        assert self.process
        status = await self.process.wait()
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
        return status

    def signal(self) -> None:
        """Ask it to end, as SIGTERM does."""
        if self.process and self.process.returncode is None:
            self.process.terminate()

    async def close(self) -> None:
        """Kill it, and leave no zombie."""
        if self.process:
            self.kill()
            await self.ended()
