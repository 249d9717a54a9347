"""EASY-EP: keep the experts that change the residual stream on a few demonstrations of the domain.

For token t with residual stream h_t, gate weights g_{i,t} and outputs e_{i,t} of its chosen experts i:

    c_{i,t} = g_{i,t} * ||e_{i,t}||                     the expert's share of the routed output
    s_t     = max(0, 1 - cos(h_t, h_t + sum_i g_{i,t} e_{i,t}))   how far the routed experts turn the stream
    I(i)    = sum over tokens of c_{i,t} * s_t

Demonstrations should be prompts followed by the unpruned model's own answers. Several domains are mixed after each is
scaled to sum 1 per layer.

"Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations" (arXiv:2504.06792).
Shapes: N tokens, E experts, K slots, D domains, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.view.events import MoEEvent
from moestro.view.observe import DomainTable

_SUMS = ("count", "gate", "gate_turn", "gated_norm", "gated_norm_turn")


@dataclass(frozen=True)
class EasyEPSums:
    """{layer: [D, E]} sums over tokens: of 1, g, g * s, g * ||e||, g * ||e|| * s."""

    domains: tuple[str, ...]
    layers: dict[int, dict[str, Float[Tensor, "d e"]]]

    def domain(self, *names: str) -> EasyEPSums:
        """The sums of some domains alone."""
        unknown = set(names) - set(self.domains)
        if unknown:
            raise ValueError(f"no domain {sorted(unknown)[0]!r} was observed; there are {list(self.domains)}")
        rows = [self.domains.index(n) for n in names]
        return EasyEPSums(names, {i: {n: t[rows] for n, t in sums.items()} for i, sums in self.layers.items()})


class EasyEPStats:
    """Collects the sums that EASY-EP and its ablations are made of."""

    needs = frozenset({"norms", "residual"})

    def __init__(self) -> None:
        self._table = DomainTable()

    def update(self, event: MoEEvent) -> None:
        stream, routed = event.residual.float(), event.combined.float()
        if stream.shape != routed.shape:
            raise ValueError(
                f"EASY-EP compares the residual stream with the experts' output, and in layer {event.layer} these have "
                f"{stream.shape[1]} and {routed.shape[1]} channels (experts in a latent space); use reap there"
            )
        turn = (1 - torch.cosine_similarity(stream, stream + routed, dim=-1)).clamp(min=0).cpu()
        rows = self._table.rows(event.tokens)
        weights, indices, norms = (t.cpu() for t in (event.routing.weights, event.routing.indices, event.norms))
        used = (weights != 0) & (indices < event.num_experts)
        place = (rows[:, None] * event.num_experts + indices)[used]
        gate, norm, turn = weights[used].float(), norms[used], turn[:, None].expand_as(weights)[used]
        for name, value in zip(_SUMS, (torch.ones_like(gate), gate, gate * turn, gate * norm, gate * norm * turn)):
            self._table.add(event.layer, name, event.num_experts, place, value)

    def merge(self, other: Self) -> None:
        self._table.merge(other._table)

    def result(self) -> EasyEPSums:
        return EasyEPSums(tuple(self._table.domains), dict(sorted(self._table.sums.items())))


def easy_ep(sums: EasyEPSums, *, norm: bool = True, token: bool = True) -> dict[int, Float[Tensor, " e"]]:
    """The score of every expert. `norm=False`, `token=False` leave out ||e|| and s_t: the paper's ablations.

    NaN: no token reached the expert.
    """
    name = ("gated_norm" if norm else "gate") + ("_turn" if token else "")
    scores = {}
    for layer, by_domain in sums.layers.items():
        domains = [by_domain[name][d] for d in range(len(sums.domains))]
        mixed = domains[0] if len(domains) == 1 else mix(domains)
        scores[layer] = torch.where(by_domain["count"].sum(dim=0) > 0, mixed, torch.nan)
    return scores


def mix(domains: list[Float[Tensor, " e"]]) -> Float[Tensor, " e"]:
    """Mean over domains of scores scaled to sum 1, so that no domain outvotes another by its length or norms."""
    return torch.stack([d / d.sum().clamp(min=1e-30) for d in domains]).mean(dim=0)


def overlap(a: Mapping[int, Tensor], b: Mapping[int, Tensor], top: int) -> dict[int, float]:
    """Per layer, the share of the `top` best experts by `a` that are also among the `top` best by `b`."""
    best = [{i: set(s[i].nan_to_num(-1.0).topk(top).indices.tolist()) for i in a} for s in (a, b)]
    return {i: len(best[0][i] & best[1][i]) / top for i in a}
