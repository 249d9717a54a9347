"""The folder of a training run: made by us or left alone, one run at a time, never another run's.

RUN/moestro-run.json    written first: that this is a run, and what its data is made of
RUN/data/               its packed rows
RUN/checkpoint.pt, metrics.jsonl, train.yaml, model/, report.html       see train/trainer.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moestro.directories import check_apart, some_path
from moestro.train import checkpoint

MARK = "moestro-run.json"
OLD_MARK = "data/made_of.json"
"""Of runs that were started before there was a mark."""


def check_folder(folder: Path, made_of: Mapping[str, Any], reads: Iterable[Path] = ()) -> None:
    """Raise before any work where a run must not be written to `folder`; `made_of` says what its data is made of.

    Raises:
        ValueError: `folder` is empty as a string; is, holds or lies in one of `reads`; holds a run on other data.
        FileExistsError: it is a file, or a directory that holds something else than a run.
    """
    some_path(folder, "out")
    check_apart(folder, reads)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a directory; choose another name with --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file() and not (folder / OLD_MARK).is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FileExistsError(
            f"{folder} is no folder of a moestro run (it holds {', '.join(names[:3])}{more}); choose another with --out"
        )
    if (folder / checkpoint.FILE).exists() and (known := data_of(folder)) is not None:
        checkpoint.check_same(known, json.loads(json.dumps(made_of)), folder)


def data_of(folder: Path) -> dict[str, Any] | None:
    """What the packed rows of a run are made of; None where that is not known."""
    try:
        return dict(json.loads((folder / MARK).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / MARK} cannot be read ({error}); start anew in another directory") from None


def mark(folder: Path, made_of: Mapping[str, Any]) -> None:
    """State that `folder`, which is made where it is missing, is a run's, and what its data is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{MARK}.part"
    draft.write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    os.replace(draft, folder / MARK)
