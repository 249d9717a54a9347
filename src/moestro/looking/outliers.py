"""Section on outliers: the experts with the largest outputs, and the massive activations of the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from moestro.analyze.output_peaks import Peaks
from moestro.analyze.super_experts import OutputProfile, super_experts
from moestro.looking.collect import Collected
from moestro.looking.result import SERIES, Figure, Heat, Lines, Listing, Section

TITLE = "Super experts: who makes the outliers"
LISTED = 12


def outliers_section(seen: Collected) -> Section:
    """Largest output of every expert, the rule for super experts, and where massive activations are formed."""
    if seen.outputs is None:
        return Section("super-experts", TITLE, absent=seen.no_outputs)
    profile = seen.outputs
    found = super_experts(profile)
    table = _peaks_table(seen, profile)
    named = [f"expert {e} of layer {layer}" for layer, e in sorted(found.experts)]
    named += [f"the shared expert of layer {layer}" for layer in found.shared]
    others = table.filter((pl.col("super") == "") & pl.col("layer").is_in(found.layers))["largest"].to_numpy()
    largest = f"{float(others.max(initial=0.0)):.4g}"
    findings = [
        f"{len(named)} super {'expert' if len(named) == 1 else 'experts'}: {', '.join(named)}; the largest output of "
        f"the others is {largest}. The rule: {found.rule}."
        if named
        else f"No super expert: the largest output is {largest}, and the rule asks for {found.rule}."
    ]
    findings += [_on_sinks(profile, layer, e) for layer, e in sorted(found.experts)]
    if profile.residual is not None:
        massive = [layer for layer, peak in profile.residual.items() if peak.is_massive]
        findings.append(
            f"Massive activations (over 100 and 1000 times the median) reach layers {', '.join(map(str, massive))}."
            if massive
            else "The residual stream holds no massive activation (over 100 and 1000 times the median)."
        )
    figures: list[Figure] = [
        Heat(
            name="largest-outputs",
            title="Largest output of every expert",
            read="The colour is the largest entry of any output of the expert, before its gate weight, beside the "
            "largest of all experts: a super expert is a lone dark cell in the first layers"
            + ("; column −1 is the shared expert." if profile.shared else "."),
            table=table,
            row="layer",
            column="expert",
            value="of_largest",
            steps=(0.02, 0.05, 0.1, 0.25, 0.5),
            unit="of the largest",
            mark=0.0,
            marked="no token",
        ),
        Listing(
            name="outliers",
            title="The largest outputs, and on what",
            read="Where an expert gave its largest output: the token, its position in the text, and how many times the "
            "median expert's largest output it is; expert −1 is a shared one.",
            table=table.sort("largest", descending=True).drop("of_largest").head(LISTED),
        ),
    ]
    if profile.residual is not None:
        figures.insert(
            1,
            Lines(
                name="residual-peaks",
                title="Largest entry of the residual stream, layer by layer",
                read="A massive activation is an entry over 100 and over 1000 times the median; the axis is the power "
                "of ten, and the control is what 1000 times the median would be.",
                table=_residual_table(profile),
                unit="log₁₀ of magnitude",
                controls=("1000 × median",),
            ),
        )
    return Section("super-experts", TITLE, tuple(findings), tuple(figures))


def _on_sinks(profile: OutputProfile, layer: int, expert: int) -> str:
    scores = profile.sinks[layer]
    return (
        f"The router scores expert {expert} of layer {layer} with {float(scores.sink[expert]):.3f} on first tokens and "
        f"{float(scores.others[expert]):.3f} on all others."
    )


def _peaks_table(seen: Collected, profile: OutputProfile) -> pl.DataFrame:
    """One line an expert, shared ones as expert -1."""
    found = super_experts(profile)
    parts = [_layer_peaks(seen, layer, peaks, 0) for layer, peaks in profile.routed.items()]
    parts += [_layer_peaks(seen, layer, peaks, -1) for layer, peaks in profile.shared.items()]
    chosen = found.experts | {(layer, -1) for layer in found.shared}
    table = pl.concat(parts)
    largest = table["largest"].to_numpy()
    return table.with_columns(
        of_largest=pl.Series(largest / max(float(largest.max()), 1e-300)),
        over_median=pl.Series(largest / max(float(np.median(largest)), 1e-300)),
        super=pl.Series(["yes" if pair in chosen else "" for pair in table.select("layer", "expert").rows()]),
    )


def _layer_peaks(seen: Collected, layer: int, peaks: Peaks, first: int) -> pl.DataFrame:
    tokens = peaks.token.tolist()
    return pl.DataFrame(
        {
            "layer": [layer] * len(tokens),
            "expert": list(range(first, first + len(tokens))),
            "largest": peaks.value.double().numpy(),
            "channel": peaks.channel.numpy(),
            "position": peaks.position.numpy(),
            "token": [_written(seen.view.tokenizer, token) for token in tokens],
        }
    )


def _written(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token])) if token >= 0 else ""


def _residual_table(profile: OutputProfile) -> pl.DataFrame:
    rows = []
    for layer, peak in (profile.residual or {}).items():
        rows.append((layer, "largest entry", float(np.log10(max(float(peak.value[0]), 1e-30))), None, None))
        rows.append((layer, "1000 × median", float(np.log10(max(1000 * peak.median, 1e-30))), None, None))
    return pl.DataFrame(rows, schema=SERIES, orient="row")
