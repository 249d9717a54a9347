"""Massive activations: a few entries of the residual stream that are orders of magnitude larger than all others.

An entry h of the stream is massive where |h| > 100 and |h| >= 1000 * median |h| ("Massive Activations in Large Language
Models", arXiv:2402.17762). Here the stream is read where an MoE block is about to be added to it. A layer forms them
where the stream that reaches the next MoE layer holds some, and they grew on the way by more than a tenth of the
largest anywhere (as in "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv:2507.23279).

Shapes: N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from jaxtyping import Float, Int
from torch import Tensor

from moestro.view.events import MoEEvent

MIN_MAGNITUDE = 100.0
MIN_OVER_MEDIAN = 1000.0
GROWTH = 0.1
TOP = 3
MEDIAN_ENTRIES = 2**20
"""The median of a batch is that of so many entries at most: of every second token, every third, and so on."""


@dataclass(frozen=True)
class ResidualPeak:
    """The largest entries of the residual stream that reaches an MoE layer: those of the token that has the largest."""

    value: Float[Tensor, " top"]
    """Magnitudes, largest first."""
    channel: Int[Tensor, " top"]
    sample: int
    position: int
    token: int
    """Its id."""
    median: float
    """Median magnitude of an entry: mean over batches."""
    count: int
    """Tokens seen."""

    @property
    def is_massive(self) -> bool:
        top = float(self.value[0])
        return top > MIN_MAGNITUDE and top >= MIN_OVER_MEDIAN * self.median


class ResidualPeaks:
    """Observer: {layer: ResidualPeak} of every MoE layer."""

    needs = frozenset({"residual"})

    def __init__(self) -> None:
        self._peaks: dict[int, ResidualPeak] = {}

    def update(self, event: MoEEvent) -> None:
        stream, tokens = event.residual.abs(), event.tokens
        per_token = stream.amax(dim=1).cpu()
        ties = (per_token == per_token.max()).nonzero().flatten()
        row = int(ties[((tokens.sample << 32) + tokens.position)[ties].argmin()])
        value, channel = stream[row].float().topk(min(TOP, stream.shape[1]))
        median = stream[:: -(-stream.numel() // MEDIAN_ENTRIES)].float().median()
        sample, position, token = (int(t[row]) for t in (tokens.sample, tokens.position, tokens.id))
        found = ResidualPeak(value.cpu(), channel.cpu(), sample, position, token, float(median), len(tokens))
        self._join(event.layer, found)

    def _join(self, layer: int, other: ResidualPeak) -> None:
        mine = self._peaks.get(layer)
        if mine is None:
            self._peaks[layer] = other
            return
        count = mine.count + other.count
        median = (mine.median * mine.count + other.median * other.count) / count
        larger = min(mine, other, key=lambda p: (-float(p.value[0]), p.sample, p.position))
        self._peaks[layer] = replace(larger, median=median, count=count)

    def merge(self, other: Self) -> None:
        for layer, peak in other._peaks.items():
            self._join(layer, peak)

    def result(self) -> dict[int, ResidualPeak]:
        return dict(sorted(self._peaks.items()))


def forming_layers(peaks: Mapping[int, ResidualPeak], *, growth: float = GROWTH) -> tuple[int, ...]:
    """The MoE layers after which the stream holds a new massive activation; never the last, after which none is read.

    What the attention before the next MoE block adds counts as the layer's.
    """
    layers = sorted(peaks)
    largest = max((float(p.value[0]) for p in peaks.values()), default=0.0)
    return tuple(
        layer
        for layer, following in pairwise(layers)
        if peaks[following].is_massive and float(peaks[following].value[0] - peaks[layer].value[0]) > growth * largest
    )
