"""What is in force in one stack: edits and an observation, for all views and threads alike.

The truth is a snapshot (see `situation`) that a lock guards; what one forward pass knows belongs to its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moestro.view.edit import Edit
from moestro.view.events import NEEDS, Batch, Observer, cached_tokens
from moestro.view.experts import is_experts
from moestro.view.head_taps import HeadTaps
from moestro.view.heads import AnyObserver, HeadEdit
from moestro.view.layers import LayerKey, MoELayer
from moestro.view.obstacles import why_no_slots
from moestro.view.recompute import (
    EAGER,
    Repeats,
    counting_repeats,
    in_backward,
    itself,
    unwrap_checkpointing,
    wrap_checkpointing,
)
from moestro.view.residual import watch_norms
from moestro.view.rules import silenced
from moestro.view.situation import (
    Edits,
    Observation,
    Pass,
    Situation,
    check_edit,
    check_together,
    situation,
)

OBSERVED = "moestro_observed"
"""The experts backend that hands out what each slot gave."""
HEAD_NEEDS = frozenset({"heads", "last_patterns", "patterns"})
SLOT_NEEDS = frozenset({"maxima", "norms", "outputs"})
_NOTHING = Situation()


class Borrowed(str):
    """The name of a backend while it serves this model; in a copy of the model, or one that was pickled, the former."""

    former: str | None

    def __new__(cls, name: str, former: str | None) -> Borrowed:
        new = super().__new__(cls, name)
        new.former = former
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.former

    def __reduce__(self) -> Any:
        return itself, (self.former,)


class _Here(threading.local):
    """What this thread is about: the pass under way, the batch given for the next, a situation of its own."""

    now: Pass | None = None
    all_given: tuple[tuple[Batch], ...] = ()
    situation: Situation | None = None

    @property
    def given(self) -> Batch | None:
        return self.all_given[-1][0] if self.all_given else None


class InForce:
    """The edits and the observation of one stack.

    `hang(situations, layers)` is called with the lock held whenever hooks may be needed, or no longer.
    """

    def __init__(
        self,
        stack: nn.Module,
        lock: Any,
        hang: Callable[[Sequence[Situation], Sequence[MoELayer]], None],
    ):
        self.stack, self.lock, self._hang = stack, lock, hang
        self._here, self._repeats = _Here(), Repeats()
        self.heads = HeadTaps(stack, self.now, self.here)
        self._layers: dict[str, MoELayer] = {}
        self._situation = _NOTHING
        self._again: list[Situation] = []
        self._checkpointed: list[nn.Module] = []
        self._backends: dict[int, list[Any]] = {}
        self._columns: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def here(self) -> Situation:
        """What is in force for the code that this thread runs now."""
        if silenced():
            return _NOTHING
        if self._here.situation is None and in_backward():  # run again, and nothing was in force the first time
            return _NOTHING
        return self._here.situation or self._situation

    @property
    def active(self) -> bool:
        """Whether an edit or an observation is under way."""
        return self._situation.active

    @property
    def edited(self) -> bool:
        """Whether an edit is in force."""
        return bool(self._situation.blocks)

    @property
    def batch(self) -> Batch | None:
        """The batch of the forward pass under way in this thread; None where nothing tells it."""
        here = self._here
        return here.given if here.now is None else here.now.batch

    def know(self, layers: Mapping[LayerKey, MoELayer]) -> None:
        """Take in the layers of a view."""
        with self.lock:
            self._layers |= {layer.path: layer for layer in layers.values()}

    @contextmanager
    def editing(
        self, edits: Sequence[Edit | HeadEdit], layers: Mapping[LayerKey, MoELayer], model: nn.Module
    ) -> Iterator[None]:
        """Run the edits until the block ends, after all those already active. Blocks may end in any order.

        `layers`: by the keys under which edits name them. `model`: what the caller generates with.
        """
        of_heads = tuple(edit for edit in edits if isinstance(edit, HeadEdit))
        of_experts = tuple(edit for edit in edits if not isinstance(edit, HeadEdit))
        block = Edits(layers, of_experts, of_heads)
        for edit in of_experts:
            check_edit(edit, layers)
        self.heads.check(of_heads)
        self.know(layers)
        with ExitStack() as undo:
            with self.lock:
                check_together([*self._situation.blocks, block])
                if of_heads:
                    undo.enter_context(self.heads.installed())
                if any(edit.rows is not None for edit in edits):
                    undo.enter_context(counting_repeats(model, self._repeats))
                undo.callback(self._leave, block)
                self._put([*self._situation.blocks, block], self._situation.observation)
            yield

    def _leave(self, block: Edits) -> None:
        with self.lock:
            self._put([b for b in self._situation.blocks if b is not block], self._situation.observation)

    @contextmanager
    def observing(
        self, observers: Sequence[AnyObserver], layers: Mapping[LayerKey, MoELayer], *, given_only: bool = False
    ) -> Iterator[None]:
        """Hand events of forward passes to the observers until the block ends.

        `given_only`: only of those whose batch is given by `on_batch`.
        """
        needs = frozenset().union(*(o.needs for o in observers))
        if needs - NEEDS:
            raise ValueError(f"observers need {sorted(needs - NEEDS)}; known needs are {sorted(NEEDS)}")
        of_heads: tuple[Any, ...] = tuple(o for o in observers if o.needs & HEAD_NEEDS)
        of_experts = tuple(o for o in observers if isinstance(o, Observer))
        if of_heads:
            self.heads.check_observers(of_heads)
        if needs & SLOT_NEEDS:
            _check_slots(layers)
        seen = Observation(layers, of_experts, of_heads, needs, given_only)
        self.know(layers)
        with ExitStack() as undo:
            with self.lock:
                if self._situation.observation is not None:
                    raise RuntimeError("an observation is already running on this model; give it all observers at once")
                if of_heads:
                    undo.enter_context(self.heads.installed())
                if needs & SLOT_NEEDS:
                    undo.enter_context(self._backend(OBSERVED, layers.values()))
                if "residual" in needs:
                    watch_norms(self.stack, list(layers.values()), self.now, undo)
                undo.callback(self._stop_observing)
                self._put(self._situation.blocks, seen)
            yield

    def _stop_observing(self) -> None:
        with self.lock:
            self._put(self._situation.blocks, None)
        self._here.now = None

    @contextmanager
    def on_batch(self, batch: Batch) -> Iterator[None]:
        """Say where the tokens of this thread's next forward passes come from; else the decoder's arguments tell."""
        here = self._here
        mine = (batch,)  # such blocks may end in any order: each takes its own away
        here.all_given, here.now = (*here.all_given, mine), None
        try:
            yield
        finally:
            here.all_given, here.now = tuple(one for one in here.all_given if one is not mine), None

    def _put(self, blocks: Sequence[Edits], observation: Observation | None) -> None:
        """Let this, and nothing else, be in force. The lock is held."""
        was = self._situation.active
        self._situation = situation(blocks, self._layers.values(), observation)
        if self._situation.active and not was:
            EAGER.enter()
        self._renew()
        if was and not self._situation.active:
            EAGER.leave()
            unwrap_checkpointing(self._checkpointed)
            self._checkpointed = []
            self._here.now = None

    def _renew(self) -> None:
        self._hang([s for s in (self._situation, *self._again) if s.active], [*self._layers.values()])

    @contextmanager
    def _backend(self, name: str, layers: Any) -> Iterator[None]:
        """Run the experts of `layers` on the backend `name`. Such blocks may overlap."""
        configs = {id(c): c for layer in layers if (c := getattr(layer.experts, "config", None)) is not None}
        with self.lock:
            for number, config in configs.items():
                entry = self._backends.setdefault(number, [config, config._experts_implementation, 0])
                entry[2] += 1
                config._experts_implementation = Borrowed(name, entry[1])
        try:
            yield
        finally:
            with self.lock:
                for number, config in configs.items():
                    entry = self._backends[number]
                    entry[2] -= 1
                    if not entry[2]:
                        config._experts_implementation = entry[1]
                        del self._backends[number]

    # What gradient checkpointing runs again

    def remember(self) -> Callable[[], Any]:
        return partial(self._as_then, self.here(), self.now().as_it_is())

    @contextmanager
    def _as_then(self, then: Situation, now: Pass) -> Iterator[None]:
        """Run what is recomputed as it was run the first time, whatever is in force by now."""
        here = self._here
        before = here.situation, here.now, here.all_given
        with ExitStack() as undo:
            if then.active:
                with self.lock:
                    EAGER.enter()
                    undo.callback(EAGER.leave)
                    self._again.append(then)
                    undo.callback(self._forget, then)
                    self._renew()
                if then.head_edits or (then.observation and then.observation.of_heads):
                    undo.enter_context(self.heads.installed())
                if then.observation and then.observation.needs & SLOT_NEEDS:
                    undo.enter_context(self._backend(OBSERVED, then.observation.layers.values()))
            here.situation, here.now = then, now
            here.all_given = ((now.batch,),) if now.given and now.batch is not None else ()
            try:
                yield
            finally:
                here.situation, here.now, here.all_given = before

    def _forget(self, then: Situation) -> None:
        with self.lock:
            self._again = [s for s in self._again if s is not then]
            self._renew()

    # One forward pass

    def now(self) -> Pass:
        if self._here.now is None:
            given = self._here.given
            self._here.now = Pass(given, given=given is not None)
        return self._here.now

    def begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.here().active:
            return
        here = self._here
        here.now = Pass(here.given, given=here.given is not None)
        if here.given is None:
            given = dict(zip(("input_ids", "attention_mask"), args)) | kwargs
            cache = given.pop("past_key_values", None)
            before = cached_tokens(cache)  # the pass is about to fill it
            read = partial(self._batch_of, given, cache, before, self._repeats.copies)
            here.now.read_batch = read
            if isinstance(given.get("attention_mask"), Tensor | Mapping) and given["attention_mask"] is not None:
                mask = given["attention_mask"]
                if isinstance(mask, Mapping) or mask.dim() == 4:
                    _ = here.now.batch  # later masks of this cache may not tell its padding
        if stack.training and torch.is_grad_enabled():
            with self.lock:
                self._checkpointed += wrap_checkpointing(stack, self.remember)

    def _batch_of(self, given: Mapping[str, Any], cache: Any, before: int, copies: int) -> Batch | None:
        known = self._columns.get(cache) if cache is not None else None
        batch = Batch.of_forward(given, before, known)
        if batch is None:
            return None
        if cache is not None and batch.real is not None:
            self._columns[cache] = batch.real
        return replace(batch, copies=copies)


def _check_slots(layers: Mapping[LayerKey, MoELayer]) -> None:
    """Raise ValueError where the slots of a layer's experts cannot be seen."""
    for key, layer in layers.items():
        name = type(layer.experts).__name__
        if not is_experts(layer.experts):
            raise ValueError(
                f"layer {key}: its experts were replaced by {name}, which has no slots; observers that need norms, "
                "maxima or outputs cannot run"
            )
        if why := why_no_slots(layer.experts):
            raise ValueError(
                f"layer {key}: {why}; observers that need norms, maxima or outputs cannot run there, those that need "
                "the routing alone can"
            )
