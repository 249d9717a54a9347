"""`moestro look`: what the experts of a model do, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moestro.arguments import name_argument, path_argument

console, errors = Console(), Console(stderr=True)


def look(
    model: Annotated[
        str, typer.Argument(parser=name_argument, help="checkpoint directory, hub name or bundled model")
    ] = "quartet",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            parser=name_argument,
            help="texts: file, folder, LABEL=FILE or embedded domain; may be repeated",
            show_default="embedded sample",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="domain that the others are compared with", show_default="English, else the largest"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens to look at, per domain", min=1)] = 10_000,
    max_length: Annotated[int | None, typer.Option(help="longest window of a text, in tokens", min=2)] = None,
    layers: Annotated[
        str | None, typer.Option(help="decoder layers to look at, as 0-11,20", show_default="all")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path_argument, help="directory for the page and its tables", show_default="MODEL-look"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draw of texts, the intervals and the permutations")] = 0,
    stream: Annotated[
        bool, typer.Option("--stream", help="run the model layer by layer from disk: for one larger than memory")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an existing look; refused where OUT holds more")
    ] = False,
) -> None:
    """See what every expert of a mixture-of-experts model does with your texts: one pass, one page.

    Load, specialisation by domain, divergence from a reference, experts that work together, what a cache of experts
    would find, the depth at which domains can be read off, super experts, retrieval heads, and a routing profile for
    runtimes that keep hot experts on the fast device; every finding beside its control or interval.

    The page and its tables hold no text of yours and no path, but the names of the domains and single tokens (where an
    expert gave its largest output). Read them before you pass them on.

    Examples:

      moestro look                                             the bundled model and the embedded sample

      moestro look ./OLMoE --data math=problems.jsonl --data mails.txt --out ./OLMoE-look

      moestro look ./Qwen3-30B-A3B --data en=en.txt --data de=de.txt --reference en --layers 0-23
    """
    from moestro.looking import pipeline

    target = Path(f"{Path(model).name}-look") if out is None else out
    report = pipeline.look(
        model,
        data or list(pipeline.DEFAULT_DATA),
        reference=reference,
        tokens=tokens,
        max_length=max_length,
        layers=None if layers is None else layer_numbers(layers),
        out=target,
        overwrite=overwrite,
        stream=stream,
        seed=seed,
    )
    for section in report.sections:
        console.print(f"[bold]{section.title.split(':')[0]}[/]")
        for line in section.findings or (section.absent,):
            console.print(f"  {line}", highlight=False)
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(f"\npage  {target / pipeline.PAGE}", highlight=False)


def layer_numbers(text: str) -> list[int]:
    """0-3,7 -> [0, 1, 2, 3, 7]. Raises ValueError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers {text!r}: {part.strip()!r} is no layer number or range; write it like 0-11,20")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
