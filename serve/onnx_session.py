"""ONNX Runtime behind the one calling convention: a padded batch in, logits out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from trainkit.serve.classifier import FloatArray, Runner
from trainkit.serve.encoding import Batch
from trainkit.serve.errors import InputError

__all__ = ["onnx_runner"]


def onnx_runner(
    model: Path | bytes,
    *,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    weights: Mapping[str, np.ndarray] | None = None,
    options: ort.SessionOptions | None = None,
) -> Runner:
    """Open a file, or its bytes, as a function from a padded batch to (B, C) float32 logits.

    ``weights`` replace those that the model says lie beside it, by name. ``options`` are ONNX
    Runtime's own defaults unless given; ``threads`` goes into them.

    ``InputError`` where a provider is not in this build of ONNX Runtime, or was asked for and not
    taken: ONNX Runtime itself would go on with the CPU and only log it.
    """
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise InputError(
            f"ONNX Runtime {ort.__version__} here has no {', '.join(missing)}, only "
            f"{', '.join(ort.get_available_providers())}; install onnxruntime-gpu, or use the CPU."
        )
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: ONNX Runtime takes one a core
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
            f"{providers[0]} was asked for and ONNX Runtime fell back to "
            f"{session.get_providers()[0]}; check its libraries, or use the CPU."
        )
    names = [tensor.name for tensor in session.get_inputs()]

    def run(batch: Batch) -> FloatArray:
        logits: FloatArray = session.run(
            ["logits"],
            {name: getattr(batch, name) for name in names},  # a batch may hold more
        )[0]
        return logits

    return run
