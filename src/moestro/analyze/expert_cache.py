"""How often a token finds its experts in fast memory, by the number of slots and the rule of eviction; what to buy.

A token's experts are looked up in the cache as the token before left it, then brought in one after the other. Each time
the new one stays, and where there is no room the cached expert of least priority leaves:

    lru      last use                                       what an inference engine can do
    lfu      (number of uses so far, last use)
    segment  (uses left in the m tokens from this one on, last use): the hit rate is SCH, segment cache best hit rate
    belady   earliest next use                              the optimum

and `fixed` holds the experts that are used most often in all the texts. Whatever the priority, what C slots hold is a
part of what C + 1 slots hold, so one pass gives the hits of every C (a stack, as in Mattson et al. 1970).

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv:2505.16056),
whose first versions call SCH the optimum, which is Belady's.
Shapes: S texts, T positions, K slots, E experts, C slots of the cache, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.analyze.local_routing import SEGMENTS, LocalRouting, LocalUse, stretches
from moestro.stats import Interval, bootstrap
from moestro.view.events import MoEEvent, Tokens

POLICIES = ("lru", "lfu", "segment", "belady", "fixed")
FIRST_USES = ("free", "miss")
ROWS = 512
"""Texts times layers that are simulated side by side."""


@dataclass(frozen=True)
class Requests:
    """The experts that N tokens of whole texts ask for; tokens are in the order of their texts.

    The windows of a long text are one text again, where none is missing.
    """

    tokens: Tokens
    experts: dict[int, Int[Tensor, "n k"]]
    """{layer: expert of each slot, -1 for an unused one}"""
    sizes: dict[int, int]
    """{layer: E}"""

    def of(self, domain: str) -> Requests:
        """The texts of one domain. Raises ValueError for one that was not observed."""
        if domain not in self.tokens.domains:
            raise ValueError(f"no text of {domain!r} was observed; there are {list(self.tokens.domains)}")
        return self[(self.tokens.domain == self.tokens.domains.index(domain)).nonzero().flatten()]

    def __getitem__(self, chosen: Int[Tensor, " n"]) -> Requests:
        return replace(self, tokens=self.tokens[chosen], experts={i: e[chosen] for i, e in self.experts.items()})

    def shuffled(self, *, seed: int = 0) -> Requests:
        """The control: every token asks for what another one, of any text, asks for in all layers."""
        order = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(seed))
        return replace(self, experts={layer: experts[order] for layer, experts in self.experts.items()})


def local_use(requests: Requests, segments: Sequence[int] = SEGMENTS) -> LocalUse:
    """What `LocalRouting` finds in these texts, for controls such as `requests.shuffled()`."""
    sums = LocalRouting(segments)
    for layer, experts in requests.experts.items():
        used = torch.zeros(len(experts), requests.sizes[layer] + 1, dtype=torch.bool)
        used.scatter_(1, experts.long().masked_fill(experts < 0, requests.sizes[layer]), True)
        sums.add(layer, requests.tokens, used[:, :-1])
    return sums.result()


class RoutedTexts:
    """Observer: `Requests` of every `every`-th text, 2 bytes a slot: 768 a token at 48 layers of 8 slots."""

    needs: frozenset[str] = frozenset()

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every={every}; 1 keeps all texts, 16 every sixteenth")
        self.every = every
        self._tokens: list[Tokens] = []
        self._experts: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self._first_layer: int | None = None

    def update(self, event: MoEEvent) -> None:
        kept = (event.tokens.sample % self.every == 0).nonzero().flatten()
        if self._first_layer in (None, event.layer):
            self._first_layer = event.layer
            self._tokens.append(event.tokens[kept])
        weights, indices = event.routing.weights.cpu()[kept], event.routing.indices.cpu()[kept]
        unused = (weights == 0) | (indices >= event.num_experts)
        self._experts.setdefault(event.layer, []).append(indices.masked_fill(unused, -1).short())
        self._sizes[event.layer] = event.num_experts

    def merge(self, other: Self) -> None:
        self._tokens += other._tokens
        for layer, parts in other._experts.items():
            self._experts.setdefault(layer, []).extend(parts)
        self._sizes |= other._sizes

    def result(self) -> Requests:
        """Raises ValueError where no text was kept."""
        if not sum(map(len, self._tokens)):
            raise ValueError(f"no text was kept with every={self.every}; keep more of them")
        tokens = Tokens.cat(self._tokens)
        order = torch.from_numpy(np.lexsort((tokens.position.numpy(), tokens.sample.numpy())))
        experts = {layer: _joined(parts)[order] for layer, parts in sorted(self._experts.items())}
        return Requests(tokens[order], experts, {layer: self._sizes[layer] for layer in experts})


def _joined(parts: list[Tensor]) -> Int[Tensor, "n k"]:
    slots = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, slots - p.shape[1]), value=-1) for p in parts])


@dataclass(frozen=True)
class CacheCurve:
    """Hits of one cache (of a layer, or one that all layers share) by its number of slots."""

    policy: str
    top_k: int
    """Experts that a token asks for at most: a cache has as many slots, or more."""
    again: Float[Tensor, "s c"]
    """By text: requests of experts used before, by the slots that they need to be found."""
    first: Float[Tensor, "s c"]
    """First requests of an expert in a text: the j-th finds a free slot where there are j."""
    requests: Float[Tensor, " s"]

    @property
    def num_experts(self) -> int:
        return self.again.shape[1]

    def hits(self, first_use: str = "free") -> Float[Tensor, "s c"]:
        """Hits of each text with 1, 2, ... slots.

        "free": what is brought into an empty slot counts as a hit, as in the paper: only evictions cost. "miss": it
        counts as a miss: what is read from slow memory.
        """
        if first_use not in FIRST_USES:
            raise ValueError(f"first_use={first_use!r}; it is 'free' or 'miss'")
        return (self.again + self.first if first_use == "free" else self.again).cumsum(dim=1)

    def rates(self, first_use: str = "free") -> Float[Tensor, " c"]:
        """Hit rate over all texts with 1, 2, ... slots."""
        return self.hits(first_use).sum(dim=0) / self.requests.sum()

    def hit_rate(self, slots: int, first_use: str = "free") -> float:
        """Raises ValueError for a number of slots that the layer has no use for."""
        self.check(slots)
        return float(self.rates(first_use)[slots - 1])

    def interval(self, slots: int, first_use: str = "free") -> Interval:
        """Bootstrap over texts."""
        self.check(slots)
        hits = self.hits(first_use)[:, slots - 1]
        return bootstrap(hits, self.requests, statistic=lambda h, r, axis: h.sum(axis) / r.sum(axis))

    def slots(self, ratio: float) -> int:
        """Slots of a cache `ratio` times the experts of a token (rho), rounded up; at most all experts."""
        if ratio < 1:
            raise ValueError(f"ratio={ratio}: a cache smaller than a token's {self.top_k} experts; give 1 or more")
        return min(int(np.ceil(ratio * self.top_k)), self.num_experts)

    def check(self, slots: int) -> None:
        if not self.top_k <= slots <= self.num_experts:
            raise ValueError(
                f"a cache of {slots} slots: a token asks for {self.top_k} experts, and there are {self.num_experts}; "
                f"give {self.top_k} to {self.num_experts}"
            )


def layer_caches(requests: Requests, policy: str, *, m: int = 16, pinned: bool = False) -> dict[int, CacheCurve]:
    """{layer: curve}: a cache of its own for every layer.

    `m`: tokens that "segment" looks at, the present one included. `pinned`: a token's experts cannot evict each other,
    as in engines that load all of them before they compute.
    """
    _check(requests, policy, m)
    shapes: dict[tuple[int, int], list[int]] = {}
    for layer, experts in requests.experts.items():
        shapes.setdefault((experts.shape[1], requests.sizes[layer]), []).append(layer)
    found = {}
    for (_, size), layers in shapes.items():
        stacked = torch.stack([requests.experts[layer].long() for layer in layers])
        for layer, curve in zip(layers, _curves(requests.tokens, stacked, size, policy, m, pinned), strict=True):
            found[layer] = curve
    return dict(sorted(found.items()))


def model_cache(requests: Requests, policy: str, *, m: int = 16, pinned: bool = False) -> CacheCurve:
    """One cache that all layers share; a token asks for the experts of all layers at once, from the first layer on."""
    _check(requests, policy, m)
    parts, size = [], 0
    for layer, experts in requests.experts.items():
        parts.append(torch.where(experts < 0, -1, experts.long() + size))
        size += requests.sizes[layer]
    (curve,) = _curves(requests.tokens, torch.cat(parts, dim=1)[None], size, policy, m, pinned)
    return curve


def _check(requests: Requests, policy: str, m: int) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}; there are {', '.join(POLICIES)}")
    longest = int(stretches(requests.tokens)[1].max())
    if policy == "segment" and not 1 <= m <= longest:
        raise ValueError(f"m={m} and the longest text has {longest} tokens; give 1 to {longest}")


def _curves(
    tokens: Tokens, experts: Int[Tensor, "l n k"], size: int, policy: str, m: int, pinned: bool
) -> list[CacheCurve]:
    """One curve for each of the L caches."""
    text, left = stretches(tokens)
    lengths = text.bincount()
    longest = int(lengths.max())
    asked = experts >= 0
    top_k = int(asked.sum(dim=2).max())
    caches, texts = len(experts), len(lengths)
    requested = torch.zeros(caches, texts, dtype=torch.float64).index_add_(1, text, asked.sum(dim=2).double())
    if policy == "fixed":
        count = torch.stack([e[a].bincount(minlength=size) for e, a in zip(experts, asked)])
        rank = count.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        need = torch.where(asked, rank.gather(1, experts.clamp(min=0).flatten(1)).view_as(experts), size)
        place = (torch.arange(caches)[:, None, None] * texts + text[:, None]) * (size + 1) + need
        again = place.flatten().bincount(minlength=caches * texts * (size + 1)).view(caches, texts, -1)[..., :size]
        never = torch.zeros(texts, size, dtype=torch.float64)
        return [CacheCurve(policy, top_k, a.double(), never, r) for a, r in zip(again, requested)]
    again, first = torch.zeros(2, caches * texts, size + 1, dtype=torch.float64)
    grid = torch.full((texts, longest), -1)
    grid[text, lengths[text] - left] = torch.arange(len(text))
    order = lengths.argsort(descending=True, stable=True)
    rows = [(cache, int(s)) for s in order for cache in range(caches)]
    for start in range(0, len(rows), ROWS):
        cache, s = torch.tensor(rows[start : start + ROWS]).T
        where = grid[s, : int(lengths[s].max())]
        part = experts[cache[:, None], where.clamp(min=0)].masked_fill((where < 0)[..., None], -1)
        need, new = stack_depths(part, size, policy, m=m, pinned=pinned)
        for table, chosen in ((again, ~new), (first, new)):
            row = (cache * texts + s)[:, None, None].expand(-1, *need.shape[1:])
            place = (row * (size + 1) + need - 1)[chosen & (need > 0)]
            table += place.bincount(minlength=table.numel()).view_as(table)
    again, first = (t.view(caches, texts, -1)[..., :size] for t in (again, first))
    return [CacheCurve(policy, top_k, a, f, r) for a, f, r in zip(again, first, requested)]


# Simulation


def stack_depths(
    requests: Int[Tensor, "s t k"], num_experts: int, policy: str, *, m: int = 16, pinned: bool = False
) -> tuple[Int[Tensor, "s t k"], Bool[Tensor, "s t k"]]:
    """(slots that a cache needs for each request to be a hit, whether it is the text's first of that expert).

    Unused slots (-1) need 0. The experts of a text lie on a stack s_1, s_2, ..., such that C slots hold the first C.
    With c_i, which leaves a cache of i slots, the least in priority of s_1, ..., s_i, bringing in the expert at depth d
    makes

        s'_1 = that expert,   s'_i = the better of s_i and c_{i-1} for 1 < i < d,   s'_d = c_{d-1}

    A cache is a recurrence: positions go one after the other, each for all texts and layers at once.
    """
    texts, length, slots = requests.shape
    weight, change = _weights(requests, num_experts, policy, m)
    last = torch.zeros(texts, num_experts, dtype=torch.long)
    stack = torch.full((texts, num_experts), -1)
    filled = torch.zeros(texts, 1, dtype=torch.long)
    depth, first = torch.zeros_like(requests), torch.zeros(requests.shape, dtype=torch.bool)
    place, uses = torch.arange(num_experts), length * slots + 1
    for t in range(length):
        asked = requests[:, t]
        found = stack[:, None] == asked[:, :, None]
        first[:, t] = ~found.any(dim=2) & (asked >= 0)
        free = filled + first[:, t].cumsum(dim=1)
        depth[:, t] = torch.where(first[:, t], free, found.long().argmax(dim=2) + 1).masked_fill(asked < 0, 0)
        held = torch.zeros_like(weight)
        if pinned:
            held = _add(held, asked, torch.full_like(asked, 3 * uses + num_experts))  # above any weight
        for k in range(slots):
            expert = asked[:, k : k + 1]
            # the expert is the last digit of its priority: no two are equal, and the least tells whose it is
            priority = ((weight + held) * uses + last) * num_experts + place
            stack, filled = _brought_in(stack, filled, expert, priority)
            weight = _add(weight, expert, change[:, t, k : k + 1])
            last = torch.where((place == expert), t * slots + k + 1, last)
        if policy == "segment" and t + m < length:
            weight = _add(weight, requests[:, t + m], torch.ones_like(asked))
    return depth, first


def _brought_in(
    stack: Int[Tensor, "s e"], filled: Int[Tensor, "s 1"], expert: Int[Tensor, "s 1"], priority: Int[Tensor, "s e"]
) -> tuple[Int[Tensor, "s e"], Int[Tensor, "s 1"]]:
    place = torch.arange(stack.shape[1])
    found = stack == expert
    seen = found.any(dim=1, keepdim=True)
    d = torch.where(seen, found.long().argmax(dim=1, keepdim=True), filled)
    own = priority.gather(1, stack.clamp(min=0))
    carried = own.cummin(dim=1).values.roll(1, dims=1)
    moved = torch.where(place < d, torch.maximum(own, carried), carried) % stack.shape[1]
    new = torch.where(place <= d, moved, stack)
    new[:, :1] = expert
    used = expert >= 0
    return torch.where(used, new, stack), filled + (used & ~seen)


def _weights(
    requests: Int[Tensor, "s t k"], num_experts: int, policy: str, m: int
) -> tuple[Int[Tensor, "s e"], Int[Tensor, "s t k"]]:
    """(weight of each expert at the start, what is added to it with each use)."""
    texts, length, slots = requests.shape
    zero = torch.zeros(texts, num_experts, dtype=torch.long)
    if policy == "lru":
        return zero, torch.zeros_like(requests)
    if policy == "lfu":
        return zero, torch.ones_like(requests)
    flat = requests.flatten(1)
    if policy == "segment":
        soon = flat[:, : m * slots]
        return _add(zero, soon, torch.ones_like(soon)), -torch.ones_like(requests)
    # belady: minus the time of the next use, experts that are not used again last
    order = flat.argsort(dim=1, stable=True)
    by_expert = flat.gather(1, order)
    after = length * slots + 1 + by_expert
    after[:, :-1] = torch.where(by_expert[:, 1:] == by_expert[:, :-1], order[:, 1:] + 1, after[:, :-1])
    following = torch.empty_like(after).scatter_(1, order, after)
    now = torch.arange(1, length * slots + 1).expand_as(flat)
    start = torch.cat([zero, zero[:, :1]], dim=1)
    start = start.scatter_reduce(1, flat.masked_fill(flat < 0, num_experts), -now, "amax", include_self=False)
    return start[:, :num_experts], (now - following).view_as(requests)


def _add(table: Int[Tensor, "s e"], expert: Int[Tensor, "s j"], value: Int[Tensor, "s j"]) -> Int[Tensor, "s e"]:
    return table.scatter_add(1, expert.clamp(min=0), value.masked_fill(expert < 0, 0))


# What to buy


def slots_for(curves: Mapping[int, CacheCurve], hit_rate: float, *, first_use: str = "free") -> dict[int, int]:
    """{layer: the least number of slots that reaches the hit rate}. Raises ValueError where no number does."""
    found = {}
    for layer, curve in curves.items():
        enough = (curve.rates(first_use) >= hit_rate).nonzero().flatten()
        if not 0 < hit_rate <= 1 or not len(enough):
            raise ValueError(
                f"hit_rate={hit_rate} in layer {layer}: with all {curve.num_experts} experts cached it is "
                f"{float(curve.rates(first_use)[-1]):.3f}; ask for less"
            )
        found[layer] = max(int(enough[0]) + 1, curve.top_k)
    return found


def share_slots(curves: Mapping[int, CacheCurve], slots: int, *, first_use: str = "free") -> dict[int, int]:
    """{layer: slots}: `slots` in all, divided so that the most requests are hits; exact, by dynamic programming.

    Raises ValueError where they are too few for a token's experts, or more than all experts.
    """
    least, most = sum(c.top_k for c in curves.values()), sum(c.num_experts for c in curves.values())
    if not least <= slots <= most:
        raise ValueError(
            f"{slots} slots for {len(curves)} layers: a token asks for {least} experts, and there are {most}; give "
            f"{least} to {most}"
        )
    best, chosen = np.zeros(1), []
    for curve in curves.values():  # best[c]: most hits of the layers so far with c slots beyond each one's top_k
        hits = curve.hits(first_use).sum(dim=0).numpy()[curve.top_k - 1 :]
        width = min(len(best) + len(hits) - 1, slots - least + 1)
        options = np.full((len(hits), width), -np.inf)
        for extra, h in enumerate(hits[:width]):
            end = min(width, extra + len(best))
            options[extra, extra:end] = best[: end - extra] + h
        chosen.append(options.argmax(axis=0))
        best = options.max(axis=0)
    left, shares = slots - least, {}
    for (layer, curve), choice in zip(reversed([*curves.items()]), reversed(chosen), strict=True):
        extra = int(choice[left])
        shares[layer], left = curve.top_k + extra, left - extra
    return {layer: shares[layer] for layer in curves}


def knee(curve: CacheCurve, *, first_use: str = "free") -> int:
    """The number of slots where the curve lies farthest above the line between its ends, the first of equal ones.

    Fewer slots cost many hits, more of them gain few.
    """
    rates = curve.rates(first_use)[curve.top_k - 1 :]
    line = torch.linspace(float(rates[0]), float(rates[-1]), len(rates), dtype=rates.dtype)
    return curve.top_k + int((rates - line).argmax())
