"""Section on experts of a layer that serve the same tokens."""

from __future__ import annotations

import polars as pl

from moestro.analyze.co_activation import expected_together, independent_together, strongest_pairs
from moestro.looking.collect import Collected
from moestro.looking.result import Heat, Listing, Section

TITLE = "Co-activation: who works together"


def pairs_section(seen: Collected) -> Section:
    """Pairs of experts beside what independent choices would give."""
    if not any(int(counts.sum()) for counts in seen.together.values()):
        return Section("pairs", TITLE, absent="Every token uses a single expert of a layer, so there are no pairs.")
    pairs = strongest_pairs(seen.profiles, seen.together, seed=seen.seed)
    table = pl.DataFrame(
        [
            (
                p.layer,
                p.first,
                p.second,
                p.together,
                p.independent,
                p.expected,
                p.lift.estimate,
                p.lift.low,
                p.lift.high,
            )
            for p in pairs
        ],
        schema=["layer", "first", "second", "together", "independent", "expected", "lift", "low", "high"],
        orient="row",
    )
    certain = [p for p in pairs if p.lift.low > 1]
    findings = [
        f"Of the {len(pairs)} pairs that stand out in one half of the texts, {len(certain)} do so in the other half as "
        "well (95% interval above 1)."
        if pairs
        else "No pair of experts was expected often enough to be judged: look at more tokens (--tokens)."
    ]
    if certain:
        best = max(certain, key=lambda p: p.lift.low)
        findings.append(
            f"Experts {best.first} and {best.second} of layer {best.layer} serve a token together {best.lift} times as "
            "often as independent choices inside each domain would have it."
        )
    heat = Heat(
        name="co-activation",
        title="All pairs of a layer",
        read="A cell is a pair of experts, the colour how often they serve the same token beside independent choices: "
        "blue more often, orange less; the diagonal is empty.",
        table=_pairs_table(seen),
        row="expert",
        column="other",
        value="lift",
        steps=(0.25, 0.5, 0.8, 1.25, 2.0, 4.0),
        unit="× independent",
        palette="diverging",
        choice="layer",
        symmetric=True,
    )
    listing = Listing(
        name="pairs",
        title="The strongest pairs",
        read="“Independent” are the tokens two experts would share by chance, “expected” those they would share by "
        "chance inside each domain; lift is together over expected, measured on texts that did not choose the pair.",
        table=table,
    )
    return Section("pairs", TITLE, tuple(findings), (heat, *([listing] if pairs else [])))


def _pairs_table(seen: Collected) -> pl.DataFrame:
    """One line for each pair of experts of a layer."""
    parts = []
    for layer, groups in seen.together.items():
        observed = groups.sum(dim=0)
        first, second = observed.new_ones(observed.shape).triu(1).nonzero(as_tuple=True)
        independent = independent_together(seen.profiles, layer, groups)[first, second]
        together = observed[first, second]
        parts.append(
            pl.DataFrame(
                {
                    "layer": [layer] * len(first),
                    "expert": first.numpy(),
                    "other": second.numpy(),
                    "together": together.numpy(),
                    "independent": independent.numpy(),
                    "expected": expected_together(seen.profiles, layer, groups).sum(dim=0)[first, second].numpy(),
                    "lift": (together / independent.clamp_min(1e-300)).numpy(),
                }
            )
        )
    return pl.concat(parts)
