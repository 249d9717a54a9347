"""Whether neighbouring tokens use the same experts: what expert offloading lives on.

A segment is m tokens in a row. With f[e, p] = how many of the m tokens from p on expert e serves, a router that names
experts for whole segments does best when it names e where f >= alpha; its F1 against the real router is

    SRP = max over alpha of  2 * sum(f | f >= alpha) / (m * #(f >= alpha) + sum(f))     segment routing best performance
    size ratio = m * #(f >= alpha) / sum(f)                      experts it keeps for each one that a token really uses

with the sums over all experts of a group (an expert, a layer, the model) and all segments. SRP has a floor that rises
with K / E, so it stands beside that of two routers without memory, whose f is binomial: `uniform`, and `shuffled`,
which uses every expert as often as the real one.

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv:2505.16056).
Shapes: D domains, E experts, N tokens, K slots, U units of the bootstrap, F = m + 1 possible values of f.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binom
from torch import Tensor

from moestro.stats import Interval, bootstrap_totals
from moestro.view.events import MoEEvent, Tokens
from moestro.view.observe import DomainTable

SEGMENTS = (4, 16, 64, 256)
"""Segment lengths of the paper."""
UNITS = 128
"""Texts are resampled for intervals; of more texts than this, those whose numbers agree modulo UNITS go together."""


@dataclass(frozen=True)
class SegmentRouting:
    """How well one set of experts can serve a whole segment."""

    srp: float
    alpha: int
    """The best router names an expert for a segment where it serves so many of its tokens."""
    size_ratio: float
    uniform: float
    """SRP of a router that chooses evenly and without memory."""
    shuffled: float
    """SRP of a router without memory that uses every expert as often."""
    interval: Interval | None
    """Of the SRP, over texts; None for a single text."""


@dataclass(frozen=True)
class LocalUse:
    """What `LocalRouting` gives: sums from which all measures follow."""

    domains: tuple[str, ...]
    tokens: Float[Tensor, " d"]
    counts: dict[int, Float[Tensor, "d e"]]
    """{layer: tokens that each expert served}"""
    uses: dict[int, dict[int, Float[Tensor, "d e f"]]]
    """{m: {layer: number of segments by f}}"""
    by_unit: dict[int, dict[int, Float[Tensor, "d u f"]]]
    """The same over all experts, by unit of the bootstrap."""
    text_spread: dict[int, Float[Tensor, " d"]]
    """{layer: sum over texts of the standard deviation over experts of their frequency}"""
    texts: Float[Tensor, " d"]
    longest: int
    """Tokens of the longest text."""

    @property
    def layers(self) -> list[int]:
        return [*self.counts]

    def of(self, *domains: str) -> LocalUse:
        """Some domains alone. Raises ValueError for one that was not observed."""
        if unknown := [d for d in domains if d not in self.domains]:
            raise ValueError(f"no text of {unknown[0]!r} was observed; there are {list(self.domains)}")
        rows = [self.domains.index(d) for d in domains]

        def pick(tables: dict[int, Tensor]) -> dict[int, Tensor]:
            return {key: table[rows] for key, table in tables.items()}

        return replace(
            self,
            domains=domains,
            tokens=self.tokens[rows],
            counts=pick(self.counts),
            uses={m: pick(tables) for m, tables in self.uses.items()},
            by_unit={m: pick(tables) for m, tables in self.by_unit.items()},
            text_spread=pick(self.text_spread),
            texts=self.texts[rows],
        )


class LocalRouting:
    """Observer: `LocalUse` of all texts; D * E * (m + 1) sums a layer, whatever the number of tokens.

    A text is a stretch of tokens that follow each other; no segment crosses from one to the next. Unused slots do not
    count. Meant for `view.observe`: tokens that are generated one by one are no stretch.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, segments: Sequence[int] = SEGMENTS):
        if not segments or min(segments) < 2:
            raise ValueError(f"segments={list(segments)}; a segment has 2 tokens or more")
        self.segments = tuple(dict.fromkeys(segments))
        self._table = DomainTable()
        self._longest = 0
        self._layer: int | None = None
        self._chunks: list[tuple[Tokens, Tensor]] = []

    def update(self, event: MoEEvent) -> None:
        if event.layer != self._layer or not self._goes_on(event.tokens):  # a batch may come in chunks, which cut texts
            self._flush()
            self._layer = event.layer
        self._chunks.append((event.tokens, served(event)))

    def _goes_on(self, tokens: Tokens) -> bool:
        """Whether they belong to the same text as the last ones."""
        if not self._chunks:
            return True
        last = self._chunks[-1][0][-1:]
        return bool(last.sample == tokens.sample[0]) and bool(last.position + 1 == tokens.position[0])

    def _flush(self) -> None:
        if self._layer is None or not self._chunks:
            return
        tokens = Tokens.cat([t for t, _ in self._chunks])
        used = torch.cat([u for _, u in self._chunks])
        self._chunks = []
        self.add(self._layer, tokens, used)

    def add(self, layer: int, tokens: Tokens, used: Bool[Tensor, "n e"]) -> None:
        """Count tokens of which it is known which experts serve them."""
        rows, experts = self._table.rows(tokens), used.shape[1]
        text, left = stretches(tokens)
        sizes = text.bincount()
        self._longest = max(self._longest, int(sizes.max()))

        def add(name: str, columns: int, place: Tensor, value: Tensor | None = None) -> None:
            self._table.add(layer, name, columns, place, torch.ones_like(place) if value is None else value)

        add("tokens", 1, rows)
        add("count", experts, (rows[:, None] * experts + torch.arange(experts))[used])
        frequency = torch.zeros(len(sizes), experts).index_add_(0, text, used.float()) / sizes[:, None]
        domain = rows[left == sizes[text]]  # at each text's first token
        add("texts", 1, domain)
        add("spread", 1, domain, frequency.std(dim=1, correction=0))
        before = torch.zeros(len(used) + 1, experts, dtype=torch.int32)
        torch.cumsum(used, dim=0, out=before[1:])
        for m in self.segments:
            inside = (left[: max(len(left) - m + 1, 0)] >= m).nonzero().flatten()
            f = before[inside + m] - before[inside]
            place = (rows[inside, None] * experts + torch.arange(experts)) * (m + 1) + f
            add(f"uses {m}", experts * (m + 1), place.flatten())
            unit = (rows[inside] * UNITS + tokens.sample[inside] % UNITS)[:, None] * (m + 1) + f
            add(f"units {m}", UNITS * (m + 1), unit.flatten())

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return self.__dict__.copy()

    def merge(self, other: Self) -> None:
        if other.segments != self.segments:
            raise ValueError(f"segments {other.segments} and {self.segments}: both must count the same")
        self._flush()
        other._flush()
        self._table.merge(other._table)
        self._longest = max(self._longest, other._longest)

    def result(self) -> LocalUse:
        """Raises ValueError where nothing was observed."""
        self._flush()
        sums = dict(sorted(self._table.sums.items()))
        if not sums:
            raise ValueError("no token was observed: there is no routing to measure")
        first = next(iter(sums.values()))
        size = len(self._table.domains)

        def of(name: str, m: int) -> dict[int, Tensor]:
            return {layer: tables[name].view(size, -1, m + 1) for layer, tables in sums.items()}

        return LocalUse(
            domains=tuple(self._table.domains),
            tokens=first["tokens"][:, 0],
            counts={layer: tables["count"] for layer, tables in sums.items()},
            uses={m: of(f"uses {m}", m) for m in self.segments},
            by_unit={m: of(f"units {m}", m) for m in self.segments},
            text_spread={layer: tables["spread"][:, 0] for layer, tables in sums.items()},
            texts=first["texts"][:, 0],
            longest=self._longest,
        )


def served(event: MoEEvent) -> Bool[Tensor, "n e"]:
    """Which experts serve each token."""
    weights, indices = event.routing.weights.cpu(), event.routing.indices.cpu().long()
    unused = (weights == 0) | (indices >= event.num_experts)
    chosen = torch.zeros(len(indices), event.num_experts + 1, dtype=torch.bool)
    return chosen.scatter_(1, indices.masked_fill(unused, event.num_experts), True)[:, : event.num_experts]


def stretches(tokens: Tokens) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(number of the stretch that each token is in, tokens of it that are left, the token itself included)."""
    follows = (tokens.sample[1:] == tokens.sample[:-1]) & (tokens.position[1:] == tokens.position[:-1] + 1)
    text = torch.cat([torch.zeros(1, dtype=torch.long), (~follows).cumsum(0)])[: len(tokens)]
    return text, text.bincount().cumsum(0)[text] - torch.arange(len(tokens))


# Segment routing


def segment_routing(use: LocalUse, m: int = 16, *, layers: Collection[int] | None = None) -> SegmentRouting:
    """SRP of the model, or of some of its layers together: the counts are pooled before the best alpha is taken."""
    chosen = _checked(use, m, use.layers if layers is None else layers)
    uses = torch.stack([use.uses[m][layer].sum(dim=(0, 1)) for layer in chosen]).sum(dim=0)
    srp, alpha = best_f1(uses)
    kept, used = float(uses[alpha:].sum()), float((uses * torch.arange(m + 1)).sum())
    shares = [use.counts[layer].sum(dim=0) / use.tokens.sum() for layer in chosen]
    even = [share.mean().expand(len(share)) for share in shares]
    units = torch.stack([use.by_unit[m][layer].sum(dim=0) for layer in chosen]).sum(dim=0)
    interval = _interval(units[units.sum(dim=1) > 0])
    return SegmentRouting(
        float(srp),
        int(alpha),
        m * kept / used,
        memoryless(torch.cat(even), m),
        memoryless(torch.cat(shares), m),
        interval,
    )


def layer_segment_routing(use: LocalUse, m: int = 16) -> dict[int, SegmentRouting]:
    """`segment_routing` of every layer."""
    return {layer: segment_routing(use, m, layers=[layer]) for layer in use.layers}


def expert_segment_routing(use: LocalUse, m: int = 16) -> dict[int, Float[Tensor, " e"]]:
    """{layer: SRP of every single expert}; NaN for one that serves no token."""
    return {layer: best_f1(use.uses[m][layer].sum(dim=0))[0] for layer in _checked(use, m, use.layers)}


def expert_floors(use: LocalUse, m: int = 16) -> dict[int, Float[Tensor, " e"]]:
    """{layer: SRP of experts without memory that are used as often}: what an expert's SRP says lies above this.

    Without it SRP mostly tells how often an expert is used.
    """
    return {
        layer: best_f1(_memoryless_uses(use.counts[layer].sum(dim=0) / use.tokens.sum(), m))[0]
        for layer in _checked(use, m, use.layers)
    }


def best_f1(uses: Float[Tensor, "*g f"]) -> tuple[Float[Tensor, "*g"], Int[Tensor, "*g"]]:
    """(SRP, alpha) from the number of segments by f = 0..m; NaN where all f are 0."""
    m = uses.shape[-1] - 1
    uses = uses.double()
    named = uses.flip(-1).cumsum(-1).flip(-1)
    hits = (uses * torch.arange(m + 1)).flip(-1).cumsum(-1).flip(-1)
    f1 = 2 * hits / (m * named + hits[..., :1])  # 0 / 0 for experts that are never used
    best, alpha = f1.max(dim=-1)
    return best, alpha


def memoryless(shares: Float[Tensor, " e"], m: int) -> float:
    """SRP of a router that gives each token to expert e with probability shares[e], whatever came before."""
    return float(best_f1(_memoryless_uses(shares, m).sum(dim=0))[0])


def _memoryless_uses(shares: Float[Tensor, " e"], m: int) -> Float[Tensor, "e f"]:
    return torch.from_numpy(binom.pmf(np.arange(m + 1), m, shares.clamp(max=1).double().numpy()[:, None]))


def _interval(units: Float[Tensor, "u f"]) -> Interval | None:
    if len(units) < 2:
        return None
    return bootstrap_totals(units.numpy(), lambda uses: best_f1(torch.from_numpy(uses))[0].numpy()[:, None])[0]


def _checked(use: LocalUse, m: int, layers: Collection[int]) -> list[int]:
    if m not in use.uses:
        raise ValueError(f"segments of m={m} were not counted; there are {[*use.uses]}: LocalRouting(segments=[{m}])")
    if m > use.longest:
        raise ValueError(f"m={m} and the longest text has {use.longest} tokens; take shorter segments or longer texts")
    if not layers or (unknown := [layer for layer in layers if layer not in use.counts]):
        raise ValueError(
            f"layers {[*layers]} and not {unknown if layers else 'one'} of them was observed: {use.layers}"
        )
    if not sum(float(use.uses[m][layer].sum()) for layer in layers):
        raise ValueError(f"no text of {', '.join(use.domains)} has m={m} tokens; take shorter segments or longer texts")
    return sorted(layers)


# Balance and specialisation


def load_spread(use: LocalUse) -> dict[int, float]:
    """{layer: standard deviation over experts of the share of all tokens they serve, in percent}; 0 for even loads."""
    return {
        layer: 100 * float((counts.sum(dim=0) / use.tokens.sum()).std(correction=0))
        for layer, counts in use.counts.items()
    }


def text_load_spread(use: LocalUse) -> dict[int, float]:
    """The same of each text by itself, then the mean over texts: loads that are even globally may differ by text."""
    return {layer: 100 * float(spread.sum() / use.texts.sum()) for layer, spread in use.text_spread.items()}


def domain_specialization(use: LocalUse) -> dict[int, Float[Tensor, " e"]]:
    """{layer: coefficient of variation over domains of each expert's frequency}; NaN for one that serves no token.

    Raises ValueError for a single domain.
    """
    if len(use.domains) < 2:
        raise ValueError(f"all texts are of {use.domains[0]!r}; specialisation needs two domains or more")
    found = {}
    for layer, counts in use.counts.items():
        frequency = counts / use.tokens[:, None]
        found[layer] = frequency.std(dim=0, correction=0) / frequency.mean(dim=0)
    return found
