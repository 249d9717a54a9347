"""How routers do while a model trains, and where a number first stopped being finite.

    load l_e          share of a layer's slots that expert e had since the last report
    entropy           -sum l_e log l_e / log E: 1 when even, 0 when one expert has all
    max_violation     max l_e / mean l - 1 ("Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664): 0 when even
    dead              experts without a slot
    dropped           share of tokens that no expert served
    slots             experts per token

Shapes: N tokens, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.layers.routers.base import Router
from moestro.routing import RoutingContext
from moestro.train.processes import Processes
from moestro.view.experts import is_experts, num_experts_of


@dataclass
class Load:
    """What one layer's router did: slots by expert, then tokens, and tokens without an expert."""

    totals: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"], num_experts: int) -> None:
        used = (weights.detach() != 0) & (indices < num_experts)
        slots = torch.bincount(indices[used], minlength=num_experts)
        dropped = (~used.any(dim=1)).sum()
        new = torch.cat([slots, torch.stack([torch.full_like(dropped, len(indices)), dropped])]).double()
        self.totals = new if self.totals.numel() == 0 else self.totals + new

    def report(self) -> dict[str, float]:
        slots, (tokens, dropped) = self.totals[:-2], self.totals[-2:].tolist()
        share = slots / slots.sum().clamp(min=1)
        entropy = float(torch.special.entr(share).sum()) / max(float(torch.tensor(len(share)).log()), 1e-9)
        return {
            "entropy": round(entropy, 4),
            "max_violation": round(float(share.max()) * len(share) - 1, 4),
            "dead": int((slots == 0).sum()),
            "dropped": round(dropped / max(tokens, 1), 4),
            "slots": round(float(slots.sum()) / max(tokens, 1), 3),
        }


class RouterHealth:
    """Counts every training forward of `model` until `report` is called."""

    def __init__(self, model: nn.Module):
        self.loads: dict[int, Load] = {}
        outer: list[str] = []
        for name, module in model.named_modules():
            if any(name.startswith(f"{o}.") for o in outer):
                continue  # a router within a router
            if isinstance(module, Router):
                outer.append(name)
                module.register_forward_hook(partial(self._on_router, layer_number(name)), with_kwargs=True)
            elif is_experts(module) and not _has_router(model, name):
                module.register_forward_pre_hook(partial(self._before_experts, layer_number(name)))

    def _on_router(self, layer: int, router: Any, args: Any, kwargs: Any, out: Any) -> None:
        if router.training:
            context = next((a for a in (*args, *kwargs.values()) if isinstance(a, RoutingContext)), None)
            number = layer if context is None else context.layer  # layers may share a router
            self.loads.setdefault(number, Load()).add(out[2], out[1], router.num_experts)

    def _before_experts(self, layer: int, experts: nn.Module, args: Any) -> None:
        if experts.training:
            _, indices, weights = args
            self.loads.setdefault(layer, Load()).add(indices, weights, num_experts_of(experts))

    def report(self, processes: Processes) -> list[dict[str, float]]:
        """One record per layer, and counting starts anew."""
        layers = sorted(self.loads)
        processes.add_up(self.loads[layer].totals for layer in layers)
        records = [{"layer": layer, **self.loads[layer].report()} for layer in layers]
        self.loads.clear()
        return records


def layer_number(name: str) -> int:
    """Number of the decoder layer in a module's qualified name; 0 where there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else 0


def _has_router(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, Router) for child in parent.children())


@torch.no_grad()
def first_non_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The module whose output is the first to hold NaN or inf in `forward`, innermost first; None where all are finite.

    A router's -inf (a closed expert) is no fault.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, out: Any) -> None:
        if not found and any(bool((t.isnan() | t.isposinf()).any()) for t in _tensors(out)):
            found.append(f"{name} ({type(module).__name__})")

    hooks = [m.register_forward_hook(partial(look, name)) for name, m in model.named_modules() if name]
    was_training = model.training
    model.eval()
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return found[0] if found else None


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, tuple | list):
        return [t for part in out for t in _tensors(part)]
    return []
