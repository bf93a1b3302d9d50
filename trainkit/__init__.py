"""Train a small text classifier, export it with proof, serve it without torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.api.benchmark import Benchmark, benchmark
    from trainkit.api.models import Bundle, Run, TrainedModel, open_model
    from trainkit.api.scores import evaluate, verify
    from trainkit.api.training import train
    from trainkit.serve.classifier import Classifier
    from trainkit.serve.errors import CheckFailedError, InputError

__version__ = "0.1.0"

__all__ = [
    "Benchmark",
    "Bundle",
    "CheckFailedError",
    "Classifier",
    "InputError",
    "Run",
    "TrainedModel",
    "__version__",
    "benchmark",
    "evaluate",
    "open_model",
    "train",
    "verify",
]

_MODULES = {
    "Benchmark": "api.benchmark",
    "Bundle": "api.models",
    "CheckFailedError": "serve.errors",
    "Classifier": "serve.classifier",
    "InputError": "serve.errors",
    "Run": "api.models",
    "TrainedModel": "api.models",
    "benchmark": "api.benchmark",
    "evaluate": "api.scores",
    "open_model": "api.models",
    "train": "api.training",
    "verify": "api.scores",
}


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that ``import trainkit`` loads neither numpy nor torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
