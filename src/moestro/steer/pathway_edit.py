"""Pathways: what the router says at the last token of a prompt, read from a model and put into one.

    omega[l, e] = score of expert e in layer l / sum of all its scores         a row sums to 1

Put in, a pathway keeps the token's own total score, so that every family's rule can go on from there: its own choice,
groups, bias, normalisation and scale.

    logits = score^-1(omega * total);    weights, indices = rule(logits)

"C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert Re-Mixing"
(arXiv:2504.07964). Shapes: B rows, T positions, S prompts, L layers, E experts, C core experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routing import SCORES, Routing, RoutingRule
from moestro.steer.answers import BATCH, Judged, Prompt, by_length, judge, padded, token_ids
from moestro.view.edit import Edit
from moestro.view.events import Batch, MoEEvent
from moestro.view.layers import MoELayer

Scope = Literal["prompt", "decode"]
"""Which tokens a pathway routes: the last of the prompt, or this one and all that are generated after it."""
LEAST = 1e-20  # a score of zero has no logit

INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda s: s.clamp(max=1 - 1e-6).logit(),
    "sqrtsoftplus": lambda s: s.square().expm1().log(),
}


def omega_of(logits: Float[Tensor, "n e"], rule: RoutingRule) -> Float[Tensor, "n e"]:
    """Each token's scores, divided by their sum."""
    scores = SCORES[rule.score](logits.float())
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(LEAST)


def logits_for(omega: Float[Tensor, "n e"], logits: Float[Tensor, "n e"], rule: RoutingRule) -> Float[Tensor, "n e"]:
    """Logits whose scores are `omega` times the total score of `logits`. Experts closed there stay closed."""
    z = logits.float()
    if rule.score == "softmax":  # whose scores before they are divided by their sum are exp(z)
        new = omega.clamp_min(LEAST).log() + z.logsumexp(dim=1, keepdim=True)
    else:
        total = SCORES[rule.score](z).sum(dim=1, keepdim=True)
        new = INVERSES[rule.score]((omega * total).clamp_min(LEAST))
    return new.masked_fill(torch.isneginf(z), float("-inf"))


@dataclass(eq=False)
class PathwayEdit(Edit):
    """Route the last token of each prompt, and by `scope` those after it, by its own pathway.

    Row b of the batch has omega[layer][b] and a prompt of `lengths[b]` tokens; under beam search, and where several
    answers are sampled, it stands for all the rows made of it. Padding may be on either side; an edit of logits that
    closed an expert is respected.
    """

    omega: Mapping[int, Float[Tensor, "_ _"]]
    rules: Mapping[int, RoutingRule]
    lengths: Int[Tensor, " b"]
    scope: Scope = "decode"

    def __post_init__(self) -> None:
        if self.scope not in ("prompt", "decode"):
            raise ValueError(f"scope={self.scope!r}; it is 'prompt' or 'decode'")
        for layer, omega in self.omega.items():
            if len(omega) != len(self.lengths):
                raise ValueError(f"{len(omega)} pathways in layer {layer} for {len(self.lengths)} prompts")

    def layers(self) -> Collection[int]:
        return self.omega.keys()

    def check(self, layer: MoELayer) -> None:
        given, needed = self.omega[layer.index].shape[1], columns(layer)
        if given != needed:
            raise ValueError(
                f"pathways of {given} experts in layer {layer.index}, whose router tells of {needed}: they are of "
                "another model"
            )

    def routing_at(self, layer: int, routing: Routing, batch: Batch) -> Routing:
        rows, length = batch.shape
        if rows % len(self.lengths):
            raise ValueError(f"{len(self.lengths)} pathways cannot be shared out over a batch of {rows} rows")
        copies = rows // len(self.lengths)
        last = (self.lengths.cpu() - 1).repeat_interleave(copies)[:, None]
        position = batch.on_grid(batch.tokens.position, -1)
        chosen = position == last if self.scope == "prompt" else position >= last
        places = chosen.flatten().nonzero().squeeze(1)
        if not len(places):
            return routing
        of_row = (places // length // copies).to(routing.logits.device)
        places = places.to(routing.logits.device)
        omega = self.omega[layer].to(routing.logits.device)[of_row]
        logits = logits_for(omega, routing.logits[places], self.rules[layer])
        weights, indices = self.slots(layer, logits, omega, of_row)
        return _put(routing, places, logits, weights, indices)

    def slots(self, layer: int, logits: Tensor, omega: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(gate weights, experts) of the chosen tokens."""
        _, weights, indices = self.rules[layer](logits)
        # unused slots name the token's first expert, not E: not every experts implementation knows that index
        return weights, torch.where(weights == 0, indices[:, :1], indices)


@dataclass(eq=False)
class SoftPathwayEdit(PathwayEdit):
    """All core experts at work, so that each gets a gradient: weights in proportion to omega, in sum the rule's own."""

    core: Mapping[int, Int[Tensor, "b c"]] = field(kw_only=True)

    def slots(self, layer: int, logits: Tensor, omega: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        core = self.core[layer].to(row.device)[row]
        inside = omega.gather(1, core)
        total = self.rules[layer](logits).weights.sum(dim=1, keepdim=True)
        return total * inside / inside.sum(dim=1, keepdim=True).clamp_min(LEAST), core


def _put(routing: Routing, places: Tensor, logits: Tensor, weights: Tensor, indices: Tensor) -> Routing:
    """The routing with some tokens' replaced; fewer slots are filled up with unused ones."""
    old_logits, old_weights, old_indices = routing
    width = max(weights.shape[1], old_weights.shape[1])

    def wide(weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        spare = width - weights.shape[1]
        return F.pad(weights, (0, spare)), torch.cat([indices, indices[:, :1].expand(-1, spare)], dim=1)

    (old_weights, old_indices), (weights, indices) = wide(old_weights, old_indices), wide(weights, indices)
    return Routing(
        old_logits.index_copy(0, places, logits.detach().to(old_logits.dtype)),
        old_weights.index_copy(0, places, weights.to(old_weights.dtype)),
        old_indices.index_copy(0, places, indices.to(old_indices.dtype)),
    )


def columns(layer: MoELayer) -> int:
    """Experts that a layer's router tells of: those it has and classes that stand for none."""
    return layer.num_experts + (layer.rule.null_experts if layer.rule else 0)


def rules_of(view: Any, layers: Collection[int] | None = None) -> dict[int, RoutingRule]:
    """{layer: its rule} of the named layers, or all that have one. Raises ValueError where a named one has none."""
    rules = {}
    for layer in view.layers if layers is None else [view.layer(index) for index in sorted(layers)]:
        if layer.rule is not None:
            rules[layer.index] = layer.rule
        elif layers is not None:
            raise ValueError(f"layer {layer.index} cannot be given a pathway: {layer.no_rule}; leave it out")
    if not rules:
        raise ValueError(f"no layer can be given a pathway: {view.layers[0].no_rule}")
    return rules


def edit_of(
    view: Any,
    omega: Mapping[int, Tensor],
    lengths: Int[Tensor, " b"],
    scope: Scope,
    core: Mapping[int, Tensor] | None = None,
) -> PathwayEdit:
    """Each pathway for as many rows of the batch as there are for it; with `core`, all these experts are at work."""
    copies = len(lengths) // len(next(iter(omega.values())))
    wide, rules = _repeated(omega, copies), rules_of(view, omega)
    if core is None:
        return PathwayEdit(wide, rules, lengths, scope)
    return SoftPathwayEdit(wide, rules, lengths, scope, core=_repeated(core, copies))


def _repeated(table: Mapping[int, Tensor], copies: int) -> dict[int, Tensor]:
    return {layer: values.repeat_interleave(copies, dim=0) for layer, values in table.items()}


class LastTokenPathways:
    """Observer: {layer: omega [S, E]} at the last token of every sample, rows in the order of samples."""

    needs: frozenset[str] = frozenset()

    def __init__(self, rules: Mapping[int, RoutingRule]) -> None:
        self.rules = rules
        self._found: dict[int, dict[int, tuple[int, Tensor]]] = {}

    def update(self, event: MoEEvent) -> None:
        if event.layer not in self.rules:
            return
        tokens = event.tokens
        samples, row = tokens.sample.unique(return_inverse=True)
        last = torch.full((len(samples),), -1).scatter_reduce(0, row, tokens.position, "amax")
        final = (tokens.position == last[row]).nonzero().squeeze(1)
        omega = omega_of(event.routing.logits[final.to(event.routing.logits.device)], self.rules[event.layer]).cpu()
        found = self._found.setdefault(event.layer, {})
        for sample, position, values in zip(tokens.sample[final].tolist(), tokens.position[final].tolist(), omega):
            if sample not in found or found[sample][0] < position:
                found[sample] = (position, values)

    def merge(self, other: Self) -> None:
        for layer, theirs in other._found.items():
            mine = self._found.setdefault(layer, {})
            for sample, (position, values) in theirs.items():
                if sample not in mine or mine[sample][0] < position:
                    mine[sample] = (position, values)

    def result(self) -> dict[int, Float[Tensor, "s _"]]:
        return {layer: torch.stack([found[s][1] for s in sorted(found)]) for layer, found in self._found.items()}


@dataclass(eq=False)
class Pathways:
    """What was found for S prompts."""

    prompts: list[list[int]]
    omega: dict[int, Float[Tensor, "s _"]]
    """{critical layer: pathways}"""
    initial: dict[int, Float[Tensor, "s _"]]
    """As the model itself routed."""
    scope: Scope
    rules: dict[int, RoutingRule] = field(repr=False)
    losses: Float[Tensor, "s t"]
    """The surrogate at every step, the first before any; of kernel regression, at every mix; of mode finding, none."""

    def edit(self, rows: slice = slice(None)) -> PathwayEdit:
        """The edit that routes a batch of these prompts, or of some of them, by what was found."""
        lengths = torch.tensor([len(p) for p in self.prompts[rows]])
        return PathwayEdit({layer: o[rows] for layer, o in self.omega.items()}, self.rules, lengths, self.scope)

    def judge(self, view: Any, answers: Sequence[Prompt], *, batch_size: int = BATCH, progress: bool = True) -> Judged:
        """The prompts' known answers by what was found. Without: `answers.judge(view, prompts, answers)`."""
        return judge(view, self.prompts, answers, self.edit, batch_size=batch_size, progress=progress)


def read(
    view: Any, prompts: Sequence[Prompt], *, batch_size: int = BATCH, progress: bool = True
) -> dict[int, Float[Tensor, "s _"]]:
    """{layer: pathways of the prompts}, as the model itself routes them."""
    ids = token_ids(view, prompts)
    batches = []
    for rows in by_length(ids, batch_size):
        batch, mask = padded([ids[r] for r in rows], "right")
        batches.append({"input_ids": batch, "attention_mask": mask, "sample": torch.tensor(rows)})
    observer = LastTokenPathways(rules_of(view))
    return view.observe(batches, [observer], progress=progress, description="pathways")[0]
