"""What one pass over the data collects: all observers at once."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from moestro.analyze.co_activation import CoActivation, Together
from moestro.analyze.expert_cache import Requests, RoutedTexts
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.data import TokenBatches
from moestro.view.events import MoEEvent

REQUEST_TOKENS = 200_000
"""About as many tokens are kept with their experts in order; of more data, every so many-th text."""


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

    @property
    def sizes(self) -> dict[int, int]:
        """{decoder layer: number of its experts}, of the layers looked at"""
        return {layer: counts.shape[1] for layer, counts in self.profiles.counts.items()}

    @property
    def domains(self) -> list[str]:
        """Those that have tokens."""
        return [self.profiles.domains[d] for d in sorted(set(self.profiles.domain.tolist()))]


class OnLayers:
    """Hands an observer the events of some decoder layers alone."""

    def __init__(self, observer: Any, layers: Collection[int]) -> None:
        self.observer, self.layers = observer, frozenset(layers)
        self.needs: frozenset[str] = observer.needs

    def update(self, event: MoEEvent) -> None:
        if event.layer in self.layers:
            self.observer.update(event)

    def merge(self, other: Self) -> None:
        self.observer.merge(other.observer)

    def result(self) -> Any:
        return self.observer.result()


def collect(
    view: Any, batches: TokenBatches, *, reference: str, layers: Collection[int], seed: int, progress: bool
) -> Collected:
    """Run the model once over the batches for all sections."""
    observers = {
        "profiles": TextProfiles({layer.index: layer.rule for layer in view.layers}),
        "together": CoActivation(),
        "requests": RoutedTexts(every=max(1, batches.num_tokens // REQUEST_TOKENS)),
    }
    start = time.perf_counter()
    found = view.observe(
        batches, [OnLayers(o, layers) for o in observers.values()], progress=progress, description="looking"
    )
    seconds = time.perf_counter() - start
    return Collected(view, batches, reference, seed, seconds, **dict(zip(observers, found, strict=True)))
