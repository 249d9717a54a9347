"""Routers by the name that a model's config gives them. `ROUTERS["mine"] = MyRouter` adds one from outside.

Each is called with (hidden_size, num_experts, top_k) and the options of its config entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moestro.layers.kinds import Kind, make, named
from moestro.layers.routers.base import Router
from moestro.layers.routers.baselines import ExpertChoiceRouter, HashRouter, RandomRouter, RowRouter
from moestro.layers.routers.comet import CometRouter
from moestro.layers.routers.permutation import PermutationSearch, PermutedRouter
from moestro.layers.routers.previous_logits import PreviousLogitsRouter
from moestro.layers.routers.recurrent import BottleneckRouter, RecurrentRouter
from moestro.layers.routers.sparsity_aware import SparsityAwareRouter
from moestro.layers.routers.stochastic import StochasticRouter
from moestro.layers.routers.temperature import TemperatureRouter
from moestro.layers.routers.token_graph import AttentionAwareRouter, SimilarityAwareRouter, UniformGraphRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.layers.routers.top_p import TopPRouter


def permuted(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    router: Kind = "top_k",
    steps: int,
    vocab_size: int,
    normalize: bool = True,
    common: Any = None,
    **search: Any,
) -> PermutedRouter:
    """A router by its name, its experts permuted by a search of so many steps with the options of PermutationSearch."""
    maker, options = named(ROUTERS, router, "router")
    offered = {"vocab_size": vocab_size, "normalize": normalize, "common": common}
    inner = make(maker, hidden_size, num_experts, top_k, options=options, offered=offered)
    return PermutedRouter(inner, PermutationSearch(num_experts, steps, **search))


ROUTERS: dict[str, Callable[..., Any]] = {
    "top_k": TopKRouter,
    "switch": partial(TopKRouter, normalize=False),
    "sigmoid": partial(TopKRouter, score="sigmoid", bias_rate=1e-3),
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "row": RowRouter,
    "random": RandomRouter,
    "comet": CometRouter,
    "permuted": permuted,
    "temperature": TemperatureRouter,
    "similarity_aware": SimilarityAwareRouter,
    "attention_aware": AttentionAwareRouter,
    "uniform_graph": UniformGraphRouter,
    "top_p": TopPRouter,
    "stochastic": StochasticRouter,
    "recurrent": RecurrentRouter,
    "bottleneck": BottleneckRouter,
    "previous_logits": PreviousLogitsRouter,
    "sparsity_aware": SparsityAwareRouter,
}

__all__ = ["ROUTERS", "Router"]
