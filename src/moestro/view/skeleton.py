"""A copy of an open model that takes no memory: experts on the meta device, routers real, everything else shared.

What is going to be done to a model is tried on such a copy first. It is never run as a whole, only its routers are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.layers.routers.base import Router
from moestro.view.layers import MoELayer


def skeleton_of(model: nn.Module, stack: nn.Module, layers: Sequence[MoELayer], **more: Any) -> SimpleNamespace:
    """`model`, `stack` and `layers` copied together, and `more` as attributes beside them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                memo[id(tensor)] = tensor
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                memo[id(value)] = type(value)()
        if "_hf_hook" in vars(module):
            memo[id(module._hf_hook)] = module._hf_hook  # it holds the weights it has offloaded
    for layer in layers:
        whole = isinstance(layer.router, Router)  # some of those read the experts' weights
        for tensor in layer.experts.parameters():
            memo[id(tensor)] = _copy(tensor) if whole else _on_meta(tensor)
        for tensor in [*layer.block._parameters.values(), *layer.block._buffers.values()]:
            if tensor is not None:
                memo[id(tensor)] = _copy(tensor)
        for tensor in (*layer.router.parameters(), *layer.router.buffers()):
            memo[id(tensor)] = _copy(tensor)
    kept = list(memo.values())
    model, stack, copied = copy.deepcopy((model, stack, list(layers)), memo)
    del kept
    return SimpleNamespace(model=model, stack=stack, layers=copied, **more)


def _copy(tensor: Tensor) -> Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _on_meta(tensor: Tensor) -> Tensor:
    new = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
