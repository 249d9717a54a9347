"""What one pass over the data collects: all observers at once."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moestro.analyze.co_activation import CoActivation, Together
from moestro.analyze.expert_cache import Requests, RoutedTexts
from moestro.analyze.layer_states import LastTokens
from moestro.analyze.massive_activations import ResidualPeaks
from moestro.analyze.output_peaks import OutputPeaks
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.analyze.super_experts import OutputProfile, SinkScoreMeans, seeing_shared
from moestro.data import TokenBatches
from moestro.routing import Score
from moestro.view.events import MoEEvent

REQUEST_TOKENS = 200_000
"""About as many tokens are kept with their experts in order; of more data, every so many-th text."""
STATE_TEXTS = 1500
"""About as many texts' last tokens are kept as vectors; of more texts, every so many-th."""
TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Collected:
    """Results of the observers, and what the sections need to know beside them."""

    view: Any
    batches: TokenBatches
    reference: str
    seed: int
    seconds: float
    profiles: Profiles
    together: Together
    requests: Requests
    """Of some of the texts."""
    states: dict[int, Float[Tensor, "s h"]]
    """{layer: what its experts read at the last token of every `state_samples`}"""
    router_states: dict[int, Float[Tensor, "s e"]]
    """The router's probabilities there."""
    state_samples: list[int]
    outputs: OutputProfile | None
    no_outputs: str
    """Why there are none; empty where there are."""

    @property
    def sizes(self) -> dict[int, int]:
        """{decoder layer: number of its experts}, of the layers looked at"""
        return {layer: counts.shape[1] for layer, counts in self.profiles.counts.items()}

    @property
    def domains(self) -> list[str]:
        """Those that have tokens."""
        return [self.profiles.domains[d] for d in sorted(set(self.profiles.domain.tolist()))]


class Filtered:
    """Hands an observer the events of some decoder layers, and of some texts, alone."""

    def __init__(self, observer: Any, layers: Collection[int], every: int = 1) -> None:
        self.observer, self.layers, self.every = observer, frozenset(layers), every
        self.needs: frozenset[str] = observer.needs

    def update(self, event: MoEEvent) -> None:
        if event.layer not in self.layers:
            return
        if self.every > 1:
            chosen = (event.tokens.sample % self.every == 0).nonzero().flatten()
            if not len(chosen):
                return
            event = MoEEvent(
                event.layer,
                event.num_experts,
                event.tokens[chosen],
                chosen,
                hidden=event.hidden,
                routing=event.routing,
                combined=event.combined,
            )
        self.observer.update(event)

    def merge(self, other: Self) -> None:
        self.observer.merge(other.observer)

    def result(self) -> Any:
        return self.observer.result()


def collect(
    view: Any, batches: TokenBatches, *, reference: str, layers: Collection[int], seed: int, progress: bool
) -> Collected:
    """Run the model once over the batches for all sections."""
    rules = {layer.index: layer.rule for layer in view.layers}
    texts = len(np.unique(np.concatenate([batches.sample[rows] for rows in batches.plan])))
    every = max(1, texts // STATE_TEXTS)
    observers = {
        "profiles": Filtered(TextProfiles(rules), layers),
        "together": Filtered(CoActivation(), layers),
        "requests": Filtered(RoutedTexts(every=max(1, batches.num_tokens // REQUEST_TOKENS)), layers),
        "states": Filtered(LastTokens("mlp_input"), layers, every),
        "router_states": Filtered(LastTokens("router", rules), layers, every),
    }
    peaks = OutputPeaks()
    scores: dict[int, Score] = {index: rule.score if rule else "softmax" for index, rule in rules.items()}
    extra = {"outputs": peaks, "sinks": SinkScoreMeans(scores), "residual": ResidualPeaks()}
    refused = _refused(view, batches, extra)
    if "outputs" not in refused:
        observers |= {name: Filtered(o, layers) for name, o in extra.items() if name not in refused}
    start = time.perf_counter()
    with nullcontext() if "outputs" in refused else seeing_shared(view, peaks):
        results = view.observe(batches, list(observers.values()), progress=progress, description="looking")
    found = dict(zip(observers, results, strict=True))
    outputs = None
    if "outputs" not in refused:
        routed, shared = found.pop("outputs")
        shared = {layer: peaks for layer, peaks in shared.items() if layer in layers}
        outputs = OutputProfile(routed, shared, found.pop("residual", None), found.pop("sinks"))
    samples = found["profiles"].samples
    return Collected(
        view,
        batches,
        reference,
        seed,
        time.perf_counter() - start,
        state_samples=samples[samples % every == 0].tolist(),
        outputs=outputs,
        no_outputs=refused.get("outputs", ""),
        **found,
    )


def _refused(view: Any, batches: TokenBatches, observers: dict[str, Any]) -> dict[str, str]:
    """{name: why the model cannot serve this observer}, tried on a few tokens."""
    if view.streamed:
        return dict.fromkeys(observers, "Outputs of single experts are not followed while a model is streamed.")
    few = {"input_ids": torch.as_tensor(batches.token_ids[None, :TRIAL_TOKENS]).long()}
    refused: dict[str, str] = {}
    for names in ([*observers], *([name] for name in observers)):  # one by one where they fail together
        try:
            view.observe([few], [copy.deepcopy(observers[name]) for name in names], progress=False)
        except ValueError as e:
            refused |= {} if len(names) > 1 else {names[0]: f"This model does not let it be seen: {e}."}
        else:
            if len(names) > 1:
                break
    return refused
