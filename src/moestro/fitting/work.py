"""What a streamed fit keeps on disk until it is done, so that a killed one goes on where it stopped.

    WORK/calibration, before, after    one directory for each pass over data (see StreamView.observe)
    WORK/plan.json                     what `fitted` and `after` were made for: the experts to keep, and whether to save
    WORK/fitted                        the cut checkpoint, until it is measured and moves to its place

Each pass knows what it was made from and refuses anything else; another plan (from another budget, say) starts again
with saving.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import moestro.view.open as opening
from moestro.view.checkpoint import complete_directory

PASSES = ("calibration", "before", "after")


class Work:
    """A work directory. `path=None`: nothing is kept.

    Raises ValueError where it and the output directory `out` lie in each other.
    """

    def __init__(self, path: Path | None, out: Path | None):
        self.path = path
        if path is not None and out is not None:
            mine, theirs = path.resolve(), out.resolve()
            if mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
                raise ValueError(f"work={path} and out={out} lie in each other; choose another directory for one")

    def directory(self, name: str) -> Path | None:
        """Where the pass `name` keeps its state."""
        return None if self.path is None else self.path / name

    def begin(self, keep: Mapping[int, Sequence[int]], *, save: bool, format: str = "hf") -> None:
        """Drop what was made for another plan."""
        if self.path is None:
            return
        note = self.path / "plan.json"
        plan = json.dumps({"save": save and format, "keep": {str(index): list(ids) for index, ids in keep.items()}})
        if not note.is_file() or note.read_text() != plan:
            for name in ("fitted", "after"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            note.write_text(plan)
        for half in self.path.glob(".fitted-*"):  # of a save that was killed
            shutil.rmtree(half)

    def saved(self, view: Any, format: str = "hf") -> Any:
        """The checkpoint that the streamed `view` plans, written if it is not there yet, and opened."""
        assert self.path is not None
        if not (self.path / "fitted").is_dir():
            shutil.rmtree(self.path / "after", ignore_errors=True)  # it knows the checkpoint by its files' dates
            view.save(self.path / "fitted", format=format)
        return opening.open(self.path / "fitted", stream=True)

    def remove(self) -> None:
        """Delete all that a fit puts here, and the directory if nothing else is in it."""
        if self.path is None:
            return
        for name in (*PASSES, "fitted"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / "plan.json").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    @contextmanager
    def published(self, out: str | Path, *, overwrite: bool) -> Iterator[Path]:
        """The checkpoint's directory, which moves to `out` when the block ends well and stays for later when not.

        Raises FileExistsError as `complete_directory` does, before anything else.
        """
        assert self.path is not None
        with suppress(_Allowed), complete_directory(out, overwrite=overwrite):
            raise _Allowed
        yield self.path / "fitted"
        with complete_directory(out, overwrite=overwrite) as half:
            half.rmdir()
            shutil.move(self.path / "fitted", half)


class _Allowed(Exception):
    """The directory may be written; nothing has been."""
