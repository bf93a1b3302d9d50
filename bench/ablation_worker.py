"""The variants of :mod:`trainkit.bench.ablation`, one a process.

``python -m trainkit.bench.ablation_worker VARIANT BUNDLE THREADS`` owns one variant and speaks as
:mod:`trainkit.bench.worker` does. Needs neither torch nor the exporter: what it has resident is
what serving has.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from trainkit.bench.engine import Engine, NotThereError, versions_of
from trainkit.bench.engines import open_engine
from trainkit.bench.worker import speak
from trainkit.serve.bundle import Bundle, open_bundle
from trainkit.serve.classifier import CPU_TOKENS, FloatArray, Runner, in_parts
from trainkit.serve.encoding import Batch, by_length
from trainkit.serve.onnx_session import onnx_runner

__all__ = ["AHEAD", "BATCHINGS", "SESSIONS", "SHIPPED", "dealt", "open_variant"]

SHIPPED = "as shipped"

_LEVELS = ort.GraphOptimizationLevel
# A key with a dot is an entry of the session's configuration, any other an attribute of its
# options. What was optimised ahead is not optimised again: that is what it is for.
SESSIONS: dict[str, dict[str, object]] = {
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "no memory pattern": {"enable_mem_pattern": False},
    "no CPU arena": {"enable_cpu_mem_arena": False},
    "ORT at level basic": {"graph_optimization_level": _LEVELS.ORT_ENABLE_BASIC},
    "ORT optimises nothing": {"graph_optimization_level": _LEVELS.ORT_DISABLE_ALL},
    "optimised ahead": {"graph_optimization_level": _LEVELS.ORT_DISABLE_ALL},
    "optimised ahead, .ort": {
        "graph_optimization_level": _LEVELS.ORT_DISABLE_ALL,
        "session.load_model_format": "ORT",
    },
}
# These open a file of their own, which ONNX Runtime saved in this format.
AHEAD = {"optimised ahead": "ONNX", "optimised ahead, .ort": "ORT"}


def open_variant(name: str, source: Path, threads: int) -> Engine:
    """Open a bundle as a variant says; a name of a graph alone opens its bundle as shipped.

    ``NotThereError`` where the bundle cannot have the variant.
    """
    bundle = open_bundle(source)
    if name in SESSIONS:
        run = _with_options(bundle, threads, SESSIONS[name])
    elif name in BATCHINGS:
        if bundle.manifest.equal_lengths:
            raise NotThereError("the model reads its padding, so its batches stay whole anyway")
        run = BATCHINGS[name](bundle.model_path, threads)
    else:
        return open_engine("onnx", source, threads)._replace(name=name)
    return Engine(
        name, run, precision=bundle.manifest.precision, versions=versions_of("onnxruntime")
    )


def _with_options(bundle: Bundle, threads: int, changed: Mapping[str, object]) -> Runner:
    options = ort.SessionOptions()
    for key, value in changed.items():
        if "." in key:
            options.add_session_config_entry(key, value)
        else:
            setattr(options, key, value)
    run = onnx_runner(bundle.model_path, threads=threads, options=options)
    return run if bundle.manifest.equal_lengths else in_parts(run)


def _whole(model: Path, threads: int) -> Runner:
    return onnx_runner(model, threads=threads)


def _one_session_a_core(model: Path, threads: int) -> Runner:
    if threads == 1:
        raise NotThereError("with one thread it is what is shipped")
    return dealt([onnx_runner(model, threads=1) for _ in range(threads)])


BATCHINGS: dict[str, Callable[[Path, int], Runner]] = {
    "batches whole": _whole,
    "one session a core": _one_session_a_core,
}


class _Part(NamedTuple):
    rows: list[int]
    batch: Batch


def dealt(runners: Sequence[Runner]) -> Runner:
    """Return one runner of many, at work at once: each batch in parts, dealt by their size.

    The longest part first, to whoever has the least yet (Graham 1969). A part has at most
    ``CPU_TOKENS`` tokens and at most an even share of the batch: one that is as large as the whole
    batch would leave the others idle.
    """
    pool = ThreadPoolExecutor(len(runners))

    def run(batch: Batch) -> FloatArray:
        hands = _deal(_parts(batch, len(runners)), len(runners))
        done = pool.map(_run_all, runners, hands)
        found = [one for hand in done for one in hand]
        parts = [part for hand in hands for part in hand]
        logits = np.empty((len(batch.input_ids), found[0].shape[1]), dtype=found[0].dtype)
        for part, values in zip(parts, found, strict=True):
            logits[part.rows] = values
        return logits

    return run


def _parts(batch: Batch, hands: int) -> list[_Part]:
    """Cut rows of like length out of ``batch``, to the last token that a mask shows."""
    width = batch.input_ids.shape[1]
    lengths = width - batch.attention_mask[:, ::-1].argmax(axis=1)
    share = -(-int(lengths.sum()) // hands)
    chosen = by_length(lengths.tolist(), len(lengths), min(CPU_TOKENS, share))
    return [
        _Part(
            rows,
            Batch._make(
                None if array is None else array[rows, : lengths[rows].max()] for array in batch
            ),
        )
        for rows in chosen
    ]


def _deal(parts: Sequence[_Part], hands: int) -> list[list[_Part]]:
    dealt_parts: list[list[_Part]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for part in sorted(parts, key=lambda part: part.batch.input_ids.size, reverse=True):
        least = tokens.index(min(tokens))
        dealt_parts[least].append(part)
        tokens[least] += part.batch.input_ids.size
    return dealt_parts


def _run_all(run: Runner, parts: Sequence[_Part]) -> list[FloatArray]:
    return [run(part.batch) for part in parts]


if __name__ == "__main__":
    variant, folder, threads = sys.argv[1:]
    speak(lambda: open_variant(variant, Path(folder), int(threads)))
