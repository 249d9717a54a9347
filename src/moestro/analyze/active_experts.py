"""How many experts tokens use, where their number varies: by layer, by domain, and with a token's difficulty.

    active, difficulty = view.observe(data, [ActiveExperts(), Difficulty()])
    active.mean(), active.by_layer(), active.by_domain(), active.quantile(0.95), difficulty.correlation

Mean and 95th percentile matter: latency follows the latter. "Harder Tasks Need More Experts" (arXiv:2403.07652).
Shapes: L layers, D domains, E experts, N tokens, K slots.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from moestro.view.events import Batch, MoEEvent
from moestro.view.observe import DomainTable


@dataclass(frozen=True)
class ActiveCounts:
    """Tokens by the number of experts they used: `histograms[layer]` [D, E + 1]."""

    domains: tuple[str, ...]
    histograms: dict[int, Float[Tensor, "d c"]]

    def mean(self) -> float:
        """Mean over layers: every layer counts the same."""
        layers = self.by_layer()
        return sum(layers.values()) / len(layers)

    def by_layer(self) -> dict[int, float]:
        return {layer: _mean(h.sum(dim=0)) for layer, h in self.histograms.items()}

    def by_domain(self) -> dict[str, float]:
        """Mean over layers, by domain."""
        rows = {name: [_mean(h[d]) for h in self.histograms.values()] for d, name in enumerate(self.domains)}
        return {name: sum(means) / len(means) for name, means in rows.items()}

    def quantile(self, q: float) -> dict[int, int]:
        """{layer: the smallest number that a share `q` of the tokens does not exceed}"""
        found = {}
        for layer, histogram in self.histograms.items():
            below = histogram.sum(dim=0).cumsum(dim=0)
            found[layer] = int((below >= q * below[-1]).nonzero()[0])
        return found


def _mean(histogram: Float[Tensor, " c"]) -> float:
    counts = torch.arange(len(histogram), dtype=histogram.dtype)
    return float((histogram * counts).sum() / histogram.sum().clamp(min=1))


class ActiveExperts:
    """Histogram of the number of experts that tokens use, by layer and domain. Unused slots do not count."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._table = DomainTable()

    def update(self, event: MoEEvent) -> None:
        classes = event.num_experts + 1
        place = self._table.rows(event.tokens) * classes + used_slots(event)
        self._table.add(event.layer, "count", classes, place, torch.ones_like(place))

    def merge(self, other: Self) -> None:
        self._table.merge(other._table)

    def result(self) -> ActiveCounts:
        histograms = {layer: sums["count"] for layer, sums in sorted(self._table.sums.items())}
        return ActiveCounts(tuple(self._table.domains), histograms)


def used_slots(event: MoEEvent) -> Int[Tensor, " n"]:
    """How many experts serve each token."""
    weights, indices = event.routing.weights.cpu(), event.routing.indices.cpu()
    return ((weights != 0) & (indices < event.num_experts)).sum(dim=1)


@dataclass(frozen=True)
class LossAndExperts:
    """Of every token that has a next one: the loss of predicting that, and the experts it used in all layers."""

    loss: Float[Tensor, " n"]
    experts: Int[Tensor, " n"]

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation; NaN where all tokens use the same number."""
        if not len(self.experts) or bool((self.experts == self.experts[0]).all()):
            return float("nan")
        return float(spearmanr(self.loss.numpy(), self.experts.numpy()).statistic)


class Difficulty:
    """Holds each token's number of experts against how hard it is to predict the next token there."""

    needs = frozenset({"lm_logits"})

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._layers: dict[int, deque[Tensor]] = {}
        """Batches whose logits are still to come: one where the model is in memory, all where it is streamed."""

    def update(self, event: MoEEvent) -> None:
        self._layers.setdefault(event.layer, deque()).append(used_slots(event))

    def update_logits(self, batch: Batch, ids: Int[Tensor, "b t"], logits: Float[Tensor, "b t v"]) -> None:
        experts = torch.stack([batches.popleft() for batches in self._layers.values()]).sum(dim=0)
        on_grid = batch.on_grid(experts, -1)
        known = on_grid >= 0
        both = known[:, :-1] & known[:, 1:]
        predicted = logits[:, :-1][both.to(logits.device)].float()
        target = ids[:, 1:][both.to(ids.device)].to(predicted.device)
        loss = torch.nn.functional.cross_entropy(predicted, target, reduction="none")
        self._kept.append((loss.cpu(), on_grid[:, :-1][both]))

    def merge(self, other: Self) -> None:
        self._kept += other._kept

    def result(self) -> LossAndExperts:
        losses, experts = zip(*self._kept) if self._kept else ((torch.zeros(0),), (torch.zeros(0, dtype=torch.long),))
        return LossAndExperts(torch.cat(losses), torch.cat(experts))
