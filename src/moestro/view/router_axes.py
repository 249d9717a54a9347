"""Which tensors of a router, and of the block around it, have one entry per expert.

By their owner's declaration (`expert_axes`), else by their shapes. Where the number of experts is a width of the layer
too, a shape says nothing, and the tensor is asked: changing its first entry must act on the first expert alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from moestro.view.experts import PerExpert, axes_of, experts_of, is_experts, misaligned_rows
from moestro.view.layers import MoELayer
from moestro.view.rules import RouterCall, logits_of, named_tensors


def router_tensors(layer: MoELayer) -> list[PerExpert]:
    """Every tensor of the router, and of the block itself, with one entry per expert.

    Raises ValueError where a shape may mean experts or channels, and what the tensor does tells neither.
    """
    assert layer.rule is not None
    sizes = {layer.num_experts, layer.num_experts + layer.rule.null_experts}
    found = []
    for module, recurse in ((layer.router, True), (layer.block, False)):
        for _, owner, attr in named_tensors(module, recurse):
            tensor, declared = getattr(owner, attr), axes_of(owner)
            if declared is not None:
                if attr in declared:
                    found.append(PerExpert(owner, attr, declared[attr]))
            elif tensor.dim() and tensor.shape[0] in sizes:
                found.append(PerExpert(owner, attr, 0))
            elif tensor.dim() > 1 and tensor.shape[-1] in sizes and tensor.numel() in sizes:
                found.append(PerExpert(owner, attr, tensor.dim() - 1))
    call = RouterCall(layer.block, layer.router)
    if call.hidden_size not in sizes and not any(_two_axes(part, sizes) for part in found):
        return found
    return [part for part in found if axes_of(part.owner) is not None or _acts_on_one(layer, call, part)]


def _two_axes(part: PerExpert, sizes: set[int]) -> bool:
    return sum(size in sizes for size in part.tensor.shape) > 1


def _acts_on_one(layer: MoELayer, call: RouterCall, part: PerExpert) -> bool:
    """Whether the tensor's first entry acts on the first expert alone. Raises ValueError where it acts on nothing."""
    rule, tensor = layer.rule, part.tensor
    assert rule is not None
    if not tensor.is_floating_point():
        raise ValueError(f"layer {layer.index}: {_ambiguous(layer, part)}")
    changed = tensor.detach().clone()
    changed.select(part.axis, 0).mul_(-3).add_(1 + changed.abs().max())
    hidden = call.hidden(5)
    before, after = call(hidden), call(hidden, {(part.owner, part.name): changed})
    logits = [logits_of(rule, routing.logits).float() for routing in (before, after)]
    if rule.returns_probabilities:  # known up to a constant of each token
        logits = [z - z[:, 1:2] for z in logits]
    moved = (logits[0] - logits[1]).abs().amax(dim=0) > 1e-3 * logits[0].abs().max().clamp_min(1e-6)
    if moved.any():
        return not bool(moved[1:].any())
    same = torch.equal(before.indices, after.indices) and torch.allclose(before.weights, after.weights)
    if same:
        raise ValueError(f"layer {layer.index}: {_ambiguous(layer, part)}")
    return True  # it acts behind the logits, where there are no channels any more


def _ambiguous(layer: MoELayer, part: PerExpert) -> str:
    return (
        f"{type(part.owner).__name__}.{part.name} of shape {tuple(part.tensor.shape)} may have an entry for each of "
        f"{layer.num_experts} experts or for each of as many channels, and nothing tells which; declare it on the "
        f"class: expert_axes = {{{part.name!r}: 0}} where it is the experts', {{}} where it is not"
    )


def bytes_per_expert(layer: MoELayer) -> int:
    """What one expert of the layer takes, router rows included; 0 where its experts cannot be removed."""
    if layer.rule is None or not is_experts(layer.experts):
        return 0
    whole = experts_of(layer.experts).nbytes() + sum(p.tensor.nbytes for p in router_tensors(layer))
    return whole // layer.num_experts


def warn_of_rows(layers: Sequence[MoELayer]) -> None:
    """Warn where the experts' widths will stop the backend that the model is to run them on."""
    for layer in layers:
        backend = getattr(getattr(layer.experts, "config", None), "_experts_implementation", None)
        if backend == "grouped_mm" and (problem := misaligned_rows(layer.experts)):
            warnings.warn(
                f"layer {layer.index}: {problem}, no multiple of 16: transformers' default experts backend, "
                "grouped_mm, will stop at the first token ('strides should be multiple of 16 bytes'). Choose another: "
                "model.set_experts_implementation('moestro'), or 'eager' without moestro",
                stacklevel=4,
            )
            return
