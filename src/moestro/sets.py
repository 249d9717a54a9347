"""Sets of experts, and of heads: {(layer, number)}, how they are chosen from scores, and their random controls.

A set is a plain `frozenset` of pairs: `SwitchOff`, `HeadMask` and the rest take it as it is. What is said of a set is
said beside controls: sets of the same size, drawn layer by layer in the same numbers (`layer_matched`) or anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Member = tuple[int, int]
"""(decoder layer, number of the expert or head)"""
Chosen = frozenset[Member]
Scores = Mapping[int, Float[Tensor, " e"]]
"""{decoder layer: one score for each expert or head}"""


def top(scores: Scores, count: int, *, layers: Collection[int] | None = None) -> list[Member]:
    """The `count` members of largest score, best first; of equal ones the first. NaN is never chosen.

    Raises ValueError where there are not so many.
    """
    pairs = [
        (float(s), (layer, number))
        for layer, row in scores.items()
        if layers is None or layer in layers
        for number, s in enumerate(row.tolist())
        if s == s
    ]
    if not 1 <= count <= len(pairs):
        raise ValueError(f"the {count} best of {len(pairs)}; choose 1 to {len(pairs)}")
    return [member for _, member in sorted(pairs, key=lambda p: (-p[0], p[1]))[:count]]


def above(scores: Scores, threshold: float, *, layers: Collection[int] | None = None) -> Chosen:
    """All members whose score is larger than `threshold`."""
    return frozenset(
        (layer, number)
        for layer, row in scores.items()
        if layers is None or layer in layers
        for number in (row > threshold).nonzero().flatten().tolist()
    )


def by_layer(chosen: Iterable[Any]) -> dict[Any, list[int]]:
    """{layer: [numbers]}, in order: how a set is written to JSON."""
    grouped: dict[Any, list[int]] = {}
    for layer, number in sorted(set(chosen), key=lambda member: (isinstance(member[0], str), *member)):  # or by name
        grouped.setdefault(layer, []).append(number)
    return grouped


def from_layers(grouped: Mapping[int | str, Sequence[int]]) -> Chosen:
    """The inverse of `by_layer`, also with the layers as JSON writes them."""
    return frozenset((int(layer), number) for layer, numbers in grouped.items() for number in numbers)


def layer_matched(
    chosen: Collection[Member], sizes: Mapping[int, int], draws: int, *, seed: int = 0, avoid: Collection[Member] = ()
) -> Iterator[Chosen]:
    """`draws` random sets with as many members in each layer as `chosen`, none of which is in `chosen` or `avoid`.

    `sizes`: {layer: number of experts or heads}. Where a layer has too few others, members of `chosen` fill up.
    Raises ValueError for a layer that `sizes` does not know.
    """
    rng = np.random.default_rng(seed)
    wanted, taken = by_layer(chosen), set(chosen) | set(avoid)
    for layer, numbers in wanted.items():
        if layer not in sizes or numbers[-1] >= sizes[layer]:
            raise ValueError(f"layer {layer} has {sizes.get(layer, 0)} members; there is no number {numbers[-1]}")
    for _ in range(draws):
        drawn: set[Member] = set()
        for layer, numbers in wanted.items():
            free = [n for n in range(sizes[layer]) if (layer, n) not in taken]
            extra = [n for n in numbers if n not in free]
            missing = max(0, len(numbers) - len(free))
            picked = rng.choice(free, len(numbers) - missing, replace=False).tolist() if free else []
            drawn |= {(layer, n) for n in (*picked, *rng.choice(extra, missing, replace=False).tolist())}
        yield frozenset(drawn)


def anywhere(
    count: int, sizes: Mapping[int, int], draws: int, *, seed: int = 0, avoid: Collection[Member] = ()
) -> Iterator[Chosen]:
    """`draws` random sets of `count` members of all layers, none of which is in `avoid`."""
    rng, taken = np.random.default_rng(seed), set(avoid)
    members = [(layer, n) for layer, size in sizes.items() for n in range(size) if (layer, n) not in taken]
    if not 0 <= count <= len(members):
        raise ValueError(f"{count} members of {len(members)}")
    for _ in range(draws):
        yield frozenset(members[i] for i in rng.choice(len(members), count, replace=False))


def overlap(first: Collection[Member], second: Collection[Member]) -> float:
    """Members in both over members in either (Jaccard); 0 for two empty sets."""
    either = len(set(first) | set(second))
    return len(set(first) & set(second)) / either if either else 0.0


def as_matrix(scores: Scores) -> Float[Tensor, "l e"]:
    """Layers of one size as rows, in order. Raises ValueError where they differ."""
    rows = [scores[layer] for layer in sorted(scores)]
    if len({len(r) for r in rows}) > 1:
        raise ValueError(f"layers of {sorted({len(r) for r in rows})} members have no common matrix")
    return torch.stack(rows)
