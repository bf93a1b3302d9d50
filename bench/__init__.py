"""Benchmarks of runtimes and servers; see :mod:`trainkit.bench.api`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.bench.api import Benchmark, compare, load_test, open_result, run

__all__ = ["Benchmark", "compare", "load_test", "open_result", "run"]


def __getattr__(name: str) -> Any:  # PEP 562: importing the package loads nothing
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainkit.bench import api

    return getattr(api, name)
