"""Output directories: complete or absent, one writer at a time, and nothing in them lost that is not ours.

    OUT/moestro-files.json     what was written there: {file: [bytes, SHA-256 of a small file or null]}
    .OUT-xxxxxxxx/             beside OUT, while it is written; moved to OUT when it is complete
    .OUT.lock                  beside OUT, held by the process that writes; the system releases it however that ends

What a killed run leaves of these is cleaned up by the next that writes to OUT.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import typer

MANIFEST = "moestro-files.json"
DIGEST_BYTES = 1_000_000
"""Files up to this size are known by their content, larger ones by their size."""
OURS = (
    *("config.json", "generation_config.json", "moestro.json", "student.json", "recipe.json"),
    *("model*.safetensors", "student.safetensors", "model.safetensors.index.json", "report.json", "report.html"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "*.tiktoken",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("look.html", "*.parquet", "routing_profile.csv", "routing_profile.json"),
)
"""Names that a directory without a manifest may have from moestro or transformers' `save_pretrained`."""


def some_path(value: str | Path, name: str) -> Path:
    """`value` as a path. Raises ValueError for an empty string and for `Path("")`, which is `Path(".")` to Python."""
    if not str(value).strip():
        raise ValueError(f"{name}={str(value)!r} names no file or directory; give its name")
    if isinstance(value, Path) and str(value) == ".":
        raise ValueError(f"{name}=Path('.') may be an empty string; for the current directory, write '.' or Path.cwd()")
    return Path(value)


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


def public_name(name: str) -> str:
    """A model's name as files that may be published state it: of a directory the last part, since the path tells of
    the user and the machine."""
    return Path(name).resolve().name if Path(name).is_dir() or Path(name).is_absolute() else name


def check_apart(path: str | Path, others: Iterable[str | Path], name: str = "out") -> None:
    """Raise ValueError where `path` is, lies in, or holds one of the directories and files that are read.

    Links, relative spellings and other mounts of the same directory are seen through.
    """
    mine = Path(os.path.realpath(path))
    for other in others:
        theirs = Path(os.path.realpath(other))
        if not theirs.exists():
            continue
        what = "directory" if theirs.is_dir() else "file"
        relation = None
        if _same(mine, theirs):
            relation = "is"
        elif any(_same(parent, theirs) for parent in mine.parents):
            relation = "lies in"
        elif any(_same(parent, mine) for parent in theirs.parents):
            relation = "holds"
        if relation:
            raise ValueError(
                f"{name}={path} {relation} the {what} that model or data are read from, {other}; choose another place"
            )


def _same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Keep other threads and processes from writing to `path` until the block ends.

    Raises BlockingIOError that names the process that holds it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    while True:
        stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115  it is closed on every way out
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another run"
            stream.close()
            raise BlockingIOError(
                errno.EAGAIN, f"{path} is being written by {holder}; wait for it, or choose another directory"
            ) from None
        if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            break
        stream.close()  # its holder was done and took the file away in between
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename}")
        stream.flush()
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def check_writable(path: Path, *, overwrite: bool, known_by: str, kind: str) -> None:
    """Raise FileExistsError where writing `path` is not allowed or would lose what was not written there by us."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a directory; choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another directory or pass overwrite (--overwrite)")
    if Path.cwd().resolve().is_relative_to(path.resolve()) or Path.home().resolve().is_relative_to(path.resolve()):
        raise FileExistsError(f"{path} is not overwritten: all its other files would be lost; choose another directory")
    if path.exists() and any(path.iterdir()) and not (path / known_by).exists():
        raise FileExistsError(f"{path} holds something else than {kind}; delete it or choose another directory")
    if path.exists() and (foreign := not_ours(path)):
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise FileExistsError(
            f"{path} is not overwritten: moestro did not write {names} (or it was changed since), and that would be "
            "lost; move it away or choose another directory"
        )


def not_ours(path: Path) -> list[str]:
    """What in a directory was not written by us, or was changed since: files, links and empty folders, sorted."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return sorted(e.name for e in path.iterdir() if e.is_dir() or not any(fnmatch(e.name, n) for n in OURS))
    try:
        written = json.loads(manifest.read_text(encoding="utf-8"))
        known = {str(name): list(stated) for name, stated in written["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return [MANIFEST]
    foreign = []
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if entry.is_dir() and not entry.is_symlink():
            if not any(entry.iterdir()):
                foreign.append(name)
        elif name != MANIFEST and known.get(name) != _print_of(entry):
            foreign.append(name)
    return sorted(foreign)


def _print_of(file: Path) -> list[int | str | None]:
    if file.is_symlink():
        return [0, os.readlink(file)]
    size = file.stat().st_size
    return [size, hashlib.sha256(file.read_bytes()).hexdigest() if size <= DIGEST_BYTES else None]


def write_manifest(directory: Path) -> None:
    """State all that is in `directory` now as written by us."""
    files = sorted(f for f in directory.rglob("*") if f.name != MANIFEST and (f.is_symlink() or f.is_file()))
    stated = {f.relative_to(directory).as_posix(): _print_of(f) for f in files}
    (directory / MANIFEST).write_text(json.dumps({"files": stated}, indent=1), encoding="utf-8")


def clean_up_after_kill(path: Path) -> None:
    """Put right what a killed run left beside `path`; its lock is held. A directory that was moved away comes back."""
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}")
    for left in [e for e in path.parent.iterdir() if pattern.fullmatch(e.name) and e.is_dir() and not e.is_symlink()]:
        if {e.name for e in left.iterdir()} - {path.name, f"new-{path.name}"}:
            continue  # not of this making
        if (left / path.name).exists() and not path.exists():
            (left / path.name).rename(path)
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def complete_directory(
    path: str | Path,
    *,
    overwrite: bool,
    size: int = 0,
    known_by: str = "config.json",
    kind: str = "a checkpoint",
    apart_from: Iterable[str | Path] = (),
) -> Iterator[Path]:
    """A directory to write into that appears at `path` when the block ends well, and not at all when it does not.

    `known_by`: the file by which a directory of this `kind` is known, so that no other is overwritten. `apart_from`:
    directories that are read meanwhile. The place is locked until the block ends.

    Raises:
        ValueError: `path` is empty, or is, holds or lies in a directory of `apart_from`.
        FileExistsError: `path` is there and not to be overwritten, or holds something that was not written by us.
        BlockingIOError: another run is writing to `path`.
        OSError: the disk cannot hold `size` bytes; checked before, and told clearly when it fills up on the way.
    """
    path = some_path(path, "out").absolute()
    check_apart(path, apart_from)
    check_writable(path, overwrite=overwrite, known_by=known_by, kind=kind)
    with lock(path):
        clean_up_after_kill(path)
        check_writable(path, overwrite=overwrite, known_by=known_by, kind=kind)
        with _moved_when_complete(path, overwrite, size, known_by, kind) as half:
            yield half


@contextmanager
def _moved_when_complete(path: Path, overwrite: bool, size: int, known_by: str, kind: str) -> Iterator[Path]:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{path} needs {size:,} bytes and the disk has {free:,} left; nothing was written")
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    half, old = work / f"new-{path.name}", work / path.name
    try:
        half.mkdir(parents=True)
        yield half
        for file in half.rglob("*.safetensors"):  # the library makes its files for their owner alone
            file.chmod(half.stat().st_mode & 0o666)
        write_manifest(half)
        if path.exists():
            check_writable(path, overwrite=overwrite, known_by=known_by, kind=kind)  # it may have changed meanwhile
            path.rename(old)
        half.rename(path)
    except BaseException as e:
        if old.exists() and not path.exists():
            old.rename(path)
        if (isinstance(e, OSError) and e.errno == errno.ENOSPC) or "No space left" in str(e):
            raise OSError(errno.ENOSPC, f"the disk filled up while writing {path}; nothing is left behind") from e
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
