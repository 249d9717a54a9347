"""The dense-to-sparse gate: a softmax whose temperature falls, so that all experts start and few remain.

    plain      weights = softmax((b1_e . h + b0_e) / tau)
    activated  weights = softmax((sigma(b1_e . h) + b0_e) / tau)

In the plain gate b1, b0 and tau times any c > 0 are the same gate, so a learned tau and the slopes cannot be told
apart, and are learned from samples more slowly than at any polynomial rate. An activation sigma that is not homogeneous
(sigmoid, tanh, GELU, SiLU) breaks that tie; `moestro.train.gaussian_moe.check_activation` tests one.

"Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (arXiv:2401.13875); the gate is EvoMoE's
(arXiv:2112.14397), here without its Gumbel noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32
from moestro.routing import Routing, RoutingContext, RoutingRule, sparsify

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


def exponential(progress: float, start: float, end: float) -> float:
    """The temperature when the share `progress` of the training is done: `start` at 0, `end` at 1."""
    return start * (end / start) ** progress


def linear(progress: float, start: float, end: float) -> float:
    """As `exponential`, in equal steps."""
    return start + (end - start) * progress


CURVES = {"exponential": exponential, "linear": linear}


def above(weights: Float[Tensor, "n e"], threshold: float) -> Float[Tensor, "n e"]:
    """Weights below the threshold are 0; each token's largest stays whatever it is."""
    largest = F.one_hot(weights.argmax(dim=-1), weights.shape[1]).bool()
    return weights * ((weights >= threshold) | largest)


class TemperatureRouter(Router):
    """`tau` falls from `start` to `end` over the training, or is learned from `start` on.

    A token uses the experts whose weight reaches `threshold` (0: all of them). From the share `top_k_from` of the
    training on, it uses its `top_k` best in their place. `normalize` makes what is left sum to 1.

    A bounded activation bounds the spread of the logits: with the sigmoid, by 1 / tau beside what the biases add.

    Raises ValueError for an unknown activation or curve, or a temperature, threshold or share out of range.
    """

    no_rule = "a threshold decides how many experts a token has: there is no top-k to re-run"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str | None = None,
        start: float = 2.0,
        end: float = 0.3,
        curve: str = "exponential",
        learn_tau: bool = False,
        threshold: float = 0.0,
        top_k_from: float | None = None,
        normalize: bool = True,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not known; there are {', '.join(ACTIVATIONS)}, or None")
        if min(start, end) <= 0:
            raise ValueError(f"start={start}, end={end}: temperatures are positive")
        if curve not in CURVES:
            raise ValueError(f"curve={curve!r} is not known; there are {', '.join(CURVES)}")
        if not 0 <= threshold < 1 or not 0 <= (top_k_from or 0) <= 1:
            raise ValueError(f"threshold={threshold}, top_k_from={top_k_from}: shares, between 0 and 1")
        if learn_tau and activation is None:
            warnings.warn(
                "a learned temperature beside a plain gate is redundant: it only rescales the slopes; give an "
                "activation, or leave tau to its schedule",
                stacklevel=2,
            )
        self.activation, self.start, self.end, self.curve = activation, start, end, curve
        self.threshold, self.top_k_from, self.normalize = threshold, top_k_from, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.theta = nn.Parameter(torch.empty(1)) if learn_tau else None
        self.reset_parameters(std=0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        if self.theta is not None:
            nn.init.constant_(self.theta, self.start + math.log(-math.expm1(-self.start)))  # inverse of softplus

    @property
    def rule(self) -> RoutingRule | None:
        """As at the end of the training."""
        if self.top_k_from is not None:
            return RoutingRule(self.top_k, normalize=self.normalize)
        return None if self.threshold else RoutingRule(self.num_experts)

    def tau(self, progress: float = 1.0) -> Float[Tensor, ""] | float:
        if self.theta is not None:
            return F.softplus(self.theta.float())[0]
        return CURVES[self.curve](progress, self.start, self.end)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        progress = 1.0 if context is None else context.progress
        z = linear_fp32(hidden, self.weight)
        if self.activation is not None:
            z = ACTIVATIONS[self.activation](z)
        logits = (z + self.bias.float()) / self.tau(progress)
        if self.top_k_from is not None and progress >= self.top_k_from:
            return RoutingRule(self.top_k, normalize=self.normalize)(logits)
        weights = above(logits.softmax(dim=-1), self.threshold)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(logits, *sparsify(weights))
