"""A KV cache that also keeps what routers remember of earlier positions, row by row.

A layer's memory is a dict of tensors [B, S, ...] of S positions, or [B] of rows. Whatever happens to the rows and
positions of the keys and values (beams, repeats, selection, cropping) happens to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

Memory = dict[str, Tensor]


class RoutingCache(DynamicCache):
    """Hand it on as any other cache; `past_key_values` of an output is one where the model was given none."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.memory: dict[int, Memory] = {}

    @classmethod
    def over(cls, cache: DynamicCache) -> RoutingCache:
        """An empty cache as one with a memory. Both share keys and values."""
        made = cls.__new__(cls)
        made.__dict__.update(cache.__dict__, memory={})
        return made

    def remembered(self, layer: int) -> Memory:
        """What the layer kept: its own dict for every call, so that a layer changes nothing but what it returns."""
        return dict(self.memory.get(layer, {}))

    def remember(self, layer: int, memory: Memory) -> None:
        self.memory[layer] = memory

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory = {layer: {n: change(t) for n, t in kept.items()} for layer, kept in self.memory.items()}

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if removed := abs(tokens_to_remove):
            self._each(lambda t: t[:, :-removed] if t.dim() > 1 else t)

    def reset(self) -> None:
        super().reset()
        self.memory = {}


def with_memory(cache: Cache | None) -> Cache | None:
    """The cache that a forward works on: one with a memory wherever nothing has been cached without."""
    if type(cache) is DynamicCache and not cache.get_seq_length():
        return RoutingCache.over(cache)
    return cache
