"""Imports point downwards only (DESIGN.md): read from the source, so that none is missed because it did not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "moestro"


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"moestro.{name}" for name in names)


METHODS = rooms("analyze", "steer", "build", "compress", "tune", "compose", "train", "serve")
TRANSFORMERS_MODELS = ("transformers.models", "transformers.modeling_utils")
TOP = rooms("fitting", "looking", "studio", "cli", "evidence")

# Who must not import whom: rooms of moestro, or other packages.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "routing": ("transformers", "moestro"),
    "stats": ("transformers", "torch", "moestro"),
    "sets": ("transformers", "moestro"),
    "recipe": ("transformers", "torch", "moestro"),
    "arguments": ("transformers", "torch", "moestro"),
    "directories": ("transformers", "torch", "moestro"),
    # of transformers, the layers know the experts interface alone
    "layers": (*TRANSFORMERS_MODELS, *rooms("view", "data", "report", "models"), *METHODS, *TOP),
    "formats": (*rooms("view", "layers", "models", "data", "report"), *METHODS, *TOP),
    "models": (*rooms("view", "report"), *METHODS, *TOP),
    "data": (*rooms("view", "layers", "models", "report"), *METHODS, *TOP),
    "view": (*rooms("report", "models"), *METHODS, *TOP),
    "report": (*rooms("view", "cli", "evidence"), *METHODS),
    **{room.removeprefix("moestro."): TOP for room in METHODS},
    "fitting": rooms("looking", "studio", "cli", "evidence"),
    "looking": rooms("studio", "cli", "evidence"),
    "studio": rooms("cli", "evidence"),
    "evidence": rooms("cli"),
}


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, relative imports resolved."""
    package = ["moestro", *file.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def files_of(room: str) -> list[Path]:
    single = SOURCE / f"{room}.py"
    return [*sorted((SOURCE / room).rglob("*.py")), *([single] if single.is_file() else [])]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_downwards(room: str) -> None:
    wrong = [
        f"{file.relative_to(SOURCE.parent)}:{line} imports {name}"
        for file in files_of(room)
        for line, name in imports_of(file)
        for forbidden in FORBIDDEN[room]
        if name == forbidden or name.startswith(forbidden + ".")
    ]
    assert not wrong, f"{room} must not import {FORBIDDEN[room]}:\n" + "\n".join(wrong)


def test_the_check_sees_what_it_forbids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "bad.py").write_text("def f():\n    from ..fitting import plan\nimport moestro.cli as c\n")
    assert [*imports_of(tmp_path / "view" / "bad.py")] == [(3, "moestro.cli"), (2, "moestro.fitting.plan")]


def test_every_room_is_known() -> None:
    present = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert present - set(FORBIDDEN) - {"__init__", "__main__", "bundled", "cli"} == set()
