"""The standard router: a linear map, softmax or sigmoid, the K best.

    scores  = softmax(W h)  or  sigmoid(W h)
    indices = top-K of scores (+ correction bias)
    weights = scores[indices], normalised or not, times `scale`

top_k=1, unnormalised: Switch Transformers (arXiv:2101.03961). Softmax, top-2, normalised: GShard (arXiv:2006.16668).
Sigmoid with a correction bias that is moved after every step instead of a balance loss: "Auxiliary-Loss-Free Load
Balancing" (arXiv:2408.15664), as in DeepSeek-V3.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32, recomputing
from moestro.routing import Routing, RoutingContext, RoutingRule


class TopKRouter(Router):
    """`bias_rate`: step of the loss-free balancing; 0 leaves the correction bias out.

    Raises ValueError for a negative bias_rate or an unknown score.
    """

    counts = ("slots_seen",)
    e_score_correction_bias: Tensor
    slots_seen: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 0.0,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score!r} is not known; there are softmax and sigmoid")
        if bias_rate < 0:
            raise ValueError(f"bias_rate={bias_rate}: it is the size of a step, 0 or more")
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.score, self.normalize, self.scale, self.bias_rate = score, normalize, scale, bias_rate
        if bias_rate:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
            self.register_buffer("slots_seen", torch.zeros(num_experts), persistent=False)
        self.reset_parameters(std=0.02)

    @property
    def rule(self) -> RoutingRule:
        bias = (lambda: self.e_score_correction_bias) if self.bias_rate else None
        return RoutingRule(self.top_k, self.score, normalize=self.normalize, scale=self.scale, bias=bias)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        routing = self.rule(linear_fp32(hidden, self.weight))
        if self.bias_rate and self.training and not recomputing():
            chosen = routing.indices if context is None or context.real is None else routing.indices[context.real]
            self.slots_seen += torch.bincount(chosen.reshape(-1), minlength=self.num_experts)
        return routing

    def probabilities(self, logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        if self.score == "softmax":
            return logits.softmax(dim=-1)
        scores = logits.sigmoid()
        return scores / scores.sum(dim=-1, keepdim=True)

    def after_step(self, progress: float) -> None:
        """Move the bias of experts that served less than the mean up, of the others down."""
        if self.bias_rate:
            self.e_score_correction_bias += self.bias_rate * torch.sign(self.slots_seen.mean() - self.slots_seen)
            self.slots_seen.zero_()
