"""A mixture-of-experts layer that takes the place of any feed-forward layer.

    out[n] = sum over slots k of weights[n, k] * experts[indices[n, k]](hidden[n])  (+ shared(hidden[n]))

Shapes: B rows, T positions, N = B * T tokens, H hidden, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.losses import LOSSES
from moestro.layers.routers.base import Router
from moestro.routing import Routing, RoutingContext


class MoE(nn.Module):
    """Router, experts and an optional shared expert that every token passes.

    `losses`: {name in LOSSES: coefficient, or a mapping with `coef` and the loss's own options}. In training mode, the
    forward leaves them, times their coefficients, in `self.losses`; `gather_losses` adds up those of a whole model.

    Raises ValueError for an unknown loss, or a router and experts that disagree about the number of experts.
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        shared: nn.Module | None = None,
        *,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router chooses among {router.num_experts} experts; there are {experts.num_experts}")
        self.router, self.experts = router, experts
        if shared is not None:
            self.shared = shared
        self._terms = [(name, *_term(name, value)) for name, value in (losses or {}).items()]
        self.losses: dict[str, Tensor] = {}
        router.bind(experts)

    def forward(self, hidden: Float[Tensor, "... h"], context: RoutingContext | None = None) -> Float[Tensor, "... h"]:
        """`context` is needed by routers that look beyond single tokens; hidden [B, T, H] or [N, H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if context is None:
            context = RoutingContext(shape=(hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (1, len(flat)))
        routing = Routing(*self.router(flat, context))  # edits of an open model give a plain triple
        out = self.experts(flat, routing.indices, routing.weights.to(flat.dtype))
        if hasattr(self, "shared"):
            out = out + self.shared(flat)
        if self.training and self._terms:
            self.losses_have_gradient = torch.is_grad_enabled()
            probabilities = self.router.probabilities(routing.logits)
            self.losses = {
                name: coefficient * LOSSES[name](routing, probabilities, context, **options)
                for name, coefficient, options in self._terms
            }
        return out.view_as(hidden)


def _term(name: str, value: float | Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is not known; there are {', '.join(LOSSES)}")
    options = dict(value) if isinstance(value, Mapping) else {"coef": value}
    return float(options.pop("coef")), options


def gather_losses(model: nn.Module) -> dict[str, Float[Tensor, ""]]:
    """{name: sum over modules} of the losses that the last forward in training mode left, coefficients included.

    Raises ValueError where that forward ran without gradient, as under reentrant gradient checkpointing: these losses
    would train nothing.
    """
    total: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        found = (getattr(module, "losses", None) or {}).values()
        lost = torch.is_grad_enabled() and not getattr(module, "losses_have_gradient", True)
        if lost and found and not any(loss.requires_grad for loss in found):
            raise ValueError(
                f"the losses of {name or type(module).__name__} were computed without gradient: under reentrant "
                'gradient checkpointing pass gradient_checkpointing_kwargs={"use_reentrant": False}, and call '
                "gather_losses under torch.no_grad() where no gradient is wanted"
            )
        for name, loss in (getattr(module, "losses", None) or {}).items():
            total[name] = total[name] + loss if name in total else loss
    return total


@torch.no_grad()
def after_step(model: nn.Module, progress: float) -> None:
    """Tell every router that an optimiser step was taken; `progress` is the share of the training that is done."""
    for module in model.modules():
        if isinstance(module, Router):
            module.after_step(progress)
