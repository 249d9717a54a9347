"""The residual stream around an MoE block, found by watching what its layer's norms and parts give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from moestro.view.layers import MoELayer, decoder_layer
from moestro.view.situation import Pass
from moestro.view.state import LiveHook


def watch_norms(stack: nn.Module, layers: list[MoELayer], now: Callable[[], Pass], undo: ExitStack) -> None:
    """Remember what goes in and out of the norms beside each MoE block, and what the layer's parts give."""
    for layer in layers:
        owner = decoder_layer(stack, layer)
        for module in owner.modules():
            own = list(module.parameters(recurse=False))
            plain = own and all(p.dim() == 1 for p in own) and not list(module.children())
            if plain or "norm" in type(module).__name__.lower():  # a gated norm has parts of its own
                undo.callback(module.register_forward_hook(LiveHook(partial(_on_norm, now, layer.path))).remove)
        for module in owner.children():
            undo.callback(module.register_forward_hook(LiveHook(partial(_on_part, now, layer.path))).remove)


def _on_norm(now: Callable[[], Pass], name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    if isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == out.shape:
        now().normed.setdefault(name, []).append((ref(args[0]), args[0].detach(), out))


def _on_part(now: Callable[[], Pass], name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    several = isinstance(out, tuple)
    tensors = [t for t in (out if several else [out]) if isinstance(t, Tensor)]
    now().parts.setdefault(name, []).extend((ref(t), several) for t in tensors)


def residual_stream(now: Pass, layer: MoELayer, router_input: Tensor) -> Tensor:
    """The residual stream: what went into the norm whose output the router reads, else the router's input.

    The layer still holds it, since the block is to be added to it (where the norm was given a copy in another type,
    one of its parts made it), and it is none of several tensors that a part gives: those are a mix of streams and how
    to undo it.
    """
    pairs = now.normed.pop(layer.path, [])
    parts = [(t, several) for weak, several in now.parts.pop(layer.path, []) if (t := weak()) is not None]
    now.normed.clear()
    now.parts.clear()
    stream: Tensor | None = router_input
    for held, before, after in reversed(pairs):
        if _same_values(after, router_input):
            stream = held()
            if stream is None:
                stream = next((t for t, _ in parts if _same_values(t, before)), None)
            break
    if stream is None or any(several and t.data_ptr() == stream.data_ptr() for t, several in parts):
        raise ValueError(
            f"layer {layer.index} ({layer.name}): the residual stream could not be found: what its norm or router "
            "reads is not what the experts' output is added to; observers that need it, easy-ep for one, cannot run; "
            "use saliency 'reap'"
        )
    return stream


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    """Whether `other` is the tensor, also in another shape or rounded to another type."""
    if tensor.numel() != other.numel():
        return False
    same_memory = tensor.data_ptr() == other.data_ptr()
    return same_memory or torch.equal(tensor.reshape(other.shape).to(other.dtype), other)
