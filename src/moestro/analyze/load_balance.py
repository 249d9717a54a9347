"""How evenly experts are used.

    violation of an expert = (load - mean load) / mean load
    under-used: load < threshold * mean load                                        "ReXMoE" (arXiv:2510.17483)
    evenness = H(load) / log E                    1: all alike, 0: one expert serves everything
    Gini     = mean difference of two loads / (2 * mean load)            0: all alike, 1 - 1/E: one serves everything

Shapes: D domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

UNDER_USED = 0.1
"""Part of the mean load below which an expert counts as under-used."""

Loads = Mapping[int, Float[Tensor, "d e"]]
"""{layer (or group of layers): tokens of each domain that every expert served}, as ExpertCounts gives it."""


def load_balance_violation(loads: Loads) -> dict[int, Float[Tensor, " e"]]:
    """{layer: [E]}: 0 at even loads, -1 for an expert that serves nothing. Raises ValueError where nothing was seen."""
    found = {}
    for layer, table in loads.items():
        load = table.sum(dim=0).double()
        if not load.sum() > 0:
            raise ValueError(f"layer {layer} served no token: there is no load to compare with")
        found[layer] = load / load.mean() - 1
    return found


def under_used(loads: Loads, threshold: float = UNDER_USED) -> float:
    """Share of all experts with less than `threshold` of their layer's mean load."""
    violations = torch.cat(list(load_balance_violation(loads).values()))
    return float((violations < threshold - 1).double().mean())


def evenness(loads: Float[Tensor, "*b e"]) -> Float[Tensor, "*b"]:
    """Entropy of the load over its largest possible value; 0 where there is no load."""
    shares = loads.double() / loads.double().sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(shares).sum(dim=-1) / math.log(max(loads.shape[-1], 2))


def gini(loads: Float[Tensor, "*b e"]) -> Float[Tensor, "*b"]:
    """Gini coefficient of the load."""
    ranked = loads.double().sort(dim=-1).values
    experts = loads.shape[-1]
    place = 2 * torch.arange(1, experts + 1, dtype=torch.float64) - experts - 1
    return (ranked * place).sum(dim=-1) / (experts * ranked.sum(dim=-1)).clamp_min(1e-300)
