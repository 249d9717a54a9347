"""The models that come with the package: `quartet` (a small mixture of experts) and `solo` (its dense twin)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

NAMES = ("quartet", "solo")


def bundled_path(name: str) -> Path | None:
    """The checkpoint directory of a bundled model; None for any other name."""
    return Path(str(files(__name__) / name)) if name in NAMES else None
