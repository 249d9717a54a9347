"""Keys that heads may not see: attention is what it would be, had they not been there.

With pattern p, hidden keys G and what goes to no key (1 - sum of p; a sink's share, else 0):

    p'_i = p_i / (sum of p outside G + 1 - sum of p) outside G, 0 in G

A query that may see hidden keys alone attends to nothing. To make heads attend to given keys there is
`moestro.view.heads.ForcePattern`; to make them attend to all alike, HeadMask(mode="uniform").

The row of a pattern as the place to intervene: "Circuit Component Reuse Across Tasks in Transformer Language Models"
(arXiv:2310.08744). A window for all but some heads: "Retrieval Head Mechanistically Explains Long-Context Factuality"
(arXiv:2404.15574), of which heads need a whole cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.sets import by_layer
from moestro.view.heads import At, HeadCall, HeadEdit, HeadId, HeadLayer

EPSILON = 1e-6
"""What is left of a row that counts as nothing."""


def hide(pattern: Float[Tensor, "b m t s"], hidden: Bool[Tensor, "b 1 t s"]) -> Float[Tensor, "b m t s"]:
    """The pattern without the hidden keys, what they had shared out as softmax would."""
    left = pattern.masked_fill(hidden, 0.0)
    to_none = 1 - pattern.sum(dim=-1, keepdim=True)
    total = left.sum(dim=-1, keepdim=True) + to_none.clamp_min(0)
    shared = torch.where(total > EPSILON, left / total.clamp_min(EPSILON), 0.0)
    return torch.where(hidden.any(dim=-1, keepdim=True), shared, pattern).to(pattern.dtype)


@dataclass(eq=False)
class _HeadPatterns(HeadEdit):
    """Base of the edits of some heads' patterns."""

    heads: Iterable[HeadId]

    def __post_init__(self) -> None:
        self.ids = by_layer(self.heads)

    def layers(self) -> Collection[int]:
        return self.ids

    def check(self, layer: HeadLayer) -> None:
        if wrong := [h for h in self.ids[layer.index] if not 0 <= h < layer.num_heads]:
            raise ValueError(f"layer {layer.index} has heads 0..{layer.num_heads - 1}; there is no head {wrong[0]}")

    def pattern_heads(self, layer: int) -> Sequence[int]:
        return self.ids[layer]


@dataclass(eq=False)
class HideKeys(_HeadPatterns):
    """Hide keys at given positions from heads, for some queries."""

    keys: Int[Tensor, "b p"]
    """Positions of the keys in each row; -1 for none."""
    at: At = "all"

    def pattern(self, call: HeadCall, pattern: Tensor, allowed: Tensor) -> Tensor:
        if call.shape[0] % len(self.keys):
            raise ValueError(f"HideKeys: keys of {len(self.keys)} rows, and the batch has {call.shape[0]}")
        keys = self.keys.cpu().repeat_interleave(call.shape[0] // len(self.keys), dim=0)
        named = ((call.key_position[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, None, :]).any(dim=-1)
        hidden = named[:, None, None, :] & call.places(self.at).any(dim=-1)[:, None, :, None]
        return hide(pattern, hidden.to(pattern.device))


@dataclass(eq=False)
class KeepRecent(_HeadPatterns):
    """Let heads see the last `window` tokens, the query among them, and the first `first`: a small cache for them."""

    window: int
    first: int = 1

    def check(self, layer: HeadLayer) -> None:
        super().check(layer)
        if self.window < 1 or self.first < 0:
            raise ValueError(f"KeepRecent(window={self.window}, first={self.first}); a query sees itself: window >= 1")

    def pattern(self, call: HeadCall, pattern: Tensor, allowed: Tensor) -> Tensor:
        key = call.key_position[:, None, :]
        old = (key <= call.position[:, :, None] - self.window) & (key >= self.first)
        return hide(pattern, old[:, None].to(pattern.device))
