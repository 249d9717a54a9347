"""The numbers and the drawings of the report: plain functions from values to text, geometry and SVG.

A drawing names classes only; the colours live in the style sheet, so one drawing serves light, dark and print. Cells
of one state share a single path: 48 layers x 128 experts are five elements, not six thousand.
Shapes: L layers, D domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

Counts = Sequence[Sequence[int]]
"""[D, E] tokens that each expert served, by domain"""

GUTTER = 66
"""Room for the names of the layers, left of a drawing."""
LEAST_SPAN = 1.0
"""Nats per token that the axis of losses covers at least."""
MAP_WIDTH = 900
"""What the cells of the expert map may take before the map scrolls sideways."""


# ------------------------------------------------------------------------------------------------ numbers as text


def size_text(count: float) -> str:
    """Bytes in decimal units, as file managers and model cards give them: 16.4 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{significant(count / scale)}\u00a0{unit}"
    return f"{count:,.0f}\u00a0bytes"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent where that stays readable."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "NaN"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def loss_text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else significant(value)


def signed(value: float, decimals: int = 3) -> str:
    """With a true minus sign, and no sign where it rounds to zero."""
    if not math.isfinite(value):
        return significant(value)
    rounded = round(value, decimals)
    return f"{abs(rounded):.{decimals}f}" if rounded == 0 else f"{rounded:+.{decimals}f}".replace("-", "−")


def change_text(before: float | None, after: float | None) -> str:
    """−45%; empty where there is nothing to compare with."""
    if before is None or after is None or not (before > 0 and math.isfinite(before) and math.isfinite(after)):
        return ""
    percent = 100 * (after / before - 1)
    return "unchanged" if abs(percent) < 0.5 else f"{percent:+,.0f}%".replace("-", "−")


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def percent_text(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def listing(words: Sequence[str], limit: int = 4) -> str:
    """a, b and c; past `limit` only how many."""
    if len(words) > limit:
        return f"{len(words)} domains"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ranges(ids: Sequence[int]) -> str:
    """0-3, 7, 9-12"""
    parts: list[str] = []
    start = previous = None
    for i in [*sorted(ids), None]:
        if start is not None and (i is None or previous is None or i != previous + 1):
            parts.append(f"{start}" if start == previous else f"{start}–{previous}")
            start = None
        if start is None:
            start = i
        previous = i
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------ what the counts say


def mutual_information(counts: Counts) -> float | None:
    """Bits that knowing the domain tells about the expert that serves a token: sum p(d,e) log2 p(d,e)/(p(d) p(e)).

    Every domain weighs the same, however many tokens it had. None where fewer than two domains were seen.
    """
    table = np.array([row for row in counts if sum(row) > 0], dtype=float)
    if len(table) < 2:
        return None
    given = table / table.sum(axis=1, keepdims=True)
    joint, expert = given / len(given), given.mean(axis=0)
    seen = joint > 0
    return max(0.0, float((joint[seen] * np.log2((given / np.where(expert > 0, expert, 1))[seen])).sum()))


def served_by(counts: Counts, kept: Sequence[int], rows: Sequence[int]) -> float | None:
    """Share of the routing slots of these domains (each weighing the same) that went to the kept experts."""
    shares = [sum(counts[d][e] for e in kept) / sum(counts[d]) for d in rows if sum(counts[d]) > 0]
    return sum(shares) / len(shares) if shares else None


# ------------------------------------------------------------------------------------------------ axes


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Axis:
    """Values to percent of a track's width."""

    ticks: list[float]

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


def loss_axis(values: Sequence[float]) -> Axis:
    """At least LEAST_SPAN wide, so that a small difference looks small."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return Axis([0.0, 1.0])
    low, high = min(finite), max(finite)
    missing = max(0.0, LEAST_SPAN - (high - low))
    return Axis(ticks(max(min(low, 0.0), low - missing / 2), high + missing / 2, 4))


# ------------------------------------------------------------------------------------------------ drawings


@dataclass(frozen=True)
class MapRow:
    """One layer of the expert map."""

    layer: int
    num_experts: int
    kept: frozenset[int]
    unseen: frozenset[int]
    served: float | None
    """Share of the task's routing that the kept experts served before the cut."""


def cell_size(num_experts: int) -> tuple[int, int]:
    width = max(6, min(26, MAP_WIDTH // max(1, num_experts)))
    return width, max(width, 11)


def square(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"


def expert_map(rows: Sequence[MapRow]) -> Markup:
    """Layers x experts: kept a full cell, dropped a dot, unseen a ring, kept although unseen a cell in a ring."""
    most = max((row.num_experts for row in rows), default=1)
    w, h = cell_size(most)
    gap = 1 if w < 14 else 2
    dot_w, dot_h = max(2, round(w * 0.36)), max(3, round(h * 0.36))
    top, right = 20, GUTTER + most * w + 10
    paths: dict[str, list[str]] = {"dropped": [], "kept": [], "unseen": [], "kept-unseen": []}
    texts: list[str] = []
    for i, row in enumerate(rows):
        y = top + i * h
        for e in range(row.num_experts):
            x = GUTTER + e * w
            ring = square(x + gap / 2 + 0.75, y + gap / 2 + 0.75, w - gap - 1.5, h - gap - 1.5)
            if e in row.kept:
                paths["kept"].append(square(x + gap / 2, y + gap / 2, w - gap, h - gap))
            if e in row.unseen:
                paths["kept-unseen" if e in row.kept else "unseen"].append(ring)
            elif e not in row.kept:
                paths["dropped"].append(square(x + (w - dot_w) / 2, y + (h - dot_h) / 2, dot_w, dot_h))
        base = y + h / 2 + 3.5
        texts.append(f'<text class="end" x="{GUTTER - 8}" y="{base:g}">layer {row.layer}</text>')
        texts.append(f'<text class="end" x="{right + 46}" y="{base:g}">{len(row.kept)}/{row.num_experts}</text>')
        if row.served is not None:
            bar_y, bar_h = y + h / 2 - min(4, h / 2 - 2), min(8, h - 4)
            texts.append(f'<rect class="rail" x="{right + 56}" y="{bar_y:g}" width="52" height="{bar_h:g}"/>')
            texts.append(
                f'<rect class="fill" x="{right + 56}" y="{bar_y:g}" width="{52 * row.served:.1f}" height="{bar_h:g}"/>'
            )
            texts.append(f'<text x="{right + 114}" y="{base:g}">{percent_text(row.served)}</text>')
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 10**6) if step * w >= 22)
    axis = "".join(
        f'<text class="mid" x="{GUTTER + e * w + w / 2:g}" y="{top - 7}">{e}</text>' for e in range(0, most, every)
    )
    head = (
        f'<text class="end" x="{GUTTER - 8}" y="{top - 7}">expert</text>'
        f'<text class="end" x="{right + 46}" y="{top - 7}">kept</text>'
        f'<text x="{right + 56}" y="{top - 7}">task routing</text>'
    )
    drawn = "".join(f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in paths.items() if parts)
    width, height = right + 150, top + len(rows) * h + 4
    return Markup(
        f'<svg id="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true" '
        f'data-x="{GUTTER}" data-y="{top}" data-w="{w}" data-h="{h}">'
        f'{head}{axis}{drawn}<rect class="cursor" width="{w}" height="{h}" visibility="hidden"/>{"".join(texts)}</svg>'
    )


def information_chart(layers: Sequence[int], bits: Sequence[float]) -> Markup:
    """One column per layer, as high as its mutual information; a click chooses the layer."""
    top, plot, left = 18, 120, 40
    slot = max(16, min(88, MAP_WIDTH // max(1, len(layers))))
    marks = ticks(0.0, max([*bits, 0.01]), 3)
    scale = plot / marks[-1]
    base = top + plot
    width, height = left + len(layers) * slot + 8, base + 34
    parts = []
    for mark in marks:
        y = base - mark * scale
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text class="end" x="{left - 7}" y="{y + 3.5:g}">{mark:g}</text>')
    bar = min(44, slot - 4)
    for i, (layer, value) in enumerate(zip(layers, bits)):
        x, y = left + i * slot, base - value * scale
        label = slot >= 30
        parts.append(
            f'<g class="bar" data-i="{i}" data-tip="Layer {layer}: {value:.3f} bits">'
            f'<rect class="hit" x="{x}" y="{top}" width="{slot}" height="{plot + 18}"/>'
            f'<rect class="fill" x="{x + (slot - bar) / 2:g}" y="{y:.1f}" width="{bar}" height="{base - y:.1f}"/>'
            + (f'<text class="mid value" x="{x + slot / 2:g}" y="{y - 5:.1f}">{value:.2f}</text>' if label else "")
            + (f'<text class="mid" x="{x + slot / 2:g}" y="{base + 14}">{layer}</text>' if label or i % 2 == 0 else "")
            + "</g>"
        )
    parts.append(f'<text class="mid" x="{left + len(layers) * slot / 2:g}" y="{base + 30}">layer</text>')
    return Markup(
        f'<svg id="bits" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )
