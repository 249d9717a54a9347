"""Losses that keep a router balanced, bounded or decided, under their published names.

Each is a function of the routing triple, the router's probabilities [N, E] and the context, and returns a scalar
without its coefficient. Padding never counts, and neither do unused slots.
Shapes: N = B * T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import Routing, RoutingContext

Loss = Callable[..., Float[Tensor, ""]]


def load_balance(routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e; f: share of all slots, P: mean probability. 1 when even.

    Switch Transformers (arXiv:2101.03961), GShard (arXiv:2006.16668).
    """
    real = context.real
    slots = _slots(routing, probabilities.shape[1], real).sum(dim=0)
    share = slots / slots.sum().clamp(min=1)
    return len(share) * (share * _mean(probabilities, real)).sum()


def router_z(routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext) -> Float[Tensor, ""]:
    """Mean squared log-partition of the logits: keeps them small (ST-MoE, arXiv:2202.08906)."""
    return _mean(routing.logits.float().logsumexp(dim=-1).square(), context.real)


def router_entropy(routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext) -> Float[Tensor, ""]:
    """Mean entropy of the probabilities, in nats: the dynamic loss of "Harder Tasks Need More Experts"
    (arXiv:2403.07652)."""
    positive = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)  # at 0 the gradient would be NaN
    return _mean(torch.special.entr(positive).sum(dim=-1), context.real)


def top_p_balance(routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e; f: share of the tokens that e serves, P: mean probability.

    When even, the mean number of experts a token uses. "Harder Tasks Need More Experts" (arXiv:2403.07652).
    """
    real = context.real
    slots = _slots(routing, probabilities.shape[1], real).sum(dim=0)
    tokens = len(probabilities) if real is None else real.sum().clamp(min=1)
    return len(slots) * (slots / tokens * _mean(probabilities, real)).sum()


def expert_balance(routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext) -> Float[Tensor, ""]:
    """sum_e f_e P_e within each sequence, averaged over sequences; f_e = E / (K T) * slots. 1 when even.

    DeepSeekMoE (arXiv:2401.06066), as released: per sequence.
    """
    f, mean = _by_sequence(routing, probabilities, context)
    return (f * mean).sum(dim=-1).mean()


def device_balance(
    routing: Routing, probabilities: Float[Tensor, "n e"], context: RoutingContext, *, groups: Sequence[Sequence[int]]
) -> Float[Tensor, ""]:
    """sum_d f'_d P'_d over groups of experts; f': mean of f in the group, P': sum of P. 1 when even.

    DeepSeekMoE (arXiv:2401.06066). Raises ValueError where the groups do not partition the experts.
    """
    experts = probabilities.shape[1]
    if sorted(e for group in groups for e in group) != list(range(experts)):
        raise ValueError(f"groups {groups} do not partition the {experts} experts")
    f, mean = _by_sequence(routing, probabilities, context)
    return sum(f[:, list(g)].mean(dim=1) * mean[:, list(g)].sum(dim=1) for g in groups).mean()  # type: ignore[union-attr]


LOSSES: dict[str, Loss] = {
    "load_balance": load_balance,
    "router_z": router_z,
    "router_entropy": router_entropy,
    "top_p_balance": top_p_balance,
    "expert_balance": expert_balance,
    "device_balance": device_balance,
}


def _slots(routing: Routing, num_experts: int, real: Tensor | None) -> Float[Tensor, "n e"]:
    """How many slots each token has at each expert."""
    slots = torch.zeros(len(routing.indices), num_experts + 1, dtype=torch.float32, device=routing.indices.device)
    slots.scatter_add_(1, routing.indices, torch.ones_like(routing.indices, dtype=torch.float32))
    slots = slots[:, :num_experts]
    return slots if real is None else slots * real[:, None]


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over tokens."""
    if real is None:
        return values.mean(dim=0)
    weight = real.to(values.dtype)
    return torch.tensordot(weight, values, dims=([0], [0])) / weight.sum().clamp(min=1)


def _by_sequence(
    routing: Routing, probabilities: Tensor, context: RoutingContext
) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"]]:
    """DeepSeek's f and P of every sequence; one without tokens has zeros."""
    rows, length = context.shape
    slots = _slots(routing, probabilities.shape[1], context.real).view(rows, length, -1).sum(dim=1)
    f = slots * probabilities.shape[1] / slots.sum(dim=1, keepdim=True).clamp(min=1)
    by_row = probabilities.view(rows, length, -1)
    if context.mask is None:
        return f, by_row.mean(dim=1)
    weight = context.mask.to(by_row.dtype)
    return f, torch.einsum("bt,bte->be", weight, by_row) / weight.sum(dim=1, keepdim=True).clamp(min=1)
