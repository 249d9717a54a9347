"""The saliencies by name, each an observer and a function of what it saw.

A saliency gives every expert of every layer a score [E]; larger is kept longer. NaN marks an expert that no
calibration token reached: nothing was measured, which is not the same as a measured zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.prune.easy_ep import EasyEPStats, easy_ep
from moestro.view.events import Observer
from moestro.view.observe import SlotStatistics, SlotStats

Scores = dict[int, Float[Tensor, " e"]]
"""{decoder layer number: [E]}"""


def frequency(stats: SlotStatistics) -> Scores:
    """How many tokens an expert served. 0 is a measurement here: the router never chose it."""
    return {i: slots.count for i, slots in stats.layers.items()}


def gating_score(stats: SlotStatistics) -> Scores:
    """Sum of the gate weights that an expert was given."""
    return {i: _unless_unseen(slots.gate_sum, slots.count) for i, slots in stats.layers.items()}


def reap(stats: SlotStatistics) -> Scores:
    """Mean gate-weighted output norm over the tokens an expert served.

    "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression" (arXiv:2510.13999).
    """
    return {
        i: _unless_unseen(slots.gated_norm_sum / slots.count.clamp(min=1), slots.count)
        for i, slots in stats.layers.items()
    }


def random(stats: SlotStatistics, seed: int = 0) -> Scores:
    """The control: uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.rand(s.count.shape, generator=generator, dtype=torch.float64) for i, s in stats.layers.items()}


def _unless_unseen(score: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, score, torch.nan)


@dataclass(frozen=True)
class Saliency:
    """`score` of what `observer` saw."""

    observer: Callable[[], Observer]
    score: Callable[[Any], Scores]


SALIENCIES: dict[str, Saliency] = {
    "random": Saliency(SlotStats, random),
    "frequency": Saliency(SlotStats, frequency),
    "gating-score": Saliency(SlotStats, gating_score),
    "reap": Saliency(SlotStats, reap),
    "easy-ep": Saliency(EasyEPStats, easy_ep),
}
