"""Route an open model by another rule than its own: more or fewer experts a token, or as many as p asks for.

    with view.edits(top_p(view, 0.6)):      as many of a token's best experts as hold 60% of its scores
    with view.edits(top_k(view, 3)):        three experts for every token

The scores, and whether weights are normalised, stay the family's. The model was not trained so: this is a baseline for
what training with such a router gives ("Harder Tasks Need More Experts", arXiv:2403.07652), or a way to see how much
a model leans on the last of its experts ("DeepSeekMoE", arXiv:2401.06066).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

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


def top_k(view: Any, k: int) -> Reroute:
    """Every token uses its `k` best experts, in all layers; the weights are untouched, unlike by `view.set_top_k`.

    Raises ValueError where a layer's routing cannot be re-run, or limits tokens to groups too small for k.
    """
    rules = {layer.index: replace(_rule(layer), top_k=k) for layer in view.layers}
    for index, rule in rules.items():
        most = view.layer(index).num_experts // rule.groups * rule.top_groups
        if not 1 <= k <= most:
            raise ValueError(f"k={k} in layer {index}, whose tokens can use 1 to {most} experts")
        if rule.top_p is not None:
            rules[index] = replace(rule, top_p=None)
    return Reroute(rules)


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
