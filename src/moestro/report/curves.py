"""Curves over the steps of a run, drawn by hand as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from moestro.report.figures import ticks

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 26


@dataclass(frozen=True)
class Curve:
    """One line (or, with `dots`, points) of a chart; `kind` is its CSS class."""

    label: str
    points: Points
    kind: str = "line"
    dots: bool = False


def step_text(step: float) -> str:
    """1500 -> 1.5k"""
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def chart(curves: Sequence[Curve], *, wide: bool = False, zero: bool = False) -> Markup:
    """Curves over one x axis of steps and one y axis; numbers that are not finite leave a gap. Empty without a number.

    zero: the y axis starts at 0.
    """
    finite = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return Markup("")
    width = 2 * WIDTH + 16 if wide else WIDTH
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    y_marks = ticks(min(low, 0.0) if zero else low, high, 4)
    x_marks = [m for m in ticks(0.0, max(x for x, _ in finite), 5 if wide else 3)]
    x_end = max(max(x for x, _ in finite), 1.0)
    plot_w, plot_h = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        share = (y - y_marks[0]) / (y_marks[-1] - y_marks[0])
        return round(LEFT + plot_w * x / x_end, 1), round(TOP + plot_h * (1 - share), 1)

    parts = []
    for mark in y_marks:
        _, y = at(0, mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 3.5:g}">{mark:g}</text>')
    for mark in x_marks:
        if mark <= x_end:
            x, _ = at(mark, y_marks[0])
            parts.append(f'<text class="mid" x="{x}" y="{HEIGHT - 8}">{step_text(mark)}</text>')
    for curve in curves:
        parts.append(_drawn(curve, [(at(x, y) if math.isfinite(y) else None) for x, y in curve.points]))
    label = escape(", ".join(curve.label for curve in curves))
    return Markup(
        f'<svg class="curves" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


def _drawn(curve: Curve, places: Sequence[tuple[float, float] | None]) -> str:
    title = f"<title>{escape(curve.label)}</title>"
    if curve.dots:
        dots = "".join(f'<circle cx="{p[0]}" cy="{p[1]}" r="3.2"/>' for p in places if p is not None)
        return f'<g class="{curve.kind}">{title}{dots}</g>'
    path, pen_down = [], False
    for place in places:
        if place is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{place[0]} {place[1]}")
        pen_down = True
    if len(path) == 1:  # a single report is a point
        x, y = next(p for p in places if p is not None)
        return f'<g class="{curve.kind} only">{title}<circle cx="{x}" cy="{y}" r="2.4"/></g>'
    return f'<path class="{curve.kind}" d="{"".join(path)}">{title}</path>'
