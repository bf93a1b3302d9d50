"""All cores for large models; other tests give torch one thread."""

import contextlib
from collections.abc import Iterator

import torch

from trainkit.serve.cores import usable_cores

__all__ = ["all_cores"]


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let torch use every core, to train or export a whole MiniLM."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
