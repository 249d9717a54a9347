"""How evenly experts are used.

    violation of an expert = (load - mean load) / mean load
    under-used: load < threshold * mean load

"ReXMoE" (arXiv:2510.17483). Shapes: D domains, E experts.
"""

from __future__ import annotations

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
