"""As many experts as a token's probability mass asks for: dynamic routing by a threshold.

    P = softmax(W h),  sorted: P_(1) >= P_(2) >= ...
    t = min{ k : P_(1) + ... + P_(k) >= p }
    weights = P of the first t experts, not normalised

so a token whose router is sure uses one expert, and one whose router is not uses several, in training and at inference
alike. The router could flatten P to buy more computation: train it with

    router_losses = {"top_p_balance": 1e-2, "router_entropy": 1e-4}

"Harder Tasks Need More Experts: Dynamic Routing in MoE Models" (arXiv:2403.07652).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32
from moestro.routing import Routing, RoutingContext, RoutingRule

DEFAULT_P = 0.4  # the paper's


class TopPRouter(Router):
    """`top_k` is what routers are called with; here it counts for nothing, p decides.

    `max_experts` bounds what a token costs, and breaks the promise that its experts hold mass p. `norm_weights` scales
    the weights to sum 1, which the paper does not. How many experts a batch uses is not bounded by p where P is flat.

    Raises ValueError for p outside (0, 1] or max_experts < 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        p: float = DEFAULT_P,
        max_experts: int | None = None,
        norm_weights: bool = False,
    ):
        super().__init__(hidden_size, num_experts, 1)
        check_p(p)
        if max_experts is not None and max_experts < 1:
            raise ValueError(f"max_experts={max_experts}: every token uses at least one expert")
        self.p, self.max_experts, self.norm_weights = p, max_experts, norm_weights
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters(std=0.02)

    @property
    def rule(self) -> RoutingRule:
        return RoutingRule(1, normalize=self.norm_weights, top_p=self.p, max_experts=self.max_experts)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        return self.rule(linear_fp32(hidden, self.weight))

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, p={self.p:g}"


def check_p(p: float) -> None:
    """Raise ValueError where p is no share of a probability mass."""
    if not 0 < p <= 1:
        raise ValueError(f"p={p}: the share of the probability mass to reach lies in (0, 1]; 1 takes all experts")
