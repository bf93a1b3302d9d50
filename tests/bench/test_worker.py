import time
from pathlib import Path

import numpy as np

from trainkit.bench.protocol import load_batches, load_logits, save_batches, save_logits
from trainkit.bench.worker import is_stable, take_turn
from trainkit.serve.encoding import Batch, pad


def test_batches_and_logits_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    batches = [pad([[number, 2, 3], [4]], 0) for number in range(12)]  # 10 must not sort before 2
    save_batches(tmp_path / "batches.npz", batches)
    for read, expected in zip(load_batches(tmp_path / "batches.npz"), batches, strict=True):
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
