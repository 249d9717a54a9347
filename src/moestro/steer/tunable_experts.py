"""A switchboard of experts: turn some down or up, or give some a slot for every token, while the model runs.

    gain g      gate weight * g: 0 is off, 1 untouched. renormalize: a token's weights keep their former sum
    refill      experts that are off are closed to the router, and others take their slots (without: the slot is lost)
    force       the expert has a slot for every token: it takes the place of the one of lowest weight, with the token's
                mean weight; weights keep their former sum

    with tune_experts(view, off=found.top(10)) as unserved:
        model.generate(...)

The sum that is kept is the router's own, so families that scale their weights stay scaled. A token all of whose experts
are off gets nothing from the routed experts (a shared one still serves it); such tokens are counted, and more than 1%
of them warned of. `rows` steers some rows of a batch alone.

This can weaken a model's refusals; whoever steers a model answers for what it then says.

"Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time" (arXiv:2502.11096). How a forced
expert is weighted is our choice; the paper does not say.
Shapes: N tokens, K slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moestro import sets
from moestro.analyze.set_effect import Measure, SetEffect, changed_by, compared, values_of
from moestro.analyze.token_resonance import Resonance
from moestro.routing import Routing
from moestro.view.edit import Edit, Gain, OnExperts, SwitchOff
from moestro.view.layers import MoELayer

WARN_UNSERVED = 0.01
SIZES = (1, 2, 5, 10, 20)
DRAWS = 10


@dataclass(eq=False)
class Insert(OnExperts):
    """Give experts a slot of every token, on the finished routing: that of lowest weight, with the mean weight.

    A token that chose the expert itself keeps it as it is. Weights are scaled to their former sum.
    """

    def check(self, layer: MoELayer) -> None:
        super().check(layer)
        if len(ids := self.ids[layer.index]) > layer.top_k:
            raise ValueError(
                f"{len(ids)} experts forced on in layer {layer.index}, which has top_k={layer.top_k} slots; "
                f"force at most {layer.top_k}"
            )

    def routing(self, layer: int, routing: Routing) -> Routing:
        weights, indices = routing.weights.clone(), routing.indices.clone()
        used = (weights != 0).sum(dim=-1, keepdim=True)
        total = weights.sum(dim=-1, keepdim=True)
        mean = total / used.clamp_min(1)
        forced = torch.tensor(self.ids[layer], device=indices.device)
        for expert in self.ids[layer]:
            has = ((indices == expert) & (weights != 0)).any(dim=-1, keepdim=True)
            taken = torch.isin(indices, forced) & (weights != 0)
            slot = weights.masked_fill(taken, float("inf")).argmin(dim=-1, keepdim=True)
            indices = torch.where(has, indices, indices.scatter(1, slot, expert))
            weights = torch.where(has, weights, weights.scatter(1, slot, mean))
        now = weights.sum(dim=-1, keepdim=True)
        return routing._replace(weights=weights * (total / torch.where(now == 0, 1.0, now)), indices=indices)


def switchboard(
    *,
    off: Iterable[sets.Member] = (),
    gains: Mapping[sets.Member, float] | None = None,
    force: Iterable[sets.Member] = (),
    refill: bool = False,
    renormalize: bool = True,
    rows: Sequence[int] | Sequence[bool] | Tensor | None = None,
) -> list[Edit]:
    """The edits that do this, to be run by `view.edits(*...)` or kept in a steering file.

    `refill` is of the experts in `off`. Raises ValueError for a negative gain, or an expert both off and forced, or
    with two gains.
    """
    off, force, gains = frozenset(off), frozenset(force), dict(gains or {})
    if negative := [member for member, gain in gains.items() if not gain >= 0]:
        raise ValueError(f"gain {gains[negative[0]]} of expert {negative[0]}; a gain is 0 or more")
    if twice := sorted((off | gains.keys()) & force) or sorted(off & gains.keys()):
        raise ValueError(f"expert {twice[0]} is named twice: it is either off, forced, or has a gain")
    edits: list[Edit] = []
    if off and refill:
        edits.append(SwitchOff(off, rows=rows))
    elif off:
        gains |= dict.fromkeys(off, 0.0)
    if gains:
        edits.append(Gain(gains, renormalize=renormalize, rows=rows))
    if force:
        edits.append(Insert(force, rows=rows))
    return edits


@dataclass
class Unserved:
    """Tokens that no routed expert served, by layer."""

    without: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    @property
    def share(self) -> dict[int, float]:
        """{layer: share of the tokens, padding left out, that got nothing from its routed experts}"""
        return {layer: int(self.without[layer]) / max(n, 1) for layer, n in self.tokens.items()}


@contextmanager
def tune_experts(view: Any, **switches: Any) -> Iterator[Unserved]:
    """Run the switchboard inside the block; gives the count of tokens left without an expert.

    `switches`: as of `switchboard`. Warns (RuntimeWarning) at the end where a layer left more than 1% of its tokens.
    """
    edits = switchboard(**switches)
    unserved = Unserved()

    def count(layer: MoELayer, experts: nn.Module, args: tuple[Any, ...]) -> None:
        _, indices, weights = args
        nothing = ((weights == 0) | (indices >= layer.num_experts)).all(dim=-1)
        if view.batch is not None and view.batch.kept is not None:
            nothing = nothing[view.batch.kept.to(nothing.device)]
        at = layer.index
        unserved.without[at] = unserved.without.get(at, 0) + nothing.sum()
        unserved.tokens[at] = unserved.tokens.get(at, 0) + len(nothing)

    with ExitStack() as undo:
        for index in {i for edit in edits for i in edit.layers() or ()}:
            layer = view.layer(index)
            undo.callback(layer.experts.register_forward_pre_hook(partial(count, layer)).remove)
        undo.enter_context(view.edits(*edits))
        yield unserved
    if lost := {layer: share for layer, share in unserved.share.items() if share > WARN_UNSERVED}:
        worst = max(lost, key=lost.__getitem__)
        warnings.warn(
            f"{lost[worst]:.1%} of the tokens had all their experts of layer {worst} off and got nothing from it; turn "
            "off fewer of its experts, or use refill=True",
            RuntimeWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class SweepPoint:
    """Effects of tuning the `size` most distinctive experts, beside three kinds of control."""

    size: int
    matched: SetEffect
    """Controls: random experts of the same layers."""
    anywhere: SetEffect
    """Controls: random experts."""
    next_ranks: SetEffect
    """Control: the `size` experts that rank next."""


def sweep_experts(
    view: Any,
    found: Resonance,
    measure: Measure,
    *,
    sizes: Collection[int] = SIZES,
    draws: int = DRAWS,
    seed: int = 0,
    tuned: Callable[[sets.Chosen], Any] | None = None,
) -> list[SweepPoint]:
    """What tuning the most distinctive experts does to `measure`, one number a prompt, for several numbers of them.

    `tuned(chosen)`: a context manager; by default the experts are off and the remaining weights renormalised.
    Raises ValueError where 2 * size experts are more than the model has.
    """
    tuned = tuned or (lambda chosen: tune_experts(view, off=chosen))
    experts = {layer.index: layer.num_experts for layer in view.layers}
    whole = values_of(measure)
    points = []
    for size in sizes:
        top, following = frozenset(found.top(size)), frozenset(found.top(size, skip=size))
        own = changed_by(measure, tuned(top))
        controls = {
            "matched": sets.layer_matched(top, experts, draws, seed=seed),
            "anywhere": sets.anywhere(size, experts, draws, seed=seed),
            "next_ranks": [following],
        }
        effects = {
            name: compared(whole, own, [changed_by(measure, tuned(c)) for c in chosen])
            for name, chosen in controls.items()
        }
        points.append(SweepPoint(size, **effects))
    return points
