"""Circuits of attention heads, traced by path patching, and how much two tasks share of them.

    circuit = trace_circuit(view, pairs, [Stage(), Stage("q"), Stage("v", at="S2")], share=0.02)
    circuit_table(view, pairs, circuit)                              effects, what each head looks at, and its role
    overlap_curve(first, second, view.num_heads)                     against the share of heads kept, with its null

A trace goes backwards from the logits: the heads of strongest effect (see `path_patching`) are the next stage's
receivers. The overlap of two circuits is |both| / |either|.

"Circuit Component Reuse Across Tasks in Transformer Language Models" (arXiv:2310.08744).
Shapes: A query heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor

from moestro import sets, stats
from moestro.analyze.path_patching import BATCH_TOKENS, SHARE, PathEffects, path_patching
from moestro.data.minimal_pairs import MinimalPairs
from moestro.view.heads import HeadEvent, HeadId, Part


@dataclass(frozen=True)
class Stage:
    """One step of tracing: through what the receivers are reached, and where the senders' z is changed."""

    part: Part | None = None
    """None: the receivers are the logits, else q, k, v or z of the heads kept at the stage before."""
    at: str = "last"
    """A name of the pairs' positions."""


@dataclass(frozen=True)
class Circuit:
    """The stages of a trace."""

    stages: list[tuple[Stage, PathEffects]]
    share: float

    def heads(self, share: float | None = None) -> sets.Chosen:
        """The heads kept at any stage; another share of every stage's effects can be asked for."""
        kept = self.share if share is None else share
        return frozenset(head for _, effects in self.stages for head in effects.top(kept))


def trace_circuit(
    view: Any,
    pairs: MinimalPairs,
    stages: Sequence[Stage],
    *,
    share: float = SHARE,
    freeze_mlp: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Circuit:
    """Trace a circuit backwards from the logits: the strongest heads of a stage are the next one's receivers.

    Stages whose receivers are all in the first layer find no senders and end the trace.
    """
    if not stages or stages[0].part is not None or any(stage.part is None for stage in stages[1:]):
        raise ValueError("the first stage has the logits as its receiver (part=None), and no other has")
    if unknown := [stage.at for stage in stages if stage.at not in pairs.positions]:
        raise ValueError(f"the pairs have no place {unknown[0]!r}; they have {', '.join(sorted(pairs.positions))}")
    found: list[tuple[Stage, PathEffects]] = []
    first = min(view.num_heads)
    for stage in stages:
        receivers: Any = "logits"
        if stage.part is not None:
            receivers = [(layer, h, stage.part) for layer, h in found[-1][1].top(share)]
            if all(layer == first for layer, _, _ in receivers):
                break
        effects = path_patching(
            view, pairs, receivers, at=stage.at, freeze_mlp=freeze_mlp, batch_tokens=batch_tokens, progress=progress
        )
        found.append((stage, effects))
    return Circuit(found, share)


@dataclass(frozen=True)
class Overlap:
    """Heads in both circuits over heads in either, and what chance would give."""

    value: float
    shared: sets.Chosen
    null_mean: float
    null_high: float
    """95th percentile"""
    p: float


def circuit_overlap(first: Collection[HeadId], second: Collection[HeadId], sizes: Mapping[int, int]) -> Overlap:
    """Held against random circuits with as many heads in each layer: the exact distribution, no sampling.

    In a layer of n heads of which the circuits hold a and b, the number they share by chance is hypergeometric (n, a,
    b); layers are independent. `sizes`: {layer: number of heads}.
    """
    one, two = set(first), set(second)
    mine, theirs = sets.by_layer(one), sets.by_layer(two)
    if wrong := [m for m in sorted(one | two) if not 0 <= m[1] < sizes.get(m[0], 0)]:
        raise ValueError(f"layer {wrong[0][0]} has {sizes.get(wrong[0][0], 0)} heads; there is no head {wrong[0][1]}")
    counts = ((n, len(mine.get(i, ())), len(theirs.get(i, ()))) for i, n in sizes.items())
    by_layer = [hypergeom(n, a, b).pmf(np.arange(min(a, b) + 1)) for n, a, b in counts if a and b]
    chance = reduce(np.convolve, by_layer, np.ones(1))
    shared = np.arange(len(chance))
    values = shared / np.maximum(len(one) + len(two) - shared, 1)
    high = values[np.searchsorted(np.cumsum(chance), 0.95 - 1e-12)]
    both = one & two
    p = min(1.0, float(chance[shared >= len(both)].sum()))
    return Overlap(sets.overlap(one, two), frozenset(both), float(values @ chance), float(high), p)


def overlap_curve(first: Circuit, second: Circuit, sizes: Mapping[int, int], shares: Sequence[float]) -> pl.DataFrame:
    """Overlap against the share of heads kept at every stage: a single threshold can tell anything."""
    rows = []
    for share in shares:
        one, two = first.heads(share), second.heads(share)
        found = circuit_overlap(one, two, sizes)
        rows.append((share, len(one), len(two), found.value, found.null_mean, found.null_high, found.p))
    names = ["share", "first", "second", "overlap", "null_mean", "null_high", "p"]
    return pl.DataFrame(rows, schema=names, orient="row")


def effect_difference(first: PathEffects, second: PathEffects) -> dict[int, Float[Tensor, " a"]]:
    """{layer: difference of the effects, each over the largest of its own map}: near 0 where both tasks use a head."""

    def scaled(effects: PathEffects) -> dict[int, Tensor]:
        largest = max(float(row.abs().max()) for row in effects.effect.values())
        return {layer: row / largest for layer, row in effects.effect.items()}

    other = scaled(second)
    return {layer: row - other[layer] for layer, row in scaled(first).items()}


# Roles


class _Attention:
    """Observer: sums over pairs of the attention from one place to others."""

    needs = frozenset({"patterns"})

    def __init__(self, query: Tensor, keys: Mapping[str, Tensor]) -> None:
        self.query, self.keys = query, keys
        self.sums: dict[str, dict[int, Tensor]] = {name: {} for name in keys}

    def update_heads(self, event: HeadEvent) -> None:
        samples = event.call.batch.on_grid(event.tokens.sample, -1)[:, 0]
        rows = torch.arange(len(samples))
        for name, key in self.keys.items():
            found = event.pattern.cpu()[rows, :, self.query[samples], key[samples]].double().sum(dim=0)
            self.sums[name][event.layer] = self.sums[name].get(event.layer, 0) + found

    def merge(self, other: _Attention) -> None:
        for name, sums in other.sums.items():
            for layer, total in sums.items():
                self.sums[name][layer] = self.sums[name].get(layer, 0) + total

    def result(self) -> dict[str, dict[int, Tensor]]:
        return {
            name: {layer: (total / len(self.query)).float() for layer, total in sorted(sums.items())}
            for name, sums in self.sums.items()
        }


def attention_from(
    view: Any, pairs: MinimalPairs, query: str = "last", *, batch_tokens: int = BATCH_TOKENS, progress: bool = True
) -> dict[str, dict[int, Float[Tensor, " a"]]]:
    """{place: {layer: mean attention of every head from the place `query` to it}}, after the clean prompts."""
    if query not in pairs.positions:
        raise ValueError(f"the pairs have no place {query!r}; they have {', '.join(sorted(pairs.positions))}")
    rows = max(1, batch_tokens // pairs.clean.shape[1])
    data = [
        {"input_ids": part.clean, "attention_mask": part.mask.long()}
        for part in (pairs[start : start + rows] for start in range(0, len(pairs), rows))
    ]
    observer = _Attention(pairs.positions[query], {n: at for n, at in pairs.positions.items() if n != query})
    return view.observe(data, [observer], progress=progress, description="attention")[0]


def circuit_table(view: Any, pairs: MinimalPairs, circuit: Circuit, *, progress: bool = False) -> pl.DataFrame:
    """A row for each head of each stage: its effect, and the named place that it looks at most from where it sends.

    Roles are those that the pairs name by (query, key); a "negative" head speaks against the answer.
    """
    looks = {at: attention_from(view, pairs, at, progress=progress) for at in {stage.at for stage, _ in circuit.stages}}
    rows = []
    for number, (stage, effects) in enumerate(circuit.stages):
        for layer, head in effects.top(circuit.share):
            seen = {name: float(by_layer[layer][head]) for name, by_layer in looks[stage.at].items()}
            place = max(seen, key=lambda name: seen[name])
            spread = effects.interval((layer, head))
            role = pairs.roles.get((stage.at, place), "")
            if role and spread.high < 0:
                role = f"negative {role}"
            through = stage.part or "logits"
            rows.append((number, through, stage.at, layer, head, *_ends(spread), place, seen[place], role))
    names = ["stage", "through", "at", "layer", "head", "effect", "low", "high", "looks_at", "attention", "role"]
    return pl.DataFrame(rows, schema=names, orient="row")


def _ends(interval: stats.Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high
