"""The processes that train one model together: one, or those that torchrun started.

Each takes its share of every batch, PyTorch's DistributedDataParallel (Li et al. 2020) averages the
gradients, and the first one, which leads, writes the run's folder.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.serve.errors import InputError


class ProcessGroup(NamedTuple):
    """This process's number among ``size`` that train together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes what comes out."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model to call, whose backward averages the gradients of all processes."""
        if self.size == 1:
            return model
        ids = [device] if device.type == "cuda" else None
        # Buffers are solved or counted before, alike in all processes, and never change.
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def no_sync(self, forward: nn.Module) -> AbstractContextManager[None]:
        """Return a block whose backward adds to this process's own gradients, not yet averaged."""
        if isinstance(forward, nn.parallel.DistributedDataParallel):
            return forward.no_sync()
        return nullcontext()

    def shard(self, chosen: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return what this process takes of a batch: about as many tokens as each of the others.

        ``lengths`` are in the order of ``chosen``. Empty where there are fewer rows than processes.
        """
        if self.size == 1:
            return list(chosen)
        by_length = sorted(range(len(chosen)), key=lambda place: lengths[place])
        return [chosen[place] for place in by_length[self.rank :: self.size]]

    def all_sum(self, *values: float) -> list[float]:
        """Add up each value over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors (on the CPU, of one shape) of all processes, by rank."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found


SINGLE = ProcessGroup()


@contextmanager
def init() -> Iterator[ProcessGroup]:
    """Meet the other processes that torchrun started, if it did; part from them at the end."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE
        return
    if not dist.is_available():
        raise InputError(
            "this build of PyTorch has no torch.distributed; train without torchrun, or install "
            "one that has."
        )
    # Tensors of the CPU go over gloo in any case: sums and random numbers' states.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
