"""The hooks of an open model: there while an edit or an observer is active, gone afterwards.

One hook on each router runs the edits and remembers the logits; one on each experts module hands events to the
observers. A layer that no edit acts on has none: a hook costs time at every token that is generated. Observers that
ask for slot norms or outputs are served by the `moestro` experts backend, which has each slot's output at hand, so
nothing is computed twice. What the hooks act by is in `in_force`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.routing import Routing
from moestro.view.edit import Edit
from moestro.view.events import Batch, MoEEvent, check_indices
from moestro.view.experts_backend import experts_forward
from moestro.view.in_force import OBSERVED, SLOT_NEEDS, InForce
from moestro.view.layers import MoELayer
from moestro.view.recompute import in_backward, refuse_checkpoint_by_hand
from moestro.view.residual import residual_stream
from moestro.view.rules import logits_of
from moestro.view.situation import Observation, Situation
from moestro.view.state import LiveHook, ModelState, state_of

OUTPUT_BYTES = 256 * 2**20
"""Memory for the slot outputs of one event; more tokens are served in chunks."""

_owners: WeakKeyDictionary[nn.Module, ref[Taps]] = WeakKeyDictionary()
"""Which taps an experts module belongs to. Weakly: taps hold their modules, and a model must go when nobody has it."""


def _observed_forward(module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    owner = _owners.get(module)
    taps = None if owner is None else owner()
    run = experts_forward if taps is None else taps.observed
    return run(module, hidden, indices, weights)


ALL_EXPERTS_FUNCTIONS.register(OBSERVED, _observed_forward)


def taps_of(stack: nn.Module) -> Taps:
    """The taps of `stack`, made when first asked for."""
    state = state_of(stack)
    with state.lock:
        if state.taps is None:
            state.taps = Taps(stack, state)
        return state.taps


class Taps:
    """The hooks of one stack, which all views of the model share."""

    def __init__(self, stack: nn.Module, state: ModelState):
        self.stack = stack
        self.force = InForce(stack, state.lock, self._hang)
        self._hooks: dict[tuple[nn.Module, str], Any] = {}
        self._sharing: dict[nn.Module, list[MoELayer]] = {}

    def _hang(self, situations: Sequence[Situation], layers: Sequence[MoELayer]) -> None:
        """Register the hooks that these situations need, and remove the others."""
        self._sharing = {}
        for layer in layers:
            for module in {layer.router, layer.experts}:
                self._sharing.setdefault(module, []).append(layer)
                _owners[module] = ref(self)
        wanted: dict[tuple[nn.Module, str], Callable[[], Any]] = {}
        for here in situations:
            begin = partial(self.stack.register_forward_pre_hook, LiveHook(self.force.begin), with_kwargs=True)
            wanted[self.stack, "stack"] = begin
            for layer in layers:
                router, experts = layer.router, layer.experts
                acting, observed = here.acting.get(layer.path), here.observes(layer)
                if observed or (acting and (acting.on_logits or acting.on_routing)):
                    edit = partial(router.register_forward_hook, LiveHook(self._on_router), with_kwargs=True)
                    wanted[router, "router"] = edit
                if acting and acting.on_output:
                    wanted[experts, "before"] = partial(
                        experts.register_forward_pre_hook, LiveHook(self._before_experts)
                    )
                if observed or (acting and acting.on_output):
                    wanted[experts, "experts"] = partial(experts.register_forward_hook, LiveHook(self._on_experts))
        for place in self._hooks.keys() - wanted.keys():
            self._hooks.pop(place).remove()
        for place, hang in wanted.items():
            if place not in self._hooks:
                self._hooks[place] = hang()

    def clean(self, copied: Mapping[int, Any]) -> None:
        """Take off a deep copy under way what serves this model alone. `copied`: deepcopy's memo."""
        with self.force.lock:
            for module in self.stack.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    mine = [number for number, hook in hooks.items() if isinstance(hook, LiveHook)]
                    for number in mine:
                        copied.get(id(hooks), {}).pop(number, None)

    # What the hooks do

    def _on_router(self, router: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        here = self.force.here()
        if not here.active:
            return None
        now = self.force.now()
        layer = now.turn(router, "router", self._sharing[router])
        observed = here.observes(layer)
        if observed and "residual" in here.observation.needs and not in_backward():  # type: ignore[union-attr]
            now.residual[layer.path] = residual_stream(now, layer, args[0] if args else next(iter(kwargs.values())))
        rule = layer.rule
        routing = Routing(*out[:3])
        if routing.logits.dim() != 2:
            routing = Routing(*(t.reshape(-1, t.shape[-1]) for t in routing))
        if rule is not None:
            routing = routing._replace(logits=logits_of(rule, routing.logits))
        edited = self._edited(here, layer, routing)
        if observed:
            now.routed[layer.path] = edited
        if edited is routing:
            return None
        if rule is not None and rule.returns_probabilities:
            edited = edited._replace(logits=edited.logits.softmax(-1))
        return (*(_like(new, old) for new, old in zip(edited, out[:3])), *out[3:])

    def _edited(self, here: Situation, layer: MoELayer, routing: Routing) -> Routing:
        acting = here.acting.get(layer.path)
        if acting is None:
            return routing
        if self.stack.training:
            refuse_checkpoint_by_hand()
        if acting.on_logits:
            assert layer.rule is not None
            logits, nothing = routing.logits, torch.zeros_like(routing.logits)
            prefer, everywhere, somewhere = nothing, False, []
            for edit, key in acting.on_logits:
                rows = self._rows(edit, layer, logits)
                new_logits, new_prefer = edit.logits(key, logits, prefer)  # type: ignore[arg-type]
                logits, prefer = _where(rows, new_logits, logits), _where(rows, new_prefer, prefer)
                if rows is None:
                    everywhere = True
                else:
                    somewhere.append(rows)
            again = layer.rule(logits, None if prefer is nothing else prefer)
            # rows that no edit names keep their very own routing
            touched = None if everywhere else torch.stack(somewhere).any(dim=0)
            routing = Routing(logits, *(_where(touched, n, o) for n, o in zip(again[1:], routing[1:])))
        for edit, key in acting.on_routing:
            new = edit.routing(key, routing)  # type: ignore[arg-type]
            if edit.reads_batch:
                new = edit.routing_at(key, new, self._batch_for(layer, len(new.logits)))  # type: ignore[arg-type]
            if new is not routing:
                if new.indices is not routing.indices:
                    check_indices(f"{type(edit).__name__} in {layer.name}", new.indices, layer.num_experts)
                rows = self._rows(edit, layer, new.logits)
                routing = Routing(new.logits, *(_where(rows, n, o) for n, o in zip(new[1:], routing[1:])))
        return routing

    def _rows(self, edit: Edit, layer: MoELayer, tokens: Tensor) -> Tensor | None:
        """[N, 1] bool: which of `tokens` [N, ...] the edit's rows hold; None for all."""
        if edit.rows is None:
            return None
        batch = self._batch_for(layer, len(tokens))
        mask = edit.row_mask(batch.shape[0], batch.copies)
        return mask.repeat_interleave(batch.shape[1]).unsqueeze(1).to(tokens.device)

    def _batch_for(self, layer: MoELayer, tokens: int) -> Batch:
        batch = self.force.batch
        if batch is None or batch.shape[0] * batch.shape[1] != tokens:
            raise RuntimeError(
                f"{layer.name} got {tokens} tokens, and the batch is "
                f"{'unknown' if batch is None else batch.shape}: rows and positions cannot be told"
            )
        return batch

    def _before_experts(self, experts: nn.Module, args: tuple[Tensor, ...]) -> Any:
        here, now = self.force.here(), self.force.now()
        layer = now.turn(experts, "before", self._sharing[experts])
        acting = here.acting.get(layer.path)
        now.replaced.pop(layer.path, None)
        if acting is None or not any(e.rows is None and not e.uses_output for e, _ in acting.on_output):
            return None
        if here.observes(layer) and here.observation.needs & SLOT_NEEDS:  # type: ignore[union-attr]
            return None
        now.replaced[layer.path] = args
        return tuple(t[:0] for t in args)  # nobody sees the output: compute none of it

    def _on_experts(self, experts: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Any:
        here, now = self.force.here(), self.force.now()
        layer = now.turn(experts, "experts", self._sharing[experts])
        acting = here.acting.get(layer.path)
        replacing = [] if acting is None else acting.on_output
        if replacing and self.stack.training:
            refuse_checkpoint_by_hand()
        hidden, indices, weights = now.replaced.pop(layer.path, args)
        combined = out if len(out) == len(hidden) else torch.zeros_like(hidden)
        for edit, key in replacing:
            new = edit.output(key, hidden, Routing(weights, weights, indices), combined)  # type: ignore[arg-type]
            combined = _where(self._rows(edit, layer, hidden), new, combined)
        combined = combined.to(out.dtype)
        if here.observes(layer) and not here.observation.needs & SLOT_NEEDS:  # type: ignore[union-attr]
            self._emit(here.observation, layer, hidden, indices, weights, combined)
        elif here.observes(layer) and layer.path not in now.slots_seen:
            raise RuntimeError(
                f"{layer.name} ran its experts past the observers: their backend was changed while observers of norms, "
                "maxima or outputs are at work; choose it (set_experts_implementation) before the block"
            )
        now.slots_seen.discard(layer.path)
        return combined if replacing else None

    # Observing

    def observed(self, experts: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The experts' forward with events handed out on the way, in chunks where slot outputs are wanted."""
        here, now = self.force.here(), self.force.now()
        layer = now.turn(experts, "observed", self._sharing[experts])
        seen = here.observation
        if seen is None or not here.observes(layer):
            return _unobserved(experts, hidden, indices, weights)
        now.slots_seen.add(layer.path)
        slots, width = indices.shape[1], hidden.shape[1]
        step = max(len(hidden), 1)
        if "outputs" in seen.needs:
            step = max(1, OUTPUT_BYTES // (slots * width * hidden.element_size()))
        parts = []
        for start in range(0, max(len(hidden), 1), step):
            h, i, w = (t[start : start + step] for t in (hidden, indices, weights))
            norms = torch.zeros(i.shape, dtype=torch.float32, device=h.device)
            given: dict[str, Tensor] = {"norms": norms}
            if "maxima" in seen.needs:
                given |= {"maxima": torch.zeros_like(norms), "channels": torch.zeros_like(i, dtype=torch.long)}
            if "outputs" in seen.needs:
                given["outputs"] = h.new_zeros(*i.shape, width)

            def on_outputs(token: Tensor, slot: Tensor, out: Tensor, given: dict[str, Tensor] = given) -> None:
                out = out.detach()
                given["norms"][token, slot] = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)
                if "maxima" in given:
                    largest, channel = out.abs().max(dim=-1)
                    given["maxima"][token, slot], given["channels"][token, slot] = largest.float(), channel
                if "outputs" in given:
                    given["outputs"][token, slot] = out.to(given["outputs"].dtype)  # autocast has its own type

            combined = experts_forward(experts, h, i, w, on_outputs=on_outputs)
            self._emit(seen, layer, h, i, w, combined, start, len(hidden), **given)
            parts.append(combined)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _emit(
        self,
        seen: Observation | None,
        layer: MoELayer,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        combined: Tensor,
        start: int = 0,
        total: int | None = None,
        **computed: Tensor | None,
    ) -> None:
        now = self.force.now()
        if seen is None or in_backward() or (seen.given_only and not now.given):
            return
        batch = self._batch_for(layer, total or len(hidden))
        end = start + len(hidden)
        tokens, kept = batch.tokens, batch.kept
        if kept is not None:
            low, high = torch.searchsorted(kept, torch.tensor([start, end])).tolist()
            tokens, kept = tokens[low:high], kept[low:high] - start
        elif len(hidden) != len(tokens):
            tokens = tokens[start:end]
        residual = now.residual.get(layer.path)
        if end >= (total or end):
            now.residual.pop(layer.path, None)
        if not len(tokens):
            return
        event = MoEEvent(
            seen.keys[layer.path],
            layer.num_experts,
            tokens,
            kept,
            name=layer.name,
            hidden=hidden.detach(),
            routing=Routing(now.routed[layer.path].logits[start:end].detach(), weights.detach(), indices),
            combined=combined.detach(),
            residual=None if residual is None else residual.reshape(-1, residual.shape[-1])[start:end].detach(),
            **computed,
        )
        event.check()
        with self.force.lock:
            for observer in seen.observers:
                observer.update(event)


def _unobserved(experts: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts on the backend that they had before others beside them were observed."""
    former = getattr(experts.config._experts_implementation, "former", None)  # type: ignore[union-attr]
    own = getattr(type(experts).forward, "__wrapped__", experts_forward)
    run = own if former in (None, "eager") else ALL_EXPERTS_FUNCTIONS.get_interface(former, own)
    return run(experts, hidden, indices, weights)


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
