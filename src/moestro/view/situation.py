"""What is in force in a model at one moment, and what one forward pass knows.

A `Situation` is a snapshot that never changes: whoever enters or leaves an edit or an observation puts a new one in its
place. A layer that gradient checkpointing runs again is given the snapshot of its first run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import ref

from torch import Tensor, nn

from moestro.routing import Routing
from moestro.view.edit import Edit, ForceOn, SwitchOff
from moestro.view.events import Batch, Observer
from moestro.view.heads import HeadEdit, HeadObserver
from moestro.view.layers import LayerKey, MoELayer


@dataclass(frozen=True, eq=False)
class Edits:
    """What one `with view.edits(...)` block brought in, and the layers by the keys that its view gives them."""

    layers: Mapping[LayerKey, MoELayer]
    of_experts: tuple[Edit, ...]
    of_heads: tuple[HeadEdit, ...]


@dataclass(frozen=True, eq=False)
class Observation:
    """Observers of one pass over data, or of whatever runs inside a `with view.observing(...)` block."""

    layers: Mapping[LayerKey, MoELayer]
    observers: tuple[Observer, ...]
    of_heads: tuple[HeadObserver, ...]
    needs: frozenset[str]
    given_only: bool
    """Whether passes count only where a batch was given for them: then other threads' passes are left out."""
    keys: Mapping[str, LayerKey] = field(init=False)
    """{path of the layer: its key}"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", {layer.path: key for key, layer in self.layers.items()})


class Acting(NamedTuple):
    """The edits of one layer, in order, by what they act on, each with the key by which it knows the layer."""

    on_logits: list[tuple[Edit, LayerKey]]
    on_routing: list[tuple[Edit, LayerKey]]
    on_output: list[tuple[Edit, LayerKey]]

    @classmethod
    def of(cls, blocks: Iterable[Edits], layer: MoELayer) -> Acting:
        here = [
            (edit, key)
            for block in blocks
            for edit in block.of_experts
            if (key := key_in(edit, block.layers, layer)) is not None
        ]
        return cls(
            [(e, key) for e, key in here if e.changes_logits],
            [(e, key) for e, key in here if e.changes_routing],
            [(e, key) for e, key in here if e.changes_output],
        )


def key_in(edit: Edit, layers: Mapping[LayerKey, MoELayer], layer: MoELayer) -> LayerKey | None:
    """The key by which `edit` knows `layer`; None where it does not act on it."""
    chosen = edit.layers()
    keys = layers if chosen is None else chosen
    return next((key for key in keys if find_layer(layers, key).path == layer.path), None)


@dataclass(frozen=True, eq=False)
class Situation:
    """The edits and the observation of one moment."""

    blocks: tuple[Edits, ...] = ()
    acting: Mapping[str, Acting] = field(default_factory=dict)
    """By the layer's path."""
    head_edits: tuple[HeadEdit, ...] = ()
    observation: Observation | None = None

    @property
    def active(self) -> bool:
        return bool(self.blocks) or self.observation is not None

    def observes(self, layer: MoELayer) -> bool:
        seen = self.observation
        return seen is not None and bool(seen.observers) and layer.path in seen.keys


def situation(blocks: Sequence[Edits], layers: Iterable[MoELayer], observation: Observation | None = None) -> Situation:
    acting = {layer.path: Acting.of(blocks, layer) for layer in layers}
    heads = tuple(edit for block in blocks for edit in block.of_heads)
    return Situation(tuple(blocks), {n: a for n, a in acting.items() if any(a)}, heads, observation)


class Pass:
    """One forward pass of the stack, in one thread."""

    def __init__(self, batch: Batch | None = None, *, given: bool = False):
        self._batch, self.given = batch, given
        self.read_batch: Callable[[], Batch | None] | None = None
        self.routed: dict[str, Routing] = {}
        self.normed: dict[str, list[tuple[ref[Tensor], Tensor, Tensor]]] = {}
        self.parts: dict[str, list[tuple[ref[Tensor], bool]]] = {}
        self.residual: dict[str, Tensor] = {}
        self.replaced: dict[str, tuple[Tensor, ...]] = {}
        self.slots_seen: set[str] = set()
        self._calls: Counter[tuple[nn.Module, str]] = Counter()

    @property
    def batch(self) -> Batch | None:
        """The batch of the pass; None where nothing tells it. Found out when first asked for."""
        if self.read_batch is not None:
            self._batch, self.read_batch = self.read_batch(), None
        return self._batch

    def turn(self, module: nn.Module, place: str, sharing: Sequence[MoELayer]) -> MoELayer:
        """Which of the layers that share `module` calls it now: they take turns, in order."""
        if len(sharing) == 1:
            return sharing[0]
        self._calls[module, place] += 1
        return sharing[(self._calls[module, place] - 1) % len(sharing)]

    def as_it_is(self) -> Pass:
        """The pass as a layer finds it that begins now, for when it is run again."""
        now = Pass(given=self.given)
        now._batch, now.read_batch, now._calls = self._batch, self.read_batch, self._calls.copy()
        return now


def check_edit(edit: Edit, layers: Mapping[LayerKey, MoELayer]) -> None:
    """Raise ValueError where the edit names a layer that is not there, or one that it cannot act on."""
    chosen = edit.layers()
    for key in layers if chosen is None else chosen:
        layer = find_layer(layers, key, type(edit).__name__)
        if edit.changes_logits and layer.rule is None:
            raise ValueError(
                f"{type(edit).__name__} in layer {key}: its routing cannot be re-run ({layer.no_rule}); Gain and "
                "Replace work there"
            )
        edit.check(replace(layer, index=key))


def find_layer(layers: Mapping[LayerKey, MoELayer], key: LayerKey, who: str = "") -> MoELayer:
    """The layer that `key`, a number or a name, stands for. Raises ValueError where it stands for none, or several."""
    found = layers.get(key)
    if found is None:
        found = next((layer for layer in layers.values() if layer.name == key), None)
    if found is not None:
        return found
    same = [layer.name for layer in layers.values() if layer.index == key]
    if same:
        raise ValueError(f"{who + ': ' * bool(who)}decoder layer {key} stands for {' and '.join(same)}; give the name")
    raise ValueError(f"{who + ': ' * bool(who)}decoder layer {key} has no experts; MoE layers are {[*layers]}")


def check_together(blocks: Sequence[Edits]) -> None:
    """Several edits of one kind must leave a router as many experts as one edit must, in every row they share."""
    rows = {edit: edit.row_numbers() for block in blocks for edit in block.of_experts}
    kinds: tuple[type[SwitchOff] | type[ForceOn], ...] = (SwitchOff, ForceOn)
    for kind in kinds:
        same = [(edit, block.layers) for block in blocks for edit in block.of_experts if isinstance(edit, kind)]
        for row in {-1}.union(*(rows[edit] or () for edit, _ in same)) if len(same) > 1 else ():
            named: dict[MoELayer, set[int]] = {}
            for edit, layers in same:
                if (its := rows[edit]) is None or row in its:
                    for key, ids in edit.ids.items():  # type: ignore[attr-defined]
                        named.setdefault(find_layer(layers, key), set()).update(ids)
            union = kind([(layer.name, expert) for layer, ids in named.items() for expert in ids])
            for layer in named:
                union.check(replace(layer, index=layer.name))
