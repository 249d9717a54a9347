"""Section on how far the routing of each domain departs from the reference's, layer by layer."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from moestro import stats
from moestro.analyze.multilingual_routing import normalised_js
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Heat, Lines, Section

TITLE = "Divergence: where domains are routed apart"
PERMUTATIONS = 200
LEAST_TEXTS = 4


def divergence_section(seen: Collected) -> Section:
    """Normalised Jensen-Shannon divergence between mean router probabilities, beside texts that exchange domains."""
    reference = seen.reference
    sizes = {name: len(seen.profiles.of(name)) for name in seen.domains}
    others = [name for name in seen.domains if name != reference and sizes[name] >= LEAST_TEXTS]
    if not others or sizes[reference] < LEAST_TEXTS:
        texts = f"{reference!r} has {sizes[reference]}"
        return Section(
            "divergence",
            TITLE,
            absent=f"There is no second domain of {LEAST_TEXTS} texts or more to hold against the reference ({texts}): "
            "give one with --data, or more --tokens.",
        )
    table = pl.concat([_compared(seen, name) for name in others])
    by_layer = {layer: float(part["divergence"].to_numpy().mean()) for (layer,), part in table.group_by("layer")}
    nearest, farthest = min(by_layer, key=by_layer.__getitem__), max(by_layer, key=by_layer.__getitem__)
    beyond = table.with_columns(p=pl.Series(stats.corrected(table["p"].to_list()))).filter(pl.col("p") <= 0.05)
    by_domain = table.group_by("domain").agg(pl.col("divergence").mean()).sort("divergence")
    near, far = by_domain.row(0, named=True), by_domain.row(-1, named=True)
    findings = (
        f"Routing departs most from {reference}'s in layer {farthest} (mean {by_layer[farthest]:.3f} of 1) and least "
        f"in layer {nearest} ({by_layer[nearest]:.3f}). {len(beyond)} of {len(table)} pairs of a domain and a layer "
        "exceed their control (texts that exchange domains; p ≤ 0.05, false discovery rate).",
        f"Nearest to {reference} is {near['domain']} ({near['divergence']:.3f}, mean over layers), farthest "
        f"{far['domain']} ({far['divergence']:.3f}).",
    )
    heat = Heat(
        name="divergence",
        title=f"Divergence from {reference}, domain by domain",
        read="A row is a domain, a column a layer, the colour how far the domain's mean router probabilities lie from "
        "the reference's, from 0 (alike) to 1 (as far as their entropies allow).",
        table=table,
        row="domain",
        column="layer",
        value="divergence",
        steps=_steps(table),
        unit="0 to 1",
    )
    lines = Lines(
        name="divergence-layers",
        title="The mean over domains, layer by layer",
        read="Where the line comes near the control, layers route all domains alike; the control's band is what 95% of "
        "exchanges of the texts' domains give.",
        table=_means(table),
        unit="0 to 1",
        controls=("exchanged domains",),
    )
    return Section("divergence", TITLE, findings, (lines, heat))


def _compared(seen: Collected, domain: str) -> pl.DataFrame:
    """One line a layer: divergence and its control. No bootstrap interval: resampled texts are farther apart."""
    pair = [seen.profiles.of(name) for name in (domain, seen.reference)]
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(p) for p in pair]))
    generator = torch.Generator().manual_seed(seen.seed)
    orders = [labels, *(labels[torch.randperm(len(labels), generator=generator)] for _ in range(PERMUTATIONS))]
    own = torch.stack(orders).double()
    rows = []
    for layer in seen.sizes:
        q = torch.cat([p.importance[layer] for p in pair]).double()
        first, second = (((w @ q) / w.sum(dim=1, keepdim=True)) for w in (own, 1 - own))
        measured, *null = normalised_js(first, second).tolist()
        low, high = np.quantile(null, [0.025, 0.975]).tolist()
        p = stats.exceeds(measured, null)
        rows.append((domain, layer, measured, float(np.mean(null)), low, high, p))
    columns = ["domain", "layer", "divergence", "control", "control_low", "control_high", "p"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def _means(table: pl.DataFrame) -> pl.DataFrame:
    """Of every layer, the mean over domains and that of the controls."""
    columns = ("divergence", "control", "control_low", "control_high")
    means = table.group_by("layer").agg([pl.col(c).mean() for c in columns]).sort("layer")
    rows = []
    for row in means.iter_rows(named=True):
        rows.append((row["layer"], "measured", row["divergence"], None, None))
        rows.append((row["layer"], "exchanged domains", row["control"], row["control_low"], row["control_high"]))
    return pl.DataFrame(rows, schema=SERIES, orient="row")


def _steps(table: pl.DataFrame) -> tuple[float, ...]:
    """Five steps up to the largest divergence, so that models of any sharpness show their differences."""
    largest = max(float(table["divergence"].to_numpy().max()), 1e-6)
    return tuple(float(f"{largest * part:.1g}") for part in (0.1, 0.2, 0.35, 0.5, 0.75))
