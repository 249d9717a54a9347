"""How much one layer's choice of expert tells about the next layer's.

    I(X; Y) / ((H(X) + H(Y)) / 2),   X, Y: the expert of largest gate weight in two consecutive MoE layers

0 for independent choices, 1 where one decides the other. A measure of "Layerwise Recurrent Router for
Mixture-of-Experts" (arXiv:2408.06793). Shapes: N tokens, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from moestro.view.events import MoEEvent

FirstChoices = Mapping[int, Int[Tensor, " n"]]
"""{decoder layer: every token's expert of largest gate weight}, tokens in the same order in every layer."""


class FirstChoice:
    """Keeps every token's first expert in every layer: 16 bits each."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, event: MoEEvent) -> None:
        routing = event.routing
        first = routing.indices.gather(1, routing.weights.argmax(dim=1, keepdim=True))[:, 0]
        part = (event.tokens.sample, event.tokens.position, first.to("cpu", torch.int16))
        self._kept.setdefault(event.layer, []).append(part)

    def merge(self, other: Self) -> None:
        for layer, parts in other._kept.items():
            self._kept.setdefault(layer, []).extend(parts)

    def result(self) -> dict[int, Int[Tensor, " n"]]:
        """Tokens are in the order of their samples and positions."""
        joined = {}
        for layer, parts in sorted(self._kept.items()):
            sample, position, first = (torch.cat(column) for column in zip(*parts, strict=True))
            joined[layer] = first[torch.from_numpy(np.lexsort((position.numpy(), sample.numpy())))].long()
        return joined


def cross_layer_mi(choices: FirstChoices) -> Float[Tensor, " m"]:
    """Normalised mutual information of every two consecutive MoE layers [L-1].

    Few tokens overestimate it: it wants some hundred for each pair of experts. Raises ValueError for a single layer.
    """
    layers = sorted(choices)
    if len(layers) < 2:
        raise ValueError(f"choices of layers {layers}: two layers are the least that can depend on each other")
    mi = [normalized_mutual_info_score(choices[a].numpy(), choices[b].numpy()) for a, b in pairwise(layers)]
    return torch.tensor(mi)
