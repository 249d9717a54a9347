"""What a look finds, as data: sections of sentences and figures, each figure with the table it is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import polars as pl

SERIES = {"layer": pl.Int64, "series": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
"""Columns of the table of `Lines`."""


@dataclass(frozen=True)
class Heat:
    """A map of coloured cells. The table has one line a cell: `choice`, `row` and `column` say where, `value` what."""

    name: str
    """Of its files: NAME.parquet, NAME.csv."""
    title: str
    read: str
    """One sentence: how to read it."""
    table: pl.DataFrame
    row: str
    column: str
    value: str
    steps: Sequence[float]
    """Values at which the colour changes."""
    unit: str
    palette: Literal["sequential", "diverging"] = "sequential"
    choice: str | None = None
    """A column of which one value is shown at a time."""
    start: str | None = None
    """The value that is shown first."""
    symmetric: bool = False
    """The table holds one of (row, column) and (column, row)."""
    mark: float | None = None
    """Cells of this value are drawn as marked."""
    marked: str = ""
    """What the mark means."""


@dataclass(frozen=True)
class Lines:
    """Measures by layer. The table has the columns of SERIES, low and high where there is an interval."""

    name: str
    title: str
    read: str
    table: pl.DataFrame
    unit: str
    controls: tuple[str, ...] = ()
    """Series that are controls, drawn as such."""
    zero: bool = True
    """Whether the axis starts at 0."""


@dataclass(frozen=True)
class Listing:
    """A table that is read line by line; with `choice`, the lines of one of its values at a time."""

    name: str
    title: str
    read: str
    table: pl.DataFrame
    choice: str | None = None
    start: str | None = None
    shown: int = 12
    """Lines on the page; the files hold all."""


Figure = Heat | Lines | Listing


@dataclass(frozen=True)
class Section:
    """One question, its findings in words, and the figures behind them."""

    key: str
    title: str
    findings: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    absent: str = ""
    """Why there is nothing to show, and what would change that; empty where there is."""
    note: str = ""
    """What else must be known: another pass, a part of the texts."""


@dataclass(frozen=True)
class LookReport:
    """All that the page shows."""

    model: str
    layers: dict[int, int]
    """{decoder layer: number of its experts}"""
    top_k: tuple[int, ...]
    tokens: dict[str, int]
    """By domain."""
    texts: int
    reference: str
    sections: list[Section]
    date: datetime
    versions: dict[str, str]
    machine: str
    seconds: float
    """Of the pass over the data."""
    seed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]

    def section(self, key: str) -> Section:
        """Raises ValueError for a key that is not there."""
        for section in self.sections:
            if section.key == key:
                return section
        raise ValueError(f"no section {key!r}; there are {[s.key for s in self.sections]}")
