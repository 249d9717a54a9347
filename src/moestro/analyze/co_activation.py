"""Which experts of a layer serve the same tokens, beside what independent choices would give.

    together[i, j] = tokens that experts i and j both serve
    expected[i, j] = f * sum over domains of n_d pi_d[i] pi_d[j],    pi_d[i] = share of domain d's tokens served by i

The expectation is that of experts chosen independently of each other inside every domain, so two experts that merely
like the same domain are no pair; f makes it sum to the observed number of pairs (a token's experts are all different).
Texts fall into groups by their number: pairs are found in one half of the groups and measured in the other, whose
spread gives the interval. Shapes: G groups, D domains, E experts, K slots, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from moestro import stats
from moestro.analyze.profiles import Profiles
from moestro.view.events import MoEEvent

GROUPS = 16
LEAST_EXPECTED = 10.0
"""Tokens that a pair must be expected to share in the half that finds it."""

Together = dict[int, Int[Tensor, "g e e"]]
"""{layer: tokens that two experts both serve, by group of texts}; the upper triangle holds the counts."""


class CoActivation:
    """Observer of pairs of experts: `Together`, with text s in group s % GROUPS."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._counts: Together = {}

    def update(self, event: MoEEvent) -> None:
        size = event.num_experts
        weights, indices = event.routing.weights.cpu(), event.routing.indices.cpu().long()
        unused = (weights == 0) | (indices >= size)
        ranked = indices.masked_fill(unused, size).sort(dim=1).values  # unused slots last
        group = (event.tokens.sample % GROUPS) * size
        places = []
        for a, b in combinations(range(ranked.shape[1]), 2):
            low, high = ranked[:, a], ranked[:, b]
            both = (high < size) & (low < high)
            places.append(((group + low) * size + high)[both])
        pairs = torch.cat(places) if places else group.new_zeros(0)
        counts = torch.bincount(pairs, minlength=GROUPS * size * size).view(GROUPS, size, size).int()
        kept = self._counts.setdefault(event.layer, torch.zeros_like(counts))
        kept += counts

    def merge(self, other: Self) -> None:
        for layer, counts in other._counts.items():
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    def result(self) -> Together:
        return dict(sorted(self._counts.items()))


@dataclass(frozen=True)
class Pair:
    """Two experts of one layer that serve the same tokens, measured on texts that did not choose them."""

    layer: int
    first: int
    second: int
    together: int
    """Tokens that both serve, over all texts."""
    independent: float
    """What independent choices would give over all texts, whatever the domain."""
    expected: float
    """What independent choices inside every domain would give."""
    lift: stats.Interval
    """together / expected on the half of the texts that did not choose the pair."""


def expected_together(profiles: Profiles, layer: int, together: Int[Tensor, "g e e"]) -> Float[Tensor, "g e e"]:
    """Pairs expected in every group of texts under independence inside domains (upper triangle)."""
    counts, domains = profiles.counts[layer], len(profiles.domains)
    by_domain = torch.zeros(domains, counts.shape[1], dtype=torch.float64).index_add_(0, profiles.domain, counts)
    total = torch.zeros(domains, dtype=torch.float64).index_add_(0, profiles.domain, profiles.tokens)
    share = by_domain / total.clamp_min(1)[:, None]
    place = (profiles.samples % GROUPS) * domains + profiles.domain
    tokens = torch.zeros(GROUPS * domains, dtype=torch.float64).index_add_(0, place, profiles.tokens)
    expected = torch.einsum("gd,di,dj->gij", tokens.view(GROUPS, domains), share, share).triu(1)
    return expected * (together.sum() / expected.sum().clamp_min(1e-300))


def independent_together(profiles: Profiles, layer: int, together: Int[Tensor, "g e e"]) -> Float[Tensor, "e e"]:
    """Pairs expected over all texts under independence, whatever the domain (upper triangle)."""
    share = profiles.counts[layer].sum(dim=0)
    expected = torch.outer(share, share).triu(1)
    return expected * (together.sum() / expected.sum().clamp_min(1e-300))


def strongest_pairs(profiles: Profiles, together: Together, count: int = 10, *, seed: int = 0) -> list[Pair]:
    """The `count` pairs of largest lift in the even groups of texts, each measured in the odd ones.

    Empty where no pair is expected often enough, or a half holds no text.
    """
    found: list[tuple[float, int, int, int]] = []
    expectations = {}
    for layer, observed in together.items():
        expectations[layer] = expected = expected_together(profiles, layer, observed)
        seen, wanted = observed[::2].sum(dim=0).double(), expected[::2].sum(dim=0)
        lift = torch.where(wanted >= LEAST_EXPECTED, seen / wanted.clamp_min(1e-300), 0.0).flatten()
        best = lift.topk(min(count, len(lift)))
        size = observed.shape[1]
        found += [(v, layer, *divmod(p, size)) for v, p in zip(best.values.tolist(), best.indices.tolist()) if v > 0]
    pairs = []
    for _, layer, i, j in sorted(found, key=lambda pair: (-pair[0], pair[1:]))[:count]:
        table = torch.stack([together[layer][1::2, i, j].double(), expectations[layer][1::2, i, j]], dim=1)
        table = table[table[:, 1] > 0]
        if len(table) < 2:
            continue
        (interval,) = stats.bootstrap_totals(table.numpy(), _ratio, seed=seed)
        independent = independent_together(profiles, layer, together[layer])[i, j]
        both = int(together[layer][:, i, j].sum())
        pairs.append(Pair(layer, i, j, both, float(independent), float(expectations[layer][:, i, j].sum()), interval))
    return pairs


def _ratio(sums: NDArray) -> NDArray:
    return sums[:, :1] / np.maximum(sums[:, 1:], 1e-300)
