"""How a stack is run one decoder layer at a time, and what lies between two layers.

`Walk` runs one layer inside the stack's own forward, `Hidden` keeps what the layers hand on, `Progress` keeps what is
needed to go on after a kill.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.view.heads import AnyObserver


@dataclass
class Handed:
    """What one batch's layers handed on: outputs by layer, and what they wrote into containers they were given.

    Outputs are tensors or tuples of them; only the last layer's is kept, unless a later layer wants more.
    """

    outputs: dict[int, Any] = field(default_factory=dict)
    written: dict[int, list[tuple[str, Any, Any]]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Handed:
        def own(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device)
            return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

        move = partial(_each, own)
        return Handed(
            {j: move(out) for j, out in self.outputs.items()},
            {j: [(arg, key, move(value)) for arg, key, value in entries] for j, entries in self.written.items()},
        )


class Walk:
    """Runs the decoder layers of a stack one at a time, for one batch after the other.

    `model`: the stack, or a model around it, which may give the layers other positions and masks than the stack alone.
    """

    def __init__(self, model: Any, stack: nn.Module, decoder: Sequence[nn.Module]):
        self._model, self._stack, self._decoder = model, stack, decoder
        self._current = 0
        self._handed = Handed()
        self._out: Any = None
        self._ran = False

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Let decoder layer `index` run; those before it play back, those behind it hand on what it gave."""
        self._current = index
        with ExitStack() as undo:
            for number, module in enumerate(self._decoder):
                forward = partial(self._play, number)
                if number == index:
                    forward = partial(self._run, module.forward)
                undo.callback(delattr, module, "forward")
                module.forward = forward  # type: ignore[method-assign]
            yield

    def run(self, inputs: Mapping[str, Tensor], handed: Handed) -> Handed:
        """One batch: what the layer and those before it hand on."""
        with self._playing(handed):
            self._up_to_the_stack(inputs)
            return Handed({**handed.outputs, self._current: self._out}, self._handed.written)

    def logits(self, inputs: Mapping[str, Tensor], handed: Handed) -> Tensor:
        """One batch through the last layer and what the model does behind it: the logits [B, T, V]."""
        text = self._model.config.get_text_config()  # a loss of all layers' router logits cannot be had here
        silent = {"output_router_logits": False} if getattr(text, "output_router_logits", False) else {}
        with self._playing(handed):
            return self._model(**inputs, use_cache=False, **silent).logits

    @contextmanager
    def _playing(self, handed: Handed) -> Iterator[None]:
        self._handed, self._out, self._ran = handed, None, False
        yield
        if not self._ran:
            raise RuntimeError(f"{type(self._stack).__name__} did not call its decoder layer {self._current}")
        self._handed, self._out = Handed(), None

    def _up_to_the_stack(self, inputs: Mapping[str, Tensor]) -> None:
        """The model's forward as far as the stack's end: what lies behind it has no weights yet."""
        if self._model is self._stack:
            self._stack(**inputs, use_cache=False)
            return
        hook = self._stack.register_forward_hook(_stop)
        try:
            self._model(**inputs, use_cache=False)
        except _StackRan:
            pass
        finally:
            hook.remove()

    def _play(self, number: int, *args: Any, **kwargs: Any) -> Any:
        if number > self._current:
            return self._out
        for argument, key, value in self._handed.written.get(number, ()):
            kwargs[argument][key] = value
        outputs = self._handed.outputs
        return outputs[number] if number in outputs else outputs[max(outputs)]

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        self._out, self._ran = forward(*args, **kwargs), True
        written = [
            (name, key, value)
            for name, known in before.items()
            for key, value in kwargs[name].items()
            if key not in known or known[key] is not value
        ]
        if written:
            self._handed = Handed(self._handed.outputs, {**self._handed.written, self._current: written})
        return self._out

    def reader_of_more(self, inputs: Mapping[str, Tensor], handed: Handed) -> int | None:
        """The first layer whose arguments depend on more than what the layer right before it handed on; else None.

        All layers hand on the same output, then some of them another one. Two different layers differ in a bit of
        their numbers, so a change in the layers with that bit reveals whether layer n reads one besides n - 1.
        """
        (out,) = handed.outputs.values()
        other = _changed(out)
        same = self._arguments(inputs, out, other, set())
        layers = range(len(self._decoder))
        for bit in range(len(layers).bit_length()):
            for side in (0, 1):
                changed = {j for j in layers if j >> bit & 1 == side}
                seen = self._arguments(inputs, out, other, changed)
                for number in layers[2:]:
                    if number - 1 not in changed and seen[number] != same[number]:
                        return number
        return None

    def _arguments(self, inputs: Mapping[str, Tensor], out: Any, other: Any, changed: set[int]) -> list[list[float]]:
        """A digest of what each layer is called with when the layers in `changed` give `other`, the rest `out`."""
        seen: list[list[float]] = [[] for _ in self._decoder]

        def play(number: int, *args: Any, **kwargs: Any) -> Any:
            seen[number] = list(_digest([*args, kwargs]))
            return _copied(other if number in changed else out)

        with ExitStack() as undo:
            for number, module in enumerate(self._decoder):
                undo.callback(delattr, module, "forward")
                module.forward = partial(play, number)  # type: ignore[method-assign]
            self._up_to_the_stack(inputs)
        return seen


class _StackRan(Exception):
    """Ends a forward that went far enough."""


def _stop(*_: Any) -> None:
    raise _StackRan


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed, also those in tuples and lists."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(change, part) for part in value) if isinstance(value, tuple | list) else value


_copied = partial(_each, torch.clone)
_changed = partial(_each, lambda t: 0.25 - 0.5 * t if t.is_floating_point() else t.flip(-1))


def _digest(value: Any) -> Iterator[float]:
    if isinstance(value, Tensor):
        real = torch.view_as_real(value) if value.is_complex() else value
        flat = real.detach().reshape(-1).double().nan_to_num(neginf=-1.0)
        yield flat.sum().item()
        yield (flat * torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)).sum().item()
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _digest(part)


class Hidden:
    """What the layers handed on, by batch: in memory up to `limit` bytes, in files of `directory` beyond.

    While a layer runs, what it reads stays as it is and what it gives is gathered beside it (in memory it takes the
    place at once); `turn` makes the latter the former.
    """

    def __init__(self, directory: Path, batches: int, limit: int):
        self._directory, self._batches, self._limit = directory, batches, limit
        self._memory: dict[int, Handed] = {}
        self._on_disk = limit == 0
        self.keep_all = False
        self.generation = 0

    def get(self, place: int, device: torch.device | str) -> Handed:
        if self.generation == 0:
            return Handed()
        if not self._on_disk:
            return self._memory[place].to(device)
        return Handed(*torch.load(self._file(self.generation, place), weights_only=True)).to(device)

    def put(self, place: int, handed: Handed) -> None:
        last = max(handed.outputs)
        if not self.keep_all:
            handed = Handed({last: handed.outputs[last]}, handed.written)
        handed = handed.to("cpu")
        if self.generation == 0 and place == 0:
            self._on_disk = self._on_disk or _bytes(handed) * self._batches > self._limit
        if self._on_disk:
            file = self._file(self.generation + 1, place)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save((handed.outputs, handed.written), file)
        else:
            self._memory[place] = handed

    def turn(self) -> None:
        self.generation += 1

    def clear(self, *, but: int) -> None:
        """Delete the files of all generations but one."""
        for old in self._directory.glob("hidden-*"):
            if old.name != f"hidden-{but}":
                shutil.rmtree(old, ignore_errors=True)

    def _file(self, generation: int, place: int) -> Path:
        return self._directory / f"hidden-{generation}" / f"{place}.pt"


def _bytes(handed: Handed) -> int:
    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        return sum(map(size, value)) if isinstance(value, tuple | list) else 0

    return sum(size(out) for out in handed.outputs.values())


class Progress:
    """The state of an observation in a directory: fingerprint, next layer, observers.

    Everything of a finished layer is written beside what is there; replacing `progress.json` makes it count.

    Raises ValueError where the directory holds another observation.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any]):
        self._directory, self._fingerprint = directory, json.loads(json.dumps(fingerprint))
        self._file = directory / "progress.json"
        directory.mkdir(parents=True, exist_ok=True)
        if not self._file.is_file() and any(f for f in directory.iterdir() if not _ours(f)):
            raise ValueError(f"{directory} holds other files; give work= a directory of its own")
        self._found: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        known = self._found.get("fingerprint", self._fingerprint)
        differs = [name for name, value in self._fingerprint.items() if known.get(name) != value]
        if differs:
            raise ValueError(
                f"{directory} holds an observation with other {' and '.join(differs)}; "
                "give work= another directory, or delete this one"
            )

    def resume(self, observers: Sequence[AnyObserver], hidden: Hidden) -> int:
        """Bring observers to where they were; returns the layer to go on with."""
        if not self._found:
            hidden.clear(but=0)
            try:
                pickle.dumps([vars(observer) for observer in observers])
            except Exception as e:
                raise ValueError(f"work= must keep the observers, and one of them cannot be pickled: {e}") from e
            return 0
        with open(self._directory / self._found["observers"], "rb") as file:
            for mine, stored in zip(observers, pickle.load(file), strict=True):
                vars(mine).clear()
                vars(mine).update(vars(stored))
        hidden.generation, hidden.keep_all = self._found["layer"], self._found["keep_all"]
        return int(self._found["layer"])

    def commit(self, layer: int, observers: Sequence[AnyObserver], hidden: Hidden) -> None:
        """Make what has been observed up to `layer` (exclusive) count."""
        name = f"observers-{layer}.pickle"
        with open(self._directory / name, "wb") as file:
            pickle.dump(list(observers), file)
            file.flush()
            os.fsync(file.fileno())
        state = {"layer": layer, "observers": name, "keep_all": hidden.keep_all, "fingerprint": self._fingerprint}
        half = self._file.with_suffix(".tmp")
        half.write_text(json.dumps(state))
        os.replace(half, self._file)
        hidden.clear(but=layer)
        for old in self._directory.glob("observers-*.pickle"):
            if old.name != name:
                old.unlink()


def _ours(file: Path) -> bool:
    return re.fullmatch(r"hidden-\d+|observers-\d+\.pickle|progress\.tmp", file.name) is not None
