"""Route an open model by another rule than its own: more or fewer experts a token, as many as p asks for, or just one.

    with view.edits(top_p(view, 0.6)):      as many of a token's best experts as hold 60% of its scores
    with view.edits(top_k(view, 3)):        three experts for every token
    with view.edits(rank(view, 2)):         one expert for every token: the router's second choice
    with view.edits(random_expert(view)):   one expert for every token, drawn at random

The scores, and whether weights are normalised, stay the family's. The model was not trained so: this is a baseline for
what training with such a router gives ("Harder Tasks Need More Experts", arXiv:2403.07652), a way to see how much
a model leans on the last of its experts ("DeepSeekMoE", arXiv:2401.06066), or the weak pass of self-contrast
("Unchosen Experts Can Contribute Too", arXiv:2405.14507). Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moestro.layers.routers.top_p import check_p
from moestro.routing import Routing, RoutingRule
from moestro.view.edit import Edit
from moestro.view.layers import MoELayer


@dataclass(eq=False)
class Reroute(Edit):
    """Route layers by other rules, which may give tokens another number of slots: {layer: rule}.

    Edits of logits act before it, whatever their place; what ForceOn prefers is lost.
    """

    rules: Mapping[int, RoutingRule]

    def layers(self) -> Collection[int]:
        return self.rules.keys()

    def check(self, layer: MoELayer) -> None:
        top_k = self.rules[layer.index].top_k
        if not 1 <= top_k <= layer.num_experts:
            raise ValueError(f"top_k={top_k} in layer {layer.index}, which has {layer.num_experts} experts")

    def routing(self, layer: int, routing: Routing) -> Routing:
        logits, weights, indices = self.rules[layer](routing.logits)
        # unused slots name the token's first expert, not E: not every experts implementation knows that index
        return Routing(logits, weights, torch.where(weights == 0, indices[:, :1], indices))


@dataclass(eq=False)
class _OneExpert(Edit):
    """Base of the edits that leave every token one expert, weighted by the family's rule: 1 where it normalises."""

    rules: Mapping[int, RoutingRule]

    def layers(self) -> Collection[int]:
        return self.rules.keys()

    def choose(self, layer: int, routing: Routing) -> Int[Tensor, "n 1"]:
        raise NotImplementedError

    def routing(self, layer: int, routing: Routing) -> Routing:
        chosen = self.choose(layer, routing)
        return Routing(routing.logits, self.rules[layer].weigh(routing.logits, chosen), chosen)


@dataclass(eq=False)
class Rank(_OneExpert):
    """Every token uses the expert that its router ranks last of `top_k`, which is the rules' rank."""

    def choose(self, layer: int, routing: Routing) -> Int[Tensor, "n 1"]:
        return self.rules[layer](routing.logits).indices[:, -1:]


@dataclass(eq=False)
class RandomExpert(_OneExpert):
    """Every token uses an expert drawn anew in every layer and forward pass."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def choose(self, layer: int, routing: Routing) -> Int[Tensor, "n 1"]:
        tokens, experts = routing.logits.shape
        return torch.randint(experts, (tokens, 1), generator=self.generator).to(routing.logits.device)


def rank(view: Any, k: int) -> Rank:
    """Every token uses one expert, the router's `k`-th choice (1 is the best), in all layers.

    The order is that in which the router would choose: by scores with a correction bias, inside the best groups.
    Raises ValueError where a layer's routing cannot be re-run, or its tokens cannot use k experts.
    """
    return Rank(_with_top_k(view, k))


def random_expert(view: Any, *, seed: int = 0) -> RandomExpert:
    """Every token uses one expert drawn uniformly, in all layers. Raises ValueError as `rank` does."""
    return RandomExpert(_with_top_k(view, 1), torch.Generator().manual_seed(seed))


def top_k(view: Any, k: int) -> Reroute:
    """Every token uses its `k` best experts, in all layers; the weights are untouched, unlike by `view.set_top_k`.

    Raises ValueError where a layer's routing cannot be re-run, or limits tokens to groups too small for k.
    """
    return Reroute(_with_top_k(view, k))


def top_p(view: Any, p: float, *, max_experts: int | None = None) -> Reroute:
    """Every token uses its best experts until their share of its scores reaches `p`, in all layers.

    Weights are normalised over these experts where the family normalises. p=1: all experts.
    Raises ValueError for p outside (0, 1], max_experts < 1, or a layer whose routing cannot be re-run.
    """
    check_p(p)
    if max_experts is not None and max_experts < 1:
        raise ValueError(f"max_experts={max_experts}: every token uses at least one expert")
    return Reroute(
        {layer.index: replace(_rule(layer), top_k=1, top_p=p, max_experts=max_experts) for layer in view.layers}
    )


def _with_top_k(view: Any, k: int) -> dict[int, RoutingRule]:
    """The rule of every layer with `k` in the place of its top_k or top_p."""
    rules = {layer.index: replace(_rule(layer), top_k=k, top_p=None) for layer in view.layers}
    for index, rule in rules.items():
        most = view.layer(index).num_experts // rule.groups * rule.top_groups
        if not 1 <= k <= most:
            raise ValueError(f"k={k} in layer {index}, whose tokens can use 1 to {most} experts")
    return rules


def _rule(layer: MoELayer) -> RoutingRule:
    rule = layer.rule
    if rule is None:
        raise ValueError(f"layer {layer.index} cannot be routed by another rule: {layer.no_rule}")
    if rule.sparsemixer is not None or rule.null_experts:
        raise ValueError(
            f"layer {layer.index} cannot be given another number of experts: its rule is {rule.describe()}"
            f"{' with classes for no expert' if rule.null_experts else ''}"
        )
    return rule
