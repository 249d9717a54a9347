"""What the studio's page shows and changes, without the page: switches, traces, and text as it is made.

Shapes: T tokens, K slots, E experts, A heads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.sets import Member
from moestro.steer.router_steering import SoftSteer
from moestro.steer.steering import Steering
from moestro.view.edit import SwitchOff
from moestro.view.events import MoEEvent
from moestro.view.heads import HeadEvent, HeadGain

Unit = Literal["expert", "head"]
Setting = Literal["off", "boost"]
NEXT: dict[Setting | None, Setting | None] = {None: "off", "off": "boost", "boost": None}
"""What a click makes of a setting."""
EXPERT_BOOST = 1.0
"""Standard deviations of a token's logits."""
HEAD_BOOST = 2.0


@dataclass(frozen=True)
class Switches:
    """Which experts and heads are switched off or boosted."""

    experts: Mapping[Member, Setting] = field(default_factory=dict)
    heads: Mapping[Member, Setting] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.experts or self.heads)

    def clicked(self, unit: Unit, member: Member) -> Switches:
        """As it is -> off -> boosted -> as it is."""
        table = dict(self.experts if unit == "expert" else self.heads)
        new = NEXT[table.pop(member, None)]
        if new is not None:
            table[member] = new
        return replace(self, experts=table) if unit == "expert" else replace(self, heads=table)

    def edits(self) -> list[Any]:
        """Raises ValueError, as `view.edits` does, once they are used where too few experts are left on."""
        found: list[Any] = []
        off, boosted = ([m for m, s in sorted(self.experts.items()) if s == setting] for setting in ("off", "boost"))
        if off:
            found.append(SwitchOff(off))
        if boosted:
            found.append(SoftSteer(boosted, strength=EXPERT_BOOST))
        if self.heads:
            found.append(HeadGain({m: 0.0 if s == "off" else HEAD_BOOST for m, s in sorted(self.heads.items())}))
        return found

    def describe(self) -> list[str]:
        """A line for each switch."""
        tables: tuple[tuple[str, Mapping[Member, Setting]], ...] = (("expert", self.experts), ("head", self.heads))
        return [
            f"{unit} {number} of layer {layer}: {'off' if setting == 'off' else 'boosted'}"
            for unit, table in tables
            for (layer, number), setting in sorted(table.items())
        ]

    def steering(self, view: Any, base: Steering | None = None) -> Steering:
        """As a steering setup, after those of `base`."""
        mine = Steering.of(view, *self.edits(), learned_from="set in the studio")
        if base is None:
            return mine
        return base.model_copy(update={"edits": [*base.edits, *mine.edits]})


@dataclass(frozen=True)
class Trace:
    """How one text was computed."""

    tokens: list[str]
    prompt: int
    """How many of the tokens are the prompt's."""
    experts: dict[int, Int[Tensor, "t k"]]
    """{layer: the experts of each token, by weight}; E for unused slots"""
    weights: dict[int, Float[Tensor, "t k"]]
    counts: dict[int, Float[Tensor, " e"]]
    """{layer: share of the tokens that each expert served}"""
    heads: dict[int, Float[Tensor, " a"]]
    """{layer: mean norm of each head's output}; empty where heads cannot be reached"""


class _Routes:
    """Observer of one row: experts by weight, and heads where they can be had."""

    def __init__(self, heads: bool):
        self.needs = frozenset({"heads"} if heads else ())
        self.experts: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        self.heads: dict[int, Tensor] = {}

    def update(self, event: MoEEvent) -> None:
        weights, order = event.routing.weights.float().cpu().sort(dim=1, descending=True)
        experts = event.routing.indices.cpu().gather(1, order).masked_fill(weights == 0, event.num_experts)
        self.experts[event.layer], self.weights[event.layer] = experts, weights
        used = torch.bincount(experts.flatten(), minlength=event.num_experts + 1)[: event.num_experts]
        self.counts[event.layer] = used.float() / len(experts)

    def update_heads(self, event: HeadEvent) -> None:
        self.heads[event.layer] = event.z.float().norm(dim=-1).mean(dim=0).cpu()

    def merge(self, other: _Routes) -> None:
        raise TypeError("a trace is of one text; there is nothing to merge")

    def result(self) -> _Routes:
        return self


def trace(view: Any, ids: Int[Tensor, "1 t"], prompt: int, *, edits: Any = ()) -> Trace:
    """Run the text once more, under the edits, and tell how each token was computed."""
    try:
        reachable = bool(view.heads)
    except ValueError:
        reachable = False
    with view.edits(*edits):
        (routes,) = view.observe([ids], [_Routes(reachable)], progress=False)
    tokens = [view.tokenizer.decode([i]) for i in ids[0].tolist()]
    return Trace(tokens, prompt, routes.experts, routes.weights, routes.counts, routes.heads)


def pieces(run: Callable[[Callable[[str], None], Callable[[], bool]], Any]) -> Iterator[str]:
    """The text so far, again and again, while `run(on_text, stop)` makes it in a thread of its own.

    Closing the iterator stops the run. An exception of the run is raised here.
    """
    made: queue.Queue[str | None] = queue.Queue()
    stopped = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            run(made.put, stopped.is_set)
        except BaseException as e:
            failure.append(e)
        finally:
            made.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    text = ""
    try:
        while (piece := made.get()) is not None:
            text += piece
            yield text
    finally:
        stopped.set()
        thread.join()
    if failure:
        raise failure[0]
