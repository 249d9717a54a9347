"""`moestro studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moestro.arguments import name_argument, path_argument

errors = Console(stderr=True)


def studio(
    model: Annotated[
        str, typer.Argument(parser=name_argument, help="checkpoint directory, hub name or bundled model")
    ] = "quartet",
    steer: Annotated[Path | None, typer.Option(parser=path_argument, help="steering file to begin with")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 lets the whole network in")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="port", show_default="7860, or the next free one")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the page in a browser")] = True,
) -> None:
    """Open a local page: see which experts each token takes, switch experts and heads, compare, save the steering.

    The page is served on this machine alone, and asks nothing of any other. Ctrl-C ends it. Nothing is written but
    the steering file that you save, which holds numbers of experts and heads, and no prompt.

    Examples:

      moestro studio

      moestro studio ./OLMoE --steer no-refusals.json --port 8000 --no-browser
    """
    import moestro
    from moestro.steer.steering import Steering
    from moestro.studio.app import launch

    setup = None if steer is None else Steering.load(steer)
    view = moestro.open(model)
    if host != "127.0.0.1":
        errors.print(f"[yellow]warning:[/] everybody who reaches {host} can use this model")
    launch(view, Path(model).name, setup, server_name=host, server_port=port, inbrowser=browser)
