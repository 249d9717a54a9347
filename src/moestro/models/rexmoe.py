"""Sparse layers in groups of r that own their experts together: each routes among the r N experts of its group.

Experts are stored once, so their parameters are those of the base model with N a layer; only the routers grow, r-fold.
Every layer keeps its own router, norm and shared expert. During training the candidates may be opened by and by (see
layers/routers/progressive.py).

    MoELMConfig(num_experts=8, block={"kind": "rexmoe", "reuse": 4, "schedule": "linear"})

The printed group of layer l, {floor(l / r) + k : 1 <= k <= r}, does not tile the layers as the text says; here it is
{r floor(l / r), ..., r floor(l / r) + r - 1}, counting sparse layers alone.
"ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts" (arXiv:2510.17483).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moestro.layers import MoE
from moestro.layers.experts import EXPERTS
from moestro.layers.kinds import named
from moestro.layers.routers.base import Router
from moestro.layers.routers.progressive import ProgressivePool
from moestro.models.lm import BLOCKS, Common, FeedForward, MoELMConfig, build_router


def group_of(layer: int, reuse: int, sparse_layers: Sequence[int]) -> list[int]:
    """The sparse layers that share experts with `layer`, itself among them.

    Raises ValueError where `reuse` does not divide their number.
    """
    if reuse < 1 or len(sparse_layers) % reuse:
        raise ValueError(
            f"reuse={reuse} does not divide the {len(sparse_layers)} sparse layers into groups of one size; choose a "
            "divisor, or other moe_layers"
        )
    place = sorted(sparse_layers).index(layer) // reuse * reuse
    return sorted(sparse_layers)[place : place + reuse]


def build_rexmoe(
    config: MoELMConfig, layer: int, common: Common, *, reuse: int = 4, schedule: str | None = "linear", **options: Any
) -> MoE:
    """`schedule` and `options` are those of ProgressivePool; schedule=None opens the whole pool from the start."""
    group = group_of(layer, reuse, config.moe_layers or ())
    own, pool = config.num_experts, config.num_experts * reuse
    experts = _experts_of_group(config, pool, f"experts of layers {group}", common)
    router: Router = build_router(config, pool, common)
    if schedule is not None and reuse > 1:
        place = group.index(layer)
        router = ProgressivePool(router, range(place * own, (place + 1) * own), schedule=schedule, **options)
    elif options:
        raise ValueError(f"{sorted(options)[0]!r} is an option of a schedule, and there is none")
    width = config.shared_intermediate_size
    shared = FeedForward(config.hidden_size, width) if width else None
    return MoE(router, experts, shared, losses=config.router_losses)


def _experts_of_group(config: MoELMConfig, pool: int, name: str, common: Common) -> nn.Module:
    """A module of each layer's own, so that it can be observed; the parameters are the group's."""
    make_experts, options = named(EXPERTS, config.experts, "experts")
    experts = make_experts(pool, config.hidden_size, config.moe_intermediate_size, config=config, **options)
    if name not in common:
        common[name] = experts
    for path, parameter in common[name].named_parameters():
        owner, _, attribute = path.rpartition(".")
        setattr(experts.get_submodule(owner), attribute, parameter)
    return experts


BLOCKS["rexmoe"] = build_rexmoe
