"""A worker of known behaviour: SOURCE's name says which, as in ``sleep-20`` (milliseconds)."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from trainkit.bench.engines.base import Engine, EngineUnavailableError
from trainkit.bench.race.worker import speak
from trainkit.serve.bundle import open_bundle
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.types import FloatArray

source = Path(sys.argv[1])
encoder = open_bundle(source).encoder()
behaviour, argument = (*source.name.split("-"), "")[:2]
calls = 0


def run(batch: Batch) -> FloatArray:
    global calls
    calls += 1
    logits = np.stack([batch.input_ids.sum(axis=1), -batch.attention_mask.sum(axis=1)], axis=1)
    match behaviour:
        case "sleep":
            time.sleep(int(argument) / 1000)
        case "drifts":  # each call takes this many microseconds longer than the one before
            time.sleep(calls * int(argument) / 1e6)
        case "stalls" if calls == int(argument):
            time.sleep(1)
        case "swapped":  # the labels
            logits = logits[:, ::-1]
        case "off" | "int8":  # by this many thousandths of a logit
            logits = logits + int(argument) / 1000
        case "nan":
            logits = logits * np.nan
        case "dies" if calls == int(argument):
            print("about to fail")
            raise RuntimeError("out of luck")
        case "killed" if calls == int(argument):
            os.kill(os.getpid(), 9)
        case "prints":  # through Python and past it
            print("a library says hello")
            os.write(1, b"so does its C part\n")
    return logits.astype(np.float32)


def load() -> Engine:
    if behaviour == "refuses":
        raise InputError("this model is not for you; take another.")
    if behaviour == "absent":
        raise EngineUnavailableError("it was never installed")
    if behaviour == "reader":  # takes texts
        return Engine("Fake reader", None, classify=lambda texts: run(encoder.encode(texts)))
    precision = "int8" if behaviour == "int8" else "fp32"
    return Engine(f"Fake {behaviour}", run, precision=precision)


source.with_suffix(".pid").write_text(str(os.getpid()))
if behaviour == "garbage":
    print("Welcome to my library!", flush=True)
speak(load)
if behaviour == "stays":
    time.sleep(600)
