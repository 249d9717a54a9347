"""What observers receive: one MoEEvent per MoE layer and chunk of tokens, and where its tokens came from.

Shapes: B rows, T positions, N tokens with padding removed, H hidden, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from moestro.routing import Routing

NEEDS = frozenset({"heads", "last_patterns", "lm_logits", "maxima", "norms", "outputs", "patterns", "residual"})
"""What an observer may ask for beyond what every event carries."""


@dataclass(frozen=True)
class Tokens:
    """Where each of N tokens came from. Padding is not among them."""

    sample: Int[Tensor, " n"]
    """Index of the document over the whole data set."""
    position: Int[Tensor, " n"]
    """Position of the token in its document."""
    id: Int[Tensor, " n"]
    """Token id; -1 where the model was given embeddings."""
    domain: Int[Tensor, " n"]
    """Index into `domains`."""
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, chosen: slice | Int[Tensor, " m"]) -> Tokens:
        return Tokens(self.sample[chosen], self.position[chosen], self.id[chosen], self.domain[chosen], self.domains)

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """The tokens of several parts of one data set, one after the other."""
        names = tuple(dict.fromkeys(name for t in parts for name in t.domains))
        sample, position, id = (torch.cat([getattr(t, f) for t in parts]) for f in ("sample", "position", "id"))
        domain = torch.cat([torch.tensor([names.index(n) for n in t.domains])[t.domain] for t in parts])
        return cls(sample, position, id, domain, names)


@dataclass(frozen=True)
class Batch:
    """One forward pass: its shape, its tokens, and which of the B * T places hold a token."""

    shape: tuple[int, int]
    tokens: Tokens
    kept: Int[Tensor, " n"] | None
    """Places of the tokens among B * T; None where there is no padding."""
    before: int = 0
    """Columns that precede the T in a cache, padding included."""
    real: Bool[Tensor, "b s"] | None = None
    """Which of the `before` + T columns hold a token; None where all do."""
    copies: int = 1
    """How many rows in turn stand for one row of the caller's batch: beams, or sequences to return."""

    def on_grid(self, values: Shaped[Tensor, " n"], padding: float) -> Shaped[Tensor, "b t"]:
        """The tokens' values at their places, and `padding` where no token is."""
        grid = values.new_full((self.shape[0] * self.shape[1],), padding)
        grid[slice(None) if self.kept is None else self.kept] = values
        return grid.view(self.shape)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        *,
        ids: Int[Tensor, "b t"] | None,
        mask: Shaped[Tensor, "b s"] | None,
        sample: Int[Tensor, " b"] | None = None,
        start: Int[Tensor, " b"] | int = 0,
        domain: Int[Tensor, " b"] | None = None,
        domains: tuple[str, ...] = ("all",),
        before: int = 0,
    ) -> Batch:
        """`mask` may be longer than T (a cache precedes the tokens): its last T columns count."""
        rows, length = shape
        device = torch.device("cpu")
        ids = torch.full(shape, -1) if ids is None else ids.to(device)
        if mask is None or mask.dim() != 2:
            position = torch.arange(length).expand(shape)
            keep = real = None
        else:
            real = mask.to(device).bool()
            position = (real.long().cumsum(dim=1) - 1)[:, -length:]
            keep = real[:, -length:]
        position = position + (start.to(device)[:, None] if isinstance(start, Tensor) else start)
        sample = torch.arange(rows) if sample is None else sample.to(device)
        domain = torch.zeros(rows, dtype=torch.long) if domain is None else domain.to(device)
        flat = [t.reshape(-1) for t in (sample[:, None].expand(shape), position, ids, domain[:, None].expand(shape))]
        kept = None if keep is None or bool(keep.all()) else keep.reshape(-1).nonzero().squeeze(1)
        if kept is not None:
            flat = [t[kept] for t in flat]
        sample, position, ids, domain = flat
        return cls(shape, Tokens(sample, position, ids, domain, domains), kept, before, real)

    @classmethod
    def of_forward(
        cls, kwargs: Mapping[str, Any], before: int, known: Bool[Tensor, "b before"] | None = None
    ) -> Batch | None:
        """From the arguments of a decoder's forward and the number of cached tokens; None where they do not tell.

        `known`: which of the cached columns hold a token, where an earlier pass has told.
        """
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None or given.dim() < 2:
            return None
        shape = (given.shape[0], given.shape[1])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # one for each kind of attention; a sliding one forgets
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is not None and not isinstance(mask, Tensor):
            return None
        if mask is not None and mask.dim() == 4:
            mask = _real_tokens(mask, before, shape, known)
        positions = kwargs.get("position_ids")
        if mask is None and before and isinstance(positions, Tensor) and positions.shape == shape:
            start: Any = positions[:, 0]  # the caller has counted: a cache whose padding no mask tells
        else:
            start = before if mask is None else 0
        return cls.of(shape, ids=ids, mask=mask, start=start, before=before)


def cached_tokens(cache: Any) -> int:
    """Tokens in a KV cache; 0 where it is None, or does not tell."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _real_tokens(
    mask: Shaped[Tensor, "b h t s"], before: int, shape: tuple[int, int], known: Tensor | None
) -> Bool[Tensor, "b n"] | None:
    """Which of the tokens so far are no padding, from the mask [B or 1, 1, T, S] that attention itself is given.

    A new token is real where it may attend to itself, an earlier one where a new token may attend to it. The mask of a
    sliding window shows the last columns alone: then what is `known` of the others counts, and None is returned where
    nothing is.
    """
    rows, length = shape
    allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(rows, -1, -1)
    columns = allowed.shape[2]
    whole = before + length <= columns
    # where keys slide out of the window, the newest ones stand in the last columns
    first = before if whole else columns - length
    at = torch.arange(length, device=mask.device)
    new = allowed[:, at, (at + first).clamp(min=0)] if columns else torch.ones_like(allowed[:, :, 0])
    if known is not None and known.shape == (rows, before):
        earlier = known.to(new.device)
    elif whole:
        earlier = allowed[:, :, :before].any(dim=1)
    else:
        return None
    return torch.cat([earlier, new], dim=1)


class MoEEvent:
    """One MoE layer's part in one forward pass, or in a chunk of its tokens.

    `layer` is the layer's number; in a view of several stacks that number alike, the name of its block, which `name`
    always is. Attributes of N tokens are computed when first read, so an observer pays only for what it uses:
    `hidden` [N, H] (input of the experts), `routing` (the triple that was in force, edits included), `combined`
    [N, H] (the routed experts' weighted sum; before any Replace where an observer asks for norms, maxima or outputs),
    and where asked for in `needs`: `norms` [N, K] (L2 norm of each slot's output before its gate weight), `maxima`
    [N, K] (its largest entry by magnitude, with the channel in `channels` [N, K]), `outputs` [N, K, H], `residual`
    [N, H] (the residual stream that the block will be added to). Unused slots have weight 0.
    """

    def __init__(
        self,
        layer: Any,
        num_experts: int,
        tokens: Tokens,
        kept: Tensor | None,
        *,
        name: str = "",
        hidden: Tensor,
        routing: Routing,
        combined: Tensor,
        norms: Tensor | None = None,
        maxima: Tensor | None = None,
        channels: Tensor | None = None,
        outputs: Tensor | None = None,
        residual: Tensor | None = None,
    ):
        self.layer, self.num_experts, self.tokens, self.name = layer, num_experts, tokens, name or f"layer {layer}"
        self._kept = kept
        self._raw = dict(hidden=hidden, combined=combined, outputs=outputs, residual=residual)
        self._raw |= dict(norms=norms, maxima=maxima, channels=channels)
        self._routing = routing

    def check(self) -> None:
        """Raise FloatingPointError or ValueError where the model broke: it names layer, expert, sample and position."""
        experts, bad = self.num_experts, torch.isnan(self.routing.logits).any(dim=-1)
        if bad.any():
            raise FloatingPointError(f"NaN router logits {self._at(bad)}: the model or that sample is broken")
        check_indices(f"the router of {self.name}", self.routing.indices, experts)
        bad = (~torch.isfinite(self.routing.weights) & (self.routing.indices < experts)).any(dim=-1)
        if bad.any():
            raise FloatingPointError(
                f"gate weights that are not finite {self._at(bad)}: a router logit is infinite, or overflows "
                f"{self.routing.weights.dtype}; the model or that sample is broken"
            )
        if self._raw["norms"] is None:
            return
        used = (self.routing.weights != 0) & (self.routing.indices < experts)
        broken = used & ~torch.isfinite(self.norms)
        if broken.any():
            slot = broken.flatten().nonzero()[0]
            expert = int(self.routing.indices.flatten()[slot])
            raise FloatingPointError(
                f"expert {expert} gave {float(self.norms.flatten()[slot])} as the norm of its output "
                f"{self._at(broken.any(dim=-1))}: its weights are broken, or its type ({self.hidden.dtype}) "
                "overflows; nothing was changed"
            )

    def _at(self, bad: Bool[Tensor, " n"]) -> str:
        where = int(bad.nonzero()[0])
        sample, position = int(self.tokens.sample[where]), int(self.tokens.position[where])
        return f"in layer {self.layer} ({self.name}) at sample {sample}, position {position}"

    def _rows(self, name: str) -> Tensor:
        value = self._raw[name]
        if value is None:
            need = "maxima" if name == "channels" else name
            raise ValueError(f"event.{name} was not asked for: add {need!r} to the observer's needs")
        return value if self._kept is None else value[self._kept.to(value.device)]

    @cached_property
    def hidden(self) -> Float[Tensor, "n h"]:
        return self._rows("hidden")

    @cached_property
    def combined(self) -> Float[Tensor, "n h"]:
        return self._rows("combined")

    @cached_property
    def norms(self) -> Float[Tensor, "n k"]:
        return self._rows("norms")

    @cached_property
    def maxima(self) -> Float[Tensor, "n k"]:
        return self._rows("maxima")

    @cached_property
    def channels(self) -> Int[Tensor, "n k"]:
        return self._rows("channels")

    @cached_property
    def outputs(self) -> Float[Tensor, "n k h"]:
        return self._rows("outputs")

    @cached_property
    def residual(self) -> Float[Tensor, "n h"]:
        return self._rows("residual")

    @cached_property
    def routing(self) -> Routing:
        if self._kept is None:
            return self._routing
        return Routing(*(t[self._kept.to(t.device)] for t in self._routing))


def check_indices(where: str, indices: Int[Tensor, "n k"], num_experts: int) -> None:
    """Raise ValueError where a slot names an expert that is not there. Index E, and no other, marks an unused slot."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= num_experts:
        wrong = indices[(indices < 0) | (indices > num_experts)]
        raise ValueError(
            f"{where} gives a slot expert {int(wrong[0])}; there are experts 0 to {num_experts - 1}, and {num_experts} "
            "marks a slot as unused"
        )


@runtime_checkable
class Observer(Protocol):
    """Learns from forward passes. Any number of observers share one pass over the data."""

    needs: frozenset[str]
    """Subset of NEEDS: what must be computed for this observer."""

    def update(self, event: MoEEvent) -> None: ...

    def merge(self, other: Self) -> None:
        """Take in what `other` saw. Associative, so that data can be split over processes and machines."""

    def result(self) -> Any: ...


class LogitsObserver(Observer, Protocol):
    """An observer that needs "lm_logits": it is also given what the language model predicts."""

    def update_logits(self, batch: Batch, ids: Int[Tensor, "b t"], logits: Float[Tensor, "b t v"]) -> None:
        """One whole batch, after all its events. Padding has logits as well; `batch.kept` tells what to leave out."""
