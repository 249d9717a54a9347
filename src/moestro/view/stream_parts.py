"""What a streamed view is put together with: weights that come and go, reading ahead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import nn

import moestro.view.surgery as surgery
from moestro.formats.hf import Group
from moestro.view.layers import MoELayer, _could_route, is_experts
from moestro.view.rules import named_tensors
from moestro.view.stream_weights import Weights

PREFETCH_BYTES = 2**31
"""Layers up to this size are read ahead while the layer before them computes."""


class State:
    """The tensors of a module and the numbers of experts that some modules state, to come back to."""

    def __init__(self, module: nn.Module, holders: Iterable[Any], *, recurse: bool = True):
        self._tensors = [(owner, attr, getattr(owner, attr)) for _, owner, attr in named_tensors(module, recurse)]
        self._numbers = [(h, n, v) for h in holders for n, v in surgery.numbers(h, surgery.EXPERT_COUNT)]

    def restore(self) -> None:
        for owner, name, value in [*self._tensors, *self._numbers]:
            setattr(owner, name, value)


def router_names(model: nn.Module) -> list[str]:
    """What may be a router, beside the experts or in the block itself: prefixes of names. Found by shapes alone."""
    names = []
    for name, module in model.named_modules():
        if is_experts(module):
            block_name, _, own = name.rpartition(".")
            block = model.get_submodule(block_name)
            count = next(p for p in module.parameters(recurse=False) if p.dim() == 3).shape[0]
            for child_name, child in block.named_children():
                if child_name != own and _could_route(child, count):
                    names.append(f"{block_name}.{child_name}.")
            names += [f"{block_name}.{attr}" for _, _, attr in named_tensors(block, recurse=False)]
    return names or ["no such module"]


def list_of(layers: Sequence[MoELayer]) -> str:
    """Name of the list of decoder layers. Raises ValueError where the experts lie in none."""
    numbers = list(re.finditer(r"\.(\d+)(?=\.|$)", layers[0].name))
    if not numbers:
        raise ValueError(f"{layers[0].name} lies in no list of decoder layers; open the model with stream=False")
    return layers[0].name[: numbers[-1].start()]


class Ahead:
    """Reads the next layer in a thread while the current one computes."""

    def __init__(self, weights: Weights):
        self._weights, self._pool = weights, ThreadPoolExecutor(1)
        self._reading: Future[None] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)
        self._weights.forget()

    def start(self, groups: Sequence[Group]) -> None:
        if groups and self._weights.size_of(groups) <= PREFETCH_BYTES:
            self._reading = self._pool.submit(self._weights.fetch, groups)

    def wait(self, groups: Sequence[Group]) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.result()
