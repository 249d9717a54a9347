"""`moestro league`: train what is missing, and show the table."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moestro.arguments import path_argument
from moestro.directories import lock

if TYPE_CHECKING:
    import polars as pl

    from moestro.evidence.league.run import Run, Settings

console, errors = Console(), Console(stderr=True)
WIDTH = 190
"""Characters that the whole table takes; a narrower terminal gets it in two parts."""


def league(
    quick: Annotated[
        bool, typer.Option("--quick", help="few steps, one seed: shows that it runs, ranks nothing")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="entry to run; may be repeated")] = None,
    task: Annotated[list[str] | None, typer.Option(help="task to run; may be repeated")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="runs of each entry and task", min=1, show_default="3; quick: 1")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps of a run", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path_argument, help="table to write and to go on from (.parquet)")
    ] = None,
    with_: Annotated[
        list[Path] | None,
        typer.Option("--with", parser=path_argument, help="Python file that adds entries; may be repeated"),
    ] = None,
    again: Annotated[list[str] | None, typer.Option(help="entry whose rows are thrown away and run again")] = None,
    show: Annotated[bool, typer.Option("--show", help="train nothing: show the table as it is")] = False,
) -> None:
    """Train every router and kind of expert side by side, at equal active parameters.

    One table has them all, with a page (.md) and a picture (.svg) beside it.

    Every finished run is kept: after an interruption, the same command goes on.

    In a checkout of the sources, a league with its own settings and entries is recorded
    there, and docs/league.md is written; any other goes to the current directory. The files tell the kind of machine
    and the names of the --with files, no directory of yours.

    Examples:

      moestro league --quick

      moestro league --seeds 5

      moestro league --with my_router.py --only mine --only top_k --only dense
    """
    from moestro.evidence.league import page, run

    for file in with_ or ():
        load(file)
    settings = run.QUICK if quick else run.Settings()
    settings = settings if steps is None else replace(settings, steps=steps)
    own = bool(with_) or steps is not None
    path = out or (Path(run.recorded(quick).name) if own or not page.in_checkout() else run.recorded(quick))
    if path.suffix != ".parquet":
        raise ValueError(f"--out {path}: the table is a .parquet file")
    page.check_places(path)
    failed: list[str] = []
    if not show:
        counted = seeds or (1 if quick else page.LEAST_SEEDS)
        with lock(path):
            for left in path.parent.glob(f".{path.name}.*.part"):
                left.unlink()  # of a run that was killed
            run.go_on_from(run.recorded(quick), path, settings)
            failed = _play(path, settings, entries=only, tasks=task, seeds=counted, again=again or ())
    table = run.read(path)
    if not len(table):
        raise ValueError(f"{path} has no rows" + ("; run it without --show" if show else f": {'; '.join(failed)}"))
    _print(table)
    for written in [path, *page.write_pages(table, path, command(quick, steps, with_, out))]:
        console.print(f"written: {written}", highlight=False, soft_wrap=True)
    if failed:
        raise ValueError(f"{len(failed)} runs failed and have no row: {'; '.join(failed)}")


def load(file: Path) -> None:
    """Run a Python file that adds to ROUTERS, ENTRIES and the other tables. Raises ValueError if it adds no entry."""
    from moestro.evidence.league.entries import ENTRIES

    if not file.is_file():
        raise FileNotFoundError(f"--with {file}: there is no such file")
    if (loaded := sys.modules.get(file.stem)) is not None:
        if getattr(loaded, "__file__", None) == str(file.resolve()):
            return
        raise ValueError(f"--with {file}: there is a module {file.stem!r} already; give the file another name")
    before = set(ENTRIES)
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"--with {file}: it is no Python file")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if set(ENTRIES) == before:
        raise ValueError(f'--with {file}: it adds no entry; write ENTRIES["mine"] = {{"router": "mine"}} in it')


def command(quick: bool, steps: int | None, with_: Sequence[Path] | None, out: Path | None) -> str:
    """How to get this table again."""
    parts = ["moestro", "league", *(["--quick"] if quick else []), *(["--steps", str(steps)] if steps else [])]
    parts += [word for file in with_ or () for word in ("--with", _told(file))]
    return shlex.join([*parts, *(["--out", _told(out)] if out else [])])


def _told(file: Path) -> str:
    """A path as a page that may be published tells it."""
    return file.name if file.is_absolute() or ".." in file.parts else str(file)


def _play(path: Path, settings: Settings, **wanted: Any) -> list[str]:
    """Run what is missing, with a bar where there is a terminal; returns what failed."""
    from moestro.evidence.league import run

    _print_budgets(run.budgets(run.chosen(wanted["entries"], run.ENTRIES, "entry"), settings))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    failed: list[str] = []
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("league", total=None)
        place = [0, 0]

        def on_start(now: Run, number: int, total: int) -> None:
            place[:] = [number, total]
            progress.update(bar, total=total * settings.steps, completed=number * settings.steps)
            progress.update(bar, description=f"{number + 1} of {total}: {now.entry} on {now.task}, seed {now.seed}")

        def on_done(now: Run, row: dict[str, Any]) -> None:
            number, total = place[0] + 1, place[1]
            left = (time.perf_counter() - start) / number * (total - number)
            console.print(
                f"{number}/{total} {now.entry} on {now.task}, seed {now.seed}: loss {row['loss']:.3f}, "
                f"{row['seconds']:.0f} s; about {left / 60:.0f} min left",
                highlight=False,
            )

        def on_failure(now: Run, error: Exception) -> None:
            failed.append(f"{now.entry} on {now.task}, seed {now.seed}: {error}")
            errors.print(f"[red]failed:[/] {escape(failed[-1])}", highlight=False, soft_wrap=True)

        try:
            run.play(
                path,
                settings=settings,
                on_start=on_start,
                on_step=lambda _: progress.advance(bar),
                on_done=on_done,
                on_failure=on_failure,
                **wanted,
            )
        except KeyboardInterrupt:
            errors.print(f"finished runs are in {path}; the same command goes on from there", soft_wrap=True)
            raise
    return failed


def _print_budgets(counted: dict[str, Any]) -> None:
    table = Table("entry", "active", "routers", "total", title="parameters; active: without embeddings and routers")
    for name, p in counted.items():
        table.add_row(name, f"{p.active:,.0f}", f"{p.router:,}", f"{p.total - p.embedding:,}")
    console.print(table)


def _print(table: pl.DataFrame) -> None:
    from moestro.evidence.league import page

    header, body = page.lines(table)
    half = header.index("violation")
    wide = not console.is_terminal or console.width >= WIDTH
    parts = [range(len(header))] if wide else [range(half), [0, *range(half, len(header))]]
    wide_console = console if console.is_terminal else Console(width=WIDTH, file=console.file)
    for columns in parts:
        shown = Table(*(header[c] for c in columns))
        for line in body:
            shown.add_row(*(line[c] for c in columns))
        wide_console.print(shown)
    for said in page.cautions(table):
        console.print(said.replace("**", ""), highlight=False, markup=False)
