"""Change the experts of a model for good: keep, merge or replace them, or use fewer per token.

What the experts hold is theirs to cut (`moestro.view.experts`); which tensors of a router carry one entry per expert is
read off their shapes, and where a shape could mean two things, off what they do. Every cut of a router is verified: on
random hidden states the new logits must be the old ones of the experts that stayed. Requests that cannot work are
refused before anything is changed, and a cut that fails on the way leaves the model as it was. Shapes: E experts, H
hidden.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import moestro.recipe as recipes
from moestro.view.experts import PerExpert, Undo, average, experts_of, is_experts, offers_contract, undo_all
from moestro.view.layers import MoELayer
from moestro.view.router_axes import router_tensors
from moestro.view.rules import RouterCall, derive_rule

Keep = Mapping[Any, Any]
"""{name of the MoE block, or number of its decoder layer: experts to keep}"""

UNDO_BYTES = 2**30
"""A cut keeps the old experts to go back to up to this size: holding both can take twice the model's memory. Of larger
ones every tensor is tried out before the first is cut."""

EXPERT_COUNT = re.compile(r"^(?!.*(shared|per_tok|top|group|size|dim|layer)).*(experts|router_classes)$")
TOP_K = re.compile(r"^(?!.*(group|index)).*(top_?k|per_tok(en)?|moe_k)(_experts)?$")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done: tensors that are cut cannot be put back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals raise in the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raising = {number: handler for number, handler in before.items() if callable(handler)}
    came: list[int] = []
    for number in raising:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def resolve(layers: Sequence[MoELayer], name: str) -> MoELayer:
    """The layer of that name: the MoE block's, whole or without what it lies in, or the decoder layer's number.

    Raises ValueError where none has it, or several.
    """
    if name.isdecimal():
        found = [layer for layer in layers if layer.index == int(name)]
        if not found:
            raise ValueError(f"decoder layer {name} has no experts; MoE layers are {[layer.index for layer in layers]}")
    else:
        found = [layer for layer in layers if layer.name == name]
        found = found or [x for x in layers if x.name.endswith(f".{name}") or name.endswith(f".{x.name}")]
    if len(found) != 1:
        names = ", ".join(layer.name for layer in found or layers)
        raise ValueError(f"{name!r} names {len(found)} of the layers with experts; write one of: {names}")
    return found[0]


def by_name(layers: Sequence[MoELayer], recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with every layer by its block's name. Raises ValueError as `resolve`."""
    return recipe.on(lambda name: resolve(layers, name).name)


def _chosen(layers: Sequence[MoELayer], operation: Any) -> Any:
    """The operation with layers by name, all of which are there."""
    return by_name(layers, recipes.Recipe((operation,))).operations[0]


@uninterrupted()
def keep_experts(layers: Sequence[MoELayer], keep: Keep) -> None:
    """Drop all experts but those named; layers that are not named stay as they are. In the order of the ids given.

    Raises:
        ValueError: unknown layers or experts, fewer than top_k left, unequal numbers per group, or a router that
            looks experts up by token id. Nothing has been changed then.
    """
    experts = _chosen(layers, recipes.keep(keep)).experts
    chosen = [(layer, experts[layer.name]) for layer in layers if layer.name in experts]
    for layer, ids in chosen:
        check_keep(layer, ids)
    _cut([(layer, ids) for layer, ids in chosen if ids != list(range(layer.num_experts))], [])


def check_own(layers: Sequence[MoELayer]) -> None:
    """Raise ValueError where two layers share expert weights: a cut would store them once for each."""
    first: dict[int, MoELayer] = {}
    for layer in layers:
        for parameter in layer.experts.parameters():
            if (other := first.setdefault(id(parameter), layer)) is not layer:
                raise ValueError(
                    f"layers {other.index} and {layer.index} share their experts: a cut would store them once for each "
                    "layer and make the model larger; only models whose layers own their experts can be cut"
                )


def check_unshared(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Raise ValueError where expert weights also serve another layer or module, which a cut would leave whole."""
    check_own(layers)
    ours = {id(p): layer for layer in layers for p in layer.experts.parameters()}
    inside = {id(m) for layer in layers for m in layer.experts.modules()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(module) not in inside and (layer := ours.get(id(parameter))) is not None:
                raise ValueError(
                    f"layer {layer.index} ({layer.name}) shares its expert weights with {name}: experts cannot be "
                    "removed from one of them alone"
                )


def check_keep(layer: MoELayer, ids: Sequence[int]) -> None:
    """Raise ValueError where `layer` cannot run with these experts alone."""
    where, count = f"layer {layer.index}", layer.num_experts
    if layer.rule is None:
        raise ValueError(f"{where}: experts cannot be removed ({layer.no_rule})")
    if not is_experts(layer.experts):
        raise ValueError(f"{where}: its experts were replaced by {type(layer.experts).__name__}, which holds none")
    ids = recipes.plain_ids(ids, where)
    wrong = [e for e in ids if not 0 <= e < count]
    if wrong:
        raise ValueError(f"{where} has experts 0..{count - 1}; there is no expert {wrong[0]}")
    if len(ids) < layer.top_k:
        raise ValueError(
            f"keep={len(ids)} experts cannot serve top_k={layer.top_k} in {where}; keep at least {layer.top_k} "
            "or lower top_k first with set_top_k"
        )
    groups = layer.rule.groups
    if groups > 1:
        sizes = [sum(e * groups // count == g for e in ids) for g in range(groups)]
        least = max(2, -(-layer.top_k // layer.rule.top_groups))
        if len(set(sizes)) > 1 or sizes[0] < least:
            raise ValueError(
                f"{where} routes in {groups} groups of {count // groups}: keep the same number in each group, at least "
                f"{least}; asked for {sizes}"
            )
        if list(ids) != sorted(ids):
            raise ValueError(f"{where} routes in groups: give the experts to keep in ascending order")


@uninterrupted()
def merge_experts(
    layers: Sequence[MoELayer],
    clusters: Mapping[Any, Any],
    weights: Mapping[Any, Any] | None = None,
) -> None:
    """Make each cluster one expert: the weighted mean of its members' tensors, router rows included.

    `clusters`: {layer: [[ids], ...]}, a new expert each; experts in none are dropped. `weights`: {layer: one
    non-negative number per old expert}, scaled to sum 1 in each cluster; equal where not given.
    """
    asked = _chosen(layers, recipes.merge(clusters))
    given = None
    if weights is not None:
        given = {resolve(layers, str(name)).name: weight for name, weight in weights.items()}
    chosen = [(layer, asked.clusters[layer.name]) for layer in layers if layer.name in asked.clusters]
    for layer, groups in chosen:
        members = [e for group in groups for e in group]
        check_keep(layer, [e for e in members if not 0 <= e < layer.num_experts] or [min(g) for g in groups])
        if given is not None:
            _check_weights(layer, groups, given.get(layer.name))
    done: list[Undo] = []
    try:
        for layer, groups in chosen:
            if any(len(group) > 1 for group in groups):
                share = torch.ones(layer.num_experts) if given is None else torch.as_tensor(given[layer.name]).float()
                done.append(_mergeable(layer).average(groups, share))
                for part in router_tensors(layer):
                    done.append(average(part.tensor.data, groups, share, part.axis))
        _cut([(layer, [min(group) for group in groups]) for layer, groups in chosen], done, verify=False)
    except BaseException:
        undo_all(done)
        raise


def _mergeable(layer: MoELayer) -> Any:
    experts = experts_of(layer.experts)
    if not hasattr(experts, "average"):
        raise ValueError(
            f"layer {layer.index}: {type(layer.experts).__name__} offers no average(groups, share), so its experts "
            "cannot be merged"
        )
    return experts


def _check_weights(layer: MoELayer, groups: Sequence[Sequence[int]], weights: Any) -> None:
    where = f"merge weights of layer {layer.index}"
    if weights is None:
        raise ValueError(f"no {where}; give one number per expert for every layer that is merged")
    weights = torch.as_tensor(weights)
    if weights.shape != (layer.num_experts,):
        raise ValueError(
            f"{where} have shape {tuple(weights.shape)}; give one number for each of its {layer.num_experts} experts"
        )
    for group in groups:
        share = weights[list(group)]
        if len(group) > 1 and not (bool((share >= 0).all()) and 0 < float(share.sum()) < float("inf")):
            raise ValueError(
                f"{where} are {share.tolist()} for experts {list(group)}; give non-negative numbers, not all zero"
            )


def replace_experts(layer: MoELayer, module: nn.Module) -> None:
    """Put `module` in the place of the layer's experts. It takes (hidden [N, H], indices, weights), gives [N, H]."""
    reference = next(layer.router.parameters())
    width = _input_width(layer)
    hidden = torch.zeros(2, width, device=reference.device, dtype=reference.dtype)
    indices = torch.zeros(2, layer.top_k, dtype=torch.long, device=reference.device)
    with torch.no_grad():
        out = module(hidden, indices, hidden.new_ones(2, layer.top_k))
    if not isinstance(out, Tensor) or out.shape != hidden.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer {layer.index}: the new experts must turn [N, {width}] into [N, {width}]; got {got}")
    layer.routed = layer.num_experts
    setattr(layer.block, layer.experts_name, module)


def _input_width(layer: MoELayer) -> int:
    experts = layer.experts
    up = getattr(experts, "gate_up_proj", getattr(experts, "up_proj", None))
    if not isinstance(up, Tensor) or up.dim() != 3:
        return RouterCall(layer.block, layer.router).hidden_size
    return up.shape[1] if getattr(experts, "is_transposed", False) else up.shape[2]


def set_top_k(layers: Sequence[MoELayer], holders: Iterable[Any], top_k: int) -> None:
    """Let every token use `top_k` experts; `holders` are further objects (configs, models) that state the number.

    Raises ValueError where a layer has fewer experts, or a router does not follow. Nothing has been changed then.
    """
    top_k = recipes.set_top_k(top_k).top_k
    for layer in layers:
        if layer.rule is None:
            raise ValueError(f"layer {layer.index}: top_k is fixed ({layer.no_rule})")
        rule = layer.rule
        limit = layer.num_experts // rule.groups * rule.top_groups if rule.groups > 1 else layer.num_experts
        if not 1 <= top_k <= limit:
            raise ValueError(f"top_k={top_k} in layer {layer.index}, whose router can choose 1 to {limit} experts")
    modules = [m for layer in layers for m in (layer.router, layer.block, layer.experts)]
    undo = [
        (owner, name, value)
        for owner in [*modules, *holders]
        for name, value in [*numbers(owner, TOP_K), *_top_k_as_count(owner, layers)]
        if value == layers[0].top_k
    ]
    rules = []
    try:
        for owner, name, _ in undo:
            setattr(owner, name, top_k)
        for owner in {id(owner): owner for owner, _, _ in undo}.values():
            if not isinstance(owner, nn.Module):
                owner.validate()  # Zaya's config, for one, allows a single expert per token only
        for layer in layers:
            call = RouterCall(layer.block, layer.router)
            got = call(call.hidden(0)).indices.shape[1]
            if got != top_k:
                raise ValueError(f"its router keeps choosing {got} experts")
            assert layer.rule is not None
            # Derived anew: some routers put top_k into a weight (OpenAI's privacy filter divides by it).
            rules.append(derive_rule(call, layer.num_experts, replace(layer.rule, top_k=top_k)))
    except Exception as e:
        for owner, name, value in undo:
            setattr(owner, name, value)
        reason = str(e).splitlines()[-1].strip() or type(e).__name__
        raise ValueError(f"layer {layers[len(rules)].index}: top_k cannot be changed to {top_k}: {reason}") from e
    for layer, rule in zip(layers, rules, strict=True):
        layer.rule = rule


def _top_k_as_count(owner: Any, layers: Sequence[MoELayer]) -> list[tuple[str, int]]:
    """Where a block keeps top_k under the name of a number of experts (OpenAI's privacy filter scales by it)."""
    blocks = {layer.block: layer for layer in layers}
    if not isinstance(owner, nn.Module) or owner not in blocks:
        return []
    return [(n, v) for n, v in numbers(owner, EXPERT_COUNT) if v != blocks[owner].num_experts]


def set_expert_count(holders: Iterable[Any], old: int, new: int) -> None:
    """Update every number of experts that the holders (modules, configs) state."""
    for holder in holders:
        for name, value in numbers(holder, EXPERT_COUNT):
            if value == old:
                setattr(holder, name, new)


def numbers(holder: Any, name: re.Pattern[str]) -> list[tuple[str, int]]:
    """The integer attributes of a module or config whose name matches."""
    return [(n, v) for n, v in list(vars(holder).items()) if type(v) is int and name.search(n)]


def _cut(chosen: Sequence[tuple[MoELayer, Sequence[int]]], done: list[Undo], verify: bool = True) -> None:
    """Slice everything per expert down to the ids, all routers first; on a failure all is put back, `done` included."""
    stacks = [experts_of(layer.experts) for layer, _ in chosen]
    routers = [router_tensors(layer) for layer, _ in chosen]
    for experts, (layer, _) in zip(stacks, chosen):
        if hasattr(experts, "per_expert"):
            for part in experts.per_expert():
                _try_out(layer, part)
    begun = False
    undoable = sum(experts.nbytes() for experts in stacks) <= UNDO_BYTES
    try:
        for (layer, ids), tensors in zip(chosen, routers):
            _cut_router(layer, ids, tensors, done, verify)
        for experts, (_, ids) in zip(stacks, chosen):
            restore = experts.slice(ids)
            begun = True
            if undoable:
                done.append(restore)
            del restore
    except BaseException as e:
        if begun and not undoable:
            raise RuntimeError("some layers are cut and some are not: load the model anew") from e
        undo_all(done)
        done.clear()
        raise


def _try_out(layer: MoELayer, part: PerExpert) -> None:
    """Raise ValueError where the tensor cannot be sliced, whatever it is made of."""
    tensor = part.tensor
    try:
        tensor.data.index_select(part.axis, torch.zeros(1, dtype=torch.long, device=tensor.device))
    except Exception as e:  # every tensor type has its own way of saying so
        reason = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        raise ValueError(
            f"layer {layer.index}: {part.name} is a {type(tensor.data).__name__}, which cannot be cut ({reason}); "
            "nothing was changed"
        ) from e


def _cut_router(
    layer: MoELayer, ids: Sequence[int], tensors: Sequence[PerExpert], done: list[Undo], verify: bool
) -> None:
    """Slice what the router and the block hold per expert, and verify the logits; `done` grows as things change."""
    assert layer.rule is not None
    count, null = layer.num_experts, layer.rule.null_experts
    call = RouterCall(layer.block, layer.router)
    hidden = call.hidden(3)
    with_null = [*ids, *range(count, count + null)]
    expected = call(hidden).logits[:, with_null]
    for part in tensors:
        done.append(part.slice(ids if part.tensor.shape[part.axis] == count else with_null))
    holders = [layer.router, layer.block]
    if not offers_contract(layer.experts):  # else it counts for itself
        holders.append(layer.experts)
    done += [partial(setattr, h, n, v) for h in holders for n, v in numbers(h, EXPERT_COUNT)]
    set_expert_count(holders, count, len(ids))
    if null:
        set_expert_count(holders, count + null, len(with_null))
    got = call(hidden).logits
    if layer.rule.returns_probabilities:
        got, expected = got.log(), expected.log() - expected.sum(-1, keepdim=True).log()
    same = got.shape == expected.shape and torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-3)
    if verify and not same:
        raise RuntimeError(
            f"layer {layer.index} ({layer.name}): the cut router gives other logits; nothing was changed"
        )


def pad_to_uniform(
    layers: Sequence[MoELayer], keep: Mapping[int, Sequence[int]], scores: Mapping[int, Float[Tensor, " e"]]
) -> dict[int, list[int]]:
    """Fill every layer (of a grouped router: every group) up to the largest number kept, with its next best by score.

    For families whose checkpoints store one number of experts for all layers.
    """
    for index in keep:
        resolve(layers, str(index))
    chosen = [layer for layer in layers if layer.index in keep]
    groups = max(layer.rule.groups if layer.rule else 1 for layer in chosen)
    group_of = {layer.index: [e * groups // layer.num_experts for e in keep[layer.index]] for layer in chosen}
    most = max(of.count(g) for of in group_of.values() for g in range(groups))
    padded = {}
    for layer in chosen:
        score = scores[layer.index].double().nan_to_num(nan=float("-inf"))
        score[list(keep[layer.index])] = float("inf")
        best = score.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, :most]
        first = torch.arange(groups)[:, None] * (layer.num_experts // groups)
        padded[layer.index] = sorted((best + first).flatten().tolist())
    return padded
