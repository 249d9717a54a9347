"""Monet: S * S small experts a layer, each composed of a left and a right part, at the cost of the 2 S parts.

Router, one for `group` layers in a row, with R heads; for the left parts (and in the same way the right ones):

    z = W x [R, S];  n = z normalised over tokens and parts, head by head;  q = Phi^-1(1 - top_k / S)
    kept = n >= min(q, max n);  g = softmax of the kept z               about top_k parts, at least one
    expert (i, j) has the weight w_ij = sum over heads of g1[i] g2[j];  left_i = sum_j w_ij;  right_j = sum_i w_ij

Horizontal: E_ij(x) = V_j act(U_i x + b1_i) + b2_j, summed over all experts without making one:

    a_i = act(U_i x + b1_i);  y = sum_j V_j (sum_i w_ij a_i) + right_j b2_j

Vertical: half of the hidden neurons (a = act(U1_i x + b11_i), c = act(U2_j x + b12_j)) and half of the output each:

    y = [ sum_i V11_i left_i a_i + V12_i (sum_j w_ij c_j) + left_i b21_i
          sum_j V21_j (sum_i w_ij a_i) + V22_j right_j c_j + right_j b22_j ]

with act = ReLU^2. The sums over pairs factor into the heads, unless experts are removed (w_ij = 0): then they cost S^2.
Losses: uniformity -mean log of the mean g; ambiguity mean (1 - max g).

Monet: Mixture of Monosemantic Experts for Transformers (arXiv:2412.04139).
Shapes: N tokens, R routing heads, S parts of a side, M width of an expert, H hidden.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.layers.routers.base import linear_fp32
from moestro.routing import RoutingContext

MOMENTUM = 0.1
"""Of the running statistics, as in torch's BatchNorm."""
LEAST_SHARE = 1e-9
"""Lower bound inside the logarithm of the uniformity loss."""
REMOVED_ELEMENTS = 1 << 24
"""Pair weights (tokens * S * S) held at a time where experts are removed."""


class Parts(NamedTuple):
    """What a router decides: gates of the left and the right parts, 0 where not kept; and which pairs are removed."""

    left: Float[Tensor, "n r s"]
    right: Float[Tensor, "n r s"]
    removed: Bool[Tensor, "s s"] | None = None


class HeadNorm(nn.Module):
    """BatchNorm without scale and shift: each head over tokens and parts. Padding does not count.

    It only decides which parts are kept, so no gradient passes. `frozen`: use the running statistics in training too.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, eps: float = 1e-5):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(heads))
        self.register_buffer("running_var", torch.ones(heads))
        self.eps, self.frozen = eps, False

    @torch.no_grad()
    def forward(self, z: Float[Tensor, "n r s"], real: Bool[Tensor, " n"] | None) -> Float[Tensor, "n r s"]:
        mean, variance = self.running_mean.float(), self.running_var.float()
        counted = z if real is None else z[real]
        if self.training and not self.frozen and len(counted):
            variance, mean = torch.var_mean(counted, dim=(0, 2), correction=0)
            self.running_mean.lerp_(mean.to(self.running_mean), MOMENTUM)
            self.running_var.lerp_(variance.to(self.running_var), MOMENTUM)
        return (z - mean[:, None]) / (variance[:, None] + self.eps).sqrt()


class MonetRouter(nn.Module):
    """Gates of both sides' parts, in fp32. `uniformity`, `ambiguity`: coefficients of the two losses.

    Raises ValueError where top_k does not lie between 1 and S - 1: the quantile would be infinite.
    """

    def __init__(
        self, hidden_size: int, parts: int, heads: int, top_k: int, *, uniformity: float = 1e-3, ambiguity: float = 1e-3
    ):
        super().__init__()
        if not 1 <= top_k < parts:
            raise ValueError(f"top_k={top_k} of {parts} parts: choose between 1 and {parts - 1}")
        if heads < 1:
            raise ValueError(f"heads={heads}: a router has at least one")
        self.parts, self.heads, self.top_k = parts, heads, top_k
        self.coefficients = {"uniformity": uniformity, "ambiguity": ambiguity}
        self.left = nn.Linear(hidden_size, heads * parts, bias=False)
        self.right = nn.Linear(hidden_size, heads * parts, bias=False)
        self.left_norm, self.right_norm = HeadNorm(heads), HeadNorm(heads)
        self.quantile = NormalDist().inv_cdf(1 - top_k / parts)
        self.losses: dict[str, Tensor] = {}

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Parts:
        real = None if context is None else context.real
        parts = Parts(
            self._gates(hidden, self.left, self.left_norm, real), self._gates(hidden, self.right, self.right_norm, real)
        )
        if self.training:
            self.losses_have_gradient = torch.is_grad_enabled()
            losses = {"uniformity": uniformity(parts, real), "ambiguity": ambiguity(parts, real)}
            self.losses = {f"monet_{name}": self.coefficients[name] * loss for name, loss in losses.items()}
        return parts

    def _gates(self, hidden: Tensor, scores: nn.Linear, norm: HeadNorm, real: Tensor | None) -> Tensor:
        z = linear_fp32(hidden, scores.weight).unflatten(1, (self.heads, self.parts))
        normed = norm(z, real)
        kept = normed >= normed.amax(dim=-1, keepdim=True).clamp(max=self.quantile)
        return z.masked_fill(~kept, float("-inf")).softmax(dim=-1)


def uniformity(parts: Parts, real: Bool[Tensor, " n"] | None = None) -> Float[Tensor, ""]:
    """-mean over heads and parts of log(mean gate over tokens), both sides; log S when even."""
    sides = [g if real is None else g[real] for g in parts[:2]]
    return -torch.stack([g.mean(dim=0).clamp_min(LEAST_SHARE).log().mean() for g in sides]).mean()


def ambiguity(parts: Parts, real: Bool[Tensor, " n"] | None = None) -> Float[Tensor, ""]:
    """Mean over tokens, heads and sides of 1 - the largest gate: 0 where every head is sure."""
    sides = [g if real is None else g[real] for g in parts[:2]]
    return torch.stack([(1 - g.amax(dim=-1)).mean() for g in sides]).mean()


class Pairs:
    """Sums over all pairs of parts, weighted: through the heads, or over [N, S, S] where pairs are removed."""

    def __init__(self, parts: Parts, dtype: torch.dtype):
        self.first, self.second = parts.left.to(dtype), parts.right.to(dtype)
        self.weights: Tensor | None = None
        if parts.removed is not None:
            weights = torch.einsum("nri,nrj->nij", self.first, self.second)
            self.weights = weights.masked_fill(parts.removed.to(weights.device), 0.0)

    def left(self) -> Float[Tensor, "n s"]:
        """left_i = sum_j w_ij"""
        return self.first.sum(dim=1) if self.weights is None else self.weights.sum(dim=2)

    def right(self) -> Float[Tensor, "n s"]:
        """right_j = sum_i w_ij"""
        return self.second.sum(dim=1) if self.weights is None else self.weights.sum(dim=1)

    def to_left(self, c: Float[Tensor, "n s m"]) -> Float[Tensor, "n s m"]:
        """sum_j w_ij c_j"""
        if self.weights is None:
            return self.first.transpose(1, 2) @ (self.second @ c)
        return self.weights @ c

    def to_right(self, a: Float[Tensor, "n s m"]) -> Float[Tensor, "n s m"]:
        """sum_i w_ij a_i"""
        if self.weights is None:
            return self.second.transpose(1, 2) @ (self.first @ a)
        return self.weights.transpose(1, 2) @ a


class HorizontalExperts(nn.Module):
    """Input matrices from the left parts, output matrices from the right ones."""

    def __init__(self, hidden_size: int, parts: int, width: int):
        super().__init__()
        self.parts = parts
        self.up = nn.Linear(hidden_size, parts * width)
        self.down = nn.Linear(parts * width, hidden_size, bias=False)
        self.down_bias = nn.Parameter(torch.zeros(parts, hidden_size))

    def forward(self, hidden: Float[Tensor, "n h"], pairs: Pairs) -> Float[Tensor, "n h"]:
        a = self.up(hidden).relu().square().unflatten(1, (self.parts, -1))
        return self.down(pairs.to_right(a).flatten(1)) + pairs.right() @ self.down_bias


class VerticalExperts(nn.Module):
    """Half of the hidden neurons and half of the output from each side. Raises ValueError for odd sizes."""

    def __init__(self, hidden_size: int, parts: int, width: int):
        super().__init__()
        if width % 2 or hidden_size % 2:
            raise ValueError(f"width={width}, hidden_size={hidden_size}: vertical experts halve both; make them even")
        self.parts = parts
        self.up_left = nn.Linear(hidden_size, parts * width // 2)
        self.up_right = nn.Linear(hidden_size, parts * width // 2)
        self.down_left = nn.Linear(parts * width, hidden_size // 2, bias=False)  # V11 | V12
        self.down_right = nn.Linear(parts * width, hidden_size // 2, bias=False)  # V21 | V22
        self.bias_left = nn.Parameter(torch.zeros(parts, hidden_size // 2))
        self.bias_right = nn.Parameter(torch.zeros(parts, hidden_size // 2))

    def forward(self, hidden: Float[Tensor, "n h"], pairs: Pairs) -> Float[Tensor, "n h"]:
        a = self.up_left(hidden).relu().square().unflatten(1, (self.parts, -1))
        c = self.up_right(hidden).relu().square().unflatten(1, (self.parts, -1))
        left, right = pairs.left(), pairs.right()
        top = torch.cat([left.unsqueeze(-1) * a, pairs.to_left(c)], dim=1).flatten(1)
        bottom = torch.cat([pairs.to_right(a), right.unsqueeze(-1) * c], dim=1).flatten(1)
        return torch.cat(
            [self.down_left(top) + left @ self.bias_left, self.down_right(bottom) + right @ self.bias_right], dim=1
        )


DECOMPOSITIONS = {"horizontal": HorizontalExperts, "vertical": VerticalExperts}


class Monet(nn.Module):
    """The feed-forward part of one layer. Without a router of its own it takes its group's gates from the state."""

    no_triple = (
        "weighs S * S composed experts by two factors and has no (logits, weights, indices) of single experts; "
        "moestro.steer.expert_masking measures and removes its experts"
    )
    """Why `moestro.open` cannot open it."""

    def __init__(self, experts: nn.Module, router: MonetRouter | None):
        super().__init__()
        self.experts = experts
        if router is not None:
            self.router = router

    def forward(self, hidden: Float[Tensor, "b t h"], context: RoutingContext) -> Float[Tensor, "b t h"]:
        flat, state = hidden.flatten(0, 1), context.state
        if hasattr(self, "router"):
            new = self.router(flat, context)
            state.pop("monet.removed", None)
            state.update({f"monet.{name}": t for name, t in new._asdict().items() if t is not None})
        if "monet.left" not in state:
            raise ValueError(f"layer {context.layer} takes the gates of its group's first layer, which did not run")
        left, right, removed = state["monet.left"], state["monet.right"], state.get("monet.removed")
        step = len(flat) if removed is None else max(1, REMOVED_ELEMENTS // removed.numel())
        out = [
            self.experts(x, Pairs(Parts(first, second, removed), flat.dtype))
            for x, first, second in zip(flat.split(step), left.split(step), right.split(step), strict=True)
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).view_as(hidden)


def build_monet(
    config: Any,
    layer: int,
    common: dict[str, nn.Module],
    *,
    parts: int = 512,
    heads: int = 8,
    width: int = 16,
    top_k: int = 32,
    group: int = 4,
    decompose: str = "vertical",
    uniformity: float = 1e-3,
    ambiguity: float = 1e-3,
) -> Monet:
    """The Monet part of a language model's layer: of `group` sparse layers in a row, the first has the router.

    Raises ValueError for an unknown decomposition or a group of no layers.
    """
    if decompose not in DECOMPOSITIONS:
        raise ValueError(f"decompose={decompose!r} is not known; there are {', '.join(DECOMPOSITIONS)}")
    if group < 1:
        raise ValueError(f"group={group}: a router serves at least its own layer")
    first = config.moe_layers.index(layer) % group == 0
    experts = DECOMPOSITIONS[decompose](config.hidden_size, parts, width)
    losses = dict(uniformity=uniformity, ambiguity=ambiguity)
    return Monet(experts, MonetRouter(config.hidden_size, parts, heads, top_k, **losses) if first else None)


def routers(model: nn.Module) -> list[MonetRouter]:
    """The Monet routers of a model, in order. Raises ValueError where it has none."""
    found = [m for m in model.modules() if isinstance(m, MonetRouter)]
    if not found:
        raise ValueError(f'{type(model).__name__} has no Monet layer; build one with block={{"kind": "monet", ...}}')
    return found


def freeze_routers(model: nn.Module) -> None:
    """Keep routing as it is in fine-tuning, as the paper's released models do: weights and running statistics."""
    for router in routers(model):
        router.requires_grad_(False)
        router.left_norm.frozen = router.right_norm.frozen = True
