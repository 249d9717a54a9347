"""`moestro papers` and `moestro reproduce`: what is covered, and running it again."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moestro.arguments import name_argument

console, errors = Console(), Console(stderr=True)


def papers(
    docs: Annotated[bool, typer.Option("--docs", help="rewrite docs/evidence.md from the recorded results")] = False,
) -> None:
    """List the papers that are covered, with what their experiments showed here."""
    from moestro.evidence import page, records

    table = Table(box=None, pad_edge=False, expand=True)
    longest = max(map(len, records.papers()))
    for name, width in (("key", longest), ("arXiv", 10), ("shown", 5), ("run on", 11)):
        table.add_column(name, width=width)
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
    old = []
    for key, module in records.papers().items():
        record = records.load(key)
        if record is None:
            table.add_row(key, module.ARXIV, "", "not run yet", module.TITLE)
            continue
        shown = f"{sum(claim.holds for claim in record.claims)}/{len(record.claims)}"
        table.add_row(key, module.ARXIV, shown, f"{record.date:%Y-%m-%d}", module.TITLE)
        if changed := records.stale(record):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            old.append(f"{key}: older than its code: {changed[0]}{more} changed since")
    console.print(table)
    for line in old:
        errors.print(f"[yellow]{line}[/]", highlight=False)
    if docs:
        written = page.write_page()
        console.print(f"written: {written}" if written else "not written: this is no checkout of the sources")


def reproduce(
    keys: Annotated[list[str] | None, typer.Argument(help="papers to run, by key (see `moestro papers`)")] = None,
    everything: Annotated[bool, typer.Option("--all", help="run every paper")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="fewer draws and less data: a minute or two each")] = False,
    model: Annotated[
        str | None, typer.Option(parser=name_argument, help="another checkpoint than the bundled model")
    ] = None,
) -> None:
    """Run a paper's experiment, print what it measured and which of its claims hold.

    A full run in a checkout of the sources is recorded there, and docs/evidence.md rewritten. A claim that does not
    hold is a result, not an error.

    Examples:

      moestro reproduce easy-ep

      moestro reproduce --all --quick
    """
    from moestro.evidence import page, records

    known = records.papers()
    if bool(keys) == everything:
        raise ValueError(f"name papers to run, or pass --all; there are: {', '.join(known)}")
    chosen = list(known) if everything else list(dict.fromkeys(keys or ()))
    for key in chosen:
        records.paper(key)
    settings: dict[str, Any] = {} if model is None else {"model": model}
    for key in chosen:
        record = records.run(key, quick=quick, **settings)
        told = "not recorded: only a full run on the bundled model, in a checkout of the sources, is"
        if not (quick or settings or page.page_path() is None):
            told = f"recorded in {records.save(record)}, {page.write_page()}"  # before anything else can fail
        _print(record)
        console.print(told, highlight=False)


def _print(record) -> None:
    from moestro.evidence import page, records

    module = records.paper(record.key)
    console.print(f"[bold]{module.TITLE}[/] (arXiv:{module.ARXIV})", highlight=False)
    for laid_out in page.tables(record.rows):
        table = Table(*laid_out.header, title=laid_out.title)
        for line in laid_out.lines:
            table.add_row(*line)
        console.print(table)
    claims = Table("claim", "measured", "needed", "")
    for claim in record.claims:
        name, measured, needed, verdict = page.claim_cells(claim)
        claims.add_row(name, measured, needed, f"[{'green' if claim.holds else 'yellow'}]{verdict}[/]")
    console.print(claims)
    console.print(f"{record.seconds:.0f} s, {record.machine}", highlight=False)
