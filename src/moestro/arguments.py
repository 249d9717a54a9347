"""Paths and names of the command line: what every command asks of them."""

from pathlib import Path

import typer


def path_argument(text: str) -> Path:
    """A path of the command line, for typer's `parser=`; an empty string is refused before it becomes Path(".")."""
    path = Path(name_argument(text))
    return path if str(path) != "." else Path.cwd()


def name_argument(text: str) -> str:
    """A path or name of the command line, for typer's `parser=`."""
    if not text.strip():
        raise typer.BadParameter(
            "an empty string names no file, directory or model (is a variable of the shell unset?)"
        )
    return text
