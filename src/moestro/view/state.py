"""What is true of a model that is open, kept once, with the model.

The stack (the part that turns token ids into hidden states) carries one `ModelState`. Every view of the model, in any
thread, reads and changes that one; a copy of the model, or one that was pickled, starts with no edit and no observer in
force, and keeps where it came from and what has been done to it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

_ATTRIBUTE = "_moestro_state"


class LiveHook:
    """A hook that serves a live model: in a copy of the model, or one that was pickled, it does nothing."""

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _Copied()

    def __reduce__(self) -> Any:
        return _Copied, ()


class _Copied:
    """What a LiveHook is in a copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class ModelState:
    """What all views of one model share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while anything of this, or the weights, is changed."""
        self.source: Path | None = None
        """The checkpoint directory that the model was loaded from; None where it came from memory or the hub."""
        self.lineage: list[Any] = []
        """The recipes (see `moestro.recipe`) that had made the checkpoint before it was loaded: oldest first."""
        self.recipe: list[Any] = []
        """The operations done to the model since it was loaded, in order."""
        self.original_ids: dict[str, list[int]] = {}
        """{name of the MoE block within the stack: for each present expert, its number in the first model of the
        lineage}; a block that is not in it has all of its experts."""
        self.made_on: Any = None
        """What `recipe` was begun on (see `moestro.recipe.MadeOn`); None where nothing has been done."""
        self.stated: dict[str, int] = {}
        """{name of a stack's first MoE block: the number of experts that the config states for that stack}"""
        self.taps: Any = None
        """The hooks that serve edits and observers (see `taps`); made when first needed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        if self.taps is not None:
            self.taps.clean(memo)
        copied = ModelState()
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        kept = ("source", "lineage", "recipe", "original_ids", "made_on", "stated")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(kept)


def state_of(stack: nn.Module) -> ModelState:
    """The state that lives with `stack`; made when first asked for."""
    found = stack.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = stack.__dict__.setdefault(_ATTRIBUTE, ModelState())
    return found
