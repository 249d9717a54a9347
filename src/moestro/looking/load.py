"""Sections on the load of the experts: how even it is, and how few experts carry it."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from moestro import stats
from moestro.analyze.load_balance import UNDER_USED, evenness, gini
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Figure, Heat, Lines, Listing, Section
from moestro.report.figures import ranges

STATES = ("dead", "under-used", "overloaded")
OVERLOADED = 3.0
"""Times the mean load of its layer from which an expert is called overloaded. Our choice."""
SHARES = (0.5, 0.8, 0.95)
"""Of a layer's slots, for which the experts needed are counted."""
HOT = 0.25
"""Share of a layer's experts that the finding on hot experts takes."""


def load_section(seen: Collected) -> Section:
    """Load of every expert, dead and overloaded ones by name, evenness of every layer."""
    table = load_table(seen)
    states = {state: table.filter(pl.col("state") == state) for state in STATES}
    texts = len(seen.profiles)
    findings = [
        f"{len(states['dead']):,} of {len(table):,} experts served no token. With {texts:,} texts seen, each of them "
        f"is reached by fewer than {min(1.0, 3 / texts):.2%} of texts like these (95% confidence)."
        if len(states["dead"])
        else f"All {len(table):,} experts served tokens."
    ]
    busiest = table.sort("load", descending=True).row(0, named=True)
    findings.append(
        f"{len(states['overloaded']):,} carry more than {OVERLOADED:g} times and {len(states['under-used']):,} less "
        f"than {UNDER_USED:g} times the mean load of their layer; the busiest is expert {busiest['expert']} of layer "
        f"{busiest['layer']} with {busiest['load']:.1f} times."
    )
    even, intervals = evenness_table(seen)
    lowest = min(intervals, key=lambda layer: intervals[layer].estimate)
    certain = f"{intervals[lowest]} of 1 (95% interval over texts)"
    findings.append(
        f"The load is least even in layer {lowest}: entropy "
        + (f"{certain}." if texts > 1 else f"{intervals[lowest].estimate:.4g} of 1; a single text gives no interval.")
    )
    return Section("load", "Load: who does the work", tuple(findings), _load_figures(table, even))


def _load_figures(table: pl.DataFrame, even: pl.DataFrame) -> tuple[Figure, ...]:
    named = _named(table)
    heat = Heat(
        name="load",
        title="Load of every expert",
        read="A row is a layer, a column an expert, the colour how many times its layer's mean load it carries: blue "
        "is more than the mean, orange less, a cross none at all.",
        table=table,
        row="layer",
        column="expert",
        value="load",
        steps=(0.1, 0.5, 0.8, 1.25, 2.0, OVERLOADED),
        unit="× mean",
        palette="diverging",
        mark=0.0,
        marked="no token",
    )
    lines = Lines(
        name="evenness",
        title="How even the load is, layer by layer",
        read="Entropy is 1 and Gini 0 when all experts of a layer carry the same; the bands are 95% bootstrap "
        "intervals over texts.",
        table=even,
        unit="0 to 1",
    )
    listed = Listing(
        name="load-named",
        title="Dead, under-used and overloaded experts, by number",
        read=f"An expert is dead with no token, under-used below {UNDER_USED:g} times and overloaded above "
        f"{OVERLOADED:g} times its layer's mean load.",
        table=named,
        shown=128,
    )
    return (heat, lines, listed) if len(named) else (heat, lines)


def _named(table: pl.DataFrame) -> pl.DataFrame:
    """One line for each layer that has such experts: their numbers, by state."""
    rows = []
    for (layer,), part in table.filter(pl.col("state") != "").group_by("layer", maintain_order=True):
        numbers = [ranges(part.filter(pl.col("state") == state)["expert"].to_list()) for state in STATES]
        rows.append((layer, *numbers))
    return pl.DataFrame(rows, schema=["layer", *(state.replace("-", "_") for state in STATES)], orient="row")


def load_table(seen: Collected) -> pl.DataFrame:
    """One line an expert: layer, expert, tokens, load (times its layer's mean), state."""
    parts = []
    for layer, counts in seen.profiles.counts.items():
        tokens = counts.sum(dim=0)
        load = tokens / tokens.mean().clamp_min(1e-300)
        state = np.select([tokens == 0, load < UNDER_USED, load > OVERLOADED], STATES, "")
        parts.append(
            pl.DataFrame(
                {
                    "layer": np.full(len(tokens), layer),
                    "expert": np.arange(len(tokens)),
                    "tokens": tokens.long().numpy(),
                    "load": load.numpy(),
                    "state": state.tolist(),
                }
            )
        )
    return pl.concat(parts)


def evenness_table(seen: Collected) -> tuple[pl.DataFrame, dict[int, stats.Interval]]:
    """(lines of entropy and Gini of every layer, {layer: interval of its entropy})"""

    def statistic(loads: NDArray) -> NDArray:
        of = torch.from_numpy(loads)
        return torch.stack([evenness(of), gini(of)], dim=1).numpy()

    rows, found = [], {}
    for layer, counts in seen.profiles.counts.items():
        both = _intervals(counts.numpy(), statistic, seen.seed)
        found[layer] = both[0]
        rows += [(layer, name, i.estimate, i.low, i.high) for name, i in zip(("entropy", "Gini"), both, strict=True)]
    return pl.DataFrame(rows, schema=SERIES, orient="row"), found


def _intervals(table: NDArray, statistic, seed: int) -> list[stats.Interval]:
    """`bootstrap_totals`; for a single text the bare estimates, whose interval is unknown."""
    if len(table) > 1:
        return stats.bootstrap_totals(table, statistic, resamples=1000, seed=seed)
    return [stats.Interval(v, float("nan"), float("nan")) for v in statistic(table)[0].tolist()]


def _ratio(sums: NDArray) -> NDArray:
    return sums[:, :1] / np.maximum(sums[:, 1:], 1)


def profile_section(seen: Collected) -> Section:
    """How few experts carry the load, chosen on one half of the texts and measured on the other; the exported files."""
    rows, hot = [], []
    for layer, counts in seen.profiles.counts.items():
        ranked = counts.sum(dim=0).sort(descending=True).values
        reached = (ranked.cumsum(dim=0) / ranked.sum().clamp_min(1)).numpy()
        needed = [int(np.searchsorted(reached, share - 1e-12)) + 1 for share in SHARES]
        rows += [
            (layer, f"{part:.0%} of the slots", float(n), None, None) for part, n in zip(SHARES, needed, strict=True)
        ]
        size = counts.shape[1]
        fast = max(1, round(HOT * size))
        if len(counts) > 3:
            chosen = counts[::2].sum(dim=0).topk(fast).indices
            rest = counts[1::2]
            served = torch.stack([rest[:, chosen].sum(dim=1), rest.sum(dim=1)], dim=1)
            (interval,) = stats.bootstrap_totals(served.numpy(), _ratio, resamples=1000, seed=seen.seed)
            hot.append((layer, fast, interval.estimate, interval.low, interval.high, fast / size))
    columns = ["layer", "experts", "served", "low", "high", "even_share"]
    table = pl.DataFrame(hot, schema=columns, orient="row") if hot else pl.DataFrame(schema=columns)
    findings = []
    if len(table):
        share, even = (float(table[name].to_numpy().mean()) for name in ("served", "even_share"))
        findings.append(
            f"The busiest quarter of each layer's experts, chosen on one half of the texts, serves {share:.0%} of the "
            f"slots of the other half (mean over layers; an arbitrary quarter would serve {even:.0%})."
        )
    findings.append(
        "routing_profile.csv (layer, expert, count) and routing_profile.json beside this page carry the counts to "
        "runtimes that keep hot experts on the fast device; the JSON's logical_count is what SGLang's "
        "--init-expert-location reads."
    )
    needed_lines = Lines(
        name="hot-experts",
        title="Experts needed for most of the work",
        read="Each line is the number of experts of a layer, busiest first, that together serve that share of its "
        "slots: the lower, the fewer need fast memory.",
        table=pl.DataFrame(rows, schema=SERIES, orient="row"),
        unit="experts",
    )
    listing = Listing(
        name="hot-quarter",
        title="The busiest quarter, on texts that did not choose it",
        read="“Served” is the share of slots that the chosen experts serve on the other half of the texts, with its "
        "95% interval over texts, beside the share of as many arbitrary ones.",
        table=table,
        shown=64,
    )
    return Section(
        "profile",
        "Routing profile: which experts to keep close",
        tuple(findings),
        (needed_lines, *([listing] if len(table) else [])),
    )
