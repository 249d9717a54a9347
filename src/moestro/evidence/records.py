"""The papers that are covered, their recorded results, and whether a record is older than what made it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import pkgutil
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import moestro
from moestro.evidence.base import Evidence

PACKAGE = Path(moestro.__file__).parent
RESULTS = Path(__file__).parent / "results"


class Record(Evidence):
    """A result and how it was got."""

    key: str
    settings: dict[str, Any]
    """Keyword arguments of the run."""
    date: datetime
    versions: dict[str, str]
    machine: str
    seconds: float
    sources: dict[str, str]
    """{file of the package: fingerprint}"""


def papers() -> dict[str, ModuleType]:
    """{key: module} of every paper, sorted."""
    found = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"moestro.evidence.{info.name}")
        if hasattr(module, "ARXIV"):
            found[info.name.replace("_", "-")] = module
    return dict(sorted(found.items()))


def paper(key: str) -> ModuleType:
    """The paper's module. Raises ValueError naming the known keys."""
    known = papers()
    if key not in known:
        raise ValueError(f"no paper {key!r} is covered; there are: {', '.join(known)}")
    return known[key]


def run(key: str, *, quick: bool = False, progress: bool = True, **settings: Any) -> Record:
    """Run a paper's experiment; nothing is written. `quick` starts from its QUICK settings.

    Raises ValueError for an unknown key, or a setting that the experiment does not have.
    """
    module = paper(key)
    known = {n: p.default for n, p in inspect.signature(module.run).parameters.items() if n != "progress"}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{key} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    settings = {**known, **(module.QUICK if quick else {}), **settings}
    sources = fingerprints(module)
    start = time.perf_counter()
    evidence = module.run(progress=progress, **settings)
    return Record(
        key=key,
        rows=evidence.rows,
        claims=_explained(evidence, module),
        settings=settings,
        date=datetime.now(UTC).replace(microsecond=0),
        versions={"python": platform.python_version(), **{n: version(n) for n in ("moestro", "torch", "transformers")}},
        machine=machine(),
        seconds=round(time.perf_counter() - start, 1),
        sources=sources,
    )


def machine() -> str:
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{gpu}"


def _explained(evidence: Evidence, module: ModuleType) -> list[Any]:
    """The claims, each that does not hold with the reason that its module gives."""
    reasons = getattr(module, "NOT_SHOWN", {})
    return [c.model_copy(update={"reason": None if c.holds else reasons.get(c.name)}) for c in evidence.claims]


def load(key: str) -> Record | None:
    """The recorded result; None where there is none yet."""
    path = RESULTS / f"{key}.json"
    if not path.is_file():
        return None
    record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    return record.model_copy(update={"claims": _explained(record, paper(key))})


def save(record: Record) -> Path:
    """Write the result in the place of an older one, whole or not at all."""
    path = RESULTS / f"{record.key}.json"
    write_whole(path, record.model_dump_json(indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there: a reader sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(half, 0o644)
        os.replace(half, path)
    except BaseException:
        os.unlink(half)
        raise


def stale(record: Record) -> list[str]:
    """The files that have changed since the record was made: those it depends on, by content."""
    now = fingerprints(paper(record.key))
    return sorted(name for name in {**now, **record.sources} if now.get(name) != record.sources.get(name))


def fingerprints(module: ModuleType) -> dict[str, str]:
    """{file: fingerprint} of the paper's module and its SOURCES."""
    own = Path(str(module.__file__))
    files = {own, *(file for pattern in module.SOURCES for file in PACKAGE.glob(pattern))}
    return {_name(file): fingerprint(file) for file in sorted(files)}


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix() if file.is_relative_to(PACKAGE) else file.name


def fingerprint(file: Path) -> str:
    """Of a Python file: what it does, whatever its comments, docstrings and layout. Of any other: its bytes."""
    content = file.read_bytes()
    if file.suffix == ".py":
        content = "\n".join(_code(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _code(node: Any) -> Iterator[str]:
    """The syntax tree in words, prose left out: docstrings, and the reasons for claims not shown."""
    if isinstance(node, ast.AST):
        if not _is_prose(node):
            yield type(node).__name__
            for name, value in ast.iter_fields(node):
                if value not in (None, []):  # so that a newer Python's additional, empty fields change nothing
                    yield name
                    yield from _code(value)
    elif isinstance(node, list):
        for item in node:
            yield from _code(item)
    else:
        yield repr(node)


def _is_prose(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(t, ast.Name) and t.id == "NOT_SHOWN" for t in targets)
