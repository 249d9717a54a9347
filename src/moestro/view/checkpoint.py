"""What a plain checkpoint of a model would be, and the directory that it is written into.

A save goes to a directory beside the target and is moved into place when it is complete, so a killed run leaves no
half checkpoint.
"""

from __future__ import annotations

import copy
import errno
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moestro.view.layers import MoELayer
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
    inner = _inner_config(config, model.config, stack.config)
    if len(set(counts.values())) > 1 or inner.is_heterogeneous:
        stated = [name for name, _ in numbers(inner, EXPERT_COUNT)]
        per_layer = {int(i): values for i, values in inner.to_dict().get("per_layer_config", {}).items()}
        inner.per_layer_config = per_layer | {
            i: per_layer.get(i, {}) | dict.fromkeys(stated, count) for i, count in counts.items()
        }
    problem = _mismatch(model, config, layers)
    if problem is None:
        return config
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{type(model).__name__} checkpoints store one number of experts for all layers, and this model has "
            f"{sorted(set(counts.values()))}: {problem}. Keep the same number everywhere; pad_to_uniform(layers, keep, "
            "scores) fills the smaller layers with their next best experts"
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
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items()}
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


@contextmanager
def complete_directory(
    path: str | Path, *, overwrite: bool, size: int = 0, known_by: str = "config.json", kind: str = "a checkpoint"
) -> Iterator[Path]:
    """A directory to write into that appears at `path` when the block ends well, and not at all when it does not.

    `known_by`: the file by which a directory of this `kind` is known, so that no other is overwritten.

    Raises:
        FileExistsError: `path` is there and not to be overwritten, or it holds something of another kind.
        OSError: the disk cannot hold `size` bytes; checked before, and told clearly when it fills up on the way.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another directory or pass overwrite (--overwrite)")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a directory; choose another name")
    if Path.cwd().is_relative_to(path) or Path.home().is_relative_to(path):
        raise FileExistsError(f"{path} is not overwritten: all its other files would be lost; choose another directory")
    if path.exists() and any(path.iterdir()) and not (path / known_by).exists():
        raise FileExistsError(f"{path} holds something else than {kind}; delete it or choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{path} needs {size:,} bytes and the disk has {free:,} left; nothing was written")
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    half, old = work / f"new-{path.name}", work / path.name
    try:
        half.mkdir(parents=True)
        yield half
        for file in half.rglob("*.safetensors"):  # the library makes its files for their owner alone
            file.chmod(half.stat().st_mode & 0o666)
        if path.exists() and overwrite:
            path.rename(old)
        half.rename(path)
    except BaseException as e:
        if old.exists() and not path.exists():
            old.rename(path)
        if (isinstance(e, OSError) and e.errno == errno.ENOSPC) or "No space left" in str(e):
            raise OSError(errno.ENOSPC, f"the disk filled up while writing {path}; nothing is left behind") from e
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
