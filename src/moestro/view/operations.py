"""Carry out recipes on an open model: check everything first, then do all of it or nothing.

`Target` is what operations are done to: an open view, or the weightless copy of one on which a recipe is tried. DO says
how each kind of operation is done; what may be done at all, and what a checkpoint can hold, is asked here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel

import moestro.view.checkpoint as checkpoint
import moestro.view.saving as saving
import moestro.view.surgery as surgery
from moestro.recipe import Keep, MadeOn, Merge, Notes, Operation, Recipe, SetTopK
from moestro.view.experts import is_experts
from moestro.view.layers import MoELayer
from moestro.view.obstacles import check_no_adapters, check_plain
from moestro.view.skeleton import skeleton_of
from moestro.view.state import ModelState


@runtime_checkable
class Target(Protocol):
    """A model with experts: `streamed` where their weights are on the meta device for good."""

    model: Any
    stack: Any
    layers: list[MoELayer]
    streamed: bool

    @property
    def state(self) -> ModelState: ...


def _keep(target: Any, layers: Sequence[MoELayer], operation: Keep) -> None:
    surgery.keep_experts(layers, operation.experts)


def _merge(target: Any, layers: Sequence[MoELayer], operation: Merge) -> None:
    surgery.merge_experts(layers, operation.clusters, operation.weights)


def _set_top_k(target: Any, layers: Sequence[MoELayer], operation: SetTopK) -> None:
    surgery.set_top_k(layers, holders(target), operation.top_k)


DO: dict[str, Callable[[Any, Sequence[MoELayer], Any], None]] = {
    "keep": _keep,
    "merge": _merge,
    "set_top_k": _set_top_k,
}
"""How each kind of operation is done to these layers: all of it, or an error and nothing."""


def holders(target: Target) -> list[Any]:
    """Configs and models that state numbers of experts for all layers."""
    found = [target.model, target.stack, target.stack.config]
    found += [layer.experts.config for layer in target.layers if hasattr(layer.experts, "config")]
    return list({id(h): h for h in found}.values())


# --- what the model is -----------------------------------------------------------------------------------------------


def made_on(target: Target) -> MadeOn:
    """The model as it is now, as recipes know it."""
    named = {layer.name: layer for layer in target.layers}
    return MadeOn(
        type(_innermost(target)).__name__,
        {name: layer.num_experts for name, layer in named.items()},
        {name: layer.top_k for name, layer in named.items()},
    )


def _innermost(target: Target) -> Any:
    """The model without what other libraries put around it: adapters, torch.compile, DataParallel."""
    return next((m for m in target.model.modules() if isinstance(m, PreTrainedModel)), target.model)


def _prefix(target: Target) -> str:
    """What layers' names begin with before they reach the stack. The model's state, which all views share whatever
    they were opened on, knows layers without it."""
    name = next(name for name, module in target.model.named_modules() if module is target.stack)
    return f"{name}." if name else ""


def original_ids(target: Target) -> dict[str, list[int]]:
    """{layer name: for each present expert, its number in the first model of the lineage}"""
    known = target.state.original_ids
    return {layer.name: list(known.get(layer.path, range(layer.num_experts))) for layer in target.layers}


def notes(target: Target) -> Notes:
    """What a checkpoint of the model carries of its history."""
    state, prefix = target.state, _prefix(target)
    numbers = {layer.name: layer.index for layer in target.layers}
    recipe = Recipe(tuple(state.recipe)).on(lambda name: prefix + name)
    if recipe.operations:
        then = state.made_on
        experts, top_k = ({prefix + n: v for n, v in part.items()} for part in (then.experts, then.top_k))
        recipe = replace(recipe, made_on=MadeOn(then.architecture, experts, top_k))
    others = {prefix + name: ids for name, ids in state.original_ids.items()}  # of another stack, say
    return Notes(recipe, tuple(state.lineage), others | original_ids(target), numbers)


def remember(target: Target, found: Notes | None) -> None:
    """Take up the history that a checkpoint carries. Raises ValueError where it is not of this model."""
    if found is None:
        return
    state = target.state
    for name, ids in found.original_ids.items():
        try:
            layer = surgery.resolve(target.layers, name)
        except ValueError:
            continue  # of another stack, or another part of the model
        if len(ids) != layer.num_experts:
            raise ValueError(
                f"moestro.json beside the weights speaks of {len(ids)} experts in {layer.name}, and there are "
                f"{layer.num_experts}: it belongs to another checkpoint; delete it, or fetch the checkpoint anew"
            )
        state.original_ids[layer.path] = list(ids)
    state.lineage = [*found.lineage, *([found.recipe] if found.recipe.operations else [])]


# --- check -----------------------------------------------------------------------------------------------------------


def resolved(target: Target, recipe: Recipe) -> Recipe:
    """The recipe with the target's own names. Raises ValueError where it was made on a model that is not alike."""
    recipe = surgery.by_name(target.layers, recipe)
    if recipe.made_on is not None:
        here = made_on(target)
        then = recipe.made_on
        names = {name: _name_here(target, name) for name in then.experts}
        then = MadeOn(
            then.architecture,
            {names[n]: e for n, e in then.experts.items()},
            {names[n]: k for n, k in then.top_k.items()},
        )
        if difference := then.difference(here):
            raise ValueError(f"this recipe does not fit: {difference}")
    return recipe


def _name_here(target: Target, name: str) -> str:
    try:
        return surgery.resolve(target.layers, name).name
    except ValueError:
        return name


def check_operation(target: Target, operation: Operation) -> None:
    """Raise ValueError where the layers that an operation names cannot be changed, whatever it does to them."""
    surgery.check_unshared(target.model, target.layers)
    named = operation.layers()
    for layer in target.layers:
        if (named is None or layer.name in named) and is_experts(layer.experts):
            parts = (layer.router, layer.experts)
            check_plain(target.model, layer.name, layer.block, parts, streamed=target.streamed)


def check(target: Any, recipe: Recipe, format: str | None) -> None:
    """Raise ValueError where the recipe cannot be carried out, or the format cannot hold what comes out of it.

    Tried on a copy of the model without weights: what surgery and saving themselves would say is what is said.
    """
    if format is not None:
        saving.check_format(format, target.source)
    recipe = resolved(target, recipe)
    for operation in recipe.operations:
        check_operation(target, operation)
    if format is not None:
        check_no_adapters(target.model)
    copied = skeleton_of(target.model, target.stack, target.layers, state=ModelState(), streamed=True)
    copied.state.stated = dict(target.state.stated)
    for number, operation in enumerate(recipe.operations, 1):
        try:
            _do(copied, operation)
        except RuntimeError as e:
            raise ValueError(f"operation {number} ({operation.kind}) cannot be done: {e}") from e
    if format is not None:
        check_savable(copied.model, copied.stack, copied.layers)
        check_tokenizer(target.tokenizer, target.model)


def check_savable(model: Any, stack: Any, layers: Sequence[MoELayer]) -> None:
    """Raise ValueError where the model cannot be saved as a plain checkpoint: everything that saving asks."""
    config = checkpoint.plain_config(model, stack, layers)
    with tempfile.TemporaryDirectory(prefix="moestro-check-") as place:
        config.save_pretrained(place)
        if model.can_generate():
            try:
                model.generation_config.save_pretrained(place)
            except ValueError as e:
                reason = " ".join(line.strip(" -") for line in str(e).splitlines() if line.strip())
                raise ValueError(
                    f"transformers refuses to save the model's generation config: {reason[:300]} Set these values of "
                    "model.generation_config right, or give the model a plain one: model.generation_config = "
                    "transformers.GenerationConfig()"
                ) from e


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise ValueError where the tokenizer gives ids that the model has no embedding for."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(table, "num_embeddings", None)
    if tokenizer is None or rows is None:
        return
    name, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives {name!r} the id {largest}, and the model embeds ids 0..{rows - 1}: texts with it "
            "cannot be read, and the checkpoint would not fit together; give the tokenizer that belongs to the model, "
            f"or enlarge the model first: model.resize_token_embeddings({largest + 1})"
        )


# --- do --------------------------------------------------------------------------------------------------------------


def apply(target: Any, recipe: Recipe) -> None:
    """Do all operations of the recipe, or raise and change nothing. See `surgery` for what each may raise."""
    recipe = resolved(target, recipe)
    if len(recipe.operations) > 1:  # one alone is all or nothing by itself
        check(target, recipe, None)
    for operation in recipe.operations:
        check_operation(target, operation)
    state, prefix, before = target.state, _prefix(target), made_on(target)
    experts, top_k = ({n.removeprefix(prefix): v for n, v in part.items()} for part in (before.experts, before.top_k))
    begun = MadeOn(before.architecture, experts, top_k)
    if state.recipe:  # what it does not know yet is of another stack, and whole
        then = state.made_on
        begun = MadeOn(then.architecture, experts | then.experts, top_k | then.top_k)
    for operation in recipe.operations:
        _do(target, operation)
        state.made_on = begun
        state.recipe.append(operation.on({layer.name: layer.path for layer in target.layers}))


def _do(target: Target, operation: Operation) -> None:
    first, count = target.layers[0].path, target.layers[0].num_experts
    ids = original_ids(target)
    before = [layer.num_experts for layer in target.layers]
    DO[operation.kind](target, target.layers, operation)
    state = target.state
    for layer, had in zip(target.layers, before):
        surgery.set_expert_count(_around(target, layer), had, layer.num_experts)
        if layer.name in (kept := operation.kept()):
            state.original_ids[layer.path] = [ids[layer.name][e] for e in kept[layer.name]]
    state.stated.setdefault(first, count)
    counts = {layer.num_experts for layer in target.layers}
    if len(counts) == 1:  # else the config has no number to state
        (new,) = counts
        surgery.set_expert_count(holders(target), state.stated[first], new)
        state.stated[first] = new


def _around(target: Target, layer: MoELayer) -> list[Any]:
    """The modules of the decoder layer around an MoE block whose first block it is: they may state its number too."""
    names = layer.name.split(".")
    numbered = max((place for place, name in enumerate(names) if name.isdigit()), default=len(names))
    found = [target.model.get_submodule(".".join(names[:end])) for end in range(numbered + 1, len(names))]
    return [module for module in found if next(m for m in module.modules() if is_experts(m)) is layer.experts]


def redo(target: Target, layers: Sequence[MoELayer]) -> None:
    """Do to the freshly loaded weights of these layers what was done to their skeleton."""
    names = {layer.path: layer.name for layer in layers}
    for operation in target.state.recipe:
        if operation.layers() is not None and (here := operation.on(names)).layers():
            DO[operation.kind](target, layers, here)


def bytes_after(target: Any, recipe: Recipe, format: str) -> int:
    """Size of the weights in the checkpoint of this format that would be saved after the recipe."""
    recipe = resolved(target, recipe)
    before = {layer.name: layer.num_experts for layer in target.layers}
    after, size = recipe.counts(before), target.expert_bytes(format)
    gone = sum((before[layer.name] - after[layer.name]) * size[layer.index] for layer in target.layers)
    return int(target.bytes_in(format, cut=bool(gone))) - gone
