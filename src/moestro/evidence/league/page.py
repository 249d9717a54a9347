"""The league as one table, for the terminal and the page of the documentation, and as one picture."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from moestro.evidence import records
from moestro.evidence.league.entries import ENTRIES, MEASURES, NOTES
from moestro.evidence.league.run import Settings, outdated, recorded
from moestro.evidence.league.tasks import TASKS
from moestro.report.league_figure import Panel, league_figure

LEAST_SEEDS = 3
"""With fewer, a table ranks nothing."""

INTRODUCTION = """# The league

Every router and kind of expert of this package beside the plain baselines: the same active parameters per token, the
same rows in the same order, the same number of tokens, the same optimiser, model and seeds. Nothing is tuned for a
single entry: learning rate and coefficients are the league's, or those that the entry's paper names, so a place in
this table says how a method does in this setting, not how it does at its best.

This page is written by `moestro league`. To add an entry of your own, see [a new router](new-router.md)."""

LEGEND = """- *loss*: held out, nats per token that counts, mean over domains; mean ± standard deviation over seeds.
- *bits*: what a token's domain tells about the expert of its slots (mutual information), by task.
- *violation*: how far the busiest expert is above the mean load; *entropy*: of the loads, 1 when even. Both are
  means over tasks, seeds and layers, on held-out rows.
- *router time*: share of a forward pass; *training*, *inference*: tokens per second, of optimiser steps and of forward
  passes without gradients; medians over all runs of the entry. They were taken one run after the other, so what else
  the machine did is in them: `benchmarks/routers.py` compares the routers' costs in turn.
- *active*: parameters that a token passes, without embeddings and routers; *slots*: what it used per layer, in
  training / held out. † marks entries whose slots made over 1% more parameters active than that: they choose the number
  themselves, and had more computation than the others.
- *routers*: parameters of all routers together, which come on top."""

RULES = """## The tasks

{tasks}

Routing matters in the two generated tasks because their domains share nothing: what is learned for one rule is of no
use to another, and a token's layers are narrow, so that learning all the rules in the same weights is slow. In *chains*
the current token is half of what decides, so that routing by token, as hash layers do, divides the work as well. In
*ciphers* the letter to be enciphered has been fetched by attention and the current token says nothing about it: a
router has to look at the hidden state. `row` is the reference for both: it is told the domain by the tag that every row
opens with, so the distance between it and `dense` is what routing by domain is worth. (In *sample*, rows open anywhere,
and it is told nothing.)"""


def lines(table: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """(header, one line per entry)."""
    tasks = [task for task in TASKS if task in table["task"].unique()]
    short = " / ".join(tasks)
    header = ["entry", *(f"loss: {task}" for task in tasks), f"bits: {short}", "violation", "entropy", "router time"]
    header += ["training", "inference", "active", "slots", "routers"]
    laid_out = []
    for entry in entries_of(table):
        own = table.filter(pl.col("entry") == entry)
        by_task = [own.filter(pl.col("task") == task) for task in tasks]
        cells = [entry + "†" * (_excess(own) > 0.01), *(_spread(part["loss"].to_list()) for part in by_task)]
        bits = [_mean(part["information"].to_list()) for part in by_task]
        cells.append(" / ".join(map(_two, bits)) if any(b is not None for b in bits) else "")
        cells += [_two(_mean(own[name].to_list())) for name in ("violation", "entropy")]
        share = _mean(own["router_share"].to_list())
        cells.append("" if share is None else f"{share:.0%}")
        cells += [f"{_median(own[name].to_list()):,.0f}" for name in ("training_rate", "inference_rate")]
        slots = [_mean(own[name].to_list()) for name in ("training_slots", "slots")]
        cells += [f"{own['active'][0]:,.0f}", "" if None in slots else " / ".join(map(_two, slots))]
        cells.append(f"{own['router'][0]:,}")
        laid_out.append(cells)
    return header, laid_out


def entries_of(table: pl.DataFrame) -> list[str]:
    """The table's entries in the order of ENTRIES; such as are no longer there come last."""
    found = table["entry"].unique(maintain_order=True).to_list()
    return [*(e for e in ENTRIES if e in found), *(e for e in found if e not in ENTRIES)]


def _excess(own: pl.DataFrame) -> float:
    """How much more was active than what all entries have in common, as a share."""
    used = _mean(own["used"].to_list())
    return 0.0 if used is None else used / own["active"][0] - 1


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _median(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else math.nan


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:z.2f}"


def _spread(values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v)]
    parts = [f"{statistics.fmean(finite):.3f}"] if finite else []
    parts += [f"± {statistics.stdev(finite):.3f}"] if len(finite) > 1 else []
    parts += [f"({len(values) - len(finite)} diverged)"] if len(finite) < len(values) else []
    return " ".join(parts)


def cautions(table: pl.DataFrame) -> list[str]:
    """What a reader must know before comparing lines."""
    said = []
    settings = json.loads(table["settings"][0])
    seeds = table.group_by("entry", "task").agg(pl.col("seed").n_unique())["seed"]
    full, least = Settings().steps, int(seeds.min() or 0)  # type: ignore[arg-type]
    if settings["steps"] < full or least < LEAST_SEEDS:
        said.append(
            f"**This table ranks nothing**: {settings['steps']} steps and {least} seed{'s' * (least != 1)} (a league "
            f"has {full} and at least {LEAST_SEEDS}). It shows that every entry trains and what it costs."
        )
    whole = table["entry"].n_unique() * table["task"].n_unique() * table["seed"].n_unique()
    if len(table) < whole:
        said.append(f"{len(table)} of {whole} runs are done; call the command again to go on.")
    if old := outdated(table, Settings(**settings)):
        said.append(f"Older than their code: {', '.join(old)}; `--again NAME` runs an entry anew.")
    if table["machine"].n_unique() > 1:
        said.append(f"Speeds were measured on different machines: {'; '.join(sorted(table['machine'].unique()))}.")
    for note, rows in table.filter(pl.col("note").is_not_null()).group_by("note", maintain_order=True):
        names = ", ".join(f"{e} on {t}, seed {s}" for e, t, s in rows.select("entry", "task", "seed").iter_rows())
        said.append(f"{names}: {note[0]}.")
    return said


def extras(table: pl.DataFrame) -> dict[str, list[list[str]]]:
    """{task: header and lines} of what only some entries measure; mean ± standard deviation over seeds."""
    found: dict[str, list[list[str]]] = {}
    for task in (t for t in TASKS if t in table["task"].unique()):
        measured: dict[str, dict[str, list[float]]] = {}
        rows = table.filter((pl.col("task") == task) & pl.col("extra").is_not_null())
        for entry, text in rows.select("entry", "extra").iter_rows():
            for name, value in json.loads(text).items():
                measured.setdefault(name, {}).setdefault(entry, []).append(value)
        if measured:
            cells = [[e, *(_spread(measured[name].get(e, [])) for name in measured)] for e in entries_of(rows)]
            found[task] = [["entry", *measured], *cells]
    return found


def figure(table: pl.DataFrame) -> str:
    """The picture: loss of every task, load balance, specialisation and speed."""
    entries = entries_of(table)

    def values(name: str, task: str | None = None) -> Mapping[str, list[float]]:
        part = table if task is None else table.filter(pl.col("task") == task)
        rows = part.filter(pl.col(name).is_not_null()).select("entry", "seed", name)
        means = rows.group_by("entry", "seed").agg(pl.col(name).mean()).sort("seed")
        return {e: means.filter(pl.col("entry") == e)[name].to_list() for e in entries}

    tasks = [task for task in TASKS if task in table["task"].unique()]
    panels = []
    for task in tasks:
        losses = values("loss", task)
        dense = [v for v in losses.get("dense", []) if math.isfinite(v)]
        reference = statistics.fmean(dense) if dense else None
        note = "nats, lower is better" + ("; dashed: dense" if dense else "")
        panels.append(Panel(f"Held-out loss: {task}", note, losses, reference))
    panels.append(Panel("Load violation", "busiest expert above the mean, 0 is even", values("violation"), 0.0))
    ruled = "chains" if "chains" in tasks else tasks[0]
    panels.append(Panel(f"Specialisation: {ruled}", "bits that the domain tells", values("information", ruled), 0.0))
    panels.append(Panel("Training speed", "tokens per second", values("training_rate"), 0.0))
    return league_figure(entries, panels)


def markdown(table: pl.DataFrame, picture: str, command: str) -> str:
    """The page."""
    header, body = lines(table)
    described = "\n".join(f"- *{name}*: {_first_line(make.__doc__)}" for name, make in TASKS.items())
    more = [f"### {task}\n\n{_table(rows)}" for task, rows in extras(table).items()]
    notes = [f"- *{e}*: {NOTES[e]}" for e in entries_of(table) if e in NOTES]
    configs = {e: table.filter(pl.col("entry") == e)["config"][0] for e in entries_of(table)}
    parts = [
        INTRODUCTION,
        *cautions(table),
        _table([header, *body]),
        LEGEND,
        f"![Loss, balance, specialisation and speed of every entry]({picture})",
        *(["About single entries:\n\n" + "\n".join(notes)] if notes else []),
        RULES.format(tasks=described),
        *(["## Measured for some entries", *_measures(table), *more] if more else []),
        "## The settings",
        _settings(table),
        "What each entry changes in the model:",
        _table([["entry", "changes"], *([name, f"`{text}`"] for name, text in configs.items())]),
        f"To run it again, or to go on: `{command}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(table: pl.DataFrame) -> str:
    settings: dict[str, Any] = json.loads(table["settings"][0])
    size = ", ".join(f"{name}={value!r}" for name, value in settings.pop("size").items())
    told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    minutes = table["seconds"].sum() / 60
    dates = sorted(table["date"].str.slice(0, 10).unique())
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{told}; AdamW (0.9, 0.95), weight decay 0.1, gradient norm 1, warm-up over a tenth of the steps, cosine "
        f"decay to a tenth. Model: {size}. {len(table)} runs in {minutes:.0f} minutes of one process, {when} "
        f"({'; '.join(sorted(table['machine'].unique()))})."
    )


def _measures(table: pl.DataFrame) -> list[str]:
    """What the functions that measured more say of themselves."""
    docs = [MEASURES[entry].__doc__ for entry in entries_of(table) if entry in MEASURES]
    return list(dict.fromkeys(inspect.cleandoc(doc) for doc in docs if doc))


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _table(rows: list[list[str]]) -> str:
    header, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rest])


def write_pages(table: pl.DataFrame, path: Path, command: str) -> list[Path]:
    """The table's page and picture: beside it, or in docs/ where it is a recorded one; returns what was written.

    The quick league is in docs/ only as long as no full one is recorded.
    """
    page = path.with_suffix(".md")
    if _is_recorded(path):
        if path.resolve() == recorded(True).resolve() and recorded(False).is_file():
            return []
        page = records.PACKAGE.parents[1] / "docs" / "league.md"
    picture = page.with_suffix(".svg")
    records.write_whole(picture, figure(table))
    records.write_whole(page, markdown(table, picture.name, command))
    return [page, picture]


def check_places(path: Path) -> None:
    """Raise FileExistsError, before any run, where the page or the picture of a table would replace a file of other
    making: one that is there although the table is not."""
    if _is_recorded(path) or path.exists():
        return
    for beside in (path.with_suffix(".md"), path.with_suffix(".svg")):
        if beside.exists():
            raise FileExistsError(
                f"{beside} exists, and the page of {path.name} would replace it; choose another file with --out"
            )


def _is_recorded(path: Path) -> bool:
    return path.resolve() in (recorded(False).resolve(), recorded(True).resolve())


def in_checkout() -> bool:
    """Whether this package is a checkout of the sources."""
    return (records.PACKAGE.parents[1] / "pyproject.toml").is_file()
