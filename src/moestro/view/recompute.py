"""What must hold around a model while something is in force in it: compiled code, recomputation, and `generate`.

- Compiled models (torch.compile) do not look at hooks that come later, so compiled code runs eagerly meanwhile.
- Gradient checkpointing runs a layer again in the backward pass, maybe after the block that edited it: the layer is
  then run in the situation of its first run, and observers count it once.
- Beam search and several return sequences repeat the rows of the caller's batch.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import nn
from transformers import GenerationMixin

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where a layer of transformers, and torch's CheckpointWrapper, keep what runs them again."""


def in_backward() -> bool:
    """Whether this thread runs a backward pass: what a layer computes then, it computes again."""
    return torch._C._current_graph_task_id() != -1


class _Eager:
    """Counts who needs compiled code to run eagerly; the first sets torch's stance, the last puts the old one back."""

    def __init__(self) -> None:
        self._lock, self._users, self._stance = threading.Lock(), 0, None

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._stance = torch.compiler.set_stance("force_eager")
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.__exit__(None, None, None)  # type: ignore[attr-defined]


EAGER = _Eager()


class _Held(threading.local):
    depth = 0


_held = _Held()
"""How deep this thread is inside functions that will be run again as they are run now."""


def refuse_checkpoint_by_hand() -> None:
    """Raise RuntimeError where the code that runs now will be run again, and nothing will say under which edits.

    Torch's checkpoint, called by other than a transformers layer, runs it again in the backward pass, which may come
    when other edits are in force, or none.
    """
    frame: Any = None if _held.depth or in_backward() else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise RuntimeError(
                "this model is edited inside torch.utils.checkpoint, which would run it again without these edits: "
                "leave that out and let the model checkpoint its layers, model.gradient_checkpointing_enable()"
            )
        frame = frame.f_back


class Recomputed:
    """A layer's checkpointing function, under which what is run again is run as it was the first time.

    `original`: what stood in its place. `remember()` gives a context manager factory for the second run.
    """

    def __init__(self, original: Callable[..., Any], remember: Callable[[], Callable[[], Any]]):
        self.original, self._remember = original, remember

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        as_then = self._remember()

        def run(*inputs: Any, **named: Any) -> Any:
            _held.depth += 1
            try:
                if not in_backward():
                    return function(*inputs, **named)
                with as_then():
                    return function(*inputs, **named)
            finally:
                _held.depth -= 1

        return self.original(run, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.original  # a copy of the model starts clean

    def __reduce__(self) -> Any:
        return itself, (self.original,)


def itself(value: Any) -> Any:
    """What a pickle calls to put the thing itself in the place of what stood for it."""
    return value


def wrap_checkpointing(stack: nn.Module, remember: Callable[[], Callable[[], Any]]) -> list[nn.Module]:
    """Let recomputed layers of `stack` run as the first time; returns the modules that were changed."""
    changed = []
    for module in stack.modules():
        for name in _CHECKPOINTS:
            function = vars(module).get(name)
            if callable(function) and not isinstance(function, Recomputed):
                setattr(module, name, Recomputed(function, remember))
                changed.append(module)
    return changed


def unwrap_checkpointing(modules: list[nn.Module]) -> None:
    for module in modules:
        for name in _CHECKPOINTS:
            if isinstance(function := vars(module).get(name), Recomputed):
                setattr(module, name, function.original)


class Repeats(threading.local):
    """How many rows of the running `generate` stand for each row of the caller's batch, in this thread."""

    copies = 1


class _Shadow:
    """A function in the place of a model's own method; in a copy of the model, the method itself."""

    def __init__(self, model: Any, name: str, run: Callable[..., Any]):
        self._model, self._name, self._run = model, name, run
        self._had = vars(model).get(name)
        vars(model)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own(memo[id(self._model)], self._name)

    def __reduce__(self) -> Any:
        return _own, (self._model, self._name)

    def remove(self) -> None:
        del vars(self._model)[self._name]
        if self._had is not None:
            vars(self._model)[self._name] = self._had


def _own(model: Any, name: str) -> Any:
    return types.MethodType(getattr(type(model), name), model)


class _Generating:
    """Notes how often a model's `generate` repeats the rows of its inputs, while it runs."""

    def __init__(self, model: Any, repeats: Repeats):
        self.users = 0
        generate, expand = model.generate, model._expand_inputs_for_generation

        def run(*args: Any, **kwargs: Any) -> Any:
            before = repeats.copies
            try:
                return generate(*args, **kwargs)
            finally:
                repeats.copies = before

        def noting(*inputs: Any, expand_size: int = 1, **more: Any) -> Any:
            repeats.copies = expand_size
            return expand(*inputs, expand_size=expand_size, **more)

        self._shadows = [_Shadow(model, "generate", run), _Shadow(model, "_expand_inputs_for_generation", noting)]

    def remove(self) -> None:
        for shadow in self._shadows:
            shadow.remove()


_lock = threading.Lock()
_generating: WeakKeyDictionary[nn.Module, _Generating] = WeakKeyDictionary()


@contextmanager
def counting_repeats(model: nn.Module, repeats: Repeats) -> Iterator[None]:
    """Keep `repeats` up to date while `model`, or a part of it, generates. Such blocks may overlap."""
    watched = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    with _lock:
        for module in watched:
            if module not in _generating:
                _generating[module] = _Generating(module, repeats)
            _generating[module].users += 1
    try:
        yield
    finally:
        with _lock:
            for module in watched:
                _generating[module].users -= 1
                if not _generating[module].users:
                    _generating.pop(module).remove()
