"""Routers to compare with: hash, row, random, expert choice.

Hash Layers (arXiv:2106.04426): the token id decides. Row: a row's first token decides for all of it; where rows open
with the tag of their task, that is task-level routing ("Beyond Distillation: Task-level Mixture-of-Experts for
Efficient Inference", arXiv:2110.03742). Random: a fixed draw per token. Expert Choice (arXiv:2202.09368): every expert
takes the tokens it scores highest, so loads are even and tokens differ in their number of experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32, needs
from moestro.routing import Routing, RoutingContext, sparsify


class HashRouter(Router):
    """Each token id has its `top_k` experts, drawn once by seed. Nothing is learned."""

    no_rule = "experts are looked up by token id: there is no choice to re-run"
    table: Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, vocab_size: int, seed: int = 0):
        super().__init__(hidden_size, num_experts, top_k)
        draw = torch.rand(vocab_size, num_experts, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", draw.topk(top_k, dim=-1).indices)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        ids = needs(context, "token ids").input_ids
        if ids is None:
            raise ValueError("hash routing needs token ids; the model was given embeddings")
        indices = self.table[ids.reshape(-1)]
        weights = torch.full(indices.shape, 1 / self.top_k, device=hidden.device)
        return Routing(torch.zeros(len(hidden), self.num_experts, device=hidden.device), weights, indices)


class RowRouter(Router):
    """All tokens of a row have the `top_k` experts of its first token's id, which divide the ids among them."""

    no_rule = "experts are looked up by a row's first token: there is no choice to re-run"

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        context = needs(context, "token ids")
        if context.input_ids is None:
            raise ValueError("routing by a row's first token needs token ids; the model was given embeddings")
        if context.memory is None and context.shape[1] == 1:
            raise ValueError("this router looks at a row's first token: generate with use_cache=False")
        first = context.input_ids[:, 0]
        if context.memory is not None:
            first = context.memory.setdefault("first", first)
        slots = torch.arange(self.top_k, device=hidden.device)
        indices = (first[:, None] * self.top_k + slots) % self.num_experts
        indices = indices.repeat_interleave(context.shape[1], dim=0)
        weights = torch.full(indices.shape, 1 / self.top_k, device=hidden.device)
        return Routing(torch.zeros(len(hidden), self.num_experts, device=hidden.device), weights, indices)


class RandomRouter(Router):
    """Experts drawn uniformly for every token, anew in every training step; in eval mode by position."""

    no_rule = "experts are drawn at random: there is no choice to re-run"

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        shape = (len(hidden), self.num_experts)
        generator = None if self.training else torch.Generator(hidden.device).manual_seed(0)
        draw = torch.rand(shape, generator=generator, device=hidden.device)
        indices = draw.topk(self.top_k, dim=-1).indices
        weights = torch.full(indices.shape, 1 / self.top_k, device=hidden.device)
        return Routing(torch.zeros(shape, device=hidden.device), weights, indices)


class ExpertChoiceRouter(Router):
    """Every expert takes the `top_k * N / E` tokens it scores highest, so `top_k` is the mean number of slots.

    The choice looks at all tokens at once, later ones included: a causal model cannot generate by it, so in eval mode
    each token takes the experts whose probability reaches the mean threshold of training.
    """

    no_rule = "experts choose tokens: a token's logits alone do not decide"
    threshold: Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, momentum: float = 0.99):
        super().__init__(hidden_size, num_experts, top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.momentum = momentum
        self.register_buffer("threshold", torch.full((num_experts,), top_k / num_experts))
        self.reset_parameters(std=0.02)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        logits = linear_fp32(hidden, self.weight)
        scores = logits.softmax(dim=-1)
        if self.training:
            real = None if context is None else context.real
            open_to = scores.detach() if real is None else scores.detach().masked_fill(~real[:, None], -1.0)
            tokens = len(hidden) if real is None else int(real.sum())
            capacity = max(1, round(tokens * self.top_k / self.num_experts))
            lowest = open_to.topk(min(capacity, len(hidden)), dim=0).values[-1]
            chosen = open_to >= lowest.clamp(min=0.0)
            self.threshold.lerp_(lowest.clamp(min=0.0), 1 - self.momentum)
        else:
            chosen = scores >= self.threshold
        return Routing(logits, *sparsify(scores * chosen))
