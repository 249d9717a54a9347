"""Path patching: what an attention head does to a model's answer by way of given heads, or directly.

    effects = path_patching(view, pairs)                             each head's direct effect on the answer
    effects = path_patching(view, pairs, [(9, 6, "q")])              ... by way of that head's queries alone

A task is minimal pairs (`moestro.data.minimal_pairs`); LD = logit(answer) - logit(foil) after the prompt's last token.
The path from a sender head to receivers (the logits, or heads' q, k, v or z) is patched in three forward passes:

    1. clean and corrupted prompts: every head's z
    2. the clean prompt with the sender's z at one place from the corrupted run and every other head's z from the clean
       one; what the receivers get here is recorded. MLPs and experts are recomputed, or frozen too
    3. the clean prompt with the receivers' inputs as recorded, all else free (logits: pass 2 is the last)

    effect = (LD patched - LD clean) / (LD corrupted - LD clean), a ratio of means over pairs

so 1 is what the whole corruption does and 0 nothing; the paper reports -100 times that. A key or value belongs to all
query heads of its group (grouped-query attention): as a receiver it is patched for all of them. Queries and keys are
patched with their positions rotated in.

"Circuit Component Reuse Across Tasks in Transformer Language Models" (arXiv:2310.08744).
Shapes: B pairs, T positions, A query heads, D head width, V vocabulary, S senders in one pass.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro import sets, stats
from moestro.data.minimal_pairs import MinimalPairs
from moestro.view.heads import HeadCall, HeadEdit, HeadEvent, HeadId, HeadPatch, Part
from moestro.view.observe import progress_bar

Receiver = tuple[int, int, Part]
"""(decoder layer, query head, which of its vectors)"""
SHARE = 0.02  # of all heads, kept at each stage of a circuit: the paper's
BATCH_TOKENS = 8192
PAIRS = 128
"""Most pairs of one pass: the rest of a batch are senders."""


@dataclass(frozen=True)
class PairAnswers:
    """What the model says after each prompt."""

    difference: Float[Tensor, " b"]
    """LD"""
    right: Bool[Tensor, " b"]
    """Whether the answer is the likeliest of all tokens."""


@dataclass(frozen=True)
class PathEffects:
    """What each sender does to LD by way of the receivers."""

    patched: dict[int, Float[Tensor, "a b"]]
    """{layer: LD of every pair with each head as the sender}"""
    clean: Float[Tensor, " b"]
    corrupted: Float[Tensor, " b"]

    @property
    def effect(self) -> dict[int, Float[Tensor, " a"]]:
        """{layer: effect of each head}"""
        whole = (self.corrupted - self.clean).mean()
        return {layer: (ld - self.clean).mean(dim=1) / whole for layer, ld in self.patched.items()}

    def interval(self, head: HeadId) -> stats.Interval:
        """A head's effect with its interval over pairs."""
        part = self.patched[head[0]][head[1]] - self.clean
        table = torch.stack([part, self.corrupted - self.clean], dim=1)
        return stats.bootstrap_totals(table.numpy(), lambda sums: sums[:, :1] / sums[:, 1:])[0]

    def top(self, share: float = SHARE) -> list[HeadId]:
        """The share of all heads (at least one) of largest effect either way, strongest first; none of effect 0."""
        strength = {layer: row.abs() for layer, row in self.effect.items()}
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: the share of heads to keep lies in (0, 1]")
        count = max(1, round(share * sum(map(len, strength.values()))))
        return [(layer, h) for layer, h in sets.top(strength, count) if strength[layer][h] > 0]


class _Grids:
    """Observer: the last pass's z of every layer, [B, T, A, D]."""

    needs = frozenset({"heads"})

    def __init__(self) -> None:
        self.z: dict[int, Tensor] = {}

    def update_heads(self, event: HeadEvent) -> None:
        self.z[event.layer] = event.z_grid

    def merge(self, other: _Grids) -> None:
        self.z |= other.z

    def result(self) -> dict[int, Tensor]:
        return self.z


@dataclass(eq=False)
class _Frozen(HeadEdit):
    """Every head's z as in the clean run, but one head's in each block of B rows; records what receivers are given."""

    clean: dict[int, Tensor]
    corrupted: dict[int, Tensor]
    senders: Sequence[HeadId]
    at: Tensor
    """[B] place of the change"""
    receivers: Collection[Receiver]
    found: dict[Receiver, Tensor] = field(default_factory=dict)

    def _record(self, layer: int, part: Part, grid: Tensor, number: Any) -> None:
        """`grid` [S B, heads, T, D]"""
        for receiver in self.receivers:
            if receiver[0] == layer and receiver[2] == part:
                self.found[receiver] = grid[:, number(receiver[1])]

    def inputs(self, call: HeadCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = call.layer.index
        self._record(index, "q", query, lambda head: head)
        self._record(index, "k", key, call.layer.group_of)
        self._record(index, "v", value, call.layer.group_of)
        return query, key, value

    def z(self, call: HeadCall, z: Tensor) -> Tensor:
        index, rows = call.layer.index, torch.arange(len(self.at), device=z.device)
        self._record(index, "z", z.transpose(1, 2), lambda head: head)
        frozen = self.clean[index].repeat(len(self.senders), 1, 1, 1)
        at = self.at.to(z.device)
        for block, (layer, head) in enumerate(self.senders):
            if layer == index:
                frozen[block * len(rows) + rows, at, head] = self.corrupted[index][rows, at, head]
        return frozen


def path_patching(
    view: Any,
    pairs: MinimalPairs,
    receivers: Literal["logits"] | Sequence[Receiver] = "logits",
    *,
    at: str = "last",
    freeze_mlp: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> PathEffects:
    """Effects of all heads as senders at place `at` on the receivers, those of no effect by construction included.

    Raises ValueError for unknown places, heads or parts, and for pairs whose corruption does not change LD, before the
    long work starts.
    """
    layers = {layer.index: layer for layer in view.heads}
    wanted: Sequence[Receiver] = () if receivers == "logits" else list(receivers)  # type: ignore[arg-type]
    _check(layers, pairs, receivers, wanted, at)
    last = max((layer for layer, _, _ in wanted), default=max(layers) + 1)
    senders = [(i, h) for i, layer in layers.items() if i < last for h in range(layer.num_heads)]
    length = pairs.clean.shape[1]
    rows = min(len(pairs), max(1, min(PAIRS, batch_tokens // length)))
    block = max(1, batch_tokens // (rows * length))
    parts = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    patched: dict[HeadId, list[Tensor]] = {sender: [] for sender in senders}
    with progress_bar(progress) as bar, torch.no_grad():
        clean = torch.cat([_differences(view, part, part.clean) for part in parts])
        corrupted = torch.cat([_differences(view, part, part.corrupted) for part in parts])
        _check_separate(clean, corrupted)
        task = bar.add_task("patching paths", total=len(pairs) * max(len(senders), 1))
        for part in parts:
            with view.observing(grids := _Grids()), _mlp_outputs(view, freeze_mlp) as outputs:
                _differences(view, part, part.clean)
            with view.observing(other := _Grids()):
                _differences(view, part, part.corrupted)
            for i in range(0, len(senders), block):
                some = senders[i : i + block]
                edit = _Frozen(grids.z, other.z, some, part.positions[at], wanted)
                with view.edits(edit), _mlps_frozen(outputs, len(some)):
                    found = _differences(view, part, part.clean, len(some))
                if wanted:
                    places = torch.arange(length).expand(len(some) * len(part), -1)
                    patches = [
                        HeadPatch({r[:2]: v for r, v in edit.found.items() if r[2] == p}, p, places)
                        for p in sorted({r[2] for r in wanted})
                    ]
                    with view.edits(*patches):
                        found = _differences(view, part, part.clean, len(some))
                for head, ld in zip(some, found.view(len(some), -1)):
                    patched[head].append(ld)
                bar.advance(task, len(some) * len(part))
    by_head = {
        (i, h): torch.cat(patched.get((i, h), [clean])) for i, layer in layers.items() for h in range(layer.num_heads)
    }
    by_layer = {i: torch.stack([by_head[i, h] for h in range(layer.num_heads)]) for i, layer in layers.items()}
    return PathEffects(by_layer, clean, corrupted)


def _check(layers: Mapping[int, Any], pairs: MinimalPairs, receivers: Any, wanted: Sequence[Receiver], at: str) -> None:
    if at not in pairs.positions:
        raise ValueError(f"the pairs have no place {at!r}; they have {', '.join(sorted(pairs.positions))}")
    if receivers != "logits" and not wanted:
        raise ValueError('there are no receivers; name some heads, or "logits"')
    for layer, head, part in wanted:
        if layer not in layers or not 0 <= head < layers[layer].num_heads or part not in ("q", "k", "v", "z"):
            raise ValueError(
                f"receiver {(layer, head, part)}: layers with heads are {[*layers]}, with "
                f"{layers[layer].num_heads if layer in layers else 'no'} heads in layer {layer}; parts are q, k, v, z"
            )


def _check_separate(clean: Tensor, corrupted: Tensor) -> None:
    change = corrupted - clean
    separate = len(change) > 1 and stats.bootstrap(change.numpy()).excludes_zero
    if not separate:
        raise ValueError(
            f"the corrupted prompts change the logit difference by {float(change.mean()):.3g} on average over "
            f"{len(change)} pairs, which cannot be told from 0: the model does not do this task, or the pairs do not "
            "separate it; effects have no scale"
        )


def answers_of(view: Any, pairs: MinimalPairs, *edits: Any, batch_tokens: int = BATCH_TOKENS) -> PairAnswers:
    """What the model says after the clean prompts with the edits in force; edits must fit every batch of them."""
    rows = max(1, batch_tokens // pairs.clean.shape[1])
    found = []
    with torch.no_grad(), view.edits(*edits):
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            logits = _last_logits(view, part, part.clean, 1)
            found.append((_ld(logits, part.answers), logits.argmax(dim=1).cpu() == part.answers[:, 0]))
    difference, right = (torch.cat(parts) for parts in zip(*found))
    return PairAnswers(difference, right)


def _ld(logits: Tensor, answers: Tensor) -> Tensor:
    chosen = logits.gather(1, answers.to(logits.device)).float().cpu()
    return chosen[:, 0] - chosen[:, 1]


def _differences(view: Any, pairs: MinimalPairs, ids: Tensor, times: int = 1) -> Tensor:
    """LD [times * B]"""
    return _ld(_last_logits(view, pairs, ids, times), pairs.answers.repeat(times, 1))


def _last_logits(view: Any, pairs: MinimalPairs, ids: Tensor, times: int) -> Tensor:
    """[times * B, V]: logits after each prompt's last token."""
    device, last = view.device, pairs.positions["last"]
    inputs: dict[str, Any] = {"input_ids": ids.repeat(times, 1).to(device)}
    if not pairs.mask.all():
        inputs["attention_mask"] = pairs.mask.repeat(times, 1).to(device).long()
    places = last.unique()
    if "logits_to_keep" in inspect.signature(view.model.forward).parameters:
        inputs["logits_to_keep"] = places.to(device)
    else:
        places = torch.arange(ids.shape[1])
    logits = view.model(**inputs, use_cache=False).logits
    column = torch.searchsorted(places, last).repeat(times).to(device)
    return logits[torch.arange(len(logits), device=device), column]


# Frozen MLPs


def _mlps(view: Any) -> list[nn.Module]:
    """The block beside the attention of every layer that has heads: MLP or experts, no norm."""
    found = []
    for layer in view.heads:
        numbered = re.match(r"(.*?\.\d+)(?=\.|$)", layer.name)
        block = view.stack.get_submodule(numbered.group(1) if numbered else layer.name)
        beside = [
            child
            for child in block.children()
            if layer.module not in set(child.modules()) and any(p.dim() > 1 for p in child.parameters())
        ]
        if len(beside) != 1:
            raise ValueError(
                f"layer {layer.index} has {len(beside)} blocks with weights beside its attention, so it is not clear "
                "what freeze_mlp=True is to freeze; use freeze_mlp=False"
            )
        found.append(beside[0])
    return found


@contextmanager
def _mlp_outputs(view: Any, wanted: bool) -> Iterator[dict[nn.Module, Any]]:
    """{module: its output in the pass inside the block}"""
    outputs: dict[nn.Module, Any] = {}
    hooks = [
        m.register_forward_hook(lambda module, args, out: outputs.update({module: out}))
        for m in (_mlps(view) if wanted else ())
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _mlps_frozen(outputs: Mapping[nn.Module, Any], times: int) -> Iterator[None]:
    def frozen(kept: Any, module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(kept, tuple):
            return (kept[0].repeat(times, *[1] * (kept[0].dim() - 1)), *out[1:])
        return kept.repeat(times, *[1] * (kept.dim() - 1))

    hooks = [m.register_forward_hook(partial(frozen, kept)) for m, kept in outputs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
