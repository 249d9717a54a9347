"""Super experts: the few experts that make a model's massive activations, and what becomes of it without them.

    profile = profile_outputs(view, data)        one pass
    found = super_experts(profile)               .experts, .shared, and .rule: what was asked of them, in words
    with ablated(view, found.experts): ...
    keep_best(view.layers, scores, count, protect=found.experts)

a[l, e] is the largest entry by magnitude of any output of expert e of layer l, before its gate weight; A holds those of
all experts, shared ones too, of the layers L that are looked at. An expert is a super expert where

    a[l, e] > 99.5% quantile of A,   a[l, e] > max(A) / 10   and   l in L

L are the first 75% of the MoE layers, or those that form massive activations. Of few experts a quantile lets one or two
pass whatever they do, and an expert of an even model may have a tenth of the largest output: of less than 1000 experts,
ours is a[l, e] > 10 * median(A) in the place of the quantile. Texts should open with the token that the model was
trained to open with: the outliers arise on the first position.

"Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv:2507.23279).
Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro import sets
from moestro.analyze.massive_activations import ResidualPeak, ResidualPeaks, forming_layers
from moestro.analyze.output_peaks import UNSEEN, OutputPeaks, Peaks
from moestro.analyze.set_effect import Measure, SetEffect, set_effect
from moestro.routing import SCORES, Score
from moestro.view.edit import Gain
from moestro.view.events import MoEEvent, Observer
from moestro.view.experts_family import read_family

QUANTILE = 0.995
RATIO = 0.1
FIRST_LAYERS = 0.75
"""The last layers have large outputs of which no massive activation comes."""
MIN_FOR_QUANTILE = 1000
OVER_MEDIAN = 10.0
"""Of fewer experts, in the place of the quantile. Not the paper's."""
DRAWS = 5


# --- how the router scores experts where attention sinks are ---------------------------------------------------------


@dataclass(frozen=True)
class SinkScores:
    """Mean router score of each expert of a layer on sink tokens, and on all others."""

    sink: Float[Tensor, " e"]
    others: Float[Tensor, " e"]


class SinkScoreMeans:
    """Observer: {layer: SinkScores}. `scores`: {layer: how logits become scores}; `sink`: positions in the text."""

    needs: frozenset[str] = frozenset()

    def __init__(self, scores: Mapping[int, Score], *, sink: Collection[int] = (0,)) -> None:
        self.scores, self.sink = scores, torch.tensor(sorted(sink))
        self._sums: dict[int, Tensor] = {}

    def update(self, event: MoEEvent) -> None:
        scores = SCORES[self.scores[event.layer]](event.routing.logits.float())[:, : event.num_experts].double().cpu()
        on_sink = torch.isin(event.tokens.position, self.sink)
        parts = [torch.cat([p.sum(dim=0), p.new_tensor([len(p)])]) for p in (scores[on_sink], scores[~on_sink])]
        self._add(event.layer, torch.stack(parts))

    def _add(self, layer: int, sums: Float[Tensor, "2 e_and_1"]) -> None:
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def merge(self, other: Self) -> None:
        for layer, sums in other._sums.items():
            self._add(layer, sums)

    def result(self) -> dict[int, SinkScores]:
        """NaN where there was no such token."""
        return {layer: SinkScores(*(s[:, :-1] / s[:, -1:])) for layer, s in sorted(self._sums.items())}


# --- the profile and the rule ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputProfile:
    """What one pass tells of a model's outliers. Layers are decoder layers."""

    routed: dict[int, Peaks]
    shared: dict[int, Peaks]
    """Of the layers that have a shared expert: of that one."""
    residual: dict[int, ResidualPeak] | None
    """None where it was not followed."""
    sinks: dict[int, SinkScores]

    @property
    def scores(self) -> dict[int, Float[Tensor, " e"]]:
        """{layer: a[l, e] of the routed experts}, for `sets.top`."""
        return {layer: peaks.value for layer, peaks in self.routed.items()}


def profile_outputs(
    view: Any, data: Iterable[Any], *, sink: Collection[int] = (0,), residual: bool = True, progress: bool = True
) -> OutputProfile:
    """Largest outputs of all experts, massive activations, and router scores on sink tokens, in one pass over `data`.

    `sink`: positions in a text at which attention sinks are. `residual=False`: leave out the massive activations, for
    families whose residual stream is several.
    Raises ValueError for a model without experts, and what `view.observe` raises.
    """
    if not view.layers:
        raise ValueError("the model was opened without its experts; there is no super expert to find")
    peaks = OutputPeaks()
    scores: dict[int, Score] = {layer.index: layer.rule.score if layer.rule else "softmax" for layer in view.layers}
    observers: list[Observer] = [peaks, SinkScoreMeans(scores, sink=sink), *([ResidualPeaks()] if residual else [])]

    with seeing_shared(view, peaks):
        (routed, shared), sinks, *stream = view.observe(
            data, observers, progress=progress, description="largest outputs"
        )
    return OutputProfile(routed, shared, stream[0] if stream else None, sinks)


@contextmanager
def seeing_shared(view: Any, peaks: OutputPeaks) -> Iterator[None]:
    """Inside the block `peaks` sees what shared experts give, beside the events that it is observing."""

    def see(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if view.batch is not None:
            peaks.update_shared(layer, view.batch, args[0] if args else next(iter(kwargs.values())), out)

    with ExitStack() as undo:
        for layer in view.layers:
            if layer.shared is not None:
                hook = layer.shared.register_forward_hook(partial(see, layer.index), with_kwargs=True)
                undo.callback(hook.remove)
        yield


@dataclass(frozen=True)
class SuperExperts:
    """Which experts passed, and the rule that they passed."""

    experts: sets.Chosen
    shared: tuple[int, ...]
    """Layers whose shared expert passed."""
    layers: tuple[int, ...]
    """Layers that were looked at."""
    rule: str


def super_experts(
    profile: OutputProfile,
    *,
    layers: float | Literal["massive"] | Collection[int] = FIRST_LAYERS,
    quantile: float = QUANTILE,
    ratio: float = RATIO,
) -> SuperExperts:
    """The experts that pass the rule above.

    `layers`: a share of the MoE layers, from the first; "massive": those that form massive activations; or numbers.
    Raises ValueError where `layers` names none, or one without experts, and for a quantile or ratio outside [0, 1).
    """
    for name, number in (("quantile", quantile), ("ratio", ratio)):
        if not 0 <= number < 1:
            raise ValueError(f"{name}={number}: it lies in [0, 1)")
    chosen = _layers(profile, layers)
    if not chosen:
        return SuperExperts(frozenset(), (), (), "no layer forms a massive activation, so there is no super expert")
    tables = [t[layer].value for t in (profile.routed, profile.shared) for layer in chosen if layer in t]
    values = np.concatenate([t.numpy() for t in tables])
    share = ratio * float(values.max())
    if len(values) >= MIN_FOR_QUANTILE:
        other, name = float(np.quantile(values, quantile)), f"the {quantile:.1%} quantile"
    else:
        other, name = OVER_MEDIAN * float(np.median(values)), f"{OVER_MEDIAN:g} times the median"
    rule = (
        f"an output over {ratio:g} of the largest ({share:.4g}) and over {name} ({other:.4g}) of {len(values)} experts "
        f"in layers {', '.join(map(str, chosen))}"
    )
    threshold = max(share, other)
    return SuperExperts(
        sets.above(profile.scores, threshold, layers=chosen),
        tuple(layer for layer in chosen if layer in profile.shared and profile.shared[layer].value[0] > threshold),
        chosen,
        rule,
    )


def _layers(profile: OutputProfile, layers: float | Literal["massive"] | Collection[int]) -> tuple[int, ...]:
    known = sorted(profile.routed)
    if isinstance(layers, float | int):
        if not 0 < layers <= 1:
            raise ValueError(f"layers={layers}: a share of the layers lies in (0, 1]; one layer is layers=[{layers}]")
        return tuple(known[: max(1, int(layers * len(known)))])
    if layers == "massive":
        if profile.residual is None:
            raise ValueError("layers='massive' needs the residual stream, and the profile was made without it")
        return forming_layers(profile.residual)
    wanted = tuple(sorted(set(layers)))
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(f"layers={list(layers)}: name some of the MoE layers {known}")
    return wanted


def down_projection_input(view: Any, profile: OutputProfile, member: sets.Member) -> float:
    """The largest entry by magnitude that the expert's down projection was given on the token of its largest output.

    Raises ValueError for an expert that no token reached, and for weights that are on disk.
    """
    layer, expert = member
    experts, peaks = view.layer(layer).experts, profile.routed[layer]
    if view.streamed:
        raise ValueError("the experts' weights are on disk; open the model with stream=False")
    if peaks.place[expert] == UNSEEN:
        raise ValueError(f"no token reached expert {expert} of layer {layer}")
    family = read_family(experts, peaks.hidden)
    u = peaks.hidden[expert : expert + 1].to(family.up) @ family.up[expert]
    u = u if family.up_bias is None else u + family.up_bias[expert]
    with torch.no_grad():
        return float(family.gate(u).abs().max())


# --- without them ----------------------------------------------------------------------------------------------------


@contextmanager
def ablated(view: Any, experts: Iterable[sets.Member], *, shared: Collection[int] = ()) -> Iterator[None]:
    """These experts, and the shared experts of layers `shared`, give nothing inside the block.

    The router is untouched, no slot goes to another expert, and no weight is renormalised.
    Raises ValueError where a layer would have no expert left, or has no shared expert.
    """
    experts = frozenset(experts)
    for layer, ids in sets.by_layer(experts).items():
        if len(ids) >= (size := view.layer(layer).num_experts):
            raise ValueError(f"all {size} experts of layer {layer} would be ablated; leave at least one")
    if lacking := [layer for layer in shared if view.layer(layer).shared is None]:
        raise ValueError(f"layer {lacking[0]} has no shared expert")
    with ExitStack() as undo:
        for layer in shared:
            nothing = view.layer(layer).shared.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
            undo.callback(nothing.remove)
        undo.enter_context(view.edits(Gain(dict.fromkeys(experts, 0.0))))
        yield


def ablation_effect(
    view: Any,
    experts: Collection[sets.Member],
    losses: Measure,
    *,
    controls: Iterable[Collection[sets.Member]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> SetEffect:
    """What ablating the experts does to the model's losses, beside controls.

    `controls`: sets to compare with; by default `draws` random ones with as many experts in the same layers.
    """
    sizes = {layer.index: layer.num_experts for layer in view.layers}
    others = sets.layer_matched(experts, sizes, draws, seed=seed) if controls is None else controls
    return set_effect(experts, losses, partial(ablated, view), others)
