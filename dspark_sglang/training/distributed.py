"""Data parallelism over ``torchrun`` processes: one all-reduce of gradients a step, sums everywhere.

Everything that enters a step is decided by (seed, step) alone, so any number of processes works
on the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class World(NamedTuple):
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.view(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum_flag(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)


def join(device: str) -> tuple[World, str]:
    """Join the process group ``torchrun`` describes; a single process needs none.

    Args:
        device: of the run; ``cuda`` becomes this process's own.

    Returns:
        This process among its peers, and its device.
    """
    if not dist.is_torchelastic_launched():
        return World(), device
    cuda = device.startswith("cuda")
    if not dist.is_initialized():
        # Counts travel as CPU tensors; the others wait while the first process validates.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    world = World(dist.get_rank(), dist.get_world_size())
    if cuda:
        device = f"cuda:{dist.get_node_local_rank()}"
        torch.cuda.set_device(device)
    return world, device


def leave() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
