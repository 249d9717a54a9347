"""The largest output of every expert, routed or shared, and the token that it occurred on.

    a[e] = max over tokens and channels of |output of e|, before its gate weight

Shapes: E experts, N tokens, K slots, H hidden, M outputs of experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.view.events import Batch, MoEEvent, Tokens

UNSEEN = 2**62
"""Place of a token that there is not: behind all others."""


@dataclass(frozen=True)
class Peaks:
    """The largest output entry of each expert of a layer, by magnitude, and the token that it occurred on."""

    value: Float[Tensor, " e"]
    """0 where no token reached the expert."""
    channel: Int[Tensor, " e"]
    token: Int[Tensor, " e"]
    """Its id; -1 where there is none."""
    place: Int[Tensor, " e"]
    """sample * 2^32 + position: the first of several equal ones counts, however the data are split."""
    hidden: Float[Tensor, "e h"]
    """What the expert was given."""

    @property
    def sample(self) -> Int[Tensor, " e"]:
        """Number of the text; -1 where no token reached the expert."""
        return torch.where(self.place == UNSEEN, -1, self.place >> 32)

    @property
    def position(self) -> Int[Tensor, " e"]:
        """Position in the text; -1 where no token reached the expert."""
        return torch.where(self.place == UNSEEN, -1, self.place & (2**32 - 1))

    @classmethod
    def of(
        cls,
        experts: int,
        tokens: Tokens,
        hidden: Float[Tensor, "n h"],
        *,
        expert: Int[Tensor, " m"],
        row: Int[Tensor, " m"],
        value: Float[Tensor, " m"],
        channel: Int[Tensor, " m"],
    ) -> Peaks:
        """From M outputs: of which expert and for which of the N tokens each is, its largest entry, and where."""
        place = ((tokens.sample << 32) + tokens.position)[row]
        best = torch.zeros(experts).scatter_reduce(0, expert, value, "amax")
        first = torch.where(value == best[expert], place, UNSEEN)
        first = torch.full((experts,), UNSEEN).scatter_reduce(0, expert, first, "amin")
        mine = (place == first[expert]).nonzero().flatten()

        def spread(found: Tensor, missing: int) -> Tensor:
            return found.new_full((experts, *found.shape[1:]), missing).index_copy(0, expert[mine], found)

        at = row[mine]
        return cls(
            best,
            spread(channel[mine], -1),
            spread(tokens.id[at], -1),
            first,
            spread(hidden[at.to(hidden.device)].cpu(), 0),
        )

    def or_larger(self, other: Peaks) -> Peaks:
        """Expert by expert the larger of the two."""
        better = (other.value > self.value) | ((other.value == self.value) & (other.place < self.place))
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Peaks(*(torch.where(better if a.dim() == 1 else better[:, None], b, a) for a, b in pairs))


class OutputPeaks:
    """Observer: ({layer: Peaks of the routed experts}, {layer: Peaks of the shared expert}).

    Events tell nothing of shared experts: `update_shared` takes them, from hooks (see `super_experts.profile_outputs`).
    """

    needs = frozenset({"maxima"})

    def __init__(self) -> None:
        self._routed: dict[int, Peaks] = {}
        self._shared: dict[int, Peaks] = {}

    def update(self, event: MoEEvent) -> None:
        used = (event.routing.weights != 0) & (event.routing.indices < event.num_experts)
        expert, value, channel = (t[used].cpu() for t in (event.routing.indices, event.maxima, event.channels))
        row = used.nonzero()[:, 0].cpu()
        found = Peaks.of(
            event.num_experts, event.tokens, event.hidden, expert=expert.long(), row=row, value=value, channel=channel
        )
        self._join(self._routed, event.layer, found)

    def update_shared(self, layer: int, batch: Batch, hidden: Tensor, out: Tensor) -> None:
        """What a layer's shared expert made of a batch: its input and output, [B * T, H] in any shape."""
        rows = slice(None) if batch.kept is None else batch.kept.to(out.device)
        value, channel = out.detach().reshape(-1, out.shape[-1])[rows].abs().max(dim=-1)
        row = torch.arange(len(batch.tokens))
        found = Peaks.of(
            1,
            batch.tokens,
            hidden.detach().reshape(-1, hidden.shape[-1])[rows],
            expert=torch.zeros_like(row),
            row=row,
            value=value.float().cpu(),
            channel=channel.cpu(),
        )
        self._join(self._shared, layer, found)

    def _join(self, table: dict[int, Peaks], layer: int, found: Peaks) -> None:
        if not found.value.isfinite().all():
            expert = int((~found.value.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the output of expert {expert} of layer {layer} is not finite: fp16 ends at 65504; load the model in "
                "bf16 or fp32"
            )
        table[layer] = table[layer].or_larger(found) if layer in table else found

    def merge(self, other: Self) -> None:
        for mine, theirs in ((self._routed, other._routed), (self._shared, other._shared)):
            for layer, found in theirs.items():
                self._join(mine, layer, found)

    def result(self) -> tuple[dict[int, Peaks], dict[int, Peaks]]:
        return dict(sorted(self._routed.items())), dict(sorted(self._shared.items()))
