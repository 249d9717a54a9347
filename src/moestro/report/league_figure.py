"""The league's picture: one panel a quantity, one line an entry, a dot for every seed and a larger one for their mean.

A file of its own that a page shows as an image: it brings its colours, for light and dark.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from moestro.report.figures import significant, ticks

STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.page { fill: #ffffff; } .title { fill: #16161a; font-weight: 600; font-size: 13px; } .soft { fill: #55544f; }
.name { fill: #16161a; } .faint { fill: #75736c; font-size: 11px; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: #ebeae5; } .line { stroke: #f6f6f3; } .reference { stroke: #75736c; stroke-dasharray: 3 3; }
.range { stroke: #1f6bc4; stroke-width: 2; opacity: .45; }
.seed { fill: #1f6bc4; opacity: .35; } .mean { fill: #1f6bc4; }
@media (prefers-color-scheme: dark) {
  .page { fill: #1a1a1d; } .title, .name { fill: #f3f3f0; } .soft { fill: #bdbcb5; } .faint { fill: #96948c; }
  .grid { stroke: #35353a; } .line { stroke: #29292d; } .reference { stroke: #96948c; }
  .range { stroke: #5a9df0; } .seed, .mean { fill: #5a9df0; }
}
"""
LINE, LEFT, PLOT, GAP, TOP = 20, 150, 200, 34, 46
"""Pixels: height of an entry's line, room for names, width of a panel, between panels, above the first line."""
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One quantity: values of every entry, one a seed; an entry may have none."""

    title: str
    note: str
    """Below the title: the unit, and which end is the better one."""
    values: Mapping[str, Sequence[float]]
    reference: float | None = None
    """Where a dashed line stands."""


def league_figure(entries: Sequence[str], panels: Sequence[Panel]) -> str:
    """The picture as the text of an SVG file."""
    rows = -(-len(panels) // COLUMNS)
    height = TOP + len(entries) * LINE + 34
    width = LEFT + COLUMNS * (PLOT + GAP)
    parts = []
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        parts.append(_panel(panel, entries, LEFT + column * (PLOT + GAP), 10 + row * height, names=column == 0))
    body = "".join(parts)
    total = rows * height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}">'
        f'<style>{STYLE}</style><rect class="page" width="{width}" height="{total}"/>{body}</svg>\n'
    )


def _panel(panel: Panel, entries: Sequence[str], left: float, top: float, *, names: bool) -> str:
    finite = [v for e in entries for v in panel.values.get(e, ()) if math.isfinite(v)]
    finite += [panel.reference] if panel.reference is not None and math.isfinite(panel.reference) else []
    marks = ticks(min(finite), max(finite), 4) if finite else [0.0, 1.0]
    first, bottom = top + TOP, top + TOP + len(entries) * LINE

    def at(value: float) -> float:
        return left + PLOT * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [f'<text class="title" x="{left}" y="{top + 12}">{escape(panel.title)}</text>']
    parts.append(f'<text class="faint" x="{left}" y="{top + 28}">{escape(panel.note)}</text>')
    for mark in marks:
        parts.append(f'<line class="grid" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="{first - 6}" y2="{bottom}"/>')
        label = f"{mark / 1000:g}k" if marks[-1] >= 10_000 and mark else f"{mark:g}"
        parts.append(f'<text class="faint mid" x="{at(mark):.1f}" y="{bottom + 14}">{label}</text>')
    if panel.reference is not None and math.isfinite(panel.reference):
        x = f"{at(panel.reference):.1f}"
        parts.append(f'<line class="reference" x1="{x}" x2="{x}" y1="{first - 6}" y2="{bottom}"/>')
    for number, entry in enumerate(entries):
        y = first + number * LINE + LINE / 2
        parts.append(f'<line class="line" x1="{left}" x2="{left + PLOT}" y1="{y:g}" y2="{y:g}"/>')
        if names:
            parts.append(f'<text class="name end" x="{left - 12}" y="{y + 4:g}">{escape(entry)}</text>')
        parts.append(_dots(panel.values.get(entry, ()), entry, y, at, left + PLOT))
    return "".join(parts)


def _dots(values: Sequence[float], entry: str, y: float, at, right: float) -> str:
    finite = [v for v in values if math.isfinite(v)]
    parts = []
    if len(finite) > 1:
        parts.append(
            f'<line class="range" x1="{at(min(finite)):.1f}" x2="{at(max(finite)):.1f}" y1="{y:g}" y2="{y:g}"/>'
        )
        parts += [f'<circle class="seed" cx="{at(v):.1f}" cy="{y:g}" r="3"/>' for v in finite]
    if finite:
        mean = statistics.fmean(finite)
        title = f"<title>{escape(entry)}: {significant(mean, 4)}</title>"
        parts.append(f'<circle class="mean" cx="{at(mean):.1f}" cy="{y:g}" r="4.5">{title}</circle>')
    if len(finite) < len(values):
        parts.append(f'<text class="faint end" x="{right}" y="{y + 4:g}">{len(values) - len(finite)} diverged</text>')
    return "".join(parts)
