"""How well single hidden neurons stand for known binary properties of what a model reads: coverage, reconstruction.

A feature f at threshold t says yes to a token where its activation exceeds t * (its maximum):

    coverage       = mean over properties of the best F1 of any (f, t)
    reconstruction = mean over positions of the F1 between the true properties and those predicted: a property is
                     predicted where any (f, t) says yes that had at least `min_precision` for it on other texts

Measures of "Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game Models"
(arXiv:2408.00113), used for experts in "Mixture of Experts Made Intrinsically Interpretable" (arXiv:2503.07639).
Shapes: N tokens, F features, P properties, E experts, I expert width, K slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.routing import Routing, dense_weights
from moestro.view.events import MoEEvent, Tokens

THRESHOLDS = tuple(i / 10 for i in range(10))
MIN_PRECISION = 0.95
MIN_FIRES = 10
"""A feature that says yes to fewer tokens has shown nothing about its precision."""


def neuron_activations(
    experts: Any, hidden: Float[Tensor, "n h"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
) -> Float[Tensor, "n f"]:
    """Hidden neurons of all experts side by side (F = E * I), times the gate weight: 0 for experts not chosen."""
    gate = dense_weights(Routing(weights, weights, indices), experts.num_experts)
    u = torch.einsum("nh,euh->neu", hidden, experts.gate_up_proj if experts.has_gate else experts.up_proj)
    a = experts._apply_gate(u) if experts.has_gate else experts.act_fn(u)
    return (a * gate.unsqueeze(-1)).flatten(1)


class NeuronActivations:
    """Observer: `neuron_activations` of one layer, [N, F] with the tokens they belong to. Meant for small models."""

    needs: frozenset[str] = frozenset()

    def __init__(self, layer: Any):
        self.layer = layer
        self._parts: list[tuple[Tensor, Tokens]] = []

    def update(self, event: MoEEvent) -> None:
        if event.layer == self.layer.index:
            with torch.no_grad():
                found = neuron_activations(
                    self.layer.experts, event.hidden, event.routing.weights.to(event.hidden), event.routing.indices
                )
            self._parts.append((found.float().cpu(), event.tokens))

    def merge(self, other: Self) -> None:
        self._parts += other._parts

    def result(self) -> tuple[Float[Tensor, "n f"], Tokens]:
        acts, tokens = zip(*self._parts, strict=True)
        return torch.cat(acts), Tokens.cat(tokens)


def feature_coverage(acts: Float[Tensor, "n f"], labels: Bool[Tensor, "n p"]) -> Float[Tensor, " p"]:
    """Best F1 of any feature and threshold, for each property; coverage is the mean.

    Raises ValueError where a property never or always holds: every feature would then be as good.
    """
    _check(acts, labels)
    truth = labels.float()
    positives = truth.sum(dim=0)
    if constant := ((positives == 0) | (positives == len(labels))).nonzero().flatten().tolist():
        raise ValueError(
            f"property {constant[0]} is the same for all {len(labels)} tokens; leave out such properties, or take "
            "texts in which they change"
        )
    best = torch.zeros_like(positives)
    for fires in _fires(acts, acts.amax(dim=0)):
        hits = fires.T @ truth
        f1 = 2 * hits / (fires.sum(dim=0)[:, None] + positives)
        best = torch.maximum(best, f1.amax(dim=0))
    return best


def reconstruction(
    acts: Float[Tensor, "n f"],
    labels: Bool[Tensor, "n p"],
    heldout_acts: Float[Tensor, "m f"],
    heldout_labels: Bool[Tensor, "m p"],
    *,
    min_precision: float = MIN_PRECISION,
) -> float:
    """Mean F1 of the held-out positions' properties, predicted by the features that are precise on the others.

    A position without properties counts as 1 where none is predicted.
    """
    _check(acts, labels)
    _check(heldout_acts, heldout_labels)
    truth, largest = labels.float(), acts.amax(dim=0)
    predicted = torch.zeros(heldout_labels.shape, dtype=torch.bool)
    for fires, heldout_fires in zip(_fires(acts, largest), _fires(heldout_acts, largest), strict=True):
        count = fires.sum(dim=0)[:, None]
        precise = (fires.T @ truth >= min_precision * count) & (count >= MIN_FIRES)
        predicted |= heldout_fires @ precise.float() > 0
    hits = (predicted & heldout_labels).sum(dim=1)
    named = predicted.sum(dim=1) + heldout_labels.sum(dim=1)
    return float(torch.where(named == 0, 1.0, 2 * hits / named.clamp(min=1)).mean())


def _fires(acts: Tensor, largest: Tensor) -> Iterator[Float[Tensor, "n f"]]:
    """1 where a feature says yes, for each threshold; a feature that is never positive says no."""
    alive = (largest > 0).float()
    for threshold in THRESHOLDS:
        yield (acts > threshold * largest).float() * alive


def _check(acts: Tensor, labels: Tensor) -> None:
    if len(acts) != len(labels) or not len(acts):
        raise ValueError(f"{len(acts)} rows of activations and {len(labels)} of labels; there is one of each per token")
