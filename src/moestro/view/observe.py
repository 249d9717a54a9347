"""One pass over data, any number of observers; and the observers that most methods need.

Sums are kept in float64 per domain, so that shards merge to the result of one pass to rounding.
Shapes: D domains, E experts, N tokens, K slots, H hidden.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from moestro.view.events import Batch, MoEEvent, Tokens
from moestro.view.heads import AnyObserver
from moestro.view.in_force import InForce
from moestro.view.layers import LayerKey, MoELayer
from moestro.view.lm_logits import hand_logits, language_model, logits_observers


def progress_bar(show: bool = True) -> Progress:
    """The progress bar of every long pass: silent where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, transient=True, disable=not show)
    progress.disable = not show or not progress.console.is_terminal
    return progress


def observe(
    model: nn.Module,
    stack: nn.Module,
    force: InForce,
    layers: Mapping[LayerKey, MoELayer],
    data: Iterable[Any],
    observers: Sequence[AnyObserver],
    *,
    progress: bool = True,
    description: str = "observing",
) -> list[Any]:
    """Run `stack`, a part of `model`, once over `data` and return each observer's result, in order.

    Where an observer needs "lm_logits", the language model around the stack is run instead.

    `data`: TokenBatch objects, mappings with `input_ids` [B, T] (and `attention_mask`), or id tensors [B, T].
    Under torch.distributed every process takes its share of the batches and all return the merged results.

    Raises:
        ValueError: no batch holds a token, an observer asks for an unknown need, or for the logits of a model without a
            language head.
        FloatingPointError: NaN router logits, or an expert whose output is not finite; names layer, expert and sample.
        RuntimeError: another process failed.
    """
    rank, world = _rank_and_world()
    batches = data if hasattr(data, "__len__") else list(data)
    device = next(stack.parameters()).device
    readers = logits_observers(observers)
    run = language_model(model, stack) if readers else stack
    seen = samples = 0
    failure: Exception | None = None
    try:
        with (
            force.observing(observers, layers, given_only=True),
            torch.no_grad(),
            progress_bar(progress and rank == 0) as bar,
        ):
            task = bar.add_task(description, total=len(batches))  # type: ignore[arg-type]
            for number, item in enumerate(batches):
                batch, inputs = as_batch(item, samples)
                samples += batch.shape[0]
                if number % world == rank and len(batch.tokens):
                    inputs = {k: v.to(device) for k, v in inputs.items()}
                    with force.on_batch(batch):
                        out = run(**inputs, use_cache=False)
                    if readers:
                        hand_logits(readers, batch, inputs["input_ids"], out.logits)
                    del out  # logits are large: not two batches' at once
                seen += len(batch.tokens)
                bar.advance(task)
        if not seen:
            raise ValueError("the data holds no token to observe: every batch is empty or padding")
    except Exception as e:
        if world == 1:
            raise
        failure = e  # the other processes wait for ours
    merged = observers if world == 1 else _merged(observers, failure, rank, world)
    return [o.result() for o in merged]


def as_batch(item: Any, first_sample: int = 0) -> tuple[Batch, dict[str, Tensor]]:
    """Provenance and model inputs of one element of the data."""
    if isinstance(item, Tensor):
        item = {"input_ids": item}
    if not isinstance(item, dict) and hasattr(item, "input_ids"):
        item = {n: getattr(item, n) for n in _FIELDS if getattr(item, n, None) is not None}
    if not hasattr(item, "keys") or "input_ids" not in item:
        raise TypeError(f"cannot observe a {type(item).__name__}: give token batches, or tensors of ids [B, T]")
    ids = item["input_ids"]
    if ids.dim() != 2:
        raise ValueError(f"input_ids of shape {tuple(ids.shape)}; observers need [B, T]")
    shape = (ids.shape[0], ids.shape[1])
    batch = Batch.of(
        shape,
        ids=ids,
        mask=item.get("attention_mask"),
        sample=item.get("sample", torch.arange(first_sample, first_sample + shape[0])),
        start=item.get("start", 0),
        domain=item.get("domain"),
        domains=tuple(item.get("domains", ("all",))),
    )
    return batch, {n: item[n] for n in ("input_ids", "attention_mask") if n in item}


_FIELDS = ("input_ids", "attention_mask", "sample", "start", "domain", "domains")


def _rank_and_world() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _merged(
    observers: Sequence[AnyObserver], failure: Exception | None, rank: int, world: int
) -> Sequence[AnyObserver]:
    """The observers of all processes merged in rank order, the same on every process; or the failure of any."""
    import torch.distributed as dist

    failures: list[Any] = [None] * world
    dist.all_gather_object(failures, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if failed := [(r, f) for r, f in enumerate(failures) if f is not None]:
        raise RuntimeError(f"process {failed[0][0]} failed while observing: {failed[0][1]}")
    shards: list[Any] = [None] * world
    dist.gather_object(list(observers), shards if rank == 0 else None)
    merged = shards[:1]
    for shard in shards[1:] if rank == 0 else ():  # once: merging may move files
        for mine, theirs in zip(merged[0], shard, strict=True):
            mine.merge(theirs)
    dist.broadcast_object_list(merged)
    return merged[0]


class DomainTable:
    """Rows by domain name, columns by expert: sums that grow as domains appear. float64."""

    def __init__(self) -> None:
        self.domains: list[str] = []
        self.sums: dict[int, dict[str, Tensor]] = {}

    def rows(self, tokens: Tokens) -> Int[Tensor, " n"]:
        """Row of each token."""
        for name in tokens.domains:
            if name not in self.domains:
                self.domains.append(name)
        table = torch.tensor([self.domains.index(name) for name in tokens.domains])
        return table[tokens.domain]

    def used_slots(self, event: MoEEvent) -> tuple[Bool[Tensor, "n k"], Int[Tensor, " m"]]:
        """Which slots an expert serves, and the flat place of each of these: row * experts + expert."""
        weights, indices = event.routing.weights.cpu(), event.routing.indices.cpu()
        used = (weights != 0) & (indices < event.num_experts)
        return used, (self.rows(event.tokens)[:, None] * event.num_experts + indices)[used]

    def add(self, layer: int, name: str, columns: int, place: Tensor, value: Tensor) -> None:
        """Add `value` [M] at the flat places row * columns + column [M]."""
        size = len(self.domains)
        sums = self.sums.setdefault(layer, {})
        old = sums.get(name, torch.zeros(0, columns, dtype=torch.float64))
        if len(old) < size:
            old = torch.cat([old, old.new_zeros(size - len(old), columns)])
        # bincount adds in order and in float64: the same sums whatever the number of threads
        sums[name] = old + torch.bincount(place, weights=value.double(), minlength=size * columns).view(size, columns)

    def merge(self, other: DomainTable) -> None:
        names = self.domains + [d for d in other.domains if d not in self.domains]
        for layer in {**self.sums, **other.sums}:
            mine, theirs = self.sums.setdefault(layer, {}), other.sums.get(layer, {})
            for name in {**mine, **theirs}:
                columns = (mine.get(name) if name in mine else theirs[name]).shape[1]  # type: ignore[union-attr]
                total = torch.zeros(len(names), columns, dtype=torch.float64)
                for source, table in ((self.domains, mine.get(name)), (other.domains, theirs.get(name))):
                    if table is not None:
                        total[[names.index(d) for d in source[: len(table)]]] += table
                mine[name] = total
        self.domains = names


@dataclass(frozen=True)
class LayerSlots:
    """What the slots of one layer did: sums over tokens [D, E] (use `.total()` for [E])."""

    count: Float[Tensor, "... e"]
    """Tokens that the expert served."""
    gate_sum: Float[Tensor, "... e"]
    norm_sum: Float[Tensor, "... e"]
    """L2 norms of the expert's outputs before the gate weight."""
    gated_norm_sum: Float[Tensor, "... e"]
    """Gate weight times that norm."""

    def total(self) -> LayerSlots:
        return LayerSlots(*(t.sum(dim=0) for t in (self.count, self.gate_sum, self.norm_sum, self.gated_norm_sum)))


@dataclass(frozen=True)
class SlotStatistics:
    """Slot statistics of every layer. `layers[i]` holds [E] sums over all domains, `by_domain[i]` [D, E]."""

    domains: tuple[str, ...]
    by_domain: dict[int, LayerSlots]
    tokens: dict[str, int]
    """Tokens seen per domain."""

    @property
    def layers(self) -> dict[int, LayerSlots]:
        return {i: slots.total() for i, slots in self.by_domain.items()}

    def domain(self, *names: str) -> SlotStatistics:
        """The statistics of some domains alone."""
        unknown = set(names) - set(self.domains)
        if unknown:
            raise ValueError(f"no domain {sorted(unknown)[0]!r} was observed; there are {list(self.domains)}")
        rows = [self.domains.index(n) for n in names]
        picked = {
            i: LayerSlots(*(t[rows] for t in (s.count, s.gate_sum, s.norm_sum, s.gated_norm_sum)))
            for i, s in self.by_domain.items()
        }
        return SlotStatistics(names, picked, {n: self.tokens[n] for n in names})


class SlotStats:
    """Counts, gate weights and output norms of every expert by domain: what the saliencies need."""

    needs = frozenset({"norms"})
    _NAMES = ("count", "gate_sum", "norm_sum", "gated_norm_sum")

    def __init__(self) -> None:
        self._table = DomainTable()
        self._tokens: dict[str, int] = {}
        self._first_layer: int | None = None

    def update(self, event: MoEEvent) -> None:
        if self._first_layer in (None, event.layer):
            self._first_layer = event.layer
            for name, n in zip(event.tokens.domains, event.tokens.domain.bincount(minlength=len(event.tokens.domains))):
                self._tokens[name] = self._tokens.get(name, 0) + int(n)
        used, place = self._table.used_slots(event)
        weights, norms = event.routing.weights.cpu()[used].float(), event.norms.cpu()[used]
        values = (torch.ones_like(weights), weights, norms, weights * norms)
        for name, value in zip(self._NAMES, values):
            self._table.add(event.layer, name, event.num_experts, place, value)

    def merge(self, other: Self) -> None:
        self._table.merge(other._table)
        for name, n in other._tokens.items():
            self._tokens[name] = self._tokens.get(name, 0) + n

    def result(self) -> SlotStatistics:
        return SlotStatistics(
            tuple(self._table.domains),
            {i: LayerSlots(**sums) for i, sums in sorted(self._table.sums.items())},
            dict(self._tokens),
        )


class ExpertCounts:
    """How many tokens of each domain every expert served: {layer: [D, E]}, rows in the order of `domains`."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._table = DomainTable()

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._table.domains)

    def update(self, event: MoEEvent) -> None:
        _, place = self._table.used_slots(event)
        self._table.add(event.layer, "count", event.num_experts, place, torch.ones_like(place))

    def merge(self, other: Self) -> None:
        self._table.merge(other._table)

    def result(self) -> dict[int, Float[Tensor, "d e"]]:
        return {layer: sums["count"] for layer, sums in sorted(self._table.sums.items())}


class _Rows:
    """Rows of a trace that wait to be written: columns of many small events, joined once.

    Plain arrays: tens of thousands of tensors or objects would have Python's collector go over them again and again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._layers: list[Any] = []
        self._lengths: list[int] = []
        self._domains: dict[str, int] = {}
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, event: MoEEvent, logits: bool) -> None:
        tokens, routing = event.tokens, event.routing
        self.count += len(tokens)
        self._layers.append(event.layer)
        self._lengths.append(len(tokens))
        columns = {
            "sample": tokens.sample,
            "position": tokens.position.int(),
            "id": tokens.id.int(),
            "experts": routing.indices.short(),
            "weights": routing.weights.float(),
        }
        if logits:
            columns["logits"] = routing.logits.float()
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(np.array(values.cpu().numpy()))
        codes = np.array([self._domains.setdefault(name, len(self._domains)) for name in tokens.domains])
        self._columns.setdefault("domain", []).append(codes[tokens.domain.numpy()])

    def frame(self, slots: int, classes: int) -> pl.DataFrame:
        by_name = isinstance(self._layers[0], str)
        layers = pl.Series(self._layers, dtype=pl.Categorical if by_name else pl.Int16)
        joined = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        columns: dict[str, Any] = {
            "layer": layers.gather(np.repeat(np.arange(len(layers)), self._lengths)),
            **{name: joined[name] for name in ("sample", "position", "id")},
            "domain": pl.Series([*self._domains])[joined["domain"]].cast(pl.Categorical),
            "experts": pl.Series(joined["experts"], dtype=pl.Array(pl.Int16, slots)),
            "weights": pl.Series(joined["weights"], dtype=pl.Array(pl.Float32, slots)),
        }
        if "logits" in joined:
            columns["logits"] = pl.Series(joined["logits"], dtype=pl.Array(pl.Float32, classes))
        return pl.DataFrame(columns)


class RoutingTrace:
    """Every token's routing in every layer, streamed to Parquet files (zstd) in a directory and read back with polars.

    Columns: layer, sample, position, id, domain, experts (array of K), weights (array of K) and, unless
    `logits=False`, logits (array of E). Layers with different K or E go to files of their own.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, path: str | Path | None = None, *, logits: bool = True, rows_per_file: int = 200_000):
        self.path = Path(path) if path is not None else Path(tempfile.mkdtemp(prefix="moestro-trace-"))
        if any(self.path.glob("*.parquet")):
            raise FileExistsError(f"{self.path} already holds a trace; name another directory or delete it")
        self.path.mkdir(parents=True, exist_ok=True)
        self.logits, self.rows_per_file = logits, rows_per_file
        self._id = uuid.uuid4().hex[:8]
        self._parts = 0
        self._pending: dict[tuple[int, int], _Rows] = {}

    def key(self) -> Any:
        """What it is asked for: not where it writes, which goes on where it was begun."""
        return self.logits, self.rows_per_file

    def update(self, event: MoEEvent) -> None:
        routing = event.routing
        shape = (routing.indices.shape[1], routing.logits.shape[1])
        pending = self._pending.setdefault(shape, _Rows())
        pending.add(event, self.logits)
        if pending.count >= self.rows_per_file:
            self._flush(*shape)

    def _flush(self, slots: int, classes: int) -> None:
        rows = self._pending.pop((slots, classes), None)
        if rows is None:
            return
        target = self.path / f"k{slots}-e{classes}-{self._id}-{self._parts:05d}.parquet"
        half = target.with_suffix(".tmp")
        rows.frame(slots, classes).write_parquet(half, compression="zstd")
        os.replace(half, target)
        self._parts += 1

    def __getstate__(self) -> dict[str, Any]:  # to another process goes what is on disk
        for shape in list(self._pending):
            self._flush(*shape)
        return self.__dict__.copy()

    def merge(self, other: Self) -> None:
        """Bring in the other trace's files; directories on one file system are joined without copying."""
        for shape in list(other._pending):
            other._flush(*shape)
        if other.path.resolve() != self.path.resolve():
            for file in sorted(other.path.glob("*.parquet")):
                shutil.move(file, self.path / file.name)

    def result(self) -> pl.LazyFrame:
        """The whole trace, sorted by layer, sample and position; one frame where all layers have the same shape."""
        for shape in list(self._pending):
            self._flush(*shape)
        return read_trace(self.path)


def read_trace(path: str | Path, slots: int | None = None, classes: int | None = None) -> pl.LazyFrame:
    """A trace written by RoutingTrace. Raises ValueError where layers differ in shape and none is chosen."""
    files = sorted(Path(path).glob(f"k{slots or '*'}-e{classes or '*'}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no routing trace in {path}")
    shapes = {tuple(f.name.split("-")[:2]) for f in files}
    if len(shapes) > 1:
        raise ValueError(f"layers of different shapes in {path}: {sorted(shapes)}; choose slots= and classes=")
    return pl.scan_parquet(files).sort("layer", "sample", "position")


class LayerOutputs:
    """The routed experts' summed output [N, H] of chosen layers, up to `max_tokens` a layer, with their tokens.

    Tokens are in the order of their samples and positions.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, layers: Collection[int] | None = None, *, max_tokens: int = 65_536):
        self.layers, self.max_tokens = layers, max_tokens
        self._kept: dict[int, list[tuple[Tensor, Tokens]]] = {}
        self._count: dict[int, int] = {}

    def key(self) -> Any:
        """What it is asked for."""
        return None if self.layers is None else sorted(self.layers), self.max_tokens

    def update(self, event: MoEEvent) -> None:
        if self.layers is not None and event.layer not in self.layers:
            return
        room = self.max_tokens - self._count.get(event.layer, 0)
        if room > 0:
            outputs, tokens = event.combined[:room].to("cpu", copy=True), event.tokens[:room]
            self._kept.setdefault(event.layer, []).append((outputs, tokens))
            self._count[event.layer] = self._count.get(event.layer, 0) + len(tokens)

    def merge(self, other: Self) -> None:
        for layer, parts in other._kept.items():
            self._kept.setdefault(layer, []).extend(parts)
            self._count[layer] = self._count.get(layer, 0) + other._count[layer]

    def result(self) -> dict[int, tuple[Float[Tensor, "n h"], Tokens]]:
        """{layer: (outputs [N, H], tokens)}"""
        joined = {}
        for layer, parts in sorted(self._kept.items()):
            tokens = Tokens.cat([t for _, t in parts])
            order = torch.from_numpy(np.lexsort((tokens.position.numpy(), tokens.sample.numpy())))[: self.max_tokens]
            joined[layer] = torch.cat([o for o, _ in parts])[order], tokens[order]
        return joined
