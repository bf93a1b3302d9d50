"""Processes that torchrun starts train as one does: the same global batches, to rounding."""

import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest
import safetensors.torch
import torch

from trainkit.trainer import checkpoint

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
SINGLE = [sys.executable, "-m", "trainkit"]
# Of 81 rows: the last batch has one, so one of two processes has none of it.
SETTINGS = """
model = "simple"
max_length = 24
epochs = 3
batch_size = 16
learning_rate = 2e-3
average_decay = 0.9
class_weights = "balanced"
device = "cpu"
dropout = {dropout}
"""
# Of weights that move by some 1e-2: AdamW divides a gradient that is all rounding by its own size.
ROUNDING = 1e-4
WAIT_S = 240


def command(*arguments, launcher=()):
    return [*launcher, *SINGLE, *map(str, arguments)]


def run(*arguments, launcher=(), code=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments, launcher=launcher),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=environment,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def data(splits, tmp_path_factory):
    """Write 81 questions to train on, and 40 each for the other splits."""
    folder = tmp_path_factory.mktemp("data")
    parts = {"train": splits.train[:81], "valid": splits.valid[:40], "test": splits.test[:40]}
    for name, examples in parts.items():
        rows = [{"text": example.text, "label": example.label} for example in examples]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    return folder


@pytest.fixture
def train(data, tmp_path):
    """Return a function that gives the arguments of a training into ``tmp_path / name``."""

    def arguments(name, *more, dropout=0.0):
        settings = tmp_path / "settings.toml"
        settings.write_text(SETTINGS.format(dropout=dropout))
        where = ["--runs", tmp_path, "--name", name]
        return ["train", "--data", data, "--config", settings, *where, *more]

    return arguments


def weights(folder):
    return safetensors.torch.load_file(checkpoint.weights_path(folder))


def largest_difference(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
def test_two_processes_come_to_the_weights_of_one(train, tmp_path):
    run(*train("one"))
    done = run(*train("two", "--json"), launcher=TWO)
    assert largest_difference(tmp_path / "two", tmp_path / "one") < ROUNDING
    histories = [
        json.loads((tmp_path / name / "history.json").read_bytes()) for name in ("one", "two")
    ]
    for first, second in zip(*histories, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    # One of them speaks, and writes.
    assert json.loads(done.stdout)["run"] == str(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "latest",
        "one",
        "two",
    ]
    # The comparison is able to fail: it sees batches that are half as large.
    run(*train("half", "--batch-size", 8))
    assert largest_difference(tmp_path / "half", tmp_path / "one") > 2e-3


@pytest.mark.long
def test_a_prefix_in_two_processes(train, tmp_path):
    """Most weights are frozen, which DistributedDataParallel must not wait for."""
    small = ["--model", "prefix", "--epochs", 1]
    run(*train("one", *small))
    run(*train("two", *small), launcher=TWO)
    assert largest_difference(tmp_path / "two", tmp_path / "one") < ROUNDING


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_weights(train, tmp_path):
    run(*train("whole", dropout=0.3), launcher=TWO)
    arguments = train("killed", "--save-every", 0, "--epochs", 3, dropout=0.3)
    process = subprocess.Popen(
        command(*arguments, launcher=TWO),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    folder, until = tmp_path / "killed", time.monotonic() + WAIT_S
    while not (folder / "history.json").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    _kill_all(process)
    assert not (folder / "test.json").exists()
    alone = run("train", "--resume", folder, code=2)
    assert "was started by 2 processes and cannot be resumed by 1" in alone.stderr
    run("train", "--resume", folder, launcher=TWO)
    first, second = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "history.json").read_bytes() == (
        tmp_path / "whole" / "history.json"
    ).read_bytes()


def _kill_all(process):
    """Kill torchrun and what it started, each of which has a session of its own."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.kill()
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_the_range_test_is_refused_under_torchrun(train, tmp_path):
    done = run(*train("two", "--lr", "auto"), launcher=TWO, code=1)  # torchrun's own exit code
    assert "trains in one process: find the rate without torchrun first" in done.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_them_all(train, tmp_path, tree):
    (tmp_path / "two").mkdir()
    before = tree(tmp_path / "two")
    done = run(*train("two"), launcher=TWO, code=1)
    assert "exists already; choose another --name" in done.stderr
    assert tree(tmp_path / "two") == before
