"""Functional token resonance imaging: which experts are busier where a model shows a behaviour.

M_p[l, e] = number of tokens of prompt p that expert e of layer l serves. Prompts are labelled by the model's answers,
not by what they ask; with mu_c the mean of M_p over the prompts of class c,

    D_c[l, e] = mu_c[l, e] - mean of M_p over all other prompts

is the distinctiveness of the expert for c. Large: it goes with the behaviour; strongly negative: with its absence.

    (profiles,) = view.observe(prompts, [TextProfiles()])
    found = token_resonance(profiles, labels, "refused")
    found.top(10)
    resonance_bootstrap(profiles, labels, "refused", 10)     how sure the ranking is

Prompts should come from one template; where they differ in length, shares of tokens are compared, not counts.

"Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time" (arXiv:2502.11096).
Shapes: S prompts, E experts, R resamples, M experts of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro import sets, stats
from moestro.analyze.profiles import Profiles

Unit = Literal["frequency", "count"]
FEW_PROMPTS = 20
"""A class of fewer gives noise."""
RESAMPLES = 1000
SPLITS = 50


@dataclass(frozen=True)
class Resonance:
    """Distinctiveness of every expert for one class of prompts."""

    target: str
    score: sets.Scores
    """D, {layer: [E]}: tokens of a prompt, or shares of its tokens."""
    means: Mapping[str, sets.Scores]
    """{class: mu_c}"""
    prompts: dict[str, int]
    """{class: its number of prompts}"""

    def top(self, count: int, *, skip: int = 0) -> list[sets.Member]:
        """The most distinctive experts, best first; those of the next ranks where the first `skip` are left out."""
        return sets.top(self.score, count + skip)[skip:]

    def bottom(self, count: int) -> list[sets.Member]:
        """The experts that go with the absence of the behaviour, strongest first."""
        return sets.top({layer: -row for layer, row in self.score.items()}, count)

    @property
    def too_few(self) -> list[str]:
        """Classes of fewer than 20 prompts, of which little can be said."""
        return [name for name, count in self.prompts.items() if count < FEW_PROMPTS]


def token_resonance(profiles: Profiles, labels: Sequence[str], target: str, *, unit: Unit = "frequency") -> Resonance:
    """D of every expert for `target`; `labels`: of each prompt, in the order of `profiles.samples`.

    Raises ValueError where labels are not one a prompt, know one class only, or not `target`.
    """
    _is_target(profiles, labels, target)
    maps = prompt_maps(profiles, unit)
    classes = {name: torch.tensor([label == name for label in labels]) for name in sorted(set(labels))}
    means = {name: {layer: m[rows].mean(dim=0) for layer, m in maps.items()} for name, rows in classes.items()}
    others = ~classes[target]
    score = {layer: means[target][layer] - m[others].mean(dim=0) for layer, m in maps.items()}
    return Resonance(target, score, means, {name: int(rows.sum()) for name, rows in classes.items()})


def prompt_maps(profiles: Profiles, unit: Unit = "frequency") -> dict[int, Float[Tensor, "s e"]]:
    """{layer: M}: tokens of each prompt that each expert serves; "frequency": as a share of the prompt's tokens."""
    return profiles.counts if unit == "count" else profiles.frequency


def raw_frequency(profiles: Profiles, labels: Sequence[str], target: str) -> sets.Scores:
    """{layer: [E]}: how often the target's prompts use each expert, whatever the others do. The baseline of D."""
    return token_resonance(profiles, labels, target).means[target]


@dataclass(frozen=True)
class ResonanceBootstrap:
    """How sure a ranking by distinctiveness is, prompts drawn again within their classes."""

    low: sets.Scores
    high: sets.Scores
    """Ends of D's 95% interval, expert by expert."""
    in_top: sets.Scores
    """Share of the resamples in which the expert is among the top."""
    p: sets.Scores
    """Family-wise: how likely the largest D of any expert is as large when labels are exchanged at random."""


def resonance_bootstrap(
    profiles: Profiles,
    labels: Sequence[str],
    target: str,
    count: int,
    *,
    unit: Unit = "frequency",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ResonanceBootstrap:
    """Intervals of D, the chance of each expert to be among the `count` best, and p-values."""
    chosen = _is_target(profiles, labels, target)
    layers, maps = _side_by_side(profiles, unit)
    rng = np.random.default_rng(seed)
    drawn = _differences(maps, *(_resampled(rows, resamples, rng) for rows in (chosen, ~chosen)))
    best = np.argpartition(-drawn, count - 1, axis=1)[:, :count]
    in_top = np.bincount(best.ravel(), minlength=maps.shape[1]) / resamples
    low, high = np.quantile(drawn, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2], axis=0)
    exchanged = np.stack([rng.permutation(chosen) for _ in range(resamples)])
    largest = _differences(maps, *(_weights(rows) for rows in (exchanged, ~exchanged))).max(axis=1)
    observed = maps[chosen].mean(axis=0) - maps[~chosen].mean(axis=0)
    p = (1 + resamples - np.searchsorted(np.sort(largest), observed)) / (1 + resamples)
    return ResonanceBootstrap(*(_by_layer(values, layers) for values in (low, high, in_top, p)))


@dataclass(frozen=True)
class HalvesOverlap:
    """Agreement of the best experts of two halves of the prompts, by the Jaccard overlap of their sets."""

    overlap: Float[np.ndarray, " splits"]
    chance: float
    """What two random sets of this size have on average, to first order."""

    @property
    def mean(self) -> float:
        return float(self.overlap.mean())


def halves_overlap(
    profiles: Profiles,
    labels: Sequence[str],
    target: str,
    count: int,
    *,
    unit: Unit = "frequency",
    splits: int = SPLITS,
    seed: int = 0,
) -> HalvesOverlap:
    """How far the `count` best experts of one half of each class are those of the other half, over random splits.

    Raises ValueError for a class (the target, or the others) of one prompt.
    """
    chosen = _is_target(profiles, labels, target)
    if min(chosen.sum(), (~chosen).sum()) < 2:
        raise ValueError(f"{int(chosen.sum())} prompts of {target!r} and {int((~chosen).sum())} others have no halves")
    _, maps = _side_by_side(profiles, unit)
    rng = np.random.default_rng(seed)
    overlaps = []
    for _ in range(splits):
        first = np.zeros_like(chosen)
        for rows in (chosen, ~chosen):
            order = rng.permutation(np.flatnonzero(rows))
            first[order[: len(order) // 2]] = True
        halves = []
        for half in (first, ~first):
            score = maps[chosen & half].mean(axis=0) - maps[~chosen & half].mean(axis=0)
            halves.append({(0, int(i)) for i in np.argsort(-score, kind="stable")[:count]})
        overlaps.append(sets.overlap(*halves))
    common = count**2 / maps.shape[1]
    return HalvesOverlap(np.array(overlaps), common / (2 * count - common))


def _is_target(profiles: Profiles, labels: Sequence[str], target: str) -> Bool[np.ndarray, " s"]:
    if len(labels) != len(profiles):
        raise ValueError(f"{len(labels)} labels for {len(profiles)} prompts; give one for each")
    if len(classes := sorted(set(labels))) < 2:
        raise ValueError(f"all prompts are {classes}; a difference needs two classes")
    if target not in classes:
        raise ValueError(f"no prompt is labelled {target!r}; there are {classes}")
    return np.array([label == target for label in labels])


def _side_by_side(profiles: Profiles, unit: Unit) -> tuple[dict[int, int], Float[np.ndarray, "s m"]]:
    """({layer: its number of experts}, the maps of all layers)."""
    maps = prompt_maps(profiles, unit)
    return {layer: m.shape[1] for layer, m in maps.items()}, torch.cat([*maps.values()], dim=1).double().numpy()


def _by_layer(values: Float[np.ndarray, " m"], sizes: dict[int, int]) -> sets.Scores:
    return dict(zip(sizes, torch.from_numpy(values).split([*sizes.values()]), strict=True))


def _resampled(rows: Bool[np.ndarray, " s"], resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "r s"]:
    """Weights of prompts drawn with replacement among `rows`."""
    return rng.multinomial(int(rows.sum()), rows / rows.sum(), size=resamples) / rows.sum()


def _weights(rows: Bool[np.ndarray, "r s"]) -> Float[np.ndarray, "r s"]:
    return rows / rows.sum(axis=1, keepdims=True)


def _differences(
    maps: Float[np.ndarray, "s m"], target: Float[np.ndarray, "r s"], others: Float[np.ndarray, "r s"]
) -> Float[np.ndarray, "r m"]:
    return (target - others) @ maps
