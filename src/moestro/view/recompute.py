"""What must hold around a model while something is in force in it: compiled code, recomputation, and `generate`.

- Compiled models (torch.compile) do not look at hooks that come later, so compiled code runs eagerly meanwhile.
- Gradient checkpointing runs a layer again in the backward pass, maybe after the block that edited it: the layer is
  then run in the situation of its first run, and observers count it once.
- Beam search and several return sequences repeat the rows of the caller's batch.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch.utils.checkpoint import CheckpointFunction
from transformers import GenerationMixin

_lock = threading.Lock()


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


@runtime_checkable
class Recorder(Protocol):
    """Whoever must know how things were when a layer ran, for when it is run again."""

    def remember(self) -> Callable[[], AbstractContextManager[Any]]:
        """What makes a context in which everything is as it is now."""
        ...


_recorders: WeakSet[Any] = WeakSet()


def record_recomputation(recorder: Recorder) -> None:
    """Let what torch.utils.checkpoint runs again run in the context that `recorder` remembers of its first run.

    Both kinds of checkpointing, whoever asks for them: a layer of transformers, a wrapper, the caller. What runs again
    what it ran by other means acts by what is in force at that moment.
    """
    with _lock:
        _recorders.add(recorder)
        if not isinstance(vars(CheckpointFunction).get("apply"), staticmethod):
            reentrant, other = CheckpointFunction.apply, checkpointing._checkpoint_without_reentrant_generator
            CheckpointFunction.apply = staticmethod(_remembering(reentrant))  # type: ignore[method-assign]
            checkpointing._checkpoint_without_reentrant_generator = _remembering(other)


def _remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checkpoint)
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _lock:
            recorders = [*_recorders]
        contexts = [recorder.remember() for recorder in recorders]

        @wraps(function, updated=())
        def as_then(*inputs: Any, **named: Any) -> Any:
            if not in_backward():
                return function(*inputs, **named)
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                return function(*inputs, **named)

        return checkpoint(as_then, *args, **kwargs)

    return run


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
