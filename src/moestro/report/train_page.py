"""report.html of a training run: its curves as one file that opens anywhere, without a script or a network request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moestro.report.curves import Curve, chart
from moestro.report.page import templates, write_whole

Record = Mapping[str, Any]
SHADES = (2, 6)
"""Layers are drawn in shades, from the first (light) to the last (dark)."""
HEALTH = {
    "entropy": ("Entropy of the load", "1 when every expert serves the same number of slots, 0 when one serves all"),
    "max_violation": ("Largest load", "load of the busiest expert over the mean, minus 1: 0 when even"),
    "dead": ("Dead experts", "experts that served nothing since the report before"),
    "dropped": ("Dropped tokens", "share of tokens that no expert served"),
    "slots": ("Experts per token", "mean over tokens"),
}
RUN = {
    "rate": "Learning rate",
    "grad_norm": "Norm of the gradient, before clipping",
    "tokens_per_second": "Tokens per second",
}


def write_train_page(records: Sequence[Record], path: Path, *, name: str, facts: Mapping[str, str]) -> None:
    """Write the page to `path` at once or not at all."""
    write_whole(train_page(records, name=name, facts=facts), path)


def train_page(records: Sequence[Record], *, name: str, facts: Mapping[str, str]) -> str:
    """The page as a string, of the records of metrics.jsonl."""
    environment = templates()
    trained = [r for r in records if "loss" in r]
    held = [r for r in records if "heldout" in r]
    return environment.get_template("train_page.jinja").render(
        name=name,
        facts=facts,
        last=trained[-1] if trained else None,
        heldout=held[-1] if held else None,
        loss=_loss(trained, held, wide=True),
        domains=_domains(trained, held),
        terms=_terms(trained),
        health=_health(trained),
        run=[(title, chart([_curve(title, trained, key)], zero=True)) for key, title in RUN.items()],
        style=Markup(environment.get_template("style.jinja").render()),
    )


def _curve(label: str, records: Sequence[Record], *keys: str, kind: str = "line", dots: bool = False) -> Curve:
    """The numbers under `keys` of those records that have them."""
    points = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            points.append((record["step"], float(value)))
    return Curve(label, points, kind, dots)


def _loss(trained: Sequence[Record], held: Sequence[Record], *, wide: bool) -> Markup:
    curves = [_curve("training", trained, "loss"), _curve("held-out", held, "heldout", kind="held", dots=True)]
    return chart(curves, wide=wide)


def _domains(trained: Sequence[Record], held: Sequence[Record]) -> list[dict[str, Any]]:
    """One chart per domain, with its last losses."""
    names = dict.fromkeys(
        [*(d for r in trained for d in r["domains"]), *(d for r in held for d in r["heldout_domains"])]
    )
    found = []
    for name in names:
        train = _curve(f"training loss, {name}", trained, "domains", name)
        kept = _curve(f"held-out loss, {name}", held, "heldout_domains", name, kind="held", dots=True)
        last = {
            "train": train.points[-1][1] if train.points else None,
            "held": kept.points[-1][1] if kept.points else None,
        }
        found.append({"name": name, "chart": chart([train, kept]), **last})
    return found


def _terms(trained: Sequence[Record]) -> list[tuple[str, Markup]]:
    """Losses of the routers, one chart each."""
    names = dict.fromkeys(name for r in trained for name in r["losses"])
    return [(name, chart([_curve(name, trained, "losses", name)], zero=True)) for name in names]


def _health(trained: Sequence[Record]) -> list[tuple[str, str, Markup]]:
    """(title, what it means, chart of all layers) of every measure of the routers."""
    layers = sorted({part["layer"] for r in trained for part in r["routers"]})
    charts = []
    for key, (title, meaning) in HEALTH.items():
        curves = []
        for place, layer in enumerate(layers):
            light, dark = SHADES
            shade = dark - round((dark - light) * (1 - place / (len(layers) - 1))) if len(layers) > 1 else dark
            points = [(r["step"], part[key]) for r in trained for part in r["routers"] if part["layer"] == layer]
            curves.append(Curve(f"layer {layer}", points, f"shade{shade}"))
        if curves:
            charts.append((title, meaning, chart(curves, zero=key != "entropy")))
    return charts
