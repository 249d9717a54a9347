"""Routers by the name that a model's config gives them. `ROUTERS["mine"] = MyRouter` adds one from outside.

Each is called with (hidden_size, num_experts, top_k) and the options of its config entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moestro.layers.routers.base import Router
from moestro.layers.routers.baselines import ExpertChoiceRouter, HashRouter, RandomRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.layers.routers.top_p import TopPRouter

ROUTERS: dict[str, Callable[..., Any]] = {
    "top_k": TopKRouter,
    "switch": partial(TopKRouter, normalize=False),
    "sigmoid": partial(TopKRouter, score="sigmoid", bias_rate=1e-3),
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "random": RandomRouter,
    "top_p": TopPRouter,
}

__all__ = ["ROUTERS", "Router"]
