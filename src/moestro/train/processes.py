"""One process or several: who this one is, and what they add up.

Several are started by `accelerate launch` or `torchrun`; accelerate joins them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.layers.routers.base import Router


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    """Where accelerate wants this process to compute; None: where the model is."""

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of process 0."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def join() -> Processes:
    """The processes that a launcher started; alone without one. Raises ImportError where accelerate is missing."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError(
            "several processes are joined by accelerate, which is not installed: pip install 'moestro[train]'"
        ) from None
    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, state.device)


def add_up_gradients(processes: Processes, weights: list[Tensor]) -> None:
    """Sum of the gradients over the processes, in one message."""
    if processes.count == 1:
        return
    flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
    processes.add_up([flat])
    for weight, part in zip(weights, flat.split([w.numel() for w in weights])):
        weight.grad = part.view_as(weight)


def share_counts(processes: Processes, model: nn.Module) -> None:
    """Add up what routers counted in this step, before they act on it."""
    for router in (m for m in model.modules() if isinstance(m, Router)):
        processes.add_up(getattr(router, name) for name in router.counts if hasattr(router, name))
