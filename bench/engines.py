"""The runtimes of the benchmark behind one interface: a source in, an :class:`Engine` out.

A process opens one engine. PyTorch, transformers and every other runtime are imported where they
are opened: the environments of the peers (:mod:`trainkit.bench.peers`) have no more than serving's
packages and their own.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from trainkit.serve.bundle import MANIFEST, Bundle, Format, open_bundle
from trainkit.serve.classifier import FloatArray, Runner, in_parts
from trainkit.serve.encoding import Batch, Text
from trainkit.serve.errors import InputError, TrainkitError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "RUNTIMES",
    "Engine",
    "NotThereError",
    "Spec",
    "applicable",
    "import_openvino",
    "limit_torch",
    "open_engine",
    "openvino_runner",
    "parse",
    "python_of",
    "versions_of",
]

# Where `make peers` makes an environment for each, in a checkout.
PEERS = Path(__file__).parents[1] / "build" / "peers"

Kind: TypeAlias = Format | Literal["run", "classifier", "adapter"]
"""What a source is: a bundle by its format, a trainkit run, or a folder of Hugging Face's."""

KINDS: dict[Kind, str] = {
    "run": "a trainkit run",
    "classifier": "a Hugging Face classifier's folder",
    "adapter": "a PEFT adapter's folder",
    "onnx": "an ONNX bundle",
    "torchscript": "a TorchScript bundle",
    "pt2": "a torch.export bundle",
    "aoti": "an AOTInductor bundle",
}
ON_TORCH: tuple[Kind, ...] = ("run", "classifier", "adapter")


class Engine(NamedTuple):
    """What computes: its name for the reader, and a function from a padded batch to logits.

    A runtime that tokenises itself has ``classify`` instead of ``run``: texts to (B, C) logits, in
    one batch, columns in the order of the source's labels. ``precision`` is a key of
    ``export.parity.TOLERANCES``; ``versions`` are those of the libraries that compute.
    """

    name: str
    run: Runner | None
    classify: Callable[[Sequence[Text]], FloatArray] | None = None
    precision: str = "fp32"
    versions: Mapping[str, str] = {}


class NotThereError(Exception):
    """A runtime that this machine or environment does not have: why, and how to get it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Spec(NamedTuple):
    """What to measure: a runtime's name, and the folder it is to compute."""

    runtime: str
    source: Path


class Runtime(NamedTuple):
    """How to open it, the kinds of source it takes, and the packages it needs.

    A ``peer`` runs in the environment of that name.
    """

    open: Callable[[Path, int], Engine]
    takes: tuple[Kind, ...]
    needs: tuple[str, ...] = ("torch", "transformers")
    install: str = "pip install 'trainkit[bench]'"
    peer: str | None = None


def parse(text: str) -> Spec:
    """Read ``RUNTIME:SOURCE``, or ``SOURCE`` alone, which gets the runtime made for it.

    ``InputError`` where there is no such runtime or folder, or the one does not take the other.
    """
    name, colon, path = text.partition(":")
    # A folder may have a colon in its name; no runtime has a slash in its own.
    if Path(text).is_dir() or not colon or "/" in name:
        source = Path(text)
        kind = _kind(source)
        return Spec("eager" if kind in ON_TORCH else kind, source)
    runtime, source = _known(name), Path(path)
    if not path:
        raise InputError(f"'{text}' names no source; give {name}:FOLDER.")
    _check_takes(runtime, name, source)
    return Spec(name, source)


def applicable(source: Path) -> list[str]:
    """Return the names of all runtimes that take such a source, whether they are there or not."""
    kind = _kind(source)
    return [name for name, runtime in RUNTIMES.items() if kind in runtime.takes]


def python_of(name: str) -> Path | None:
    """Return the interpreter of a peer's environment; None where the runtime runs in this one.

    ``NotThereError`` where that environment was not made.
    """
    peer = _known(name).peer
    if peer is None:
        return None
    home = PEERS / peer / "venv" / "bin"
    if not (home / ".installed").is_file():  # which `make peers` writes last
        raise NotThereError(
            f"the environment of {peer} was not made; run, in a checkout: make peers"
        )
    return home / "python"


def open_engine(name: str, source: Path, threads: int) -> Engine:
    """Open a source in a runtime with so many threads, once in a process.

    ``NotThereError`` where the runtime is not there; ``InputError`` where it does not take the
    source or cannot open it.
    """
    runtime = _known(name)
    _check_takes(runtime, name, source)
    missing = [package for package in runtime.needs if find_spec(package) is None]
    if missing:
        raise NotThereError(f"{' and '.join(missing)} not installed; run: {runtime.install}")
    return runtime.open(source, threads)


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages by their names."""
    return {package: metadata.version(package) for package in packages}


def limit_torch(threads: int) -> None:
    """Set PyTorch's threads, inside an operation and between them: once, before anything runs."""
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != threads:  # it may be set once only
        torch.set_num_interop_threads(threads)


def _known(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise InputError(f"'{name}' is not a runtime; known are {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


def _kind(source: Path) -> Kind:
    if (source / MANIFEST).is_file():
        return open_bundle(source).manifest.format
    marks: dict[str, Kind] = {
        "checkpoint.json": "run",
        "adapter_config.json": "adapter",  # before config.json: some adapters have both
        "config.json": "classifier",
    }
    for file, kind in marks.items():
        if (source / file).is_file():
            return kind
    raise InputError(
        f"{source} is neither a bundle (no {MANIFEST}) nor a run (no checkpoint.json) nor a "
        "Hugging Face folder (no config.json); give the folder that train or export named."
    )


def _check_takes(runtime: Runtime, name: str, source: Path) -> None:
    kind = _kind(source)
    if kind not in runtime.takes:
        wanted = " or ".join(KINDS[one] for one in runtime.takes)
        raise InputError(f"{name} takes {wanted}, and {source} is {KINDS[kind]}; give it another.")


# PyTorch. All run the same `module(ids, mask[, types])` without gradients.


def _eager(source: Path, threads: int, device: str = "cpu") -> Engine:
    limit_torch(threads)
    if device == "cuda":
        _check_cuda()
    title = "PyTorch eager" if device == "cpu" else "PyTorch eager CUDA"
    return Engine(
        title,
        _module_runner(_packed(source), device),
        versions=versions_of("torch", "transformers"),
    )


def _huggingface(source: Path, threads: int) -> Engine:
    limit_torch(threads)
    return Engine(
        "Hugging Face eager",
        _module_runner(_padded(source)),
        versions=versions_of("torch", "transformers"),
    )


def _compiled(source: Path, threads: int) -> Engine:
    """Compile Hugging Face's own forward where there is one, trainkit's for a run or an adapter."""
    import torch

    limit_torch(threads)
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        raise NotThereError("torch.compile needs a C++ compiler; install g++ or clang") from None
    module = _padded(source) if _kind(source) == "classifier" else _packed(source)
    return Engine(
        "torch.compile",
        _module_runner(torch.compile(module, dynamic=True)),
        versions=versions_of("torch", "transformers"),
    )


def _packed(source: Path) -> "nn.Module":
    """Load the forward that trainkit runs and exports."""
    from trainkit.export.source import open_source

    return open_source(str(source)).model


def _padded(source: Path) -> "nn.Module":
    """Load Hugging Face's own classifier as transformers gives it, all weights in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from trainkit.models.backbone import quiet
    from trainkit.models.hub_classifier import Forward

    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    return Forward(model).eval()


def _module_runner(module: Any, device: str = "cpu") -> Runner:
    import torch

    module = module.to(device)

    def run(batch: Batch) -> FloatArray:
        with torch.inference_mode():
            logits = module(
                *(torch.from_numpy(array).to(device) for array in batch.tensors().values())
            )
            if device == "cuda":
                done = torch.cuda.Event()
                done.record()
                done.synchronize()
        array: FloatArray = logits.float().cpu().numpy()
        return array

    return run


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise NotThereError(
            f"torch {torch.__version__} finds no CUDA GPU; run it on a machine with one, with a "
            "CUDA build of torch"
        )


def _pipeline(source: Path, threads: int) -> Engine:
    """Open ``transformers``' own pipeline, its scores left as logits."""
    limit_torch(threads)
    from transformers import AutoTokenizer, pipeline

    from trainkit.models.backbone import load_tokenizer

    model: Any = _padded(source).model
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    if len(set(labels)) < len(labels):
        raise InputError(f"{source} gives two labels one name: a pipeline cannot tell them apart.")
    classify: Any = pipeline(
        "text-classification",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        device="cpu",
    )
    length = load_tokenizer(source, model).max_length

    def run(texts: Sequence[Text]) -> FloatArray:
        import numpy as np

        answers = classify(
            [
                one if isinstance(one, str) else {"text": one[0], "text_pair": one[1]}
                for one in texts
            ],
            function_to_apply="none",
            top_k=None,
            batch_size=len(texts),
            truncation=True,
            max_length=length,
        )
        by_label = [{one["label"]: one["score"] for one in answer} for answer in answers]
        return np.array([[row[label] for label in labels] for row in by_label], dtype=np.float32)

    return Engine("transformers pipeline", None, run, versions=versions_of("torch", "transformers"))


# Bundles.


def _bundle(source: Path, threads: int, title: str, package: str) -> Engine:
    from trainkit.export.runtimes import runner

    if package == "torch":
        limit_torch(threads)
    bundle = open_bundle(source)
    run = runner(bundle, threads)
    if package == "onnxruntime" and not bundle.manifest.equal_lengths:
        run = in_parts(run)  # as the library and the server do
    return _engine(title, bundle, run, package)


def _engine(title: str, bundle: Bundle, run: Runner, *packages: str) -> Engine:
    precision = bundle.manifest.precision
    name = title if precision == "fp32" else f"{title} {precision}"
    return Engine(name, run, precision=precision, versions=versions_of(*packages))


def _onnx_on(source: Path, threads: int, title: str, providers: tuple[str, ...]) -> Engine:
    """Open it on a GPU; ``InputError`` where ONNX Runtime falls back to the CPU."""
    import onnxruntime as ort

    from trainkit.serve.onnx_session import onnx_runner

    if providers[0] not in ort.get_available_providers():
        raise NotThereError(
            f"ONNX Runtime {ort.__version__} here has no {providers[0]}; on a machine with an "
            "NVIDIA GPU, run: pip install onnxruntime-gpu"
        )
    # Else NVIDIA's libraries round the factors of float32 products to 11 bits, and parity is lost.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    bundle = open_bundle(source)
    run = onnx_runner(bundle.model_path, threads=threads, providers=providers)
    versions = {"onnxruntime": ort.__version__}  # the package is called onnxruntime-gpu
    return _engine(title, bundle, run)._replace(versions=versions)


def _openvino(source: Path, threads: int) -> Engine:
    bundle = open_bundle(source)
    try:
        run = openvino_runner(str(bundle.model_path), threads)
    except RuntimeError as error:  # what its C++ exceptions become
        said = " ".join(str(error).split())[-300:]
        raise InputError(
            f"{bundle.model_path} cannot be opened by OpenVINO {metadata.version('openvino')} "
            f"({said}); export it in fp32, or with --opset 18."
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


# Conversions by others, of a Hugging Face folder.


def _converted(source: Path, threads: int, name: str) -> Engine:
    from trainkit.bench import peers

    try:
        return peers.CONVERSIONS[name](source, threads)
    except (NotThereError, TrainkitError):
        raise
    except Exception as error:  # what somebody else's exporter raises, it alone knows
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise NotThereError(
            f"{name} cannot convert {source} ({type(error).__name__}: {lines[0]}); "
            "take another runtime for this model"
        ) from error


def _conversion(name: str, *needs: str, peer: str | None = None, extra: str = "bench") -> Runtime:
    install = "make peers" if peer else f"pip install 'trainkit[{extra}]'"
    return Runtime(partial(_converted, name=name), ("classifier",), needs, install, peer)


_CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")
RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(_eager, ON_TORCH),
    "huggingface": Runtime(_huggingface, ("classifier",)),
    "compile": Runtime(_compiled, ON_TORCH),
    "pipeline": Runtime(_pipeline, ("classifier",)),
    "torchscript": Runtime(
        partial(_bundle, title="TorchScript", package="torch"), ("torchscript",), ("torch",)
    ),
    "pt2": Runtime(partial(_bundle, title="torch.export", package="torch"), ("pt2",), ("torch",)),
    "aoti": Runtime(partial(_bundle, title="AOTInductor", package="torch"), ("aoti",), ("torch",)),
    "onnx": Runtime(
        partial(_bundle, title="ONNX Runtime", package="onnxruntime"), ("onnx",), ("onnxruntime",)
    ),
    "openvino": Runtime(_openvino, ("onnx",), ("openvino",), "pip install 'trainkit[openvino]'"),
    "eager-cuda": Runtime(partial(_eager, device="cuda"), ON_TORCH),
    "onnx-cuda": Runtime(
        partial(_onnx_on, title="ONNX Runtime CUDA", providers=_CUDA), ("onnx",), ("onnxruntime",)
    ),
    "onnx-tensorrt": Runtime(
        partial(
            _onnx_on,
            title="ONNX Runtime TensorRT",
            providers=("TensorrtExecutionProvider", *_CUDA),
        ),
        ("onnx",),
        ("onnxruntime",),
    ),
    "transformers-exporters": _conversion(
        "transformers-exporters", "torch", "transformers", "onnxscript"
    ),
    "ort-optimizer": _conversion("ort-optimizer", "torch", "transformers", "onnx"),
    "openvino-converter": _conversion(
        "openvino-converter", "torch", "transformers", "openvino", extra="openvino"
    ),
    "optimum": _conversion("optimum", "optimum", peer="optimum"),
    "optimum-o2": _conversion("optimum-o2", "optimum", peer="optimum"),
    "optimum-int8": _conversion("optimum-int8", "optimum", peer="optimum"),
    "sentence-transformers": _conversion(
        "sentence-transformers", "sentence_transformers", peer="sentence-transformers"
    ),
}
