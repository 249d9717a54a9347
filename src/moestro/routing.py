"""What a router decides, and the rule by which it decides.

A router turns hidden states into a triple: logits [N, E], gate weights [N, K] and expert indices [N, K]. Families
differ in how they get from the logits to the rest. `RoutingRule` writes that step down:

    scores  = softmax | sigmoid | sqrt(softplus) of the logits
    choice  = scores (or logits) + correction bias, limited to the best groups
    indices = top-k of choice
    weights = scores[indices], normalised or not, times a constant and a per-expert scale

so that edited logits can be routed again exactly as the family would. Shapes: N tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),  # DeepSeek-V4
}


class Routing(NamedTuple):
    """The router triple. A slot whose weight is 0 is unused, whatever its index; native routers give it index E."""

    logits: Float[Tensor, "n e"]
    weights: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]


@dataclass
class RoutingContext:
    """What a router may know beyond the hidden states of its N = B * T tokens: one object a layer and forward pass."""

    shape: tuple[int, int]
    """(B, T): token n is position n % T of row n // T."""
    mask: Bool[Tensor, "b t"] | None = None
    """True where there is a token, False at padding; None where there is no padding."""
    input_ids: Int[Tensor, "b t"] | None = None
    labels: Mapping[str, Int[Tensor, "b t"]] = field(default_factory=dict)
    """What else is known of each token, by name: "modality", "task", "prompt"."""
    attentions: Float[Tensor, "b a t s"] | None = None
    """Attention weights of the same decoder layer, where the attention implementation gives them (eager)."""
    layer: int = 0
    """Number of the decoder layer."""
    start: int = 0
    """Positions that came before the T, in the KV cache."""
    progress: float = 1.0
    """Share of the training that is done, for what is scheduled."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the layers below handed on; a router (or residual) puts in what the layers above shall find."""
    memory: dict[str, Tensor] | None = None
    """What this layer kept of the earlier positions, beside the KV cache; None where nothing is cached."""

    @property
    def real(self) -> Bool[Tensor, " n"] | None:
        """Which of the N tokens are no padding; None for all."""
        return None if self.mask is None else self.mask.reshape(-1)


@dataclass(frozen=True)
class RoutingRule:
    """How one layer's router gets from logits to weights and indices.

    `bias` and `expert_scale` are functions that return the live tensor, so that surgery and training stay visible.
    """

    top_k: int
    score: Score = "softmax"
    choose_on: Literal["score", "logits"] = "score"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    group_fill: float = float("-inf")
    softmax_of_chosen: bool = False
    """The normalised softmax computed from the chosen logits alone: the same weights, rounded like gpt-oss's."""
    top_p: float | None = None
    """Every token takes experts until they hold this share of its scores, `top_k` of them at least; None: `top_k`."""
    max_experts: int | None = None
    """With `top_p`: no token takes more; None: up to all."""
    fp32: bool = True
    """Scores are computed in fp32 whatever the logits' dtype; False: in the logits' own dtype."""
    null_experts: int = 0
    """Trailing classes of the logits that stand for "no expert": chosen, they leave their slot unused."""
    sparsemixer: float | None = None
    """The jitter threshold of SparseMixer-v2 (Phi-3.5-MoE), which replaces top-k; None: plain top-k."""
    returns_probabilities: bool = False
    """The family's router returns softmax(logits) in the place of the logits; we hand on their logarithm."""
    bias: Callable[[], Float[Tensor, " e"]] | None = None
    expert_scale: Callable[[], Float[Tensor, " e"]] | None = None

    def __call__(self, logits: Float[Tensor, "n e"], prefer: Float[Tensor, "n e"] | None = None) -> Routing:
        """Route by `logits`.

        An expert whose logit is -inf is never chosen. `prefer` [N, E] is added to what top-k looks at and touches
        no weight: +inf forces an expert in.
        """
        if self.sparsemixer is not None:
            return _sparsemixer(logits, prefer, self.sparsemixer)
        z = logits.float() if self.fp32 else logits
        scores = SCORES[self.score](z)
        choice = (scores if self.choose_on == "score" else z).detach()
        if self.bias is not None:
            choice = choice + self.bias().reshape(-1).to(choice.device)
        closed = torch.isneginf(logits)
        choice = choice.masked_fill(closed, float("-inf"))
        if prefer is not None:
            choice = choice + prefer.masked_fill(closed, 0.0)
        if self.groups > 1:
            choice = self._limit_to_groups(choice).masked_fill(closed, float("-inf"))
        if self.top_p is not None:
            weights, indices = self._until(self.top_p, scores, choice)
            return Routing(logits, self._scaled(weights, indices.clamp(max=logits.shape[1] - 1)), indices)
        indices = torch.topk(choice, self.top_k, dim=-1, sorted=True).indices
        null = indices >= logits.shape[1] - self.null_experts if self.null_experts else None
        weights = self._weights(z, scores, indices, null)
        return Routing(logits, weights, indices if null is None else indices.masked_fill(null, 0))

    def weigh(self, logits: Float[Tensor, "n e"], indices: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Gate weights of experts chosen in another way than by top-k, as if the router had chosen these."""
        z = logits.float() if self.fp32 else logits
        return self._weights(z, SCORES[self.score](z), indices)

    def _weights(self, z: Tensor, scores: Tensor, indices: Tensor, unused: Tensor | None = None) -> Tensor:
        weights = z.gather(1, indices).softmax(dim=-1) if self.softmax_of_chosen else scores.gather(1, indices)
        if unused is not None:
            weights, indices = weights.masked_fill(unused, 0.0), indices.masked_fill(unused, 0)
        if self.normalize and not self.softmax_of_chosen:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return self._scaled(weights, indices)

    def _scaled(self, weights: Tensor, indices: Tensor) -> Tensor:
        if self.scale != 1.0:
            weights = weights * self.scale
        if self.expert_scale is not None:
            weights = weights * self.expert_scale()[indices]
        return weights

    def _until(self, p: float, scores: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, indices) of the best experts that hold share `p` of each token's scores (arXiv:2403.07652).

        p = 1 takes all, whatever rounding makes of the sum.
        """
        experts = choice.shape[1]
        most = min(max(self.max_experts or experts, self.top_k), experts)
        ranked, indices = torch.topk(choice, most, dim=-1, sorted=True)
        weights = scores.gather(1, indices)
        share = weights.detach().float() / scores.detach().float().sum(dim=-1, keepdim=True).clamp_min(1e-20)
        before = F.pad(share.cumsum(dim=-1)[:, :-1], (1, 0))
        unused = before >= p if p < 1 else torch.zeros_like(before, dtype=torch.bool)
        unused[:, : self.top_k] = False
        unused |= torch.isneginf(ranked)
        used = max(int((~unused).sum(dim=-1).max()), 1) if len(unused) else 1
        weights, indices, unused = weights[:, :used], indices[:, :used], unused[:, :used]
        weights, indices = weights.masked_fill(unused, 0.0), indices.masked_fill(unused, experts)
        if self.normalize or self.softmax_of_chosen:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return weights, indices

    def _limit_to_groups(self, choice: Tensor) -> Tensor:
        """Close all but the best groups of experts (DeepSeek-V2 and -V3)."""
        by_group = choice.view(len(choice), self.groups, -1)
        if self.group_score == "max":
            group_scores = by_group.max(dim=-1).values
        else:
            group_scores = by_group.topk(2, dim=-1).values.sum(dim=-1)
        best = torch.topk(group_scores, self.top_groups, dim=-1).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return by_group.masked_fill(closed.unsqueeze(-1), self.group_fill).view_as(choice)

    def describe(self) -> str:
        """The rule in one line, for errors and reports."""
        number = f"top-{self.top_k}" if self.top_p is None else f"top-p {self.top_p:g}"
        parts = [f"{number} of {'SparseMixer' if self.sparsemixer is not None else self.score}"]
        if self.choose_on == "logits":
            parts.append("chosen on logits")
        if self.bias is not None:
            parts.append("correction bias")
        if self.groups > 1:
            parts.append(f"best {self.top_groups} of {self.groups} groups by {self.group_score}")
        parts += ["normalised"] * self.normalize + ["per-expert scale"] * (self.expert_scale is not None)
        if self.scale != 1.0:
            parts.append(f"times {self.scale:g}")
        return ", ".join(parts)


def _sparsemixer(logits: Tensor, prefer: Tensor | None, jitter: float) -> Routing:
    """SparseMixer-v2 at inference, for two slots ("GRIN: GRadient-INformed MoE", arXiv:2409.12136).

    Each slot takes the arg-max; its weight is the softmax over those logits within a relative margin of
    2 * jitter of the maximum. The second slot does the same without the first slot's expert.
    """
    weights, indices = [], []
    taken = torch.isneginf(logits)
    prefer = torch.zeros_like(logits) if prefer is None else prefer
    for _ in range(2):
        open_logits = logits.masked_fill(taken, float("-inf"))
        index = (open_logits + prefer.masked_fill(taken, 0.0)).argmax(dim=-1, keepdim=True)
        top = logits.gather(1, index)
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * jitter
        gates = open_logits.masked_fill(far, float("-inf")).softmax(dim=-1)
        weights.append(gates.gather(1, index))
        indices.append(index)
        taken = taken.scatter(1, index, True)
    return Routing(logits, torch.cat(weights, 1), torch.cat(indices, 1))


def sparsify(weights: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """(gate weights, indices) of the experts whose weight is not 0: the inverse of `dense_weights`.

    K is the largest number of experts of any token, at least 1; unused slots have weight 0 and index E.
    """
    used = weights != 0
    k = max(int(used.sum(dim=-1).max()), 1) if len(weights) else 1
    order = weights.detach().masked_fill(~used, float("-inf")).topk(k, dim=-1).indices
    taken = used.gather(1, order)
    return weights.gather(1, order).masked_fill(~taken, 0.0), order.masked_fill(~taken, weights.shape[1])


def dense_weights(routing: Routing, num_experts: int) -> Float[Tensor, "n e"]:
    """Gate weight of every expert for every token: 0 where it was not chosen."""
    dense = routing.weights.new_zeros(len(routing.weights), num_experts + 1)  # the last column takes unused slots
    return dense.scatter_add(1, routing.indices.long(), routing.weights)[:, :num_experts]
