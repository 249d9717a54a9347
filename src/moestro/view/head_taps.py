"""Where heads are reached: transformers' AttentionInterface, for as long as an edit or an observer of heads is active.

The names that a model's attention asks for ("sdpa", "eager", ...) are given a function that serves the watched layers
and hands everything else through; afterwards the interface is as it was. The names themselves stay, since masks and
families look at them. What is found is verified once by a tiny forward pass: the layers must go through the interface,
and the model's output must be the same to the last bit.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moestro.view.heads import HeadCall, HeadEdit, HeadEvent, HeadLayer, HeadObserver
from moestro.view.recompute import in_backward, refuse_checkpoint_by_hand
from moestro.view.rules import silence

Attention = Callable[..., tuple[Tensor, Tensor | None]]

PATTERN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}

_lock = threading.Lock()
"""Held while the interface, which all models share, is changed."""
_watched: dict[nn.Module, Callable[..., tuple[Tensor, Tensor | None]]] = {}
"""Attention modules that are watched at this moment: run(attention, module, *args, **kwargs)."""
_users: Counter[str] = Counter()
"""How many watches need each name of the interface."""
_originals: dict[str, Attention | None] = {}


def _eager(module: nn.Module) -> Attention | None:
    """The family's own attention in plain torch, which it hands to the interface as the default."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _dispatch(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    attention = _originals.get(name) or _eager(module)
    assert attention is not None, f"{type(module).__module__} has no eager_attention_forward"
    run = _watched.get(module)
    return attention(module, *args, **kwargs) if run is None else run(attention, module, *args, **kwargs)


@contextmanager
def _watching(runs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with _lock:
        # all of them: a model may be told to compute its attention otherwise while it is watched
        names = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
        for name in names:
            if not _users[name]:
                _originals[name] = ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS.register(name, partial(_dispatch, name))
            _users[name] += 1
        _watched.update(runs)
    try:
        yield
    finally:
        with _lock:
            for module in runs:
                _watched.pop(module, None)
            for name in names:
                _users[name] -= 1
                if not _users[name]:
                    original = _originals.pop(name)
                    if original is None:  # "eager" is no entry: a family's default stands for it
                        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
                    else:
                        ALL_ATTENTION_FUNCTIONS.register(name, original)


class HeadTaps:
    """The attention heads of `stack`, reached while an edit or an observer of heads is active.

    `now`: the pass under way in this thread. `here`: what is in force for the code that it runs (see `situation`).
    """

    def __init__(self, stack: nn.Module, now: Callable[[], Any], here: Callable[[], Any]):
        self.stack, self._now, self._here = stack, now, here
        self._lock = threading.RLock()
        self._users = 0
        self._stop: ExitStack | None = None

    @cached_property
    def layers(self) -> list[HeadLayer]:
        """The attention layers, found and verified by a tiny forward pass. Raises ValueError where there are none."""
        with silence(), self._lock:
            return find_head_layers(self.stack)

    def check(self, edits: Sequence[HeadEdit]) -> None:
        """Raise ValueError where an edit names heads that are not there, or that it cannot act on."""
        by_index = {layer.index: layer for layer in self.layers} if edits else {}
        for edit in edits:
            chosen = edit.layers()
            if unknown := sorted(set(chosen or ()) - by_index.keys()):
                raise ValueError(
                    f"{type(edit).__name__}: decoder layer {unknown[0]} has no heads that can be reached; layers that "
                    f"have are {[*by_index]}"
                )
            edit.row_numbers()
            for index in by_index if chosen is None else chosen:
                edit.check(by_index[index])
                if edit.pattern_heads(index) and by_index[index].no_pattern:
                    raise ValueError(f"{type(edit).__name__}: {by_index[index].no_pattern}")

    def check_observers(self, observers: Sequence[HeadObserver]) -> None:
        """Raise ValueError where one needs patterns that a layer does not give."""
        needs = frozenset().union(*(o.needs for o in observers))
        if needs & {"patterns", "last_patterns"} and (without := [layer for layer in self.layers if layer.no_pattern]):
            raise ValueError(without[0].no_pattern)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the attention of these layers run through `_run` until the block ends. Such blocks may overlap."""
        with self._lock:
            if not self._users:
                self._stop = ExitStack()
                self._stop.enter_context(_watching({layer.module: partial(self._run, layer) for layer in self.layers}))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._stop is not None:
                    self._stop.close()

    def _run(
        self,
        layer: HeadLayer,
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        mask, here, now = attention_mask, self._here(), self._now()  # families give the mask by place or by name
        call = HeadCall(layer, (query.shape[0], query.shape[2]), key.shape[2], now.batch)
        edits = [e for e in here.head_edits if (chosen := e.layers()) is None or layer.index in chosen]
        if edits and self.stack.training:
            refuse_checkpoint_by_hand()
        seen = here.observation
        if seen is not None and (in_backward() or (seen.given_only and not now.given)):
            seen = None
        observers = () if seen is None else seen.of_heads
        needs: frozenset[str] = seen.needs if seen is not None and observers else frozenset()
        for edit in edits:
            new = edit.inputs(call, query, key, value)
            rows = _rows(edit, call, query)
            query, key, value = (_where(rows, n, o) for n, o in zip(new, (query, key, value)))
        z, weights = attention(module, query, key, value, mask, *args, **kwargs)
        patterned = [e for e in edits if e.pattern_heads(layer.index)]
        pattern = None
        if patterned or "patterns" in needs:
            allowed = _allowed(call, module, query, mask, kwargs)
            pattern = _pattern(module, query, key, value, mask, allowed, args, kwargs)
        for edit in patterned:
            assert pattern is not None
            heads = torch.tensor(edit.pattern_heads(layer.index), device=z.device)
            wide = allowed.expand(query.shape[0], query.shape[1], -1, -1)[:, heads]
            new_rows = edit.pattern(call, pattern[:, heads], wide)
            rows = _rows(edit, call, query)
            new_rows = _where(rows, new_rows, pattern[:, heads])
            read = value.repeat_interleave(layer.num_heads // layer.kv_heads, dim=1)[:, heads]
            new_z = (new_rows @ read.to(new_rows.dtype)).transpose(1, 2).to(z.dtype)
            same = (new_rows == pattern[:, heads]).all(dim=-1).transpose(1, 2).unsqueeze(-1)
            z = z.index_copy(2, heads, torch.where(same, z[:, :, heads], new_z))  # untouched rows keep their bits
            pattern = pattern.index_copy(1, heads, new_rows)
        for edit in edits:
            z = _where(_rows(edit, call, z), edit.z(call, z), z)
        if observers:
            query, key, value = query.detach(), key.detach(), value.detach()
            pattern = None if pattern is None else pattern.detach()
            last = None
            if "last_patterns" in needs:
                last = _last_pattern(call, module, query, key, value, mask, args, kwargs, pattern)
            event = HeadEvent(call, query, key, value, z.detach(), pattern, last)
            with self._lock:
                for observer in observers:
                    observer.update_heads(event)
        return z, weights if weights is None or not patterned else pattern


def _rows(edit: HeadEdit, call: HeadCall, like: Tensor) -> Tensor | None:
    """[B, 1, 1, 1] bool: the rows that are edited; None for all."""
    if edit.rows is None:
        return None
    copies = call.batch.copies
    return edit.row_mask(call.shape[0], copies).to(like.device)[:, None, None, None]


def _where(rows: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if rows is None or new is old else torch.where(rows, new, old)


def _allowed(
    call: HeadCall,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    at: Tensor | None = None,
) -> Tensor:
    """[B or 1, A or 1, T, S] bool: which keys each query may see; of queries `at` [B, 1] alone, [B, A or 1, 1, S]."""
    keys = call.keys
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    length, device = call.shape[1], query.device
    at = torch.arange(length, device=device)[None] if at is None else at
    column = at[:, :, None] + (keys - length)  # of the query itself
    key = torch.arange(keys, device=device)
    allowed = torch.ones_like(column == key)
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False:
        allowed = key <= column
        if kwargs.get("sliding_window"):
            allowed &= key > column - kwargs["sliding_window"]
    allowed = allowed[:, None]
    return allowed if mask is None else allowed & mask[:, None, None, -keys:].bool()


def _last_pattern(
    call: HeadCall,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pattern: Tensor | None,
) -> Tensor:
    """The pattern [B, A, S] of each row's last query, from the whole one where that is known."""
    at = call.last.clamp_min(0).to(query.device)

    def last(grid: Tensor) -> Tensor:
        """[B, A or 1, 1, *] of [B or 1, A or 1, T, *]"""
        wide = grid.expand(len(at), -1, -1, -1)
        return wide.gather(2, at[:, None, None, None].expand(-1, wide.shape[1], 1, wide.shape[3]))

    if pattern is not None:
        return last(pattern)[:, :, 0]
    if mask is not None and mask.dim() == 4:
        mask = last(mask)
    kwargs = {  # biases and sinks of every query
        name: last(value)
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == call.shape[1]
        else value
        for name, value in kwargs.items()
    }
    allowed = _allowed(call, module, query, mask, kwargs, at[:, None])
    return _pattern(module, last(query), key, value, mask, allowed, args, kwargs)[:, :, 0]


def _pattern(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    allowed: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """The family's own softmax of queries and keys [B, A, T, S]: its sinks, caps and biases included."""
    additive = mask
    if mask is None or mask.dim() != 4 or mask.dtype == torch.bool:
        additive = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
        additive = additive.masked_fill(~allowed, torch.finfo(query.dtype).min)
    eager = _eager(module)
    assert eager is not None
    weights = eager(module, query, key, value, additive, *args, **kwargs)[1]
    assert weights is not None
    return weights


def find_head_layers(stack: nn.Module) -> list[HeadLayer]:
    """The layers of `stack` that hand their attention to the interface, verified by a forward pass of five tokens.

    Raises ValueError where none does, or what goes through the interface is not the model's attention.
    """
    seen: dict[nn.Module, list[tuple[Any, ...]]] = {}

    def record(attention: Attention, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out = attention(module, *args, **kwargs)
        seen.setdefault(module, []).append((args, kwargs, out[0]))
        return out

    parameter = next(stack.parameters())
    if parameter.is_meta:
        raise ValueError("the model's weights are on the meta device or streamed: its heads cannot be reached")
    ids = torch.arange(2, 7, device=parameter.device)[None]
    training = {module: module.training for module in stack.modules()}
    try:
        stack.eval()
        with torch.no_grad():
            plain = stack(input_ids=ids, use_cache=False)[0]
            with _watching(dict.fromkeys(stack.modules(), record)):
                again = stack(input_ids=ids, use_cache=False)[0]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{type(stack).__name__} did not run on token ids alone, so its heads are unknown: {e}") from e
    finally:
        for module, mode in training.items():
            module.training = mode
    if not torch.equal(torch.nan_to_num(plain), torch.nan_to_num(again)):
        raise ValueError(f"{type(stack).__name__} does not repeat its output; its heads cannot be verified")
    names = {module: name for name, module in stack.named_modules()}
    layers = [layer for module, calls in seen.items() if (layer := _head_layer(module, names[module], calls))]
    if not layers:
        raise ValueError(
            f"{type(stack).__name__} does not use transformers' attention interface, so its heads cannot be reached; "
            "load the same checkpoint with the family's class in transformers"
        )
    return sorted(layers, key=lambda layer: layer.index)


def _head_layer(module: nn.Module, name: str, calls: list[tuple[Any, ...]]) -> HeadLayer | None:
    """None for attention outside the numbered layers, or that one layer calls several times."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not numbers or len(calls) != 1:
        return None
    ((args, kwargs, z),) = calls
    query, key, value, mask, *rest = args if len(args) > 3 else (*args, kwargs.pop("attention_mask", None))
    if z.dim() != 4 or z.shape[:3] != (query.shape[0], query.shape[2], query.shape[1]):
        return None
    layer = HeadLayer(int(numbers[0]), name, module, query.shape[1], key.shape[1], z.shape[3])
    layer.no_pattern = _why_no_pattern(layer, query, key, value, mask, tuple(rest), kwargs, z)
    return layer


def _why_no_pattern(
    layer: HeadLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    z: Tensor,
) -> str:
    """Empty where the pattern times the values is z."""
    where = f"layer {layer.index} ({layer.name})"
    if _eager(layer.module) is None:
        return f"{where}: the family has no eager attention, so there is no pattern to read or change"
    call = HeadCall(layer, (query.shape[0], query.shape[2]), key.shape[2], None)
    try:
        with torch.no_grad():
            allowed = _allowed(call, layer.module, query, mask, kwargs)
            pattern = _pattern(layer.module, query, key, value, mask, allowed, args, kwargs)
    except (AssertionError, RuntimeError, TypeError) as e:
        return f"{where}: its eager attention gives no pattern ({e})"
    if pattern.shape[-1] != key.shape[2]:
        return f"{where}: its pattern has {pattern.shape[-1]} columns for {key.shape[2]} keys"
    read = value.repeat_interleave(layer.num_heads // layer.kv_heads, dim=1)
    product = (pattern @ read.to(pattern.dtype)).transpose(1, 2)
    error = float((product.float() - z.float()).abs().max() / z.float().abs().max().clamp_min(1e-9))
    limit = PATTERN_TOLERANCE.get(z.dtype, 1e-4)
    return "" if error <= limit else f"{where}: pattern times values differs from the head's output by {error:.1e}"
