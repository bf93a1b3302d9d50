"""The variants of :mod:`trainkit.bench.studies.ablation`, one in a process.

``python -m trainkit.bench.studies.ablation_worker VARIANT BUNDLE THREADS`` speaks the protocol of
:mod:`trainkit.bench.race.worker`. It imports only what serving imports, as its memory is measured.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from trainkit.bench.engines.base import Engine, EngineUnavailableError, versions_of
from trainkit.bench.race.worker import speak
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.forward_pool import split_batches
from trainkit.serve.onnx_session import onnx_runner
from trainkit.serve.types import Runner

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
    """Open a bundle as a variant; the name of a graph opens its bundle as shipped.

    Raises ``EngineUnavailableError`` if the bundle cannot have the variant.
    """
    bundle = open_bundle(source)
    if name in BATCHINGS:
        if bundle.manifest.equal_lengths:
            raise EngineUnavailableError(
                "the model reads its padding, so its batches stay whole anyway"
            )
        run = BATCHINGS[name](bundle.model_path, threads)
    else:
        run = _with_options(bundle, threads, SESSIONS.get(name, {}))
    return Engine(
        name, run, precision=bundle.manifest.precision, versions=versions_of("onnxruntime")
    )


def _with_options(bundle: BundleFiles, threads: int, changed: Mapping[str, object]) -> Runner:
    options = ort.SessionOptions()
    for key, value in changed.items():
        if "." in key:
            options.add_session_config_entry(key, value)
        else:
            setattr(options, key, value)
    run = onnx_runner(bundle.model_path, threads=threads, options=options)
    return run if bundle.manifest.equal_lengths else split_batches(run)


def _whole(model: Path, threads: int) -> Runner:
    return onnx_runner(model, threads=threads)


def _a_worker_a_core(model: Path, threads: int) -> Runner:
    if threads == 1:
        raise EngineUnavailableError("with one thread it is what is shipped")
    return split_batches(onnx_runner(model, threads=1), workers=threads)


def _budget(tokens: int) -> Callable[[Path, int], Runner]:
    return lambda model, threads: split_batches(onnx_runner(model, threads=threads), tokens)


BATCHINGS: dict[str, Callable[[Path, int], Runner]] = {
    "batches whole": _whole,
    "a worker a core": _a_worker_a_core,
    # Serving's own budget on a CPU is forward_pool.CPU_TOKENS.
    **{f"at most {tokens} tokens": _budget(tokens) for tokens in (128, 512, 1024, 4096)},
}

if __name__ == "__main__":
    variant, folder, threads = sys.argv[1:]
    speak(lambda: open_variant(variant, Path(folder), int(threads)))
