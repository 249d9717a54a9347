"""A router that adds to its logits those of the sparse layer below.

    s_l = W_l u_l,  s_0 = 0
    z_l = s_l + ratio * s_{l-1}
    softmax, the K best, normalised

With ratio 0 it is the standard router. Every token has its own s; a forward pass starts at zero, so the KV cache holds
nothing of it. It is a control for the recurrent router: "r-0.5" and "r-1.0" in "Layerwise Recurrent Router for
Mixture-of-Experts" (arXiv:2408.06793), where s comes from a cell without memory (`RecurrentRouter(history="zeroed")`)
and not, as here, from the standard router. The paper writes a sum of gating scores and speaks of passing logits; we
take it to mean logits, and those of one layer below only. Shapes: N tokens, H hidden, E experts.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32
from moestro.routing import Routing, RoutingContext, RoutingRule

LOGITS, NUMBERS = "previous_logits", "previous_logits_experts"
"""Under these names s and its experts' numbers travel from layer to layer (`RoutingContext.state`)."""


class PreviousLogitsRouter(Router):
    """Expert e of one layer inherits from expert e below: where experts are cut, all layers must keep the same.

    What an edit does to a layer's routing does not reach the layers above: they are handed its own logits.

    Raises ValueError for a ratio that is not finite.
    """

    expert_numbers: Int[Tensor, " e"]
    """The experts' numbers before any cut."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, ratio: float = 0.5, normalize: bool = True):
        super().__init__(hidden_size, num_experts, top_k)
        if not math.isfinite(ratio):
            raise ValueError(f"ratio={ratio}: the share of the logits below is a finite number, 0 for none")
        self.ratio, self.normalize = ratio, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("expert_numbers", torch.arange(num_experts))
        self.reset_parameters(std=0.02)

    @property
    def rule(self) -> RoutingRule:
        return RoutingRule(self.top_k, normalize=self.normalize)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        """Without a context the layer is taken for the first one."""
        own = linear_fp32(hidden, self.weight)
        if context is None:
            return self.rule(own)
        logits = own + self.ratio * self._below(context, own) if LOGITS in context.state else own
        context.state |= {LOGITS: own, NUMBERS: self.expert_numbers}
        return self.rule(logits)

    def _below(self, context: RoutingContext, own: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        below, numbers = context.state[LOGITS], context.state[NUMBERS]
        if below.shape != own.shape:
            raise ValueError(
                f"the logits of the layer below are {tuple(below.shape)}, this layer's {tuple(own.shape)}: all "
                "sparse layers of a forward pass see the same tokens and have the same experts"
            )
        if not torch.equal(numbers, self.expert_numbers):
            raise ValueError(
                f"the layer below has experts {numbers.tolist()}, this layer {self.expert_numbers.tolist()}: an expert "
                "adds the logit of the one with its number, so keep the same experts in all sparse layers"
            )
        return below

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio:g}"
