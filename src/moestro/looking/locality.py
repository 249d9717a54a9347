"""Section on routing in time: whether neighbouring tokens share experts, and what a cache of experts would find."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import torch

from moestro.analyze.expert_cache import CacheCurve, Requests, layer_caches, local_use, slots_for
from moestro.analyze.local_routing import SegmentRouting, layer_segment_routing, segment_routing, stretches
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Figure, Heat, Lines, Listing, Section

TITLE = "Locality: what a cache of experts would find"
SEGMENT = 16
"""Tokens in a row; the paper's middle length."""
SIMULATED_TOKENS, SIMULATED_LENGTH = 8192, 512
"""Caches are simulated on so many tokens of whole texts, of each of which the first positions count."""
RATIO = 2.0
"""Slots of the cache that is shown by layer, in experts of a token. The paper finds the knee there."""
HIT_RATES = (0.5, 0.8, 0.9, 0.95)


def locality_section(seen: Collected) -> Section:
    """Segment routing beside routers without memory, and caches of every size beside the same tokens shuffled."""
    requests = simulated(seen.requests, seed=seen.seed)
    longest = int(stretches(requests.tokens)[1].max())
    if longest < SEGMENT:
        return Section(
            "locality", TITLE, absent=f"The longest text has {longest} tokens; segments of {SEGMENT} need longer ones."
        )
    use = local_use(seen.requests, [SEGMENT])
    model, layers = segment_routing(use, SEGMENT), layer_segment_routing(use, SEGMENT)
    caches = {policy: layer_caches(requests, policy) for policy in ("lru", "belady", "fixed")}
    shuffled = layer_caches(requests.shuffled(seed=seen.seed), "lru")
    lru = caches["lru"]
    slots = {layer: curve.slots(RATIO) for layer, curve in lru.items()}
    rates = {layer: curve.interval(slots[layer], "miss") for layer, curve in lru.items() if len(curve.requests) > 1}
    findings = [
        f"A router that names experts for {SEGMENT} tokens at once agrees with the real one to "
        f"{model.interval or format(model.srp, '.4g')} (F1, "
        f"all layers); one without memory that uses every expert as often reaches {model.shuffled:.4g}."
    ]
    if rates:
        best = max(rates, key=lambda layer: rates[layer].estimate)
        findings.append(
            f"A cache of {slots[best]} experts ({RATIO:g} times a token's) with the least recently used leaving finds "
            f"{rates[best]} of the requests in layer {best}, the most of all layers; with the tokens shuffled "
            f"{shuffled[best].hit_rate(slots[best], 'miss'):.2f}."
        )
    texts = len(requests.tokens.sample.unique())
    note = f"Caches are simulated on the first {SIMULATED_LENGTH} tokens at most of {texts} of the texts."
    figures = _figures(_segments(layers), _hits(caches, shuffled, slots), lru)
    return Section("locality", TITLE, tuple(findings), figures, note=note)


def _figures(segments: pl.DataFrame, hits: pl.DataFrame, lru: Mapping[int, CacheCurve]) -> tuple[Figure, ...]:
    return (
        Lines(
            name="segment-routing",
            title=f"How well experts can be named for {SEGMENT} tokens at once",
            read="The F1 of the best router that keeps its experts for a whole segment: as far as it lies above the "
            "controls, which have no memory, neighbouring tokens share experts.",
            table=segments,
            unit="F1",
            controls=("no memory, same use", "no memory, even use"),
        ),
        Lines(
            name="cache",
            title=f"Hits of a cache of {RATIO:g} times a token's experts, layer by layer",
            read="A request is a hit where the expert is in fast memory already; “optimum” knows the future, “most "
            "used” always holds the same experts, and the control has the same tokens in random order.",
            table=hits,
            unit="share of requests",
            controls=("tokens shuffled",),
        ),
        Heat(
            name="cache-size",
            title="Hits by the size of the cache",
            read="A row is a layer, a column the number of experts that fast memory holds, the colour how many of a "
            "token's requests are found there when the least recently used expert leaves.",
            table=_sizes(lru),
            row="layer",
            column="slots",
            value="hit_rate",
            steps=(0.3, 0.5, 0.7, 0.85, 0.95),
            unit="share of requests",
        ),
        Listing(
            name="cache-needed",
            title="Slots to buy",
            read="The least number of experts of each layer in fast memory that reaches this hit rate; a first request "
            "of an expert is a miss, so that some rates are out of reach (–).",
            table=_needed(lru),
            shown=64,
        ),
    )


def simulated(requests: Requests, *, seed: int) -> Requests:
    """The beginnings of some texts, drawn at random from all."""
    text, left = stretches(requests.tokens)
    lengths = text.bincount()
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    cut = lengths.clamp(max=SIMULATED_LENGTH)[order]
    taken = max(1, int((cut.cumsum(0) <= SIMULATED_TOKENS).sum()))
    early = lengths[text] - left < SIMULATED_LENGTH
    return requests[(early & (place[text] < taken)).nonzero().flatten()]


def _segments(layers: Mapping[int, SegmentRouting]) -> pl.DataFrame:
    rows: list[tuple[object, ...]] = []
    for layer, found in layers.items():
        low, high = (None, None) if found.interval is None else (found.interval.low, found.interval.high)
        rows.append((layer, "measured", found.srp, low, high))
        rows.append((layer, "no memory, same use", found.shuffled, None, None))
        rows.append((layer, "no memory, even use", found.uniform, None, None))
    return pl.DataFrame(rows, schema=SERIES, orient="row")


def _hits(
    caches: Mapping[str, Mapping[int, CacheCurve]], shuffled: Mapping[int, CacheCurve], slots: Mapping[int, int]
) -> pl.DataFrame:
    names = {"lru": "least recently used leaves", "belady": "optimum", "fixed": "most used"}
    curves = {names[policy]: curves for policy, curves in caches.items()} | {"tokens shuffled": shuffled}
    rows: list[tuple[object, ...]] = []
    for name, of in curves.items():
        for layer, curve in of.items():
            if len(curve.requests) > 1:
                hit = curve.interval(slots[layer], "miss")
                rows.append((layer, name, hit.estimate, hit.low, hit.high))
            else:
                rows.append((layer, name, curve.hit_rate(slots[layer], "miss"), None, None))
    return pl.DataFrame(rows, schema=SERIES, orient="row")


def _sizes(lru: Mapping[int, CacheCurve]) -> pl.DataFrame:
    rows = [
        (layer, slots, float(rate))
        for layer, curve in lru.items()
        for slots, rate in enumerate(curve.rates("miss").tolist(), start=1)
        if slots >= curve.top_k
    ]
    return pl.DataFrame(rows, schema=["layer", "slots", "hit_rate"], orient="row")


def _needed(lru: Mapping[int, CacheCurve]) -> pl.DataFrame:
    rows = []
    for layer, curve in lru.items():
        most = float(curve.rates("miss")[-1])
        needed = [
            slots_for({layer: curve}, rate, first_use="miss")[layer] if rate <= most else None for rate in HIT_RATES
        ]
        rows.append((layer, curve.num_experts, *needed))
    return pl.DataFrame(rows, schema=["layer", "experts", *(f"for_{rate:.0%}" for rate in HIT_RATES)], orient="row")
