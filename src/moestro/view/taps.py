"""The hooks of an open model: there while an edit or an observer is active, gone afterwards.

One hook on each router runs the edits and remembers the logits; one on each experts module hands events to the
observers. A layer that no edit acts on has none: a hook costs time at every token that is generated. Observers that
ask for slot norms or outputs are served by the `moestro` experts backend, which has each slot's output at hand, so
nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.routing import Routing
from moestro.view.edit import Edit, ForceOn, SwitchOff
from moestro.view.events import NEEDS, Batch, MoEEvent, Observer, cached_tokens
from moestro.view.experts import is_experts
from moestro.view.experts_backend import experts_forward
from moestro.view.head_taps import HeadTaps
from moestro.view.heads import AnyObserver, HeadEdit
from moestro.view.layers import MoELayer
from moestro.view.obstacles import why_no_slots
from moestro.view.rules import logits_of

OUTPUT_BYTES = 256 * 2**20
"""Memory for the slot outputs of one event; more tokens are served in chunks."""

OBSERVED = "moestro_observed"
HEAD_NEEDS = frozenset({"heads", "last_patterns", "patterns"})
SLOT_NEEDS = frozenset({"maxima", "norms", "outputs"})
_watched: dict[nn.Module, Callable[..., Tensor]] = {}
"""Experts modules whose slots are observed at this moment, by whatever thread runs them."""


def _observed_forward(module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    run = _watched.get(module)
    return experts_forward(module, hidden, indices, weights) if run is None else run(hidden, indices, weights)


ALL_EXPERTS_FUNCTIONS.register(OBSERVED, _observed_forward)


def _where(rows: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows (None: all), `old` elsewhere; the one with fewer slots gets unused ones, of weight 0."""
    if rows is None:
        return new
    width = max(new.shape[1], old.shape[1])
    new, old = (F.pad(t, (0, width - t.shape[1])) for t in (new, old))
    return torch.where(rows, new.to(old.dtype), old)


def _like(new: Tensor, old: Tensor) -> Tensor:
    """`new` [N, K'] in the type of `old` [..., K], and in its shape but for the number of slots, which edits change."""
    if new.dtype != old.dtype:
        new = new.to(old.dtype)
    return new if old.dim() == 2 else new.reshape(*old.shape[:-1], new.shape[-1])


class _Acting(NamedTuple):
    """The edits of one layer, in order, by what they act on; told apart once, not at every token."""

    on_logits: list[Edit]
    on_routing: list[Edit]
    on_output: list[Edit]

    @classmethod
    def of(cls, edits: Sequence[Edit], layer: int) -> _Acting:
        here = [e for e in edits if (chosen := e.layers()) is None or layer in chosen]
        return cls(
            [e for e in here if e.changes_logits],
            [e for e in here if e.changes_routing],
            [e for e in here if e.changes_output],
        )


class Taps:
    """Edits and observers of one open model, and the hooks that serve them."""

    def __init__(self, layers: Sequence[MoELayer], stack: nn.Module):
        self.layers, self.stack = layers, stack
        self.heads = HeadTaps(stack, lambda: self.batch)
        self._by_index = {layer.index: layer for layer in layers}
        self._edits: list[Edit] = []
        self._acting = {layer.index: _Acting.of((), layer.index) for layer in layers}
        self._observers: list[Observer] = []
        self._needs: frozenset[str] = frozenset()
        self._batch: Batch | None = None
        self._read_batch: Callable[[], Batch | None] | None = None
        self._routed: dict[int, Routing] = {}
        self._normed: dict[int, list[tuple[ref[Tensor], Tensor, Tensor]]] = {}
        self._parts: dict[int, list[tuple[ref[Tensor], bool]]] = {}
        self._residual: dict[int, Tensor] = {}
        self._hooks: dict[tuple[int, str], Any] = {}
        self._replaced_args: tuple[Tensor, ...] | None = None
        self._given = False
        self._depth = 0

    @property
    def active(self) -> bool:
        """Whether an edit or an observation is under way."""
        return self._depth > 0

    @property
    def batch(self) -> Batch | None:
        """The batch of the forward pass under way; None between passes, and where nothing tells it."""
        if self._read_batch is not None:
            self._batch, self._read_batch = self._read_batch(), None
        return self._batch

    @contextmanager
    def editing(self, edits: Sequence[Edit | HeadEdit]) -> Iterator[None]:
        """Run the edits until the block ends, after all those already active."""
        of_heads = [edit for edit in edits if isinstance(edit, HeadEdit)]
        of_experts = [edit for edit in edits if not isinstance(edit, HeadEdit)]
        for edit in of_experts:
            self._check(edit)
        before = list(self._edits)
        self._check_together([*before, *of_experts])
        with ExitStack() as undo:
            undo.enter_context(self._installed())
            if of_heads:
                undo.enter_context(self.heads.editing(of_heads))
            undo.callback(self._act, before)
            self._act(before + of_experts)
            yield

    def _act(self, edits: list[Edit]) -> None:
        """Let these edits, and no others, be in force."""
        self._edits, self._acting = edits, {index: _Acting.of(edits, index) for index in self._by_index}
        self._hang()

    def _check(self, edit: Edit) -> None:
        chosen = edit.layers()
        unknown = sorted(set(chosen or ()) - self._by_index.keys())
        if unknown:
            raise ValueError(
                f"{type(edit).__name__}: decoder layer {unknown[0]} has no experts; MoE layers are {[*self._by_index]}"
            )
        for index in self._by_index if chosen is None else chosen:
            layer = self._by_index[index]
            if edit.changes_logits and layer.rule is None:
                raise ValueError(
                    f"{type(edit).__name__} in layer {index}: its routing cannot be re-run ({layer.no_rule}); "
                    "Gain and Replace work there"
                )
            edit.check(layer)

    def _check_together(self, edits: Sequence[Edit]) -> None:
        """Several edits of one kind must leave a router as many experts as one edit must, in every row they share."""
        rows = {id(edit): edit.row_numbers() for edit in edits}
        kinds: tuple[type[SwitchOff] | type[ForceOn], ...] = (SwitchOff, ForceOn)
        for kind in kinds:
            same = [edit for edit in edits if isinstance(edit, kind)]
            for row in {-1}.union(*(rows[id(e)] or () for e in same)) if len(same) > 1 else ():
                at_row = [e for e in same if (its := rows[id(e)]) is None or row in its]
                union = kind([(index, expert) for e in at_row for index, ids in e.ids.items() for expert in ids])
                for index in union.layers():
                    union.check(self._by_index[index])

    @contextmanager
    def observing(self, observers: Sequence[AnyObserver]) -> Iterator[None]:
        """Hand events of every forward pass to the observers until the block ends."""
        needs = frozenset().union(*(o.needs for o in observers))
        if needs - NEEDS:
            raise ValueError(f"observers need {sorted(needs - NEEDS)}; known needs are {sorted(NEEDS)}")
        if self._observers or self.heads.observed:
            raise RuntimeError("an observation is already running on this model; give it all observers at once")
        of_heads: list[Any] = [o for o in observers if o.needs & HEAD_NEEDS]
        with ExitStack() as undo:
            undo.callback(self._forget)
            undo.enter_context(self._installed())
            if of_heads:
                undo.enter_context(self.heads.observing(of_heads))
            if needs & SLOT_NEEDS:
                self._watch_slots(undo)
            if "residual" in needs:
                self._watch_norms(undo)
            self._observers, self._needs = [o for o in observers if isinstance(o, Observer)], needs
            self._hang()
            yield

    def _forget(self) -> None:
        self._observers, self._needs = [], frozenset()
        self._hang()
        for memory in (self._routed, self._normed, self._parts, self._residual):
            memory.clear()

    @contextmanager
    def on_batch(self, batch: Batch) -> Iterator[None]:
        """Say where the tokens of the next forward pass come from; else the decoder's arguments tell."""
        self._batch, self._read_batch, self._given = batch, None, True
        try:
            yield
        finally:
            self._batch, self._given = None, False

    @contextmanager
    def _installed(self) -> Iterator[None]:
        self._depth += 1
        self._hang()
        try:
            yield
        finally:
            self._depth -= 1
            self._hang()
            if self._depth == 0:
                self._batch = self._read_batch = None

    def _hang(self) -> None:
        """Hang the hooks that the edits and observers of this moment need, and take off the others."""
        self._replaced_args = None  # of a pass that failed
        wanted: dict[tuple[int, str], Callable[[], Any]] = {}
        if self._depth:
            wanted[-1, "stack"] = partial(self.stack.register_forward_pre_hook, self._on_stack, with_kwargs=True)
        for layer in self.layers if self._depth else ():
            acting = self._acting[layer.index]
            if self._observers or acting.on_logits or acting.on_routing:
                hook: Any = partial(self._on_router, layer)
                wanted[layer.index, "router"] = partial(layer.router.register_forward_hook, hook, with_kwargs=True)
            if acting.on_output:
                hook = partial(self._before_experts, layer)
                wanted[layer.index, "before"] = partial(layer.experts.register_forward_pre_hook, hook)
            if self._observers or acting.on_output:
                hook = partial(self._on_experts, layer)
                wanted[layer.index, "experts"] = partial(layer.experts.register_forward_hook, hook)
        for place in self._hooks.keys() - wanted.keys():
            self._hooks.pop(place).remove()
        for place, register in wanted.items():
            if place not in self._hooks:
                self._hooks[place] = register()

    # What the hooks do

    def _on_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._given:
            given = dict(zip(("input_ids", "attention_mask"), args)) | kwargs
            before = cached_tokens(given.pop("past_key_values", None))  # the pass is about to fill it
            self._batch, self._read_batch = None, partial(Batch.of_forward, given, before)

    def _on_router(self, layer: MoELayer, router: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if "residual" in self._needs:
            self._residual[layer.index] = self._stream(layer, args[0] if args else next(iter(kwargs.values())))
        rule = layer.rule
        routing = Routing(*out[:3])
        if routing.logits.dim() != 2:
            routing = Routing(*(t.reshape(-1, t.shape[-1]) for t in routing))
        if rule is not None:
            routing = routing._replace(logits=logits_of(rule, routing.logits))
        edited = self._edited(layer, routing)
        if self._observers:
            self._routed[layer.index] = edited
        if edited is routing:
            return None
        if rule is not None and rule.returns_probabilities:
            edited = edited._replace(logits=edited.logits.softmax(-1))
        return (*(_like(new, old) for new, old in zip(edited, out[:3])), *out[3:])

    def _edited(self, layer: MoELayer, routing: Routing) -> Routing:
        acting = self._acting[layer.index]
        if acting.on_logits:
            assert layer.rule is not None
            logits, nothing = routing.logits, torch.zeros_like(routing.logits)
            prefer, everywhere, somewhere = nothing, False, []
            for edit in acting.on_logits:
                rows = self._rows(edit, layer, logits)
                new_logits, new_prefer = edit.logits(layer.index, logits, prefer)
                logits, prefer = _where(rows, new_logits, logits), _where(rows, new_prefer, prefer)
                if rows is None:
                    everywhere = True
                else:
                    somewhere.append(rows)
            again = layer.rule(logits, None if prefer is nothing else prefer)
            # rows that no edit names keep their very own routing
            touched = None if everywhere else torch.stack(somewhere).any(dim=0)
            routing = Routing(logits, *(_where(touched, n, o) for n, o in zip(again[1:], routing[1:])))
        for edit in acting.on_routing:
            new = edit.routing(layer.index, routing)
            if edit.reads_batch:
                new = edit.routing_at(layer.index, new, self._batch_for(layer, len(new.logits)))
            if new is not routing:
                rows = self._rows(edit, layer, new.logits)
                routing = Routing(new.logits, *(_where(rows, n, o) for n, o in zip(new[1:], routing[1:])))
        return routing

    def _rows(self, edit: Edit, layer: MoELayer, tokens: Tensor) -> Tensor | None:
        """[N, 1] bool: which of `tokens` [N, ...] the edit's rows hold; None for all."""
        if edit.rows is None:
            return None
        rows, length = self._batch_for(layer, len(tokens)).shape
        return edit.row_mask(rows).repeat_interleave(length).unsqueeze(1).to(tokens.device)

    def _batch_for(self, layer: MoELayer, tokens: int) -> Batch:
        batch = self.batch
        if batch is None or batch.shape[0] * batch.shape[1] != tokens:
            raise RuntimeError(
                f"{layer.name} got {tokens} tokens, and the batch is "
                f"{'unknown' if batch is None else batch.shape}: rows and positions cannot be told"
            )
        return batch

    def _before_experts(self, layer: MoELayer, experts: nn.Module, args: tuple[Tensor, ...]) -> Any:
        whole = any(e.rows is None and not e.uses_output for e in self._acting[layer.index].on_output)
        skip = whole and not self._needs & SLOT_NEEDS
        self._replaced_args = args if skip else None
        return tuple(t[:0] for t in args) if skip else None  # nobody sees the output: compute none of it

    def _on_experts(self, layer: MoELayer, experts: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Any:
        original, self._replaced_args = self._replaced_args or args, None
        hidden, indices, weights = original
        replacing = self._acting[layer.index].on_output
        combined = out if len(out) == len(hidden) else torch.zeros_like(hidden)
        for edit in replacing:
            new = edit.output(layer.index, hidden, Routing(weights, weights, indices), combined)
            rows = self._rows(edit, layer, hidden)
            combined = _where(rows, new, combined)
        combined = combined.to(out.dtype)
        if self._observers and not self._needs & SLOT_NEEDS:
            self._emit(layer, hidden, indices, weights, combined)
        return combined if replacing else None

    # Observing

    def _watch_slots(self, undo: ExitStack) -> None:
        """Route the experts through `_observed` for as long as `undo` stays open."""
        watched = {layer.experts: partial(self._observed, layer) for layer in self.layers}
        for layer in self.layers:
            if not is_experts(layer.experts):
                raise ValueError(
                    f"layer {layer.index}: its experts were replaced by {type(layer.experts).__name__}, which has no "
                    "slots; observers that need norms, maxima or outputs cannot run"
                )
            if why := why_no_slots(layer.experts):
                raise ValueError(
                    f"layer {layer.index}: {why}; observers that need norms, maxima or outputs cannot run there, those "
                    "that need the routing alone can"
                )
            if layer.experts in _watched:
                raise RuntimeError(f"another view of this model observes {layer.name}; end that observation first")
        for config in {id(c): c for layer in self.layers if (c := getattr(layer.experts, "config", None))}.values():
            undo.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = OBSERVED
        for module, run in watched.items():
            undo.callback(_watched.pop, module)
            _watched[module] = run

    def _observed(self, layer: MoELayer, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The experts' forward with events handed out on the way, in chunks where slot outputs are wanted."""
        slots, width = indices.shape[1], hidden.shape[1]
        step = max(len(hidden), 1)
        if "outputs" in self._needs:
            step = max(1, OUTPUT_BYTES // (slots * width * hidden.element_size()))
        parts = []
        for start in range(0, max(len(hidden), 1), step):
            h, i, w = (t[start : start + step] for t in (hidden, indices, weights))
            norms = torch.zeros(i.shape, dtype=torch.float32, device=h.device)
            given: dict[str, Tensor] = {"norms": norms}
            if "maxima" in self._needs:
                given |= {"maxima": torch.zeros_like(norms), "channels": torch.zeros_like(i, dtype=torch.long)}
            if "outputs" in self._needs:
                given["outputs"] = h.new_zeros(*i.shape, width)

            def on_outputs(token: Tensor, slot: Tensor, out: Tensor, given: dict[str, Tensor] = given) -> None:
                out = out.detach()
                given["norms"][token, slot] = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)
                if "maxima" in given:
                    largest, channel = out.abs().max(dim=-1)
                    given["maxima"][token, slot], given["channels"][token, slot] = largest.float(), channel
                if "outputs" in given:
                    given["outputs"][token, slot] = out

            combined = experts_forward(layer.experts, h, i, w, on_outputs=on_outputs)
            self._emit(layer, h, i, w, combined, start, len(hidden), **given)
            parts.append(combined)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _emit(
        self,
        layer: MoELayer,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        combined: Tensor,
        start: int = 0,
        total: int | None = None,
        **computed: Tensor | None,
    ) -> None:
        batch = self._batch_for(layer, total or len(hidden))
        end = start + len(hidden)
        tokens, kept = batch.tokens, batch.kept
        if kept is not None:
            low, high = torch.searchsorted(kept, torch.tensor([start, end])).tolist()
            tokens, kept = tokens[low:high], kept[low:high] - start
        elif len(hidden) != len(tokens):
            tokens = tokens[start:end]
        residual = self._residual.get(layer.index)
        if end >= (total or end):
            self._residual.pop(layer.index, None)
        if not len(tokens):
            return
        event = MoEEvent(
            layer.index,
            layer.num_experts,
            tokens,
            kept,
            hidden=hidden.detach(),
            routing=Routing(self._routed[layer.index].logits[start:end].detach(), weights.detach(), indices),
            combined=combined.detach(),
            residual=None if residual is None else residual.reshape(-1, residual.shape[-1])[start:end].detach(),
            **computed,
        )
        bad = torch.isnan(event.routing.logits).any(dim=-1)
        if bad.any():
            where = int(bad.nonzero()[0])
            raise FloatingPointError(
                f"NaN router logits in layer {layer.index} ({layer.name}) at sample {int(tokens.sample[where])}, "
                f"position {int(tokens.position[where])}: the model or that sample is broken; nothing was changed"
            )
        for observer in self._observers:
            observer.update(event)

    def _watch_norms(self, undo: ExitStack) -> None:
        """Remember what goes in and out of the norms beside each MoE block, and what the layer's parts give."""
        from moestro.view.layers import decoder_layer

        for layer in self.layers:
            owner = decoder_layer(self.stack, layer)
            for module in owner.modules():
                own = list(module.parameters(recurse=False))
                plain = own and all(p.dim() == 1 for p in own) and not list(module.children())
                if plain or "norm" in type(module).__name__.lower():  # a gated norm has parts of its own
                    hook = module.register_forward_hook(partial(self._on_norm, layer.index))
                    undo.callback(hook.remove)
            for module in owner.children():
                undo.callback(module.register_forward_hook(partial(self._on_part, layer.index)).remove)

    def _on_norm(self, index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == out.shape:
            self._normed.setdefault(index, []).append((ref(args[0]), args[0].detach(), out))

    def _on_part(self, index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        several = isinstance(out, tuple)
        tensors = [t for t in (out if several else [out]) if isinstance(t, Tensor)]
        self._parts.setdefault(index, []).extend((ref(t), several) for t in tensors)

    def _stream(self, layer: MoELayer, router_input: Tensor) -> Tensor:
        """The residual stream: what went into the norm whose output the router reads, else the router's input.

        The layer still holds it, since the block is to be added to it (where the norm was given a copy in another
        type, one of its parts made it), and it is none of several tensors that a part gives: those are a mix of
        streams and how to undo it.
        """
        pairs = self._normed.pop(layer.index, [])
        parts = [(t, several) for weak, several in self._parts.pop(layer.index, []) if (t := weak()) is not None]
        self._normed.clear()
        self._parts.clear()
        stream: Tensor | None = router_input
        for held, before, after in reversed(pairs):
            if _same_values(after, router_input):
                stream = held()
                if stream is None:
                    stream = next((t for t, _ in parts if _same_values(t, before)), None)
                break
        if stream is None or any(several and t.data_ptr() == stream.data_ptr() for t, several in parts):
            raise ValueError(
                f"layer {layer.index} ({layer.name}): the residual stream could not be found: what its norm or router "
                "reads is not what the experts' output is added to; observers that need it, easy-ep for one, cannot "
                "run; use saliency 'reap'"
            )
        return stream


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    """Whether `other` is the tensor, also in another shape or rounded to another type."""
    if tensor.numel() != other.numel():
        return False
    same_memory = tensor.data_ptr() == other.data_ptr()
    return same_memory or torch.equal(tensor.reshape(other.shape).to(other.dtype), other)
