"""docs/evidence.md: every paper's claims and measurements, written from the recorded results."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moestro.evidence import records
from moestro.evidence.base import Claim, Row

INTRODUCTION = """# Evidence

What published methods claim, tried at a small scale on the models that come with moestro. Each paper's experiment has
the paper's own baselines beside it, on the same data and draws, and its thresholds were stated before the first run.
A claim that does not hold here is listed as *not shown*, with the reason.

This page is written by `moestro reproduce`, from the results in `src/moestro/evidence/results`."""


@dataclass(frozen=True)
class Table:
    """A metric's rows laid out: the setting's last name across, the others down."""

    title: str
    header: list[str]
    lines: list[list[str]]


def tables(rows: Iterable[Row]) -> list[Table]:
    """One table per metric: mean ± standard deviation over the draws."""
    by_metric: dict[str, list[Row]] = {}
    for row in rows:
        by_metric.setdefault(row.metric, []).append(row)
    laid_out = []
    for metric, members in by_metric.items():
        *down, across = members[0].setting
        columns = list(dict.fromkeys(row.setting[across] for row in members))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for row in members:
            cells.setdefault(tuple(row.setting[name] for name in down), {})[row.setting[across]] = _number(row)
        lines = [[*place, *(found.get(c, "") for c in columns)] for place, found in cells.items()]
        laid_out.append(Table(metric, [*down, *columns], lines))
    return laid_out


def _number(row: Row) -> str:
    return f"{row.mean:z.3f} ± {row.sd:.3f}" if len(row.values) > 1 else f"{row.mean:z.3f}"


def claim_cells(claim: Claim) -> list[str]:
    """The claim, what was measured, what was needed, and the verdict."""
    verdict = "shown" if claim.holds else f"not shown: {claim.reason or 'the reason is not known yet'}"
    return [claim.name, f"{claim.measured:z.3f}", f"{claim.relation} {claim.needed:g}", verdict]


def markdown() -> str:
    """The whole page."""
    overview = [["paper", "claims shown", "run on"]]
    sections = []
    for key, module in records.papers().items():
        record = records.load(key)
        if record is None:
            overview.append([module.TITLE, "not run yet", ""])
            continue
        shown = f"{sum(c.holds for c in record.claims)} of {len(record.claims)}"
        overview.append([f"[{module.TITLE}](#{key})", shown, f"{record.date:%Y-%m-%d}"])
        sections.append(_section(key, record))
    return "\n\n".join([INTRODUCTION, _table(overview), *sections]) + "\n"


def _section(key: str, record: records.Record) -> str:
    module = records.paper(key)
    settings = ", ".join(f"{name}={value!r}" for name, value in record.settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    parts = [
        f"## {key}",
        f"[{module.TITLE} (arXiv:{module.ARXIV})](https://arxiv.org/abs/{module.ARXIV}). {module.CLAIM}",
        inspect.cleandoc(module.__doc__ or ""),
        _table([["claim", "measured", "needed", ""], *map(claim_cells, record.claims)]),
        *(f"**{table.title}**\n\n{_table([table.header, *table.lines])}" for table in tables(record.rows)),
        f"Run on {record.date:%Y-%m-%d} in {record.seconds:.0f} s ({record.machine}; {versions}) with {settings}. "
        f"To run it again: `moestro reproduce {key}`.",
    ]
    return "\n\n".join(parts)


def _table(lines: list[list[str]]) -> str:
    header, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    ruled = [header, ["---"] * len(header), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def page_path() -> Path | None:
    """Where the page stands in a checkout of the sources; None in an installed package."""
    root = records.PACKAGE.parents[1]
    return root / "docs" / "evidence.md" if (root / "pyproject.toml").is_file() else None


def write_page() -> Path | None:
    """Bring the page in line with the records; returns where it is, None outside a checkout."""
    path = page_path()
    if path is not None:
        records.write_whole(path, markdown())
    return path
