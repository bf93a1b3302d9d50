import time
from pathlib import Path

import numpy as np

from trainkit.bench.race.protocol import Work, load_logits, load_work, save_logits, save_work
from trainkit.bench.race.worker import is_stable, scheduled_turn, take_turn
from trainkit.serve.encoding import Batch, pad


def test_batches_and_logits_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    batches = [pad([[number, 2, 3], [4]], 0) for number in range(12)]  # 10 must not sort before 2
    texts = [[f"text {number}", ("Who?", "日本")] for number in range(12)]
    save_work(tmp_path / "work.npz", Work(batches, texts))
    loaded = load_work(tmp_path / "work.npz")
    assert loaded.texts == texts
    for read, expected in zip(loaded.batches, batches, strict=True):
        assert read.input_ids.dtype == read.attention_mask.dtype == np.int64
        np.testing.assert_array_equal(read[:2], expected[:2])
        assert read.token_type_ids is None
    logits = [np.full((2, 3), number, dtype=np.float32) for number in range(12)]
    save_logits(tmp_path / "logits.npz", logits)
    np.testing.assert_array_equal(load_logits(tmp_path / "logits.npz"), logits)


def test_a_turn_times_every_batch_and_makes_one_pass_at_least() -> None:
    def run(batch: Batch) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        time.sleep(0.005)
        return np.zeros((1, 2), dtype=np.float32)

    batches = [pad([[1]], 0)] * 3
    turn = take_turn(run, batches, lambda passes, seconds: True)
    assert len(turn.batch_s) == 1
    assert all(seconds >= 0.005 for seconds in turn.batch_s[0])
    assert turn.seconds >= 0.015 > turn.cpu_s
    assert len(take_turn(run, batches, lambda passes, s: len(passes) == 4).batch_s) == 4


def test_passes_are_stable_when_the_last_three_after_a_first_take_the_same_time() -> None:
    assert not is_stable([(1.0,)] * 3)
    assert is_stable([(9.0,), (1.0,), (1.02,), (1.05,)])
    assert is_stable([(9.0, 1.0), (0.5, 0.5), (0.6, 0.4), (0.4, 0.65)])
    assert not is_stable([(1.0,), (1.0,), (1.0,), (1.2,)])


def test_a_stall_delays_all_that_became_due_in_it() -> None:
    """Open loop: 0.2 s of standing still at 100 a second are some twenty late answers, not one."""
    calls = 0

    def run(item: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 11:
            time.sleep(0.2)

    due_s = [number / 100 for number in range(60)]
    turn = scheduled_turn(run, range(7), due_s)
    (latencies,) = turn.batch_s
    late = [seconds for seconds in latencies if seconds > 0.02]
    assert 15 <= len(late) <= 25
    assert 0.2 <= max(latencies) < 0.3
    assert latencies[10] == max(latencies)  # the others waited less and less
    assert 0.59 <= turn.seconds < 0.75
    closed = take_turn(run, range(7), lambda passes, seconds: len(passes) == 8)
    assert sum(s > 0.02 for one_pass in closed.batch_s for s in one_pass) == 0
