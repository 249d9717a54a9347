"""What a plain checkpoint of a model would be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moestro.view.layers import ALL, MoELayer, left_out
from moestro.view.surgery import EXPERT_COUNT, TOP_K, numbers


def model_class(config: Any) -> type[transformers.PreTrainedModel]:
    """The transformers class that a checkpoint was saved from. Raises ValueError where transformers has none."""
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[return-value]
    raise ValueError(
        f"{config.architectures or [type(config).__name__]} is not part of transformers {transformers.__version__}; "
        "moestro opens families with an experts interface in transformers, not remote code"
    )


def plain_config(model: nn.Module, stack: nn.Module, layers: Sequence[MoELayer]) -> Any:
    """The config from which plain transformers builds this very model.

    Raises ValueError where there is none: the family stores one number of experts for all layers, or experts were
    replaced by modules of another kind.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        inside = next((n for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)), "")
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so it has no plain checkpoint; save its part: "
            f"moestro.open(model.{inside})"
        )
    config = copy.deepcopy(model.config)
    counts = {layer.index: layer.num_experts for layer in layers}
    different = sorted({layer.num_experts for layer in layers})
    inner = _inner_config(config, model.config, stack.config)
    if len(different) > 1 or inner.is_heterogeneous:
        stated = [name for name, _ in numbers(inner, EXPERT_COUNT)]
        per_layer = {int(i): values for i, values in inner.to_dict().get("per_layer_config", {}).items()}
        inner.per_layer_config = per_layer | {
            i: per_layer.get(i, {}) | dict.fromkeys(stated, count) for i, count in counts.items()
        }
    problem = _mismatch(model, config, layers)
    if problem is None:
        return config
    if len(different) > 1:
        raise ValueError(
            f"{type(model).__name__} checkpoints store one number of experts for all layers, and this model has "
            f"{different}: {problem}. Keep the same number everywhere; pad_to_uniform(layers, keep, scores) fills the "
            "smaller layers with their next best experts"
        )
    if (others := left_out(model, layers)) and different != sorted({count for _, count in others}):
        raise ValueError(
            f"{type(model).__name__} checkpoints store one number of experts for all stacks; {layers[0].name} has "
            f"{different[0]} and {others[0][0]} {others[0][1]}. Open them together, "
            f"moestro.open(model, part={ALL!r}), and keep the same number in each"
        )
    raise ValueError(f"this model is no plain {type(model).__name__} any more: {problem}")


def _inner_config(copied: Any, original: Any, wanted: Any) -> Any:
    """The sub-config of `copied` that stands where `wanted` stands in `original`."""
    if original is wanted:
        return copied
    for name in getattr(original, "sub_configs", {}):
        sub = getattr(original, name, None)
        if sub is not None and (found := _inner_config(getattr(copied, name), sub, wanted)) is not None:
            return found
    return None


def _mismatch(model: nn.Module, config: Any, layers: Sequence[MoELayer]) -> str | None:
    """Build the config on the meta device and name the first difference: a tensor's shape, a count, a top_k."""
    try:
        config.validate()
        with torch.device("meta"):
            twin = type(model)(config)
    except Exception as e:  # whatever a family's constructor says is the reason
        return f"transformers cannot build it ({type(e).__name__}: {str(e).splitlines()[-1].strip()[:160]})"
    state = model.state_dict(keep_vars=True)
    packed = next((n for n, t in state.items() if type(t) not in (torch.Tensor, nn.Parameter)), None)
    if packed is not None:
        return (
            f"{packed} is a {type(state[packed]).__name__}; cut and save the model before it is quantised, and "
            "quantise what was saved"
        )
    ours = {n: tuple(t.shape) for n, t in state.items()}
    theirs = {n: tuple(t.shape) for n, t in twin.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"{name} has shape {ours.get(name)}, its config says {theirs.get(name)}"
    for layer in layers:
        for place in ("", f".{layer.router_name}", f".{layer.experts_name}"):
            module, built = (m.get_submodule(layer.name + place) for m in (model, twin))
            for attribute, value in [*numbers(module, EXPERT_COUNT), *numbers(module, TOP_K)]:
                if getattr(built, attribute, value) != value:
                    return f"{layer.name}{place}.{attribute} is {value}, its config says {getattr(built, attribute)}"
    return None


def saved_bytes(model: nn.Module) -> int:
    """Size of the model's weights in a saved checkpoint, tied tensors counted once."""
    seen: dict[int, int] = {}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict().items():
        if name not in tied or not getattr(model.config, "tie_word_embeddings", False):
            seen[tensor.data_ptr() if tensor.numel() else -len(seen) - 1] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def source_directories(model: Any) -> list[Path]:
    """The directory that a model in memory was loaded from, where it was loaded from one that is still there."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return [Path(name)] if name and Path(name).is_dir() else []
