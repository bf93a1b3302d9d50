"""What goes into which batch: in turn, within the budget, nothing lost and nothing mixed up."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.serve.encoding import Tokens
from trainkit.serve.http.batching import Batcher, BatchingPolicy
from trainkit.serve.http.exceptions import (
    DeadlineError,
    InferenceError,
    QueueFullError,
    UnavailableError,
)


def rows(*lengths, key=0):
    """Return rows of these lengths; the ids of each say which request and which row it is."""
    return [Tokens([1000 * key + number] * length, []) for number, length in enumerate(lengths)]


def logits_of(batch):
    """Return what identifies each row: its first id and its length; -1 for a blank row."""
    return np.array([[row.ids[0] if row.ids else -1, len(row.ids)] for row in batch], np.float32)


class Runs:
    """A model that is let go batch by batch, and remembers what it was given."""

    def __init__(self, poison=None):
        self.batches = []
        self.poison = poison
        self.running = asyncio.Event()
        self.gate = asyncio.Semaphore(0)

    async def __call__(self, batch):
        self.batches.append(batch)
        self.running.set()
        await self.gate.acquire()
        self.running.clear()
        if self.poison is not None and any(self.poison in row.ids for row in batch):
            raise InferenceError(f"id {self.poison} is out of range")
        return logits_of(batch)

    def open(self):
        for _ in range(100_000):
            self.gate.release()


def go(scenario, policy, poison=None, on_batch=lambda facts: None):
    """Run a scenario with a gated model and a queue before it; the queue is always closed."""

    async def main():
        runs = Runs(poison)
        batcher = Batcher(runs, policy, on_batch)
        try:
            return await scenario(batcher, runs)
        finally:
            runs.open()
            await batcher.close(5)
            assert batcher.queued_rows == batcher.queued_tokens == 0
            assert not batcher.running

    return asyncio.run(main())


async def ask(batcher, request, timeout_s=60):
    """Queue a request and let it get there."""
    task = asyncio.create_task(batcher.submit(request, timeout_s))
    await asyncio.sleep(0)
    return task


async def busy(batcher, runs):
    """Give the model a first batch, so that what follows has to wait."""
    first = await ask(batcher, rows(1, key=999))
    await runs.running.wait()
    return first


RULES = st.builds(
    BatchingPolicy,
    batch_tokens=st.integers(1, 60),
    batch_rows=st.integers(1, 9),
    packed=st.booleans(),
    equal_lengths=st.booleans(),
)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def cost(batch, policy):
    lengths = [max(1, len(row.ids)) for row in batch]
    return sum(lengths) if policy.packed else len(batch) * max(lengths)


@settings(max_examples=60, deadline=None)
@given(RULES, st.lists(LENGTHS, min_size=1, max_size=6))
def test_every_row_runs_once_within_the_budget_and_comes_back_in_its_place(policy, requests):
    async def scenario(batcher, runs):
        runs.open()
        asked = [rows(*lengths, key=key) for key, lengths in enumerate(requests, start=1)]
        found = await asyncio.gather(*(batcher.submit(request, 60) for request in asked))
        for request, answer in zip(asked, found, strict=True):
            np.testing.assert_array_equal(answer.logits, logits_of(request))
        sent = [row for request in asked for row in request]
        ran = [row for batch in runs.batches for row in batch]
        assert sorted(map(id, ran)) == sorted(map(id, sent))
        for batch in runs.batches:
            assert len(batch) <= policy.batch_rows
            assert len(batch) == 1 or cost(batch, policy) <= policy.batch_tokens
            assert not policy.equal_lengths or len({max(1, len(row.ids)) for row in batch}) == 1

    go(scenario, policy)


@pytest.mark.parametrize(("packed", "expected"), [(True, [2, 1]), (False, [1, 2])])
def test_padding_counts_where_the_graph_is_padded(packed, expected):
    """Rows of 20, 3 and 3 tokens: 23 real ones, or 40 with padding, for the first two."""

    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        asked = [await ask(batcher, rows(length)) for length in (20, 3, 3)]
        runs.open()
        await asyncio.gather(first, *asked)
        assert [len(batch) for batch in runs.batches[1:]] == expected

    go(scenario, BatchingPolicy(batch_tokens=25, packed=packed))


@pytest.mark.parametrize(
    ("packed", "long", "expected"),
    [(True, 128, [1, 60]), (True, 20, [61]), (False, 128, [1, 60]), (False, 11, [61])],
)
def test_one_long_text_does_not_pad_many_short_ones(packed, long, expected):
    """Also where the graph is packed: attention is computed on the padded batch."""

    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        request = await ask(batcher, rows(*[long] + [10] * 60))
        runs.open()
        await asyncio.gather(first, request)
        assert [len(batch) for batch in runs.batches[1:]] == expected

    go(scenario, BatchingPolicy(packed=packed))


def test_a_small_request_behind_a_large_one_is_in_the_next_batch():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        large = await ask(batcher, rows(*[5] * 1000, key=1))
        runs.gate.release()
        await first
        await runs.running.wait()  # the first batch of the large one
        small = await ask(batcher, rows(5, key=2))
        runs.gate.release()
        runs.gate.release()
        await small
        assert not large.done()
        assert any(row.ids[0] == 2000 for row in runs.batches[2])
        assert len(runs.batches) <= 4
        runs.open()
        answer = await large
        np.testing.assert_array_equal(answer.logits, logits_of(rows(*[5] * 1000, key=1)))

    go(scenario, BatchingPolicy())


def test_requests_share_a_batch_by_turns():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        asked = [await ask(batcher, rows(*[5] * 30, key=key)) for key in (1, 2, 3)]
        runs.open()
        await asyncio.gather(first, *asked)
        for batch in runs.batches[1:]:
            counts = [sum(row.ids[0] // 1000 == key for row in batch) for key in (1, 2, 3)]
            assert max(counts) - min(counts) <= 1

    go(scenario, BatchingPolicy(batch_rows=10))


def test_a_row_that_never_fits_beside_others_is_not_passed_over_for_ever():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        short = await ask(batcher, rows(*[2] * 10, key=1))
        long = await ask(batcher, rows(90, key=2))
        more = await ask(batcher, rows(*[2] * 200, key=3))
        runs.open()
        await asyncio.gather(first, short, long, more)
        assert [len(batch[0].ids) for batch in runs.batches[1:3]] == [2, 90]

    go(scenario, BatchingPolicy(batch_tokens=20, packed=True))


def test_what_expires_in_the_queue_is_told_at_once_and_never_run():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        late = await ask(batcher, rows(3, 3, key=1), timeout_s=0.02)
        kept = await ask(batcher, rows(3, key=2))
        with pytest.raises(DeadlineError):
            await late  # while the first batch still runs
        assert (batcher.queued_rows, batcher.queued_tokens) == (1, 3)
        runs.open()
        await asyncio.gather(first, kept)
        assert [row.ids[0] for batch in runs.batches for row in batch] == [999_000, 2000]
        with pytest.raises(DeadlineError):
            await batcher.submit(rows(1), 0)

    go(scenario, BatchingPolicy())


def test_a_request_that_has_begun_finishes_after_its_deadline():
    async def scenario(batcher, runs):
        task = await ask(batcher, rows(1, 1, 1), timeout_s=0.02)
        await runs.running.wait()
        await asyncio.wait({task}, timeout=0.06)
        assert not task.done()
        runs.open()
        assert len((await task).logits) == 3

    go(scenario, BatchingPolicy(batch_rows=1))


def test_a_cancelled_request_leaves_the_queue():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        gone = await ask(batcher, rows(4, 4, key=1))
        kept = await ask(batcher, rows(4, key=2))
        gone.cancel()
        await asyncio.wait({gone})
        assert (batcher.queued_rows, batcher.queued_tokens) == (1, 4)
        first.cancel()  # its batch is running: the model's answer is dropped
        await asyncio.wait({first})
        runs.open()
        await kept
        assert [row.ids[0] for batch in runs.batches for row in batch] == [999_000, 2000]

    go(scenario, BatchingPolicy())


def test_a_full_queue_says_when_there_will_be_room():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        kept = await ask(batcher, rows(60, key=1))
        with pytest.raises(QueueFullError) as caught:
            await batcher.submit(rows(50), 60)
        assert caught.value.retry_after_s == 1.0  # nothing was measured yet
        await ask(batcher, rows(40, key=2))
        assert batcher.queued_tokens == 100
        batcher.tokens_per_s = 20.0
        with pytest.raises(QueueFullError) as caught:
            await batcher.submit(rows(50), 60)
        assert caught.value.retry_after_s == pytest.approx(50 / 20)
        runs.open()
        await asyncio.gather(first, kept)

    go(scenario, BatchingPolicy(queue_tokens=100))


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    async def scenario(batcher, runs):
        runs.open()
        assert len((await batcher.submit(rows(8, 8), 60)).logits) == 2

    go(scenario, BatchingPolicy(queue_tokens=10))


def test_only_the_guilty_request_gets_the_error():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        good = [await ask(batcher, rows(3, 3, key=key)) for key in (1, 2)]
        guilty = await ask(batcher, rows(3, 3, 3, key=7))
        after = await ask(batcher, rows(3, key=8))
        runs.open()
        with pytest.raises(InferenceError, match="id 7001 is out of range"):
            await guilty
        for key, task in zip((1, 2), good, strict=True):
            np.testing.assert_array_equal((await task).logits, logits_of(rows(3, 3, key=key)))
        await asyncio.gather(first, after)

    go(scenario, BatchingPolicy(), poison=7001)


@pytest.mark.parametrize("error", [UnavailableError("no process"), MemoryError("no memory")])
def test_any_other_failure_is_told_to_all_of_the_batch_and_the_queue_goes_on(error):
    async def main():
        fails = True

        async def run(batch):
            if fails:
                raise error
            return logits_of(batch)

        batcher = Batcher(run, BatchingPolicy())
        found = await asyncio.gather(
            *(batcher.submit(rows(2), 60) for _ in range(3)), return_exceptions=True
        )
        assert found == [error] * 3
        fails = False
        assert len((await batcher.submit(rows(2), 60)).logits) == 1
        await batcher.close(1)

    asyncio.run(main())


def test_a_fault_of_the_queue_itself_leaves_nobody_waiting():
    def broken(facts):
        raise ZeroDivisionError

    async def scenario(batcher, runs):
        runs.open()
        answers = [batcher.submit(rows(2), 60) for _ in range(3)]
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert len(found[0].logits) == 1  # was there before the fault
        assert [type(error) for error in found[1:]] == [ZeroDivisionError] * 2
        assert not batcher.running
        with pytest.raises(UnavailableError):
            await batcher.submit(rows(2), 60)

    go(scenario, BatchingPolicy(batch_rows=1), on_batch=broken)


def test_an_idle_model_waits_for_a_batch_to_fill_where_it_is_told_to():
    async def scenario(batcher, runs):
        runs.open()
        loop = asyncio.get_running_loop()
        before = loop.time()
        one = await ask(batcher, rows(2, key=1))
        two = await ask(batcher, rows(2, key=2))
        await asyncio.gather(one, two)
        assert loop.time() - before >= 0.04
        assert [len(batch) for batch in runs.batches] == [2]
        before = loop.time()
        await asyncio.gather(*(batcher.submit(rows(2), 60) for _ in range(4)))
        assert loop.time() - before < 0.04  # full at once
        assert [len(batch) for batch in runs.batches] == [2, 4]

    go(scenario, BatchingPolicy(max_wait_ms=40, batch_rows=4))


def test_closing_finishes_what_waits_and_takes_nothing_new():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        waits = await ask(batcher, rows(3, 3, key=1))
        closing = asyncio.create_task(batcher.close(5))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            await batcher.submit(rows(1), 60)
        runs.open()
        await closing
        assert [len((await task).logits) for task in (first, waits)] == [1, 2]

    go(scenario, BatchingPolicy())


def test_closing_gives_up_what_does_not_end_in_time():
    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        waits = await ask(batcher, rows(3, key=1))
        await batcher.close(0.01)
        for task in (first, waits):
            with pytest.raises(UnavailableError):
                await task

    go(scenario, BatchingPolicy())


def test_the_hook_is_told_of_each_batch():
    told = []

    async def scenario(batcher, runs):
        first = await busy(batcher, runs)
        second = await ask(batcher, rows(3, 0, key=1))
        runs.open()
        answers = await asyncio.gather(first, second)
        assert [facts[:2] for facts in told] == [(1, 1), (2, 4)]
        assert all(facts.queue_s >= 0 and facts.infer_s >= 0 for facts in told)
        assert answers[1].queue_s == pytest.approx(told[1].queue_s, abs=1e-3)
        assert batcher.tokens_per_s > 0

    go(scenario, BatchingPolicy(), on_batch=told.append)
