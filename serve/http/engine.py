"""The engine keeps an inference process alive: watched, ended, and started again.

The process holds the ONNX session, so that a crash or a hang of native code takes no request with
it: what was in flight runs again in the next process. Rows of tokens go in, logits come out.
"""

import asyncio
import logging
import os
from collections.abc import Sequence

import numpy as np

from trainkit.serve.encoding import Tokens
from trainkit.serve.errors import InputError
from trainkit.serve.http.exceptions import InferenceError, UnavailableError
from trainkit.serve.http.inference_process import InferenceProcess, LostError, ProcessSpec
from trainkit.serve.http.worker import Failed
from trainkit.serve.types import FloatArray

__all__ = ["Engine"]

logger = logging.getLogger("trainkit.serve")

PING_S = 0.4
PONG_S = 0.5  # no answer for so long: not ready, which is so within a second of any stop
KILL_S = 2.0  # and for so long: ended. A machine short of cores comes back before that
PAUSES_S = (0.1, 5.0)  # between restarts that follow each other; the first comes at once
TRIES = 2  # a batch whose process ends is run again: it may not have been the batch's doing


class Engine:
    """One inference process at a time, whatever becomes of it.

    Between ``start`` and ``close`` there is a process, or a new one is being started.
    """

    def __init__(self, launch: ProcessSpec) -> None:
        self.launch = launch
        self.restarts = 0
        try:
            self._file = None if launch.files else os.open(launch.model, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{launch.model} cannot be read ({error.strerror}).") from None
        self._turn = asyncio.Lock()
        self._up = asyncio.Event()
        self._process: InferenceProcess | None = None
        self._responsive = False
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the process and wait for its model; ``InputError`` where it does not load."""
        self._adopt(await self._open())
        self._keeper = asyncio.create_task(self._keep())

    @property
    def ready(self) -> bool:
        """Whether there is a process, with its model loaded, that answers pings."""
        return self._alive() is not None and self._responsive

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process."""
        process = self._alive()
        return None if process is None else process.pid

    async def run(self, rows: Sequence[Tokens]) -> FloatArray:
        """Return the logits of one batch, (B, C); batches run one after the other.

        ``InferenceError`` where the session refuses the batch, or the process ends or hangs on it
        twice; ``UnavailableError`` where no new process comes, or the engine is closed.
        """
        how = ""
        async with self._turn:
            for _ in range(TRIES):
                process = await self._available()
                try:
                    answer = await process.run(rows)
                except LostError:
                    how = process.reason or "it ended"
                    continue
                if isinstance(answer, Failed):
                    raise InferenceError(answer.sentence)
                return np.frombuffer(answer.values, dtype=np.float32).reshape(answer.shape)
        raise InferenceError(f"the inference process was lost on it {TRIES} times: {how}")

    async def close(self) -> None:
        """End the process; a batch that still runs gets ``UnavailableError``."""
        self._closed = True
        self._up.set()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._process is not None:
            await self._process.end()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _alive(self) -> InferenceProcess | None:
        process = self._process
        return process if process is not None and process.alive else None

    async def _available(self) -> InferenceProcess:
        while not self._closed:
            process = self._alive()
            if process is not None:
                return process
            self._up.clear()  # until the keeper has a new one
            try:
                await asyncio.wait_for(self._up.wait(), self.launch.return_s)
            except TimeoutError:
                raise UnavailableError(
                    f"the inference process did not come back in {self.launch.return_s:g} s"
                ) from None
        raise UnavailableError("the model is stopped")

    def _adopt(self, process: InferenceProcess) -> None:
        self._process = process
        self._responsive = True
        self._up.set()

    async def _open(self) -> InferenceProcess:
        return await InferenceProcess.start(self.launch, self._file)

    async def _keep(self) -> None:
        """Watch the process; when it is lost start another, for ever, with growing pauses."""
        pause_s = 0.0
        while True:
            process = self._process
            assert process is not None
            await self._watch(process)
            lost_at = asyncio.get_running_loop().time()
            await process.end()
            if process.has_answered:
                pause_s = 0.0
            self._process = None
            while self._process is None:
                await asyncio.sleep(pause_s)
                pause_s = min(max(2 * pause_s, PAUSES_S[0]), PAUSES_S[1])
                try:
                    self._adopt(await self._open())
                except (InputError, OSError) as error:
                    logger.error("%s; trying again in %.1f s", error, pause_s)
            self.restarts += 1
            logger.warning(
                "the inference process of %s was lost (%s); restart %d took %.1f s",
                self.launch.model,
                process.ended(),
                self.restarts,
                asyncio.get_running_loop().time() - lost_at,
            )

    async def _watch(self, process: InferenceProcess) -> None:
        """Return when the process is lost; one that does not answer is ended."""
        while not process.lost.done():
            process.ping()
            self._responsive = await process.answers_ping(PONG_S)
            if not self._responsive and not await process.answers_ping(KILL_S - PONG_S):
                process.kill(f"it did not answer for {KILL_S:g} s")
                await process.lost
            self._responsive = not process.lost.done()
            await asyncio.wait({process.lost}, timeout=PING_S)
