"""ONNX Runtime sessions: the one place that opens them, for serving, export and benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError
from trainkit.serve.types import FloatArray, Runner


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    weights: Mapping[str, np.ndarray] | None = None,
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """Open a model file or its bytes.

    ``threads`` is the number of intra-op threads, 0 or None for all cores. ``weights`` replace
    external initializers by name. ``options`` are ONNX Runtime's defaults if not given; ``threads``
    is set in them.

    Raises ``InputError`` if the model cannot be opened, or a provider is missing from this build
    or was not used: ONNX Runtime itself would fall back to the CPU and only log it.
    """
    available = ort.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise InputError(
            f"ONNX Runtime {ort.__version__} here has no {', '.join(missing)}, only "
            f"{', '.join(available)}; install onnxruntime-gpu (trainkit env shows how), or use "
            "the CPU."
        )
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    source, name = (model, "the model") if isinstance(model, bytes) else (str(model), str(model))
    try:
        session = ort.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
        raise InputError(
            f"{name} cannot be opened by ONNX Runtime {ort.__version__} ({error}); "
            "install the version that the bundle names, or export again."
        ) from None
    if session.get_providers()[0] != providers[0]:
        raise InputError(
            f"{providers[0]} was requested and ONNX Runtime fell back to "
            f"{session.get_providers()[0]}; check its libraries, or use the CPU."
        )
    return session


def onnx_runner(
    model: Path | bytes,
    *,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    weights: Mapping[str, np.ndarray] | None = None,
    options: ort.SessionOptions | None = None,
) -> Runner:
    """Open a model as a function from a padded batch to (B, C) float32 logits.

    Parameters and errors are those of :func:`open_session`.
    """
    session = open_session(
        model, threads=threads, providers=providers, weights=weights, options=options
    )
    names = [tensor.name for tensor in session.get_inputs()]

    def run(batch: Batch) -> FloatArray:
        # A batch may hold more inputs than this model takes.
        inputs = {name: getattr(batch, name) for name in names}
        logits: FloatArray = session.run(["logits"], inputs)[0]
        return logits

    return run
