"""Bundles in the runtimes that open them: their own, another provider's, or OpenVINO."""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

from trainkit.bench.engines.base import Engine, EngineUnavailableError, limit_torch, versions_of
from trainkit.serve.bundle import BundleFiles, open_bundle
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.forward_pool import split_batches
from trainkit.serve.onnx_session import onnx_runner
from trainkit.serve.types import FloatArray, Runner


def of_bundle(source: Path, threads: int, title: str, package: str) -> Engine:
    """Open a bundle in the runtime of its format."""
    from trainkit.export.runtimes import runner

    if package == "torch":
        limit_torch(threads)
    bundle = open_bundle(source)
    run = runner(bundle, threads)
    if package == "onnxruntime" and not bundle.manifest.equal_lengths:
        run = split_batches(run)  # as the library and the server do
    return _engine(title, bundle, run, package)


def onnx_workers(source: Path, threads: int) -> Engine:
    """Open an ONNX bundle for as many forwards at once as ``threads``, with one thread each."""
    bundle = open_bundle(source)
    if bundle.manifest.equal_lengths:
        raise EngineUnavailableError("the model reads its padding: a batch cannot be shared out")
    run = split_batches(onnx_runner(bundle.model_path, threads=1), workers=threads)
    return _engine("ONNX Runtime workers", bundle, run, "onnxruntime")


def _engine(title: str, bundle: BundleFiles, run: Runner, *packages: str) -> Engine:
    precision = bundle.manifest.precision
    name = title if precision == "fp32" else f"{title} {precision}"
    return Engine(name, run, precision=precision, versions=versions_of(*packages))


def onnx_on(source: Path, threads: int, title: str, providers: tuple[str, ...]) -> Engine:
    """Open it on a GPU; raises ``InputError`` if ONNX Runtime falls back to the CPU."""
    import onnxruntime as ort

    if providers[0] not in ort.get_available_providers():
        raise EngineUnavailableError(
            f"ONNX Runtime {ort.__version__} here has no {providers[0]}; on a machine with an "
            "NVIDIA GPU, install trainkit-onnx[gpu] as trainkit env shows"
        )
    # Else NVIDIA's libraries round the factors of float32 products to 11 bits, and parity is lost.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    bundle = open_bundle(source)
    run = onnx_runner(bundle.model_path, threads=threads, providers=providers)
    versions = {"onnxruntime": ort.__version__}  # the package is called onnxruntime-gpu
    return _engine(title, bundle, run)._replace(versions=versions)


def openvino_bundle(source: Path, threads: int) -> Engine:
    """Open an ONNX bundle in OpenVINO; raises ``InputError`` if it cannot."""
    bundle = open_bundle(source)
    try:
        run = openvino_runner(str(bundle.model_path), threads)
    except RuntimeError as error:  # what its C++ exceptions become
        reason = " ".join(str(error).split())[-300:]
        raise InputError(
            f"{bundle.model_path} cannot be opened by OpenVINO {metadata.version('openvino')} "
            f"({reason}); export it in fp32, or with --opset 18."
        ) from None
    return _engine("OpenVINO", bundle, run, "openvino")


def import_openvino() -> Any:
    """Import OpenVINO, in a process of its own, without its telemetry.

    That is on by default: it tells Intel what is converted, under an id kept in the home folder.
    """
    os.environ["CI"] = "true"  # where it is off
    import openvino

    return openvino


def openvino_runner(model: Any, threads: int) -> Runner:
    """Compile a file or an ``openvino.Model`` for the CPU, in float32.

    Its inputs are named as a batch's arrays, and its one output is the logits. What OpenVINO
    cannot compile is a ``RuntimeError``.
    """
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 by default where the processor has it
        "PERFORMANCE_HINT": "LATENCY",  # one request at a time, all threads for it
    }
    compiled = import_openvino().Core().compile_model(model, "CPU", settings)
    names = [port.any_name for port in compiled.inputs]
    output = compiled.output("logits")

    def run(batch: Batch) -> FloatArray:
        logits: FloatArray = compiled({name: getattr(batch, name) for name in names})[output]
        return logits

    return run
