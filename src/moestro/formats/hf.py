"""Between a transformers model and the names and shapes under which its family's checkpoints store it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging


@dataclass(frozen=True)
class Group:
    """Stored tensors that are converted together, and the model's tensors that they become."""

    keys: tuple[str, ...]
    targets: tuple[str, ...]


def reading_plan(
    model: Any, stored: Iterable[str], conversions: list[Any] | None = None
) -> tuple[list[Group], list[str]]:
    """How a model reads stored tensors, by transformers' own renaming: (groups, names that it does not read)."""
    known = model.state_dict()
    conversions = get_model_conversion_mapping(model) if conversions is None else conversions
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    keys: dict[str, list[str]] = {}
    targets: dict[str, tuple[str, ...]] = {}
    unread = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name not in known:
            unread.append(key)
            continue
        keys.setdefault(name, []).append(key)
        names = by_pattern[pattern].target_patterns if pattern is not None else []
        targets[name] = tuple({name: 0, **{name.replace(names[0], n): 0 for n in names}})
    return [Group(tuple(keys[name]), tuple(t for t in targets[name] if t in known)) for name in keys], unread


def saved_names(model: Any) -> set[str]:
    """The model's tensors that a checkpoint stores: tied ones once."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return set(modeling_utils.remove_tied_weights_from_state_dict(state, model))


def to_stored(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model under the names and in the form in which the family's checkpoints store them."""
    with _plain_conversions(model):
        return revert_weight_conversion(model, dict(tensors))


@contextmanager
def _plain_conversions(model: Any) -> Iterator[None]:
    """Without the steps of a quantised load, which have no way back: what is stored is plain."""
    used = getattr(model, "_weight_conversions", None)
    steps = [type(step).__name__ for conversion in used or () for step in getattr(conversion, "operations", ())]
    if getattr(model, "hf_quantizer", None) is None and not any("quantize" in step.lower() for step in steps):
        yield
        return
    model._weight_conversions = None  # transformers then takes the family's own
    try:
        yield
    finally:
        model._weight_conversions = used


def skeleton(family: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model as `from_pretrained` makes it before it loads: on the meta device."""
    with ExitStack() as contexts:
        for context in family.get_init_context(dtype, False, False, False):
            contexts.enter_context(context)
        return family(config)


def check_read(family: Any, config: Any, tensors: Mapping[str, Tensor], beside: Iterable[str], where: Any) -> None:
    """Let transformers read plain tensors (on the meta device) into a new model, and compare.

    `beside`: names that the family does not read and that may be there.

    Raises RuntimeError where a tensor of the model is missing, has another shape, or one is not read.
    """
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = skeleton(family, config, dtype)
    plan = modeling_utils.LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=dtype,
        dtype_plan={},
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    with no_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), plan)
    missing = info.missing_keys - set(model.all_tied_weights_keys) - set(model._keys_to_ignore_on_save or ())
    unread = set(reading_plan(model, tensors)[1]) - set(beside)
    wrong = [f"{name} has shape {tuple(a)}, the model's {tuple(b)}" for name, a, b in info.mismatched_keys]
    wrong += [f"{name}: {str(error).splitlines()[-1]}" for name, error in info.conversion_errors.items()]
    wrong += [f"{name} is missing" for name in sorted(missing)] + [
        f"{name} would not be read" for name in sorted(unread)
    ]
    if wrong:
        raise RuntimeError(
            f"{where}: what was written is not what {family.__name__} reads ({'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}); nothing was saved. Please report this"
        )


@contextmanager
def no_bar() -> Iterator[None]:
    """Without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
