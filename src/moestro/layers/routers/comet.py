"""A differentiable tree gate that starts dense and ends with at most K experts for a token.

K full binary trees in heap order: nodes 0..E-2 with children 2i+1 and 2i+2, leaves E-1..2E-2, one leaf for each expert.

    t_ij  = S(w_ij . h + b_ij)                             share of tree j that node i sends left, S the smooth step
    p_lj  = product of t or 1 - t along the path to leaf l
    s_lj  = v_lj . h + c_lj + log p_lj                     -inf where p = 0
    g_l   = sum over j of softmax(s)_lj                    one softmax over all K * E leaves
    loss  = lambda * mean over tokens of sum over j, l of -p_lj log p_lj

S is exactly 0 or 1 outside a band of width gamma, so whole subtrees vanish; where every node is saturated, each tree
reaches one leaf. The entropy loss drives the nodes there. `harden` rounds them.

"COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (arXiv:2306.02824); its local
search is in `permutation`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32
from moestro.routing import Routing, RoutingContext, sparsify

NODE_INIT = 0.01  # of gamma: as released, so that every node starts near 1/2 and every leaf is reached
LEAF_INIT = 0.05  # as released


def smooth_step(z: Float[Tensor, "*s"], gamma: float) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """S(z) and 1 - S(z): -2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2 inside |z| <= gamma / 2, exactly 0 and 1 beyond.

    With u = z / gamma + 1/2 that is u^2 (3 - 2u) and (1 - u)^2 (1 + 2u), which lose no digits near 0.
    """
    u = (z / gamma + 0.5).clamp(0.0, 1.0)
    return u.square() * (3 - 2 * u), (1 - u).square() * (1 + 2 * u)


def leaf_probabilities(left: Float[Tensor, "... i"], right: Float[Tensor, "... i"]) -> Float[Tensor, "... e"]:
    """p of the E = i + 1 leaves of a tree whose node n sends `left[n]` to child 2n+1 and `right[n]` to child 2n+2."""
    nodes = left.shape[-1]
    levels = [torch.ones_like(left[..., :1])]
    start = 0
    while start < nodes:
        inner = min(start + levels[-1].shape[-1], nodes) - start  # the last levels mix nodes and leaves
        parents, here = levels[-1][..., :inner], slice(start, start + inner)
        children = torch.stack([parents * left[..., here], parents * right[..., here]], dim=-1)
        start += levels[-1].shape[-1]
        levels.append(children.flatten(-2))
    return torch.cat(levels, dim=-1)[..., nodes:]


def log_or_closed(p: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """log p, and -inf without a gradient where p is 0."""
    reached = p > 0
    return torch.where(reached, torch.where(reached, p, 1.0).log(), float("-inf"))


def entropy_terms(p: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """-p log p. Where p is 0 its gradient is taken as 0: an unreached leaf has no say."""
    return -p * torch.where(p > 0, p, 1.0).log()


class CometRouter(Router):
    """`top_k` is the number of trees. In training, and until the nodes saturate, a token has up to E slots.

    `entropy_coef` is lambda; over the share `ramp` of the training it rises from 0, which leaves the gate time to learn
    before it decides. `node_bias=False` as in the paper's distilled language models.

    Raises ValueError for fewer than 2 experts, or a gamma, coefficient or ramp out of range.
    """

    no_rule = "trees choose how many experts a token has: its logits have no top-k to re-run"
    hard: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        gamma: float = 1.0,
        entropy_coef: float = 0.1,
        ramp: float = 0.0,
        node_bias: bool = True,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: a tree has at least 2 leaves")
        if gamma <= 0:
            raise ValueError(f"gamma={gamma}: the width of the smooth step is positive")
        if entropy_coef < 0 or not 0 <= ramp <= 1:
            raise ValueError(f"entropy_coef={entropy_coef}, ramp={ramp}: 0 or more, and a share of the training")
        self.gamma, self.entropy_coef, self.ramp = gamma, entropy_coef, ramp
        nodes, leaves = top_k * (num_experts - 1), top_k * num_experts
        self.node_weight = nn.Parameter(torch.empty(nodes, hidden_size))
        self.node_bias = nn.Parameter(torch.empty(nodes)) if node_bias else None
        self.leaf_weight = nn.Parameter(torch.empty(leaves, hidden_size))
        self.leaf_bias = nn.Parameter(torch.empty(leaves))
        self.register_buffer("hard", torch.tensor(False))
        self.reset_parameters(std=0.02)

    def reset_parameters(self, std: float) -> None:
        """As released, whatever `std`: a node that starts outside its band would never move."""
        for name, parameter in self.named_parameters(recurse=False):
            limit = NODE_INIT * self.gamma if name.startswith("node") else LEAF_INIT
            nn.init.uniform_(parameter, -limit, limit)

    def leaves(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n k e"]:
        """p: how much of each tree reaches each expert."""
        z = linear_fp32(hidden, self.node_weight)
        if self.node_bias is not None:
            z = z + self.node_bias.float()
        left, right = smooth_step(z.view(len(hidden), self.top_k, -1), self.gamma)
        goes_left = (left >= right).float()
        left, right = torch.where(self.hard, goes_left, left), torch.where(self.hard, 1 - goes_left, right)
        return leaf_probabilities(left, right)

    def scores(self, hidden: Float[Tensor, "n h"], p: Float[Tensor, "n k e"]) -> Float[Tensor, "n k e"]:
        """s = v . h + c + log p."""
        return (linear_fp32(hidden, self.leaf_weight) + self.leaf_bias.float()).view_as(p) + log_or_closed(p)

    def parts(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n k e"]:
        """Gate weights tree by tree; their sum over trees is the gate."""
        s = self.scores(hidden, self.leaves(hidden))
        return s.flatten(1).softmax(dim=-1).view_as(s)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        p = self.leaves(hidden)
        s = self.scores(hidden, p).flatten(1)
        weights = s.softmax(dim=-1).view_as(p).sum(dim=1)
        if self.training and self.entropy_coef:
            self.losses = {"leaf_entropy": self._coefficient(context) * mean_entropy(p, context)}
        return Routing(log_or_closed(weights) + s.logsumexp(dim=-1, keepdim=True), *sparsify(weights))

    def _coefficient(self, context: RoutingContext | None) -> float:
        progress = 1.0 if context is None else context.progress
        return self.entropy_coef * (min(progress / self.ramp, 1.0) if self.ramp else 1.0)

    def active_count(self, hidden: Float[Tensor, "n h"]) -> Int[Tensor, " n"]:
        """How many experts each token uses."""
        return (self.parts(hidden).sum(dim=1) > 0).sum(dim=-1)

    def harden(self) -> None:
        """Round every node from now on: at most K experts for a token. The nodes then learn no more; leaves do."""
        self.hard.fill_(True)


def mean_entropy(p: Float[Tensor, "n k e"], context: RoutingContext | None) -> Float[Tensor, ""]:
    """Mean over tokens, without padding, of the leaf entropies of all trees, in nats."""
    entropy = entropy_terms(p).sum(dim=(1, 2))
    real = None if context is None else context.real
    return entropy.mean() if real is None else (entropy * real).sum() / real.sum().clamp(min=1)
