"""look.html: what the experts of a model do, as one file that opens anywhere.

Maps are drawn on a canvas from the figure's own table, which lies in the page compressed, is unpacked when the figure
comes near the screen, and can be had as CSV. Lines are SVG, drawn here. No request leaves the page; only its own
script runs (the content security policy names its hash); text that comes from models and users is escaped.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from moestro.report import figures
from moestro.report.layer_chart import Line, kinds, layer_chart
from moestro.report.page import script, templates, visible, write_whole

if TYPE_CHECKING:
    from moestro.looking.result import Figure, Heat, Lines, Listing, LookReport

DIGITS = 4
"""Significant digits of numbers in the page; the Parquet files have them all."""

STATIC_ROWS = 60
"""A longer table of the numbers behind curves is filled when it is opened: elements are what makes a page slow."""


def write_look_page(report: LookReport, path: Path) -> None:
    """Write the page to `path` at once or not at all."""
    write_whole(look_page(report), path)


def look_page(report: LookReport) -> str:
    """The page as a string."""
    environment = templates()
    environment.filters |= {"words": words, "value": value_text}
    own_script, digest = script(environment, "look_script.jinja")
    total = sum(report.layers.values())
    return environment.get_template("look_page.jinja").render(
        report=report,
        name=report.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or report.model,
        experts=total,
        tokens=sum(report.tokens.values()),
        sections=[(section, [drawn(figure) for figure in section.figures]) for section in report.sections],
        static_rows=STATIC_ROWS,
        style=Markup(
            environment.get_template("style.jinja").render() + environment.get_template("look_style.jinja").render()
        ),
        script=own_script,
        script_hash=digest,
    )


@dataclass(frozen=True)
class Drawn:
    """A figure as the template shows it."""

    kind: str
    """heat, lines or listing."""
    figure: Figure
    packed: Markup
    """Its table."""
    chart: Markup | str = ""
    key: Sequence[tuple[str, str]] = ()
    """(class of the swatch, what it stands for)"""
    spec: str = ""
    """What the script needs to draw it."""
    rows: Sequence[dict[str, Any]] = ()
    """Lines shown without the script."""
    height: int = 0
    """What a map will take, roughly, so that the page does not jump when it is drawn."""


def drawn(figure: Figure) -> Drawn:
    """A figure with all that the page needs to show it."""
    return {"Heat": _heat, "Lines": _lines, "Listing": _listing}[type(figure).__name__](figure)  # type: ignore[operator]


def _heat(figure: Heat) -> Drawn:
    names = ("row", "column", "value", "steps", "palette", "choice", "start", "symmetric", "mark")
    spec = json.dumps({name: getattr(figure, name) for name in names})
    tall, wide = figure.table[figure.row].n_unique(), figure.table[figure.column].n_unique()
    least, most = (7, 22) if figure.symmetric else (13, 22)
    height = 38 + tall * max(least, min(most, 1000 // max(1, wide)))
    return Drawn("heat", figure, packed(figure.table), key=_steps(figure), spec=spec, height=height)


def _lines(figure: Lines) -> Drawn:
    table = figure.table
    layers = table["layer"].unique().sort().to_list()
    names = table["series"].unique(maintain_order=True).to_list()
    lines = []
    for name in names:
        rows = {row["layer"]: row for row in table.filter(pl.col("series") == name).to_dicts()}
        values, low, high = ([_number(rows.get(n, {}).get(part)) for n in layers] for part in ("value", "low", "high"))
        lines.append(Line(visible(name), values, low, high, name in figure.controls))
    key = list(zip(kinds([line.control for line in lines]), names, strict=True))
    chart = layer_chart(layers, lines, unit=figure.unit, zero=figure.zero)
    return Drawn("lines", figure, packed(table), chart=chart, key=key)


def _listing(figure: Listing) -> Drawn:
    table = figure.table
    if figure.choice is not None:
        table = table.filter(pl.col(figure.choice) == figure.start)
    spec = json.dumps({name: getattr(figure, name) for name in ("choice", "start", "shown")})
    return Drawn("listing", figure, packed(figure.table), spec=spec, rows=table.head(figure.shown).to_dicts())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def packed(table: pl.DataFrame) -> Markup:
    """The table as base64 of compressed JSON: names, columns, and the words that text columns number."""
    columns: list[list[Any]] = []
    lists = {}
    for name in table.columns:
        column = table[name]
        if column.dtype == pl.String:
            lists[name] = [visible(word) for word in column.unique(maintain_order=True).to_list()]
            numbers = {word: i for i, word in enumerate(column.unique(maintain_order=True).to_list())}
            columns.append([numbers[word] for word in column.to_list()])
        elif column.dtype.is_float():
            columns.append([_short(v) for v in column.to_list()])
        else:
            columns.append(column.to_list())
    text = json.dumps({"names": table.columns, "columns": columns, "words": lists}, separators=(",", ":"))
    return Markup(base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode())


def _short(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def words(name: str) -> str:
    """A column's name as a heading: log2_ratio becomes log2 ratio."""
    return name.replace("_", " ")


def value_text(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return figures.significant(value)
    return f"{value:,}" if isinstance(value, int) else visible(str(value))


def _steps(figure: Heat) -> list[tuple[str, str]]:
    """The legend of a map: colour classes from low to high."""
    letter = "d" if figure.palette == "diverging" else "h"
    edges = [figures.significant(step, 2) for step in figure.steps]
    ranges = [f"under {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)), f"over {edges[-1]}"]
    key = [(f"{letter}{shade(figure, i)}", text) for i, text in enumerate(ranges)]
    return key if figure.mark is None else [*key, ("marked", figure.marked)]


def shade(figure: Heat, step: int) -> int:
    """The colour of a step: h1 to h6, or d0 to d6 with d3 in the middle."""
    steps: Sequence[float] = figure.steps
    if figure.palette == "diverging":
        return step + 3 - len(steps) // 2
    return step + 6 - len(steps)
