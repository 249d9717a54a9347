"""Attention sinks: how much attention the first tokens draw, and how much of it goes when experts are ablated.

    share[t, h] = sum over sink tokens i of p[t, i]                       p: attention of query t in head h
    D_sink      = 1 - mean over heads of (share' of the ablated model / share)

with shares averaged over the queries behind the sink, text by text, so that one query that hardly looks at the sink
does not outweigh all others. Patterns take memory of T^2: texts of some hundred tokens will do.

"Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv:2507.23279).
Shapes: B rows, T queries, S keys, A heads; X texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int

from moestro import sets, stats
from moestro.analyze.super_experts import ablated
from moestro.view.heads import HeadEvent

LEAST_SHARE = 1e-6
"""A head that gives the sink less is no part of D_sink: a ratio to nothing says nothing."""


class SinkShares:
    """Observer: {layer: [X, A]}, the attention that queries behind the sink give it, mean over each text's queries.

    `sink`: positions in a row. Texts are in the order of their numbers.
    """

    needs = frozenset({"patterns"})

    def __init__(self, *, sink: Collection[int] = (0,)) -> None:
        if not sink or min(sink) < 0:
            raise ValueError(f"sink={sorted(sink)}: name at least one position, from 0 on")
        self.sink = torch.tensor(sorted(sink))
        self._sums: dict[int, dict[int, tuple[Float[torch.Tensor, " a"], int]]] = {}

    def update_heads(self, event: HeadEvent) -> None:
        call, pattern = event.call, event.pattern
        is_sink = torch.isin(call.key_position, self.sink)
        behind = call.key_position[:, -pattern.shape[2] :] > self.sink[-1]
        share = torch.einsum("bats,bs->bat", pattern.float(), is_sink.to(pattern.device).float())
        per_row = (share * behind[:, None].to(share)).sum(dim=2).double().cpu()
        for sample, summed, count in zip(_samples(event).tolist(), per_row, behind.sum(dim=1).tolist(), strict=True):
            if count:
                self._add(event.layer, sample, summed, count)

    def _add(self, layer: int, sample: int, summed: Float[torch.Tensor, " a"], count: int) -> None:
        rows = self._sums.setdefault(layer, {})
        before, so_far = rows.get(sample, (torch.zeros_like(summed), 0))
        rows[sample] = before + summed, so_far + count

    def merge(self, other: Self) -> None:
        for layer, rows in other._sums.items():
            for sample, (summed, count) in rows.items():
                self._add(layer, sample, summed, count)

    def result(self) -> dict[int, Float[torch.Tensor, "x a"]]:
        return {
            layer: torch.stack([summed / count for _, (summed, count) in sorted(rows.items())])
            for layer, rows in sorted(self._sums.items())
        }


def _samples(event: HeadEvent) -> Int[torch.Tensor, " b"]:
    """Number of each row's text."""
    batch = event.call.batch
    return batch.on_grid(batch.tokens.sample, -1).amax(dim=1)


@dataclass(frozen=True)
class SinkDecay:
    """One layer's attention to the sink, whole and ablated."""

    before: Float[torch.Tensor, "x a"]
    after: Float[torch.Tensor, "x a"]

    @property
    def decay(self) -> Float[torch.Tensor, " x"]:
        """D_sink of every text: 1 where the sink lost all attention, 0 where it kept it, below where it gained."""
        ratio = self.after / torch.where(self.before > LEAST_SHARE, self.before, torch.nan)
        return 1 - ratio.nanmean(dim=1)

    @property
    def mean(self) -> stats.Interval:
        """D_sink, with its interval over texts."""
        return stats.bootstrap(self.decay.numpy())


def attention_sink_decay(
    view: Any,
    data: Iterable[Any],
    experts: Iterable[sets.Member],
    *,
    sink: Collection[int] = (0,),
    shared: Collection[int] = (),
    progress: bool = True,
) -> dict[int, SinkDecay]:
    """{attention layer: SinkDecay} when the experts, and the shared experts of layers `shared`, are ablated."""
    batches = data if hasattr(data, "__len__") else list(data)
    (before,) = view.observe(batches, [SinkShares(sink=sink)], progress=progress, description="attention sinks")
    with ablated(view, experts, shared=shared):
        (after,) = view.observe(batches, [SinkShares(sink=sink)], progress=progress, description="without experts")
    return {layer: SinkDecay(before[layer], after[layer]) for layer in before}
