"""Experts by the name that a model's config gives them. `EXPERTS["mine"] = MyExperts` adds one from outside.

Each is called with (num_experts, hidden_size, width, config=...) and the options of its config entry.
"""

from collections.abc import Callable
from typing import Any

from moestro.layers.experts.feed_forward import GatedExperts, UngatedExperts

EXPERTS: dict[str, Callable[..., Any]] = {"gated": GatedExperts, "ungated": UngatedExperts}

__all__ = ["EXPERTS", "GatedExperts", "UngatedExperts"]
