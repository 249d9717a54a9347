"""A router without parameters: it chooses the experts whose hidden layers it expects to be the sparsest.

The rows of expert e's input matrix up[e] [I, H] are taken for draws from a Gaussian with the mean and the variance of
each column. A pre-activation of token x is then Gaussian as well, and with ReLU:

    m_e = mean_e . x (+ mean of the biases)        s_e^2 = var_e . x^2 (+ variance of the biases)
    P(a neuron of e is active) = Phi(m_e / s_e)    expected active neurons = I * Phi(m_e / s_e)
    logits_e = -erf(m_e / (sqrt(2) s_e)) = 1 - 2 Phi(m_e / s_e)
    indices  = top-K of logits;  weights = softmax of the chosen logits

The logits lie in [-1, 1], so two gate weights differ by a factor of e^2 at most. Gradients reach the experts through
them: routing well means becoming sparse. An expert without an active neuron has the best score of all; give the layer
a balance loss.

Mixture of Experts Made Intrinsically Interpretable (arXiv:2503.07639).
Shapes: N tokens, E experts, H hidden, I expert width, J = H + 1 (the bias last).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.experts.feed_forward import SquaredReLU
from moestro.layers.routers.base import Router
from moestro.routing import Routing, RoutingContext, RoutingRule

LEAST_DEVIATION = 1e-6
"""Lower bound of s: a token of zeros, or an expert whose rows are all the same, has none."""


def column_statistics(
    up: Float[Tensor, "e i h"], bias: Float[Tensor, "e i"] | None = None
) -> tuple[Float[Tensor, "e j"], Float[Tensor, "e j"]]:
    """(mean, variance) of each column over an expert's rows, in fp32; the last column is the bias's."""
    columns = up.float()
    mean, variance = columns.mean(dim=1), columns.var(dim=1, correction=0)
    offset = torch.zeros_like(up[:, :, 0], dtype=torch.float32) if bias is None else bias.float()
    return (
        torch.cat([mean, offset.mean(dim=1, keepdim=True)], dim=1),
        torch.cat([variance, offset.var(dim=1, correction=0, keepdim=True)], dim=1),
    )


def sparsity_scores(
    hidden: Float[Tensor, "n h"], mean: Float[Tensor, "e j"], variance: Float[Tensor, "e j"]
) -> Float[Tensor, "n e"]:
    """-erf(m / (sqrt(2) s)), in fp32: 1 where no neuron is expected to be active, -1 where all are."""
    with torch.autocast(hidden.device.type, enabled=False):
        x = torch.nn.functional.pad(hidden.float(), (0, 1), value=1.0)
        deviation = (x.square() @ variance.T).clamp_min(LEAST_DEVIATION**2).sqrt()
        return -torch.erf(x @ mean.T / (math.sqrt(2) * deviation))


def expected_active(scores: Float[Tensor, "n e"], width: int) -> Float[Tensor, "n e"]:
    """Expected number of active neurons of each expert: width * Phi(m / s)."""
    return width * (1 - scores) / 2


class SparsityAwareRouter(Router):
    """Reads the input weights of the experts it is bound to: anew in every training step, once in eval mode.

    Raises ValueError where the experts are gated, or their activation leaves no neuron at exactly 0.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__(hidden_size, num_experts, top_k)
        self._experts: tuple[nn.Module, ...] = ()  # in a tuple: the experts are no part of the router
        self._read: tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def rule(self) -> RoutingRule:
        return RoutingRule(self.top_k, normalize=True, softmax_of_chosen=True)

    def bind(self, experts: nn.Module) -> None:
        activation = type(getattr(experts, "act_fn", None)).__name__
        if not hasattr(experts, "up_proj") or not isinstance(experts.act_fn, nn.ReLU | SquaredReLU):
            raise ValueError(
                f"sparsity-aware routing counts neurons that a ReLU leaves at 0; {type(experts).__name__} has the "
                f'activation {activation}: use experts={{"kind": "ungated", "activation": "relu"}}'
            )
        if experts.is_transposed:
            raise ValueError(f"{type(experts).__name__} stores up_proj as [E, H, I]; [E, I, H] is needed")
        self._experts = (experts,)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        return self.rule(sparsity_scores(hidden, *self.statistics()))

    def statistics(self) -> tuple[Float[Tensor, "e j"], Float[Tensor, "e j"]]:
        """`column_statistics` of the bound experts; kept until the weights change where nothing is learned."""
        if not self._experts:
            raise RuntimeError("the router reads its experts' weights: bind(experts) comes before the first token")
        up: Tensor = self._experts[0].up_proj  # type: ignore[assignment]
        bias: Tensor | None = getattr(self._experts[0], "up_proj_bias", None)
        if self.training or torch.is_grad_enabled() or bias is not None or up.is_inference():
            self._read = None
            return column_statistics(up, bias)
        version = (up.data_ptr(), up._version)
        if self._read is None or self._read[0] is not up or self._read[1] != version:
            self._read = (up, version, column_statistics(up))
        return self._read[2]
