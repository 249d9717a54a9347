"""Attention heads: what observers receive, and the changes to a forward pass that leave the weights alone.

A head is one of the query heads of an attention layer that hands its work to transformers' AttentionInterface; z is
what the attention function gives for it, before the output projection (and before the output gate of a family that has
one). Where several query heads share keys and values (grouped-query attention), a key or value belongs to the group.

    with view.edits(HeadMask({(3, 1), (5, 0)}), SwitchOff({(2, 7)})):
        model.generate(...)

Shapes: B rows, T queries, S keys (the cache's and the new ones), A query heads, G key-value heads, D head width,
N tokens with padding removed, P places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.sets import by_layer
from moestro.view.edit import RowChoice
from moestro.view.events import Batch, Observer, Tokens

HeadId = tuple[int, int]
"""(decoder layer, query head)"""
Part = Literal["q", "k", "v", "z"]


@dataclass(eq=False)
class HeadLayer:
    """One attention layer of an open model."""

    index: int
    """Number of the decoder layer it sits in."""
    name: str
    module: nn.Module = field(repr=False)
    num_heads: int
    kv_heads: int
    head_dim: int
    """Width of z and of the values; queries and keys may be wider."""
    no_pattern: str = ""
    """Why patterns cannot be had here; empty where they can."""

    def __str__(self) -> str:
        shared = f", {self.kv_heads} key-value heads" if self.kv_heads != self.num_heads else ""
        return f"layer {self.index} ({self.name}): {self.num_heads} heads of width {self.head_dim}{shared}"

    def group_of(self, head: int) -> int:
        """The key-value head that query head `head` reads."""
        return head * self.kv_heads // self.num_heads


class HeadCall:
    """One call of one layer's attention: where its queries and keys stand in their texts.

    Positions count a row's own tokens from 0, padding left out; padding has position -1.
    """

    def __init__(self, layer: HeadLayer, shape: tuple[int, int], keys: int, batch: Batch | None):
        self.layer, self.shape, self.keys = layer, shape, keys
        self._batch = batch

    @property
    def batch(self) -> Batch:
        """Raises RuntimeError where the rows and positions cannot be told."""
        if self._batch is None or self._batch.shape != self.shape:
            raise RuntimeError(
                f"{self.layer.name} got {self.shape[0]} x {self.shape[1]} queries, and the batch is "
                f"{'unknown' if self._batch is None else self._batch.shape}: rows and positions cannot be told"
            )
        return self._batch

    @property
    def prefill(self) -> bool:
        """Whether nothing precedes these tokens in a cache."""
        return self.batch.before == 0

    @cached_property
    def position(self) -> Int[Tensor, "b t"]:
        return self.batch.on_grid(self.batch.tokens.position, -1)

    @cached_property
    def key_position(self) -> Int[Tensor, "b s"]:
        batch = self.batch
        filled = batch.before + self.shape[1]
        if batch.real is None:
            position = torch.arange(filled).expand(self.shape[0], filled)
        else:
            position = (batch.real.long().cumsum(dim=1) - 1).masked_fill(~batch.real, -1)
        unfilled = self.keys - filled  # a static cache has room to come, a sliding one has forgotten
        return nn.functional.pad(position, (0, max(unfilled, 0)), value=-1)[:, -self.keys :]

    @cached_property
    def last(self) -> Int[Tensor, " b"]:
        """Index among the T queries of each row's last token; -1 for a row without any."""
        return torch.where(self.position >= 0, torch.arange(self.shape[1]), -1).amax(dim=1)

    def places(self, at: At) -> Bool[Tensor, "b t p"]:
        """Which query stands at which of the P places: "all" queries, the prompt's "last", or given positions [B, P].

        Rows of given positions are repeated to the batch's under beam search.
        """
        if isinstance(at, str) and at == "all":
            return (self.position >= 0)[:, :, None]
        if isinstance(at, str):
            found = torch.arange(self.shape[1]) == self.last[:, None]
            return (found if self.prefill else torch.zeros_like(found))[:, :, None]
        wanted = torch.as_tensor(at)
        if wanted.dim() != 2 or self.shape[0] % len(wanted):
            raise ValueError(f"positions of shape {tuple(wanted.shape)} for {self.shape[0]} rows; give [B, P]")
        wanted = wanted.cpu().repeat_interleave(self.shape[0] // len(wanted), dim=0)
        return (self.position[:, :, None] == wanted[:, None, :]) & (wanted >= 0)[:, None, :]


At = Literal["all", "last"] | Int[Tensor, "b p"]
"""Which tokens an edit acts on: all; the last of each prompt, at prefill alone; or positions [B, P], -1 for none."""


class HeadEvent:
    """One attention layer's part in one forward pass.

    `z` [N, A, D], `tokens` and `call` are always there; `query` [B, A, T, Dq], `key` [B, G, S, Dq] and `value`
    [B, G, S, D] are those that the attention was given, edits included; `pattern` [B, A, T, S] is there where an
    observer needs "patterns", `last_pattern` [B, A, S], that of each row's last query, where one needs "last_patterns".
    """

    def __init__(
        self,
        call: HeadCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        z_grid: Tensor,
        pattern: Tensor | None,
        last_pattern: Tensor | None = None,
    ):
        self.call, self.layer = call, call.layer.index
        self.query, self.key, self.value, self.z_grid = query, key, value, z_grid
        self._pattern, self._last_pattern = pattern, last_pattern

    @property
    def tokens(self) -> Tokens:
        return self.call.batch.tokens

    @cached_property
    def z(self) -> Float[Tensor, "n a d"]:
        rows, kept = self.z_grid.flatten(0, 1), self.call.batch.kept
        return rows if kept is None else rows[kept.to(rows.device)]

    @property
    def pattern(self) -> Float[Tensor, "b a t s"]:
        if self._pattern is None:
            raise ValueError('event.pattern was not asked for: add "patterns" to the observer\'s needs')
        return self._pattern

    @property
    def last_pattern(self) -> Float[Tensor, "b a s"]:
        """While a model generates: that of the query whose output is the next token."""
        if self._last_pattern is None:
            raise ValueError('event.last_pattern was not asked for: add "last_patterns" to the observer\'s needs')
        return self._last_pattern


@runtime_checkable
class HeadObserver(Protocol):
    """An observer of heads: it needs "heads", "patterns" or "last_patterns". With `update`, of experts as well."""

    needs: frozenset[str]

    def update_heads(self, event: HeadEvent) -> None: ...

    def merge(self, other: Any) -> None: ...

    def result(self) -> Any: ...


AnyObserver = Observer | HeadObserver


@dataclass(eq=False)
class HeadEdit(RowChoice):
    """Base of the edits of heads: acts on `layers()`, does nothing anywhere."""

    def layers(self) -> Collection[int] | None:
        """Decoder layer numbers it acts on; None: all attention layers."""
        return None

    def check(self, layer: HeadLayer) -> None:
        """Raise ValueError where the layer cannot be edited like this. Called before anything runs."""

    def inputs(
        self,
        call: HeadCall,
        query: Float[Tensor, "b a t dq"],
        key: Float[Tensor, "b g s dq"],
        value: Float[Tensor, "b g s d"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New queries, keys and values, positions already rotated in. The cache keeps the old ones."""
        return query, key, value

    def pattern_heads(self, layer: int) -> Sequence[int]:
        """The heads whose pattern `pattern` changes."""
        return ()

    def pattern(
        self, call: HeadCall, pattern: Float[Tensor, "b m t s"], allowed: Bool[Tensor, "b m t s"]
    ) -> Float[Tensor, "b m t s"]:
        """New attention of the M heads of `pattern_heads`; `allowed`: which keys the mask lets a query see."""
        return pattern

    def z(self, call: HeadCall, z: Float[Tensor, "b t a d"]) -> Float[Tensor, "b t a d"]:
        return z


@dataclass(eq=False)
class _OnHeads(HeadEdit):
    """Base of the edits of single heads: those of the first field of its own, a collection or mapping by pairs."""

    def __post_init__(self) -> None:
        first = next(f.name for f in fields(self) if f.name != "rows")
        self.ids = by_layer(getattr(self, first))

    def layers(self) -> Collection[int]:
        return self.ids

    def check(self, layer: HeadLayer) -> None:
        if wrong := [h for h in self.ids[layer.index] if not 0 <= h < layer.num_heads]:
            raise ValueError(f"layer {layer.index} has heads 0..{layer.num_heads - 1}; there is no head {wrong[0]}")


@dataclass(eq=False)
class HeadMask(_OnHeads):
    """Take heads out: their z becomes zero, a given mean, or what uniform attention to the allowed keys gives."""

    heads: Iterable[HeadId]
    mode: Literal["zero", "mean", "uniform"] = "zero"
    means: Mapping[int, Float[Tensor, "a d"]] | None = None
    """{layer: mean z of every head}, for "mean": see `HeadMeans`"""

    def check(self, layer: HeadLayer) -> None:
        super().check(layer)
        if self.mode == "mean":
            given = tuple(self.means[layer.index].shape) if self.means and layer.index in self.means else None
            if given != (layer.num_heads, layer.head_dim):
                raise ValueError(
                    f'HeadMask(mode="mean") has means of shape {given} for layer {layer.index}; give '
                    f"[{layer.num_heads}, {layer.head_dim}], as HeadMeans collects them"
                )

    def pattern_heads(self, layer: int) -> Sequence[int]:
        return self.ids[layer] if self.mode == "uniform" else ()

    def pattern(self, call: HeadCall, pattern: Tensor, allowed: Tensor) -> Tensor:
        return (allowed / allowed.sum(dim=-1, keepdim=True).clamp_min(1)).to(pattern.dtype)

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        if self.mode == "uniform":
            return z
        heads = torch.tensor(self.ids[call.layer.index], device=z.device)
        if self.mode == "zero":
            return z.index_fill(2, heads, 0.0)
        means = self.means[call.layer.index].to(z)[heads]  # type: ignore[index]
        return z.index_copy(2, heads, means.expand(*z.shape[:2], *means.shape))


@dataclass(eq=False)
class HeadGain(_OnHeads):
    """Multiply what heads contribute: 0 takes a head out, 1 leaves it."""

    gains: Mapping[HeadId, float]

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        table = torch.ones(call.layer.num_heads, dtype=z.dtype)
        for head in self.ids[call.layer.index]:
            table[head] = self.gains[call.layer.index, head]
        return z * table.to(z.device)[:, None]


@dataclass(eq=False)
class HeadPatch(_OnHeads):
    """Put given vectors in the place of heads' q, k, v or z at some positions; elsewhere nothing changes.

    A patched key or value is that of the head's group (grouped-query attention), for every head that reads it. Keys
    and values are patched wherever their position is among the keys, cached ones too.
    """

    values: Mapping[HeadId, Tensor]
    """{(layer, head): [D], [B, D] or [B, P, D]}"""
    part: Part = "z"
    at: At = "last"

    def check(self, layer: HeadLayer) -> None:
        super().check(layer)
        for head in self.ids[layer.index]:
            value = self.values[layer.index, head]
            if value.dim() not in (1, 2, 3):
                raise ValueError(f"HeadPatch: values of shape {tuple(value.shape)}; give [D], [B, D] or [B, P, D]")

    def inputs(self, call: HeadCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.part == "q":
            query = self._patched(call, query.transpose(1, 2), call.places(self.at)).transpose(1, 2)
        elif self.part in ("k", "v"):
            places = self._key_places(call)
            group = call.layer.group_of
            if self.part == "k":
                key = self._patched(call, key.transpose(1, 2), places, group).transpose(1, 2)
            else:
                value = self._patched(call, value.transpose(1, 2), places, group).transpose(1, 2)
        return query, key, value

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        return self._patched(call, z, call.places(self.at)) if self.part == "z" else z

    def _key_places(self, call: HeadCall) -> Tensor:
        """[B, S, P]"""
        if isinstance(self.at, str):
            if not call.prefill:
                raise ValueError(
                    f'HeadPatch(part="{self.part}", at="{self.at}") does not say which cached keys are meant; give '
                    "positions [B, P]"
                )
            return call.places(self.at)  # the keys are those of the queries
        asked = HeadCall(call.layer, (call.shape[0], call.keys), call.keys, None)
        asked.position = call.key_position  # the same question, of the keys
        return asked.places(self.at)

    def _patched(
        self, call: HeadCall, tensor: Tensor, places: Tensor, number: Callable[[int], int] = lambda head: head
    ) -> Tensor:
        """`tensor` [B, T, A, D] with the heads' values at their places [B, T, P]."""
        index = call.layer.index
        places = places.to(tensor.device)
        hit, which = places.any(dim=-1), places.int().argmax(dim=-1)
        columns = list(tensor.unbind(dim=2))
        for head in self.ids[index]:
            value = self.values[index, head].to(tensor)
            if value.dim() == 1:
                new = value.expand_as(columns[0])
            else:
                value = value.repeat_interleave(len(tensor) // len(value), dim=0)
                value = value[:, None] if value.dim() == 2 else value
                value = value.expand(-1, places.shape[2], -1)
                new = value.gather(1, which[:, :, None].expand(-1, -1, value.shape[2]))
            columns[number(head)] = torch.where(hit[:, :, None], new, columns[number(head)])
        return torch.stack(columns, dim=2)


@dataclass(eq=False)
class ForcePattern(_OnHeads):
    """Let heads attend to given keys alone, to each alike, from some queries: 1 / number of keys, 0 elsewhere."""

    heads: Iterable[HeadId]
    keys: Int[Tensor, "b p"]
    """Positions of the keys in each row; -1 for none."""
    at: At = "last"

    def pattern_heads(self, layer: int) -> Sequence[int]:
        return self.ids[layer]

    def pattern(self, call: HeadCall, pattern: Tensor, allowed: Tensor) -> Tensor:
        keys = self.keys.cpu().repeat_interleave(call.shape[0] // len(self.keys), dim=0)
        wanted = (call.key_position[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, None, :]
        wanted = wanted.any(dim=-1).to(pattern.device)[:, None, None, :] & allowed
        count = wanted.sum(dim=-1, keepdim=True)
        queries = call.places(self.at).any(dim=-1).to(pattern.device)[:, None, :, None]
        # a query that may see none of the keys keeps its own pattern
        return torch.where(queries & (count > 0), (wanted / count.clamp_min(1)).to(pattern.dtype), pattern)


class HeadMeans:
    """Observer: mean z of every head over all tokens, for HeadMask(mode="mean"): {layer: [A, D]}, float32."""

    needs = frozenset({"heads"})

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def update_heads(self, event: HeadEvent) -> None:
        total = event.z.double().sum(dim=0).cpu()
        self._sums[event.layer] = self._sums.get(event.layer, 0) + total
        self._tokens[event.layer] = self._tokens.get(event.layer, 0) + len(event.z)

    def merge(self, other: HeadMeans) -> None:
        for layer, total in other._sums.items():
            self._sums[layer] = self._sums.get(layer, 0) + total
            self._tokens[layer] = self._tokens.get(layer, 0) + other._tokens[layer]

    def result(self) -> dict[int, Float[Tensor, "a d"]]:
        return {layer: (total / self._tokens[layer]).float() for layer, total in sorted(self._sums.items())}
