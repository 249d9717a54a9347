"""Which experts serve which domain, and whether that is more than chance among texts.

    share[d, e]      = share of the domain's tokens that expert e serves
    log ratio        = log2(share[d, e] / mean of share[d', e] over the other domains)
    bits of a layer  = I(domain; expert) = sum p(d, e) log2(p(d, e) / (p(d) p(e))),  every domain weighing the same

The control of both exchanges the domains of whole texts: tokens of one text are not independent, so texts are the
units. A specialist's p-value is that of the largest difference anywhere in the model under exchanged domains, so it
holds for all experts at once. Shapes: S texts, D domains, E experts, M experts of all layers side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from moestro import stats
from moestro.analyze.profiles import Profiles

PERMUTATIONS = 200
PRIOR = 0.5
"""Tokens added to a count before a ratio is taken, so that it stays finite."""


@dataclass(frozen=True)
class Specialist:
    """An expert that serves one domain more than the others."""

    layer: int
    expert: int
    share: float
    elsewhere: float
    """Mean over the other domains of the share of their tokens that it serves."""
    difference: stats.Interval
    p: float
    """Chance of a difference as large anywhere in the model when texts exchange their domains."""


@dataclass(frozen=True)
class Specialisation:
    """What was measured, and its control over permutations of the texts' domains."""

    domains: tuple[str, ...]
    shares: dict[int, Float[Tensor, "d e"]]
    log_ratios: dict[int, Float[Tensor, "d e"]]
    bits: dict[int, float]
    null_bits: dict[int, NDArray[np.float64]]
    """{layer: bits under exchanged domains [permutations]}"""
    null_difference: Float[Tensor, "p d"]
    """Under exchanged domains: the largest share minus share elsewhere of any expert."""

    def information_p(self) -> dict[int, float]:
        """{layer: p-value of its bits}, corrected for the number of layers."""
        values = [stats.exceeds(self.bits[layer], self.null_bits[layer]) for layer in self.bits]
        return dict(zip(self.bits, stats.corrected(values).tolist(), strict=True))


def domain_counts(profiles: Profiles) -> dict[int, Float[Tensor, "d e"]]:
    """{layer: tokens of each domain that every expert served}"""
    rows = torch.zeros(len(profiles.domains), len(profiles), dtype=torch.float64)
    rows[profiles.domain, torch.arange(len(profiles))] = 1
    return {layer: rows @ counts for layer, counts in profiles.counts.items()}


def specialisation(profiles: Profiles, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Specialisation:
    """Shares, log ratios and bits of every layer, with their control.

    Raises ValueError for texts of fewer than two domains.
    """
    present = sorted(set(profiles.domain.tolist()))
    if len(present) < 2:
        raise ValueError(
            f"all texts are of {[profiles.domains[d] for d in present]}: specialisation compares two domains or more"
        )
    names = tuple(profiles.domains[d] for d in present)
    labels = torch.searchsorted(torch.tensor(present), profiles.domain)
    sizes = {layer: counts.shape[1] for layer, counts in profiles.counts.items()}
    counts = torch.cat([*profiles.counts.values(), profiles.tokens[:, None]], dim=1)  # [S, M + 1]

    def sums(order: Tensor) -> Tensor:
        rows = torch.zeros(len(names), len(order), dtype=torch.float64)
        rows[order, torch.arange(len(order))] = 1
        return rows @ counts

    measured = sums(labels)
    generator = torch.Generator().manual_seed(seed)
    null_bits, null_difference = [], []
    for _ in range(permutations):
        table = sums(labels[torch.randperm(len(labels), generator=generator)])
        null_bits.append([information(part) for part in table[:, :-1].split(list(sizes.values()), dim=1)])
        shares = table[:, :-1] / table[:, -1:]
        null_difference.append((shares - _elsewhere(shares)).amax(dim=1))
    smoothed = (measured[:, :-1] + PRIOR) / measured[:, -1:]
    parts = list(sizes.values())
    return Specialisation(
        names,
        dict(zip(sizes, (measured[:, :-1] / measured[:, -1:]).split(parts, dim=1), strict=True)),
        dict(zip(sizes, (smoothed / _elsewhere(smoothed)).log2().split(parts, dim=1), strict=True)),
        {layer: information(t) for layer, t in zip(sizes, measured[:, :-1].split(parts, dim=1), strict=True)},
        dict(zip(sizes, np.array(null_bits).T, strict=True)),
        torch.stack(null_difference),
    )


def information(counts: Float[Tensor, "d e"]) -> float:
    """I(domain; expert) in bits of a table of slots; every domain weighs the same, empty ones do not count."""
    table = counts[counts.sum(dim=1) > 0]
    given = table / table.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(given.mean(dim=0)).sum() - torch.special.entr(given).sum(dim=1).mean()
    return max(0.0, float(entropy) / float(np.log(2)))


def specialists(
    profiles: Profiles, found: Specialisation, domain: str, count: int = 8, *, seed: int = 0
) -> list[Specialist]:
    """The `count` experts whose share of the domain's tokens exceeds their share elsewhere most, best first."""
    own = found.domains.index(domain)
    places = [(layer, e) for layer, shares in found.shares.items() for e in range(shares.shape[1])]
    shares = torch.cat(list(found.shares.values()), dim=1)
    elsewhere = _elsewhere(shares)[own]
    best = (shares[own] - elsewhere).argsort(descending=True, stable=True)[:count]
    columns = torch.stack([profiles.counts[places[m][0]][:, places[m][1]] for m in best.tolist()], dim=1)
    intervals = _share_differences(profiles, columns, found.domains, own, seed=seed)
    null = found.null_difference[:, own].numpy()
    found_specialists = []
    for m, interval in zip(best.tolist(), intervals, strict=True):
        layer, expert = places[m]
        p = stats.exceeds(interval.estimate, null)
        found_specialists.append(Specialist(layer, expert, float(shares[own, m]), float(elsewhere[m]), interval, p))
    return found_specialists


def _share_differences(
    profiles: Profiles, columns: Float[Tensor, "s c"], domains: tuple[str, ...], own: int, *, seed: int
) -> list[stats.Interval]:
    """Bootstrap over the texts of every domain: share of the own domain minus the mean of the others."""
    numbers = [profiles.domains.index(name) for name in domains]
    width = columns.shape[1] + 1
    table = torch.zeros(len(profiles), len(domains), width, dtype=torch.float64)
    for d, number in enumerate(numbers):
        rows = profiles.domain == number
        table[rows, d] = torch.cat([columns[rows], profiles.tokens[rows, None]], dim=1)

    def statistic(sums: NDArray) -> NDArray:
        by_domain = sums.reshape(len(sums), len(domains), width)
        shares = by_domain[:, :, :-1] / np.maximum(by_domain[:, :, -1:], 1)
        others = np.delete(shares, own, axis=1).mean(axis=1)
        return shares[:, own] - others

    return stats.bootstrap_totals(
        table.flatten(1).numpy(), statistic, groups=profiles.domain.numpy(), resamples=1000, seed=seed
    )


def _elsewhere(shares: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    """Mean of the other rows."""
    return (shares.sum(dim=0, keepdim=True) - shares) / (len(shares) - 1)
