"""What an experiment gives: rows of measurements, and claims held against them.

A paper is one module of this package. Its name is the paper's key with underscores for dashes; it has

    TITLE, ARXIV   of the paper
    CLAIM          what the paper claims, in one sentence
    SOURCES        files of moestro (patterns, relative to the package) that the result depends on, beside the module
    QUICK          keyword arguments for `run` that make it a matter of a minute or two
    NOT_SHOWN      {name of a claim: why it does not hold at this scale}, written after the measurement
    run(*, progress, ...) -> Evidence

and its docstring describes the experiment: it is what docs/evidence.md prints. A claim's threshold is stated before
the first run. A claim that does not hold stays in the table, with the reason; it is never tuned until it passes.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


class Row(BaseModel):
    """One quantity in one setting."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    metric: str
    setting: dict[str, str]
    """Rows of one metric have the same names; the last makes the columns of its table."""
    values: list[float]
    """One per draw."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation over the draws; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


class Claim(BaseModel):
    """A statement that holds where `measured` stands in `relation` to `needed`. NaN never holds."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    name: str
    measured: float
    relation: Literal["<=", "<", ">=", ">"]
    needed: float
    reason: str | None = None
    """Why it does not hold."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def holds(self) -> bool:
        return RELATIONS[self.relation](self.measured, self.needed)


class Evidence(BaseModel):
    """What a run gives."""

    rows: list[Row]
    claims: list[Claim]


class Rows:
    """Rows as they are measured: values are added and found again by metric and setting."""

    def __init__(self, rows: Iterable[Row] = ()):
        self._rows = {(row.metric, tuple(row.setting.items())): row for row in rows}

    def __iter__(self):
        return iter(self._rows.values())

    def add(self, metric: str, setting: dict[str, str], *values: float) -> None:
        """One more draw (or several) of a metric in a setting."""
        row = self._rows.setdefault((metric, tuple(setting.items())), Row(metric=metric, setting=setting, values=[]))
        row.values.extend(values)

    def values(self, metric: str, setting: dict[str, str]) -> list[float]:
        """The draws. Raises KeyError where nothing was measured."""
        return self._rows[metric, tuple(setting.items())].values

    def mean(self, metric: str, setting: dict[str, str]) -> float:
        return statistics.fmean(self.values(metric, setting))

    def add_mean(self, metric: str, setting: dict[str, str], over: str, names: Sequence[str], label: str) -> None:
        """The mean over `names` in the place `over` of the setting, draw by draw, under the name `label`."""
        draws = zip(*(self.values(metric, setting | {over: name}) for name in names), strict=True)
        self.add(metric, setting | {over: label}, *map(statistics.fmean, draws))


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN, which meets no claim, where the whole is not positive."""
    return part / whole if whole > 0 else math.nan
