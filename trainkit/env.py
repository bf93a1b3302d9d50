"""What trainkit stands on here: versions, providers, processor, cores, GPU, and what is wrong.

Needs only the base install, and imports neither torch nor onnxruntime to name their versions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import util

import msgspec

from trainkit.bench.measure.environment import Environment, describe
from trainkit.serve.errors import first_line

# The oldest versions that the extras ask for.
OLDEST = {
    "numpy": "1.26",
    "onnx": "1.19",
    "onnxruntime": "1.24",
    "onnxruntime-gpu": "1.24",
    "tokenizers": "0.22",
    "torch": "2.9",
    "transformers": "5",
}
# The order that works: the base install brings onnxruntime, whose files onnxruntime-gpu replaces.
GPU_INSTALL = (
    "pip install 'trainkit-onnx[gpu]' && pip uninstall --yes onnxruntime && "
    "pip install --force-reinstall --no-deps onnxruntime-gpu"
)
CPU_INSTALL = (
    "pip uninstall --yes onnxruntime-gpu && pip install --force-reinstall --no-deps onnxruntime"
)

TORCH_INSTALL = "pip install --force-reinstall torch"


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong, and the command or the step that mends it."""

    problem: str
    remedy: str


class EnvironmentReport(msgspec.Struct, frozen=True, kw_only=True):
    """The machine with its libraries, and what is wrong; ``torch_cuda`` is torch's CUDA version."""

    environment: Environment
    torch_cuda: str | None
    findings: tuple[Finding, ...]


def inspect_environment() -> EnvironmentReport:
    """Look at this environment as it is now."""
    environment = describe()
    found = [*findings(environment.versions, environment.providers), *_cuda(environment)]
    torch_cuda = None
    if util.find_spec("torch") is not None:
        try:
            import torch
        except (ImportError, OSError) as error:  # a library of its own is missing
            found.append(Finding(f"torch cannot be imported ({first_line(error)})", TORCH_INSTALL))
        else:
            torch_cuda = torch.version.cuda
            found += _torch_cuda(environment)
    return EnvironmentReport(environment=environment, torch_cuda=torch_cuda, findings=tuple(found))


def findings(versions: Mapping[str, str | None], providers: Iterable[str]) -> Iterator[Finding]:
    """Yield what is wrong with the installed distributions.

    ``versions`` are by distribution, None for one that is not installed; ``providers`` are those
    that ONNX Runtime reports.
    """
    cpu, gpu = versions.get("onnxruntime"), versions.get("onnxruntime-gpu")
    if cpu and gpu:
        yield Finding(
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed: they own the same "
            "files, and the one installed last is used in part",
            f"for a GPU: {GPU_INSTALL}; for the CPU: {CPU_INSTALL}",
        )
    if not cpu and not gpu:
        yield Finding("onnxruntime is not installed", "pip install onnxruntime")
    elif not list(providers):
        yield Finding(
            "onnxruntime cannot be imported", f"pip install --force-reinstall {_name(gpu)}"
        )
    if gpu and not cpu and "CUDAExecutionProvider" not in providers:
        yield Finding(
            f"onnxruntime-gpu {gpu} is installed, but the module has no CUDAExecutionProvider: "
            "files of another build replaced its own",
            GPU_INSTALL,
        )
    for package, oldest in OLDEST.items():
        version = versions.get(package)
        if version is not None and _numbers(version) < _numbers(oldest):
            yield Finding(
                f"{package} {version} is older than {oldest}", f"pip install --upgrade {package}"
            )


def _name(gpu: str | None) -> str:
    return "onnxruntime-gpu" if gpu else "onnxruntime"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def _cuda(environment: Environment) -> Iterator[Finding]:
    """Yield what keeps a CUDA build of ONNX Runtime from using the GPU."""
    has_gpu = environment.gpu != "none"
    if "CUDAExecutionProvider" in environment.providers and (reason := cuda_session_error()):
        yield Finding(
            f"this CUDA build of ONNX Runtime cannot use CUDA here ({reason})",
            "install NVIDIA's driver and the libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            if has_gpu
            else f"on a machine without an NVIDIA GPU: {CPU_INSTALL}",
        )


def _torch_cuda(environment: Environment) -> Iterator[Finding]:
    """Yield what keeps a CUDA build of torch from using the GPU."""
    import torch

    has_gpu = environment.gpu != "none"
    if has_gpu and torch.version.cuda is not None and not torch.cuda.is_available():
        yield Finding(
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda} and finds no "
            "usable GPU",
            f"update the driver (now {environment.gpu_driver}), or install a torch for an "
            "older CUDA",
        )


def cuda_session_error() -> str:
    """Return why ONNX Runtime's CUDA provider does not open; empty if it does.

    The provider's library is loaded and its own libraries (cuBLAS, cuDNN) with it.
    """
    import onnxruntime as ort

    try:
        ort.preload_dlls()  # of NVIDIA's Python packages, if they are installed
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(
            EMPTY_MODEL, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
        return " ".join(str(error).split())[:200]
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return "its libraries cannot be loaded"
    return ""


# An ONNX model with one Identity node from x to y, as protobuf bytes (IR version 8, opset 17).
EMPTY_MODEL = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a0208016"
    "20f0a0179120a0a08080112040a02080142040a001011"
)
