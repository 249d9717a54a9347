"""Momentum across the depth of a sparse model: rules by which a block's output joins the residual stream.

A residual stack is read as descent: layer t adds v_t = block(norm(x_t)), which plays the negative gradient. The rules
put momentum methods in the place of plain descent; their memory starts at zero in the first sparse layer of every
forward pass, runs up the layers token by token, and never crosses from one position to another.

    heavy ball   m = mu m + v;  x = x + gamma m
    Adam first   p = b1 p + (1 - b1) v;  s = b2 s + (1 - b2) v^2;  x = (1 - kappa) x + first p / sqrt(s + eps)
    robust       v is taken at y = x + alpha gamma m;  m = mu m + v;  x = x + gamma m

"MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts" (arXiv:2410.14574); the robust rule is the Robust
Momentum Method (arXiv:1710.04740), whose look-ahead is alpha times the last step, gamma m.
Shapes: x and v [..., H]; the memory is fp32 in the same shape.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.routing import RoutingContext

EPS = 1e-8
MOMENTUM = "momentum"
"""Under this name m travels from layer to layer (`RoutingContext.state`)."""

Memory = dict[str, Tensor]


class HeavyBall(nn.Module):
    """m = mu m + v; x = x + gamma m. mu=0, gamma=1 is the plain residual.

    Raises ValueError for mu outside [0, 1) or gamma not above 0.
    """

    def __init__(self, mu: float = 0.7, gamma: float = 1.0):
        super().__init__()
        if not 0 <= mu < 1:
            raise ValueError(f"mu={mu}: the part of the momentum that a layer keeps is at least 0 and below 1")
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: a step size is above 0")
        self.mu, self.gamma = mu, gamma

    def step(
        self, x: Float[Tensor, "... h"], v: Float[Tensor, "... h"], memory: Memory
    ) -> tuple[Float[Tensor, "... h"], Memory]:
        """(the stream after the block, what the next layer shall remember)."""
        m = self._momentum(v, memory)
        return (x + self.gamma * m).to(x.dtype), {MOMENTUM: m}

    def _momentum(self, v: Tensor, memory: Memory) -> Tensor:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        return self.mu * memory[MOMENTUM] + wide if MOMENTUM in memory else wide

    def forward(self, x: Tensor, v: Tensor, context: RoutingContext) -> Tensor:
        x, memory = self.step(x, v, context.state)
        context.state.update(memory)
        return x

    def extra_repr(self) -> str:
        return f"mu={self.mu:g}, gamma={self.gamma:g}"


class AdamFirst(HeavyBall):
    """Adam's step in the first sparse layer, heavy ball (which that layer's v opens) in all others.

    `first` is the step of the first layer. Without a history, Adam's step there is about first * sqrt(10) * sign(v), so
    that a stream of small numbers wants a small one. kappa decays the stream in the first layer; 1, as released, is for
    a block whose own residual connection is wrapped in a second one, which keeps x: in a model with one it would erase
    the input.

    Raises ValueError for `first` not above 0, a beta outside [0, 1) or kappa outside [0, 1].
    """

    def __init__(
        self,
        mu: float = 0.7,
        gamma: float = 1.0,
        *,
        first: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        kappa: float = 0.0,
    ):
        super().__init__(mu, gamma)
        if not first > 0:
            raise ValueError(f"first={first}: a step size is above 0")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}={beta}: a decay rate is at least 0 and below 1")
        if not 0 <= kappa <= 1:
            raise ValueError(f"kappa={kappa}: the stream can be decayed by 0 (not at all) to 1 (erased)")
        self.first, self.beta1, self.beta2, self.kappa = first, beta1, beta2, kappa

    def step(
        self, x: Float[Tensor, "... h"], v: Float[Tensor, "... h"], memory: Memory
    ) -> tuple[Float[Tensor, "... h"], Memory]:
        if MOMENTUM in memory:
            return super().step(x, v, memory)
        m = self._momentum(v, memory)
        p, s = (1 - self.beta1) * m, (1 - self.beta2) * m.square()  # both start at zero, without bias correction
        return ((1 - self.kappa) * x + self.first * p / (s + EPS).sqrt()).to(x.dtype), {MOMENTUM: m}


class RobustMomentum(HeavyBall):
    """Heavy ball with a look-ahead: the block sees y = x + alpha gamma m.

        gamma = k (1 - p)^2 (1 + p) / Lc,   mu = k p^3 / (k - 1),   alpha = p^3 / ((k - 1) (1 - p)^2 (1 + p))

    For blocks that act like gradients of curvature between Lc / k and Lc, a layer shrinks the distance to the optimum
    by the factor p. p = 1 - 1 / sqrt(k) is the fastest, 1 - 1 / k the most robust to noise.

    Raises ValueError for k not above 1, p outside of these two, or Lc not above 0.
    """

    def __init__(self, k: float = 9.0, p: float | None = None, lipschitz: float = 1.0):
        if not k > 1:
            raise ValueError(f"k={k}: the ratio of the largest to the least curvature is above 1")
        fastest, safest = 1 - 1 / math.sqrt(k), 1 - 1 / k
        p = fastest if p is None else p
        if not fastest <= p <= safest:
            raise ValueError(f"p={p} with k={k}: choose between {fastest:.4g} (fastest) and {safest:.4g} (most robust)")
        if not lipschitz > 0:
            raise ValueError(f"lipschitz={lipschitz}: the largest curvature is above 0")
        damping = (1 - p) ** 2 * (1 + p)
        super().__init__(mu=k * p**3 / (k - 1), gamma=k * damping / lipschitz)
        self.alpha = p**3 / ((k - 1) * damping)

    def at(self, x: Float[Tensor, "... h"], context: RoutingContext) -> Float[Tensor, "... h"]:
        """Where the block is to look: its norm and router are given this in the place of x."""
        return self.look_ahead(x, context.state)

    def look_ahead(self, x: Float[Tensor, "... h"], memory: Memory) -> Float[Tensor, "... h"]:
        return (x + self.alpha * self.gamma * memory[MOMENTUM]).to(x.dtype) if MOMENTUM in memory else x


def stability_limit(mu: float) -> float:
    """The largest gamma * sigma at which heavy ball converges on curvature sigma: 2 (1 + mu). Plain descent: 2."""
    return 2 * (1 + mu)
