"""Sections that compare domains: who serves which."""

from __future__ import annotations

import numpy as np
import polars as pl

from moestro.analyze.specialisation import Specialisation, specialisation, specialists
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Figure, Heat, Lines, Listing, Section

ALPHA = 0.05
TITLE = "Specialisation: who serves which domain"


def specialisation_section(seen: Collected) -> Section:
    """Bits between domain and expert per layer; for every domain its experts beside the others' use of them."""
    if len(seen.domains) < 2:
        return Section(
            "specialisation",
            TITLE,
            absent=f"All texts are of one domain, {seen.domains[0]!r}: give a second one with --data to compare with.",
        )
    found = specialisation(seen.profiles, seed=seen.seed)
    p = found.information_p()
    strongest = max(found.bits, key=lambda layer: found.bits[layer])
    null = found.null_bits[strongest]
    listed = _specialists_table(seen, found)
    certain = listed.filter(pl.col("p") <= ALPHA)
    top = listed.sort("difference", descending=True).row(0, named=True)
    findings = (
        f"The domain tells most about the expert in layer {strongest}: {found.bits[strongest]:.3f} bits, where texts "
        f"that exchange their domains give {null.mean():.3f} (p = {p[strongest]:.2g}, {len(null)} permutations). "
        f"{sum(v <= ALPHA for v in p.values())} of {len(p)} layers exceed their control (p ≤ {ALPHA:g}, corrected for "
        "the number of layers).",
        f"{certain['domain'].n_unique()} of {len(found.domains)} domains have specialists beyond chance. The largest: "
        f"expert {top['expert']} of layer {top['layer']} serves {top['share']:.0%} of the tokens of {top['domain']} "
        f"and {top['elsewhere']:.0%} elsewhere, a difference of {top['difference']:.2f} "
        f"[{top['low']:.2f}, {top['high']:.2f}].",
    )
    return Section("specialisation", TITLE, findings, _figures(found, listed, top["domain"]))


def _figures(found: Specialisation, listed: pl.DataFrame, start: str) -> tuple[Figure, ...]:
    lines = Lines(
        name="information",
        title="How much the domain decides, layer by layer",
        read=f"At 0 bits a layer uses its experts alike whatever the text, at {np.log2(len(found.domains)):.1f} every "
        "domain has experts of its own; the control's band is what 95% of permutations of the texts' domains give.",
        table=_bits_table(found),
        unit="bits",
        controls=("exchanged domains",),
    )
    heat = Heat(
        name="specialisation",
        title="Every expert for one domain",
        read="The colour compares an expert's share of this domain's tokens with its mean share of the others', in "
        "powers of two: blue serves this domain more, orange less.",
        table=_ratio_table(found),
        row="layer",
        column="expert",
        value="log2_ratio",
        steps=(-2.0, -1.0, -0.3, 0.3, 1.0, 2.0),
        unit="log₂ ratio",
        palette="diverging",
        choice="domain",
        start=start,
    )
    listing = Listing(
        name="specialists",
        title="Its specialists",
        read="The experts whose share of this domain's tokens exceeds their share elsewhere most, with the 95% "
        "interval of the difference over texts; p is the chance of as large a difference anywhere in the model when "
        "texts exchange their domains.",
        table=listed,
        choice="domain",
        start=start,
    )
    return lines, heat, listing


def _bits_table(found: Specialisation) -> pl.DataFrame:
    rows = []
    for layer, bits in found.bits.items():
        low, mean, high = np.quantile(found.null_bits[layer], [0.025, 0.5, 0.975]).tolist()
        rows += [(layer, "measured", bits, None, None), (layer, "exchanged domains", mean, low, high)]
    return pl.DataFrame(rows, schema=SERIES, orient="row")


def _ratio_table(found: Specialisation) -> pl.DataFrame:
    """One line for each domain, layer and expert."""
    parts = []
    for layer, shares in found.shares.items():
        domains, experts = shares.shape
        elsewhere = (shares.sum(dim=0) - shares) / (domains - 1)
        parts.append(
            pl.DataFrame(
                {
                    "domain": np.repeat(found.domains, experts),
                    "layer": np.full(domains * experts, layer),
                    "expert": np.tile(np.arange(experts), domains),
                    "share": shares.flatten().numpy(),
                    "elsewhere": elsewhere.flatten().numpy(),
                    "log2_ratio": found.log_ratios[layer].flatten().numpy(),
                }
            )
        )
    return pl.concat(parts)


def _specialists_table(seen: Collected, found: Specialisation) -> pl.DataFrame:
    rows = [
        (d, s.layer, s.expert, s.share, s.elsewhere, s.difference.estimate, s.difference.low, s.difference.high, s.p)
        for d in found.domains
        for s in specialists(seen.profiles, found, d, seed=seen.seed)
    ]
    columns = ["domain", "layer", "expert", "share", "elsewhere", "difference", "low", "high", "p"]
    return pl.DataFrame(rows, schema=columns, orient="row")
