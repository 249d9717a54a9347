"""Whether experts belong to tokens of the vocabulary: what is read, what is predicted, what really follows.

    share[v, e] = part of the occurrences of id v whose expert of largest weight is e
    specialisation of e = mean of its `top` largest shares, over ids that occur `min_count` times or more

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv:2505.16056).
Shapes: N tokens, E experts, B rows, T positions, V vocabulary, M pairs (id, expert) that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.view.events import Batch, MoEEvent

KINDS = ("input", "prediction", "target")
MIN_COUNT, TOP = 20, 15  # the paper's
PENDING = 2**20
"""Occurrences that are held before they are counted."""


@dataclass(frozen=True)
class PairCounts:
    """How often each pair of id and expert occurs: `key` = id * E + expert, sorted."""

    key: Int[Tensor, " m"]
    count: Int[Tensor, " m"]
    num_experts: int

    def shares(self, min_count: int = MIN_COUNT) -> Float[Tensor, "v e"]:
        """One row for each id that occurs so often."""
        ids, row = (self.key // self.num_experts).unique(return_inverse=True)
        table = torch.zeros(len(ids), self.num_experts, dtype=torch.float64)
        table[row, self.key % self.num_experts] = self.count.double()
        total = table.sum(dim=1, keepdim=True)
        return (table / total)[total[:, 0] >= min_count]


class VocabularyUse:
    """Observer: {kind: {layer: PairCounts}} of the token read, the one predicted and the one that follows."""

    needs = frozenset({"lm_logits"})

    def __init__(self) -> None:
        self._top: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self._counted: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._pending: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}

    def update(self, event: MoEEvent) -> None:
        routing = event.routing
        chosen = routing.indices.gather(1, routing.weights.argmax(dim=1, keepdim=True))[:, 0].cpu()
        chosen = chosen.masked_fill((routing.weights.amax(dim=1).cpu() == 0) | (chosen >= event.num_experts), -1)
        self._top.setdefault(event.layer, []).append(chosen.short())
        self._sizes[event.layer] = event.num_experts

    def update_logits(self, batch: Batch, ids: Int[Tensor, "b t"], logits: Float[Tensor, "b t v"]) -> None:
        ids, predicted = ids.cpu(), logits.argmax(dim=-1).cpu()
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        for layer in self._top:
            expert = batch.on_grid(self._taken(layer, len(batch.tokens)).long(), -1)
            here = expert >= 0
            # padding may stand on either side: what follows a token is a token, and not the next row's
            real = batch.on_grid(torch.ones_like(batch.tokens.id), 0).bool()
            goes_on = here & torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
            for kind, of, where in (
                ("input", ids, here),
                ("prediction", predicted, here),
                ("target", following, goes_on),
            ):
                keys = of[where] * self._sizes[layer] + expert[where]
                self._add((kind, layer), *keys.unique(return_counts=True))

    def _taken(self, layer: int, count: int) -> Int[Tensor, " n"]:
        """The batch's tokens, which come first: of a streamed model, all batches' tokens of most layers are waiting."""
        parts, taken = self._top[layer], []
        while count:
            part, rest = parts[0][:count], parts[0][count:]
            parts[:1] = [rest] if len(rest) else []
            taken.append(part)
            count -= len(part)
        return torch.cat(taken)

    def _add(self, place: tuple[str, int], key: Tensor, count: Tensor) -> None:
        pending = self._pending.setdefault(place, [])
        pending.append((key, count))
        if sum(len(k) for k, _ in pending) >= max(PENDING, len(self._counted.get(place, ((),))[0])):
            self._count(place)

    def _count(self, place: tuple[str, int]) -> None:
        parts = self._pending.pop(place, [])
        if place in self._counted:
            parts.append(self._counted[place])
        if parts:
            keys, row = torch.cat([k for k, _ in parts]).unique(return_inverse=True)
            counts = torch.zeros(len(keys), dtype=torch.long).index_add_(0, row, torch.cat([c for _, c in parts]))
            self._counted[place] = (keys, counts)

    def merge(self, other: Self) -> None:
        self._sizes |= other._sizes
        for place in {**other._pending, **other._counted}:
            for key, count in [*other._pending.get(place, []), *filter(None, [other._counted.get(place)])]:
                self._add(place, key, count)

    def result(self) -> dict[str, dict[int, PairCounts]]:
        for place in list(self._pending):
            self._count(place)
        return {
            kind: {
                layer: PairCounts(*self._counted[kind, layer], self._sizes[layer])
                for layer in sorted(self._sizes)
                if (kind, layer) in self._counted
            }
            for kind in KINDS
        }


def vocabulary_specialization(
    pairs: dict[int, PairCounts], *, min_count: int = MIN_COUNT, top: int = TOP
) -> dict[int, Float[Tensor, " e"]]:
    """{layer: mean of each expert's `top` largest shares}. Raises ValueError where fewer ids occur often enough."""
    found = {}
    for layer, counts in pairs.items():
        shares = counts.shares(min_count)
        if len(shares) < top:
            raise ValueError(
                f"{len(shares)} ids occur {min_count} times or more in layer {layer}, and the mean is over {top}; "
                "observe more tokens, or lower top or min_count"
            )
        found[layer] = shares.topk(top, dim=0).values.mean(dim=0)
    return found
