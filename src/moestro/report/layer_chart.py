"""Measures by layer, drawn as SVG: a line each, its interval as a band, controls dashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from markupsafe import Markup, escape

from moestro.report.figures import significant, ticks

HEIGHT = 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 38
WIDTH = 860
"""What the layers may take."""
SMALL = 480
"""A chart up to this width shrinks to fit a phone; a wider one scrolls sideways."""
COLOURS, CONTROLS = 4, 2
"""Lines, and controls, of a look of their own; more share them."""


@dataclass(frozen=True)
class Line:
    """One measure: its values in the order of the layers and the bounds of their intervals; NaN where there is none."""

    label: str
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    control: bool = False


def layer_chart(layers: Sequence[int], lines: Sequence[Line], *, unit: str, zero: bool = True) -> Markup:
    """One column a layer; pointing at it tells all its values. Empty without a finite number."""
    known = [v for line in lines for row in (line.values, line.low, line.high) for v in row if isfinite(v)]
    if not known:
        return Markup("")
    low, high = min(known), max(known)
    marks = ticks(min(low, 0.0) if zero else low, high, 4)
    slot = max(12, min(62, WIDTH // max(1, len(layers))))
    width, plot = LEFT + slot * len(layers) + RIGHT, HEIGHT - TOP - BOTTOM

    def x(place: float) -> float:
        return LEFT + slot * (place + 0.5)

    def y(value: float) -> float:
        return round(TOP + plot * (1 - (value - marks[0]) / (marks[-1] - marks[0])), 1)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(m)}" y2="{y(m)}"/>'
        f'<text class="end" x="{LEFT - 7}" y="{y(m) + 3.5:g}">{m:g}</text>'
        for m in marks
    ]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**6) if n * slot >= 24)
    parts += [
        f'<text class="mid" x="{x(p):g}" y="{HEIGHT - BOTTOM + 16}">{layer}</text>'
        for p, layer in enumerate(layers)
        if p % every == 0
    ]
    parts.append(f'<text class="mid" x="{x((len(layers) - 1) / 2):g}" y="{HEIGHT - 4}">layer</text>')
    parts += [_drawn(line, kind, x, y) for line, kind in zip(lines, kinds([line.control for line in lines]))]
    parts += [
        f'<rect class="hit" x="{LEFT + slot * p}" y="{TOP}" width="{slot}" height="{plot}" '
        f'data-tip="{escape(_told(layer, p, lines, unit))}"/>'
        for p, layer in enumerate(layers)
    ]
    label = escape(f"{', '.join(line.label for line in lines)}, by layer; the table below has the numbers")
    look = "layers small" if width <= SMALL else "layers"
    return Markup(
        f'<svg class="{look}" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


def kinds(controls: Sequence[bool]) -> list[str]:
    """How each line is drawn: its class in the style sheet, from which of them are controls."""
    found = []
    for place, control in enumerate(controls):
        earlier = sum(c == control for c in controls[:place])
        found.append(f"control{earlier % CONTROLS}" if control else f"line{earlier % COLOURS}")
    return found


def _told(layer: int, place: int, lines: Sequence[Line], unit: str) -> str:
    rows = [f"Layer {layer} ({unit})"]
    for line in lines:
        if isfinite(value := line.values[place]):
            text = f"{line.label}: {significant(value)}"
            if isfinite(line.low[place]):
                text += f" [{significant(line.low[place])}, {significant(line.high[place])}]"
            rows.append(text)
    return "\n".join(rows)


def _drawn(line: Line, kind: str, x, y) -> str:
    """Band, line and dots; a value that is not finite leaves a gap."""
    runs: list[list[int]] = [[]]
    for place, value in enumerate(line.values):
        if isfinite(value):
            runs[-1].append(place)
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in filter(None, runs):
        if all(isfinite(line.low[p]) and isfinite(line.high[p]) for p in run):
            if len(run) == 1:
                (p,) = run
                parts.append(f'<path class="whisker" d="M{x(p):g} {y(line.low[p])}V{y(line.high[p])}"/>')
            else:
                up = "L".join(f"{x(p):g} {y(line.high[p])}" for p in run)
                down = "L".join(f"{x(p):g} {y(line.low[p])}" for p in reversed(run))
                parts.append(f'<path class="band" d="M{up}L{down}z"/>')
        parts.append(f'<path class="stroke" d="M{"L".join(f"{x(p):g} {y(line.values[p])}" for p in run)}"/>')
        parts += [f'<circle cx="{x(p):g}" cy="{y(line.values[p])}" r="2.6"/>' for p in run if not line.control]
    return f'<g class="{kind}">{"".join(parts)}</g>'
