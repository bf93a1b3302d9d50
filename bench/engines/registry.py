"""The runtimes of the benchmark behind one interface: a source in, an :class:`Engine` out.

A process opens one engine. A runtime is imported where it is opened: the environments of the peers
(:mod:`trainkit.bench.engines.peers`) have no more than serving's packages and their own.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trainkit.bench.engines.base import (
    KINDS,
    ON_TORCH,
    Engine,
    EngineUnavailableError,
    Kind,
    kind_of,
)
from trainkit.bench.engines.bundles import of_bundle, onnx_on, onnx_workers, openvino_bundle
from trainkit.bench.engines.peers import CONVERSIONS
from trainkit.bench.engines.pytorch import compiled, eager, huggingface, pipeline
from trainkit.serve.errors import InputError, TrainkitError
from trainkit.serve.formats import Format


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
    install: str = "pip install 'trainkit-onnx[bench]'"
    peer: str | None = None


def parse(text: str) -> Spec:
    """Read ``RUNTIME:SOURCE``, or ``SOURCE`` alone, which gets the runtime made for it.

    Raises ``InputError`` for an unknown runtime or folder, or if the runtime does not take it.
    """
    name, colon, path = text.partition(":")
    # A folder may have a colon in its name; no runtime has a slash in its own.
    if Path(text).is_dir() or not colon or "/" in name:
        source = Path(text)
        kind = kind_of(source)
        return Spec("eager" if kind in ON_TORCH else kind, source)
    runtime, source = _known(name), Path(path)
    if not path:
        raise InputError(f"'{text}' names no source; give {name}:FOLDER.")
    _check_takes(runtime, name, source)
    return Spec(name, source)


def applicable(source: Path) -> list[str]:
    """Return the names of all runtimes that take such a source, whether they are there or not."""
    kind = kind_of(source)
    return [name for name, runtime in RUNTIMES.items() if kind in runtime.takes]


def peers_folder() -> Path:
    """Return the folder with an environment per peer: `TRAINKIT_PEERS`, or else ``build/peers``."""
    return Path(os.environ.get("TRAINKIT_PEERS", "build/peers")).absolute()


def python_of(name: str) -> Path | None:
    """Return the interpreter of a peer's environment, or None for a runtime of this one.

    Raises ``EngineUnavailableError`` if the environment does not exist.
    """
    peer = _known(name).peer
    if peer is None:
        return None
    home = peers_folder() / peer / "venv" / "bin"
    if not (home / ".installed").is_file():  # which `make peers` writes last
        raise EngineUnavailableError(
            f"the environment of {peer} is not in {peers_folder()}; run in a checkout: make peers "
            "(and set TRAINKIT_PEERS to its build/peers if you work in another folder)"
        )
    return home / "python"


def open_engine(name: str, source: Path, threads: int) -> Engine:
    """Open a source in a runtime with ``threads`` threads, once in a process.

    Raises ``EngineUnavailableError`` if the runtime is not installed, and ``InputError`` if it does
    not take the source or cannot open it.
    """
    runtime = _known(name)
    _check_takes(runtime, name, source)
    missing = [package for package in runtime.needs if find_spec(package) is None]
    if missing:
        raise EngineUnavailableError(
            f"{' and '.join(missing)} not installed; run: {runtime.install}"
        )
    return runtime.open(source, threads)


def _known(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise InputError(f"'{name}' is not a runtime; known are {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


def _check_takes(runtime: Runtime, name: str, source: Path) -> None:
    kind = kind_of(source)
    if kind not in runtime.takes:
        wanted = " or ".join(KINDS[one] for one in runtime.takes)
        raise InputError(f"{name} takes {wanted}, and {source} is {KINDS[kind]}; give it another.")


def _converted(source: Path, threads: int, name: str) -> Engine:
    try:
        return CONVERSIONS[name](source, threads)
    except (EngineUnavailableError, TrainkitError):
        raise
    except Exception as error:  # what somebody else's exporter raises, it alone knows
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise EngineUnavailableError(
            f"{name} cannot convert {source} ({type(error).__name__}: {lines[0]}); "
            "take another runtime for this model"
        ) from error


def _conversion(name: str, *needs: str, peer: str | None = None, extra: str = "bench") -> Runtime:
    install = "make peers" if peer else f"pip install 'trainkit-onnx[{extra}]'"
    return Runtime(partial(_converted, name=name), ("classifier",), needs, install, peer)


def _opened(title: str, format: Format, package: str) -> Runtime:
    return Runtime(partial(of_bundle, title=title, package=package), (format,), (package,))


_CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")
RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(eager, ON_TORCH),
    "huggingface": Runtime(huggingface, ("classifier",)),
    "compile": Runtime(compiled, ON_TORCH),
    "pipeline": Runtime(pipeline, ("classifier",)),
    "torchscript": _opened("TorchScript", "torchscript", "torch"),
    "pt2": _opened("torch.export", "pt2", "torch"),
    "aoti": _opened("AOTInductor", "aoti", "torch"),
    "onnx": _opened("ONNX Runtime", "onnx", "onnxruntime"),
    "onnx-workers": Runtime(onnx_workers, ("onnx",), ("onnxruntime",)),
    "openvino": Runtime(
        openvino_bundle, ("onnx",), ("openvino",), "pip install 'trainkit-onnx[openvino]'"
    ),
    "eager-cuda": Runtime(partial(eager, device="cuda"), ON_TORCH),
    "onnx-cuda": Runtime(
        partial(onnx_on, title="ONNX Runtime CUDA", providers=_CUDA), ("onnx",), ("onnxruntime",)
    ),
    "onnx-tensorrt": Runtime(
        partial(
            onnx_on,
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
