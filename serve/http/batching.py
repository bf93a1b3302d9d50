"""The queue of one model: forms batches by tokens from the rows of all waiting requests.

As soon as the model is free, waiting rows run, one of each request in turn up to the budget, so
that a small request does not wait for a large one. ``run`` is any coroutine function from rows of
tokens to their logits and gets one batch at a time. B rows, S tokens in the longest of them.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter  # uvloop's own time has milliseconds only
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from trainkit.serve.encoding import Tokens
from trainkit.serve.http.exceptions import (
    DeadlineError,
    InferenceError,
    QueueFullError,
    UnavailableError,
)
from trainkit.serve.types import FloatArray

# Attention runs on the padded batch, in a packed graph too: a row of S positions costs there what
# S**2 / ATTENTION tokens cost elsewhere. Measured with MiniLM: 140 in int8, 240 in fp32.
ATTENTION = 170
# Allowed padding: a share of the rows' cost, plus about the cost of a batch of its own, in tokens.
WASTE, WASTE_TOKENS = 0.25, 16
RETRY_S = (0.1, 60.0)  # bounds of Retry-After; before the first batch:
UNKNOWN_RETRY_S = 1.0


class InferenceResult(NamedTuple):
    """The logits of one request, (N, C), and where its time went, in seconds."""

    logits: FloatArray
    queue_s: float  # until the first of its rows went into a batch
    infer_s: float  # from then until the last of its rows came back


class BatchStats(NamedTuple):
    """One batch that was answered; ``queue_s`` is the longest that one of its rows waited."""

    rows: int
    tokens: int
    queue_s: float
    infer_s: float


class BatchingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What may be in a batch and in the queue; see ``Settings`` for the numbers.

    ``packed``: the graph computes on real tokens, which then count, and padding costs attention
    alone; else B * S count. ``equal_lengths``: only rows of one length go together; without it,
    rows of such lengths that little is padding.
    """

    batch_tokens: int = 2048
    batch_rows: int = 64
    max_wait_ms: float = 0.0
    queue_tokens: int = 1 << 18
    packed: bool = False
    equal_lengths: bool = False


class _Request:
    """Rows that are answered together. ``order`` says which row goes when: the longest first."""

    def __init__(self, rows: Sequence[Tokens], now: float, deadline: float) -> None:
        self.rows = rows
        self.lengths = [_length(row) for row in rows]
        self.order = sorted(range(len(rows)), key=self.lengths.__getitem__)  # taken from the end
        self.tokens = sum(self.lengths)  # that wait
        self.unanswered = len(rows)
        self.arrived_at, self.started_at, self.deadline = now, now, deadline
        self.has_started = False
        self.logits: FloatArray | None = None
        self.done: asyncio.Future[InferenceResult] = asyncio.get_running_loop().create_future()


_Row: TypeAlias = tuple[_Request, int]


def _length(row: Tokens) -> int:
    return max(1, len(row.ids))  # a blank row is padded to one token


def _worth(length: int) -> float:
    return length + length**2 / ATTENTION


class _BatchCost:
    """What is in a batch so far."""

    def __init__(self, policy: BatchingPolicy) -> None:
        self.policy, self.rows = policy, 0
        self.tokens = self.longest = 0
        self.worth = 0.0  # what the rows would cost without padding, in tokens

    def takes(self, length: int) -> bool:
        """Tell whether one more row fits; a first row always does."""
        if not self.rows:
            return True
        if self.policy.equal_lengths and length != self.longest:
            return False
        rows, longest = self.rows + 1, max(self.longest, length)
        tokens = self.tokens + length if self.policy.packed else rows * longest
        if tokens > self.policy.batch_tokens:
            return False
        worth = self.worth + _worth(length)
        return tokens + rows * longest**2 / ATTENTION <= (1 + WASTE) * worth + WASTE_TOKENS

    def add(self, length: int) -> None:
        self.rows += 1
        self.tokens += length
        self.worth += _worth(length)
        self.longest = max(self.longest, length)


class Batcher:
    """Collects requests and runs their rows; made within a running event loop."""

    def __init__(
        self,
        run: Callable[[Sequence[Tokens]], Awaitable[FloatArray]],
        policy: BatchingPolicy,
        on_batch: Callable[[BatchStats], None] = lambda facts: None,
    ) -> None:
        self.policy = policy
        self.on_batch = on_batch
        self.queued_rows = 0
        self.queued_tokens = 0
        self.tokens_per_s: float | None = None
        self._run = run
        # In the order in which they give their next row.
        self._ring: OrderedDict[_Request, None] = OrderedDict()
        self._open: set[_Request] = set()  # that somebody waits for
        self._arrival = asyncio.Event()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._serve())
        self._task.add_done_callback(self._stopped)

    @property
    def running(self) -> bool:
        """Whether it forms batches: until it is closed."""
        return not self._task.done()

    async def submit(self, rows: Sequence[Tokens], timeout_s: float) -> InferenceResult:
        """Return the (N, C) logits of N rows, N at least 1, in their order.

        Raises ``DeadlineError`` if ``timeout_s`` pass before the first row runs (after that, all
        run), ``QueueFullError`` if the queue has no room (a request larger than the queue is taken
        when nothing else waits), ``InferenceError`` if ``run`` fails on these rows alone, and
        ``UnavailableError`` once closed. Cancelling it removes its rows from the queue.
        """
        assert rows
        if self._closing:
            raise UnavailableError("the model is stopping")
        now = perf_counter()
        request = _Request(rows, now, now + timeout_s)
        if self.queued_tokens and self.queued_tokens + request.tokens > self.policy.queue_tokens:
            raise QueueFullError(self._retry_after_s(request.tokens))
        self._enter(request)
        timer = self._loop.call_later(timeout_s, self._expire, request)
        try:
            return await request.done
        finally:
            timer.cancel()
            self._leave(request)

    async def close(self, grace_s: float) -> None:
        """Take nothing new, finish what is queued; after ``grace_s`` the rest is given up."""
        self._closing = True
        if self._open:
            await asyncio.wait({request.done for request in self._open}, timeout=grace_s)
        self._task.cancel()
        await asyncio.wait({self._task})
        for request in self._open:
            _fail(request, UnavailableError("the model stopped before it came to this request"))

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """Fail every waiting request if the queue itself fails, which is a bug."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._closing = True
            for request in self._open:
                _fail(request, error)

    def _enter(self, request: _Request) -> None:
        self._ring[request] = None
        self._open.add(request)
        self.queued_rows += len(request.rows)
        self.queued_tokens += request.tokens
        self._arrival.set()

    def _leave(self, request: _Request) -> None:
        """Take what still waits of a request out of the queue."""
        self._open.discard(request)
        if request in self._ring:
            del self._ring[request]
            self.queued_rows -= len(request.order)
            self.queued_tokens -= request.tokens

    def _expire(self, request: _Request) -> None:
        if not request.has_started:
            _fail(request, DeadlineError("the deadline passed while the request waited"))
            self._leave(request)

    def _retry_after_s(self, tokens: int) -> float:
        """Estimate when there will be room for ``tokens``."""
        if self.tokens_per_s is None:
            return UNKNOWN_RETRY_S
        excess = (
            self.queued_tokens + min(tokens, self.policy.queue_tokens) - self.policy.queue_tokens
        )
        low, high = RETRY_S
        return min(max(excess / self.tokens_per_s, low), high)

    async def _serve(self) -> None:
        while True:
            await self._arrival.wait()
            if self.policy.max_wait_ms:
                await self._fill()
            batch = self._take()
            if batch:
                await self._answer(batch)
            if not self._ring:
                self._arrival.clear()

    async def _fill(self) -> None:
        """Wait until a batch is full, but not longer than the first request may be kept."""
        while self._ring and not self._closing:
            oldest = min(request.arrived_at for request in self._ring)
            left_s = oldest + self.policy.max_wait_ms / 1000 - perf_counter()
            enough = (
                self.queued_rows >= self.policy.batch_rows
                or self.queued_tokens >= self.policy.batch_tokens
            )
            if enough or left_s <= 0:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left_s)
            except TimeoutError:
                return

    def _take(self) -> list[_Row]:
        """Form a batch: a row of each request in turn.

        A request whose next row does not fit keeps its place before those that came after it, and
        so is the first of a later batch at the latest: no length waits for ever.
        """
        now = perf_counter()
        load, batch, kept = _BatchCost(self.policy), list[_Row](), list[_Request]()
        # Not all of a long queue is tried for the last free tokens of a batch.
        while self._ring and max(load.rows, len(kept)) < self.policy.batch_rows:
            request, _ = self._ring.popitem(last=False)
            number = request.order[-1]
            length = request.lengths[number]
            if not request.has_started and request.deadline <= now:
                self._ring[request] = None
                self._expire(request)
            elif not load.takes(length):
                kept.append(request)
            else:
                load.add(length)
                batch.append((request, number))
                self._taken(request, length, now)
        for request in reversed(kept):
            self._ring[request] = None
            self._ring.move_to_end(request, last=False)
        return batch

    def _taken(self, request: _Request, length: int, now: float) -> None:
        if not request.has_started:
            request.has_started, request.started_at = True, now
        request.order.pop()
        request.tokens -= length
        self.queued_rows -= 1
        self.queued_tokens -= length
        if request.order:
            self._ring[request] = None

    async def _answer(self, batch: list[_Row]) -> None:
        """Run a batch; if it fails, run each of its requests alone to find the cause."""
        started_at = perf_counter()
        try:
            logits = await self._run([request.rows[number] for request, number in batch])
        except InferenceError as error:
            requests = list(dict.fromkeys(request for request, _ in batch))
            if len(requests) == 1:
                _fail(requests[0], error)
                self._leave(requests[0])
            else:
                for guest in requests:
                    if not guest.done.done():
                        await self._answer([row for row in batch if row[0] is guest])
        except Exception as error:  # the callers get it, and the queue goes on
            for request, _ in batch:
                _fail(request, error)
                self._leave(request)
        else:
            infer_s = perf_counter() - started_at
            self._hand_out(batch, logits)
            self._measure(batch, started_at, infer_s)

    def _measure(self, batch: list[_Row], started_at: float, infer_s: float) -> None:
        tokens = sum(request.lengths[number] for request, number in batch)
        rate = tokens / max(infer_s, 1e-6)
        before = self.tokens_per_s
        self.tokens_per_s = rate if before is None else 0.9 * before + 0.1 * rate
        waited_s = started_at - min(request.arrived_at for request, _ in batch)
        self.on_batch(BatchStats(len(batch), tokens, waited_s, infer_s))

    def _hand_out(self, batch: list[_Row], logits: FloatArray) -> None:
        now = perf_counter()
        for (request, number), row in zip(batch, logits, strict=True):
            if request.logits is None:
                request.logits = np.empty((len(request.rows), len(row)), dtype=np.float32)
            request.logits[number] = row
            request.unanswered -= 1
            if not request.unanswered and not request.done.done():
                queue_s = request.started_at - request.arrived_at
                answer = InferenceResult(request.logits, queue_s, now - request.started_at)
                request.done.set_result(answer)


def _fail(request: _Request, error: BaseException) -> None:
    if not request.done.done():
        request.done.set_exception(error)
