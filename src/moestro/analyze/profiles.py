"""How each text is routed: mean probability and use of every expert, text by text. One trace for many analyses.

    q[s, e] = mean over the text's tokens of p_t[e]          p: the router's probabilities over all E experts
    a[s, e] = number of the text's tokens that expert e served
    h[s]    = mean entropy of p_t, nats

Shapes: S texts (samples), E experts, N tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.routing import SCORES, RoutingRule
from moestro.view.events import MoEEvent


@dataclass(frozen=True)
class Profiles:
    """Routing of S texts; rows are in the order of `samples` in every layer."""

    samples: Int[Tensor, " s"]
    """Their numbers over the data."""
    domain: Int[Tensor, " s"]
    """Index into `domains`."""
    domains: tuple[str, ...]
    tokens: Float[Tensor, " s"]
    probability_sums: dict[int, Float[Tensor, "s e"]]
    counts: dict[int, Float[Tensor, "s e"]]
    entropy_sums: dict[int, Float[Tensor, " s"]]
    overlap_sums: dict[int, Float[Tensor, " s"]]
    """Sum over adjacent tokens of a text of the Jaccard overlap of their expert sets."""
    pairs: dict[int, Float[Tensor, " s"]]
    """How many adjacent tokens that sum holds: those next to each other that were read in one window."""

    @property
    def importance(self) -> dict[int, Float[Tensor, "s e"]]:
        """{layer: q}: a distribution over the experts for every text."""
        return {layer: sums / self.tokens[:, None] for layer, sums in self.probability_sums.items()}

    @property
    def frequency(self) -> dict[int, Float[Tensor, "s e"]]:
        """{layer: a / tokens}: share of the text's tokens that each expert served, from 0 to 1."""
        return {layer: count / self.tokens[:, None] for layer, count in self.counts.items()}

    @property
    def consistency(self) -> dict[int, Float[Tensor, " s"]]:
        """{layer: mean Jaccard overlap of the expert sets of adjacent tokens}; NaN for texts of one token."""
        return {layer: sums / self.pairs[layer] for layer, sums in self.overlap_sums.items()}

    @property
    def entropy(self) -> dict[int, Float[Tensor, " s"]]:
        """{layer: mean over the text's tokens of the entropy of their routing, nats}"""
        return {layer: sums / self.tokens for layer, sums in self.entropy_sums.items()}

    def of(self, domain: str) -> Profiles:
        """The texts of one domain. Raises ValueError for one that was not observed."""
        if domain not in self.domains:
            raise ValueError(f"no text of {domain!r} was observed; there are {list(self.domains)}")
        return self[(self.domain == self.domains.index(domain)).nonzero().flatten()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Tensor) -> Profiles:
        def pick(table: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: values[rows] for layer, values in table.items()}

        head = (self.samples[rows], self.domain[rows], self.domains, self.tokens[rows])
        tables = (self.probability_sums, self.counts, self.entropy_sums, self.overlap_sums, self.pairs)
        return Profiles(*head, *map(pick, tables))


class TextProfiles:
    """Observer: `Profiles` of all texts, S * E numbers a layer. Texts may be cut over batches and processes.

    `rules`: {layer: its RoutingRule}, which tells how logits become scores; by default their softmax. `skip`: ids of
    tokens that are read and not counted, as those that open every text or belong to a template.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, rules: Mapping[int, RoutingRule | None] | None = None, *, skip: Collection[int] = ()) -> None:
        self.rules = rules or {}
        self.skip = torch.tensor(sorted(skip), dtype=torch.long)
        self._domains: list[str] = []
        self._domain_of: dict[int, int] = {}
        self._tokens: dict[int, float] = {}
        self._sums: dict[int, dict[int, Tensor]] = {}
        self._first_layer: int | None = None

    def update(self, event: MoEEvent) -> None:
        counted = (~torch.isin(event.tokens.id, self.skip)).nonzero().flatten()
        if not len(counted):
            return
        tokens = event.tokens[counted]
        samples, row = tokens.sample.unique(return_inverse=True)
        if self._first_layer in (None, event.layer):
            self._first_layer = event.layer
            for name in tokens.domains:
                if name not in self._domains:
                    self._domains.append(name)
            domain = torch.zeros(len(samples), dtype=torch.long).index_copy_(0, row, tokens.domain)
            for s, d, n in zip(samples.tolist(), domain.tolist(), row.bincount().tolist(), strict=True):
                self._domain_of[s] = self._domains.index(tokens.domains[d])
                self._tokens[s] = self._tokens.get(s, 0.0) + n
        probabilities = self._probabilities(event).cpu()[counted]
        chosen = chosen_experts(event)[counted]
        adjacent = (row[1:] == row[:-1]) & (tokens.position[1:] == tokens.position[:-1] + 1)
        both = (chosen[1:] & chosen[:-1]).sum(1)
        jaccard = torch.zeros(len(tokens))
        jaccard[1:] = torch.where(adjacent, both / (chosen[1:] | chosen[:-1]).sum(1).clamp_min(1), 0)
        paired = F.pad(adjacent, (1, 0))
        scalars = torch.stack([torch.special.entr(probabilities).sum(1), jaccard, paired], dim=1)
        columns = torch.cat([probabilities.double(), chosen.double(), scalars.double()], dim=1)
        sums = torch.zeros(len(samples), columns.shape[1], dtype=torch.float64).index_add_(0, row, columns)
        kept = self._sums.setdefault(event.layer, {})
        for s, values in zip(samples.tolist(), sums, strict=True):
            kept[s] = kept[s] + values if s in kept else values

    def _probabilities(self, event: MoEEvent) -> Float[Tensor, "n e"]:
        rule = self.rules.get(event.layer)
        scores = SCORES["softmax" if rule is None else rule.score](event.routing.logits.float())[:, : event.num_experts]
        return scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-20)

    def merge(self, other: Self) -> None:
        self._domains += [d for d in other._domains if d not in self._domains]
        for s, n in other._tokens.items():
            self._tokens[s] = self._tokens.get(s, 0.0) + n
            self._domain_of[s] = self._domains.index(other._domains[other._domain_of[s]])
        for layer, rows in other._sums.items():
            mine = self._sums.setdefault(layer, {})
            for s, values in rows.items():
                mine[s] = mine[s] + values if s in mine else values

    def result(self) -> Profiles:
        samples = sorted(self._tokens)
        joined = {layer: torch.stack([rows[s] for s in samples]) for layer, rows in sorted(self._sums.items())}
        sizes = {layer: (t.shape[1] - 3) // 2 for layer, t in joined.items()}
        return Profiles(
            torch.tensor(samples),
            torch.tensor([self._domain_of[s] for s in samples]),
            tuple(self._domains),
            torch.tensor([self._tokens[s] for s in samples], dtype=torch.float64),
            {layer: t[:, : sizes[layer]] for layer, t in joined.items()},
            {layer: t[:, sizes[layer] : 2 * sizes[layer]] for layer, t in joined.items()},
            *({layer: t[:, column] for layer, t in joined.items()} for column in (-3, -2, -1)),
        )


def chosen_experts(event: MoEEvent) -> Bool[Tensor, "n e"]:
    """Which experts serve each token."""
    routing, size = event.routing, event.num_experts
    used = (routing.weights != 0) & (routing.indices < size)
    chosen = torch.zeros(len(event.tokens), size + 1, dtype=torch.bool)  # the last column takes unused slots
    return chosen.scatter_(1, routing.indices.masked_fill(~used, size).cpu().long(), True)[:, :size]
