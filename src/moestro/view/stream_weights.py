"""Read a checkpoint part by part into a model without weights, and write one tensor by tensor.

Reading: the model is built on the meta device, as `from_pretrained` builds it. Each group of stored tensors that
transformers converts together (the experts of a layer that become one `gate_up_proj`, say) is read and handed to
transformers' own conversion when it is asked for, so what is loaded is bit for bit what `from_pretrained` loads.
Files are read with `pread`: a mapped file would count as resident memory.

Writing: names, types and shapes of the output are found by converting back on the meta device; the files are laid out
from them, and every tensor goes to its place as soon as it is there.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import re
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging

from moestro.view.checkpoint import INDEX, model_class, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 4 * 10**9
"""Size from which an output is split into several files."""
ALIGNMENT = 64
_OWN_PAGES = 1 << 20  # buffers from this size on are given back to the system as soon as they are free
_READ_AT_ONCE = 1 << 30


@dataclass(eq=False)
class Stored:
    """One tensor in a safetensors file; `stored[...]` reads it, as transformers' loader expects of a slice."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    _early: Tensor | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, _: Any) -> Tensor:
        tensor, self._early = self._early, None
        return self._read() if tensor is None else tensor

    def fetch(self) -> None:
        """Read ahead: the next `[...]` finds the tensor in memory."""
        self._early = self._read()

    def forget(self) -> None:
        self._early = None

    def _read(self) -> Tensor:
        # Matrix kernels round differently on differently aligned weights: keep the alignment of a mapped file.
        shift = self.offset % ALIGNMENT if self.offset % self.dtype.itemsize == 0 else 0
        size = shift + self.nbytes
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        buffer: Any = mmap.mmap(-1, size) if size >= _OWN_PAGES else torch.empty(size, dtype=torch.uint8).numpy()
        if size >= _OWN_PAGES and hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        view, done = memoryview(buffer), shift
        while done < size:
            got = os.preadv(self.file, [view[done : done + _READ_AT_ONCE]], self.offset + done - shift)
            if not got:
                raise OSError(f"a weight file ended {size - done:,} bytes early: was it changed while open?")
            done += got
        count = math.prod(self.shape)
        return torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=shift).reshape(self.shape)


@dataclass(frozen=True)
class Group:
    """Stored tensors that are converted together, and the model's tensors that they become."""

    keys: tuple[str, ...]
    targets: tuple[str, ...]


class Weights:
    """A checkpoint directory's tensors and the model on the meta device that they belong to.

    Raises ValueError where the checkpoint is quantised, or lacks tensors of the model.
    """

    def __init__(self, path: Path, config: Any, *, dtype: Any = "auto", device: str = "cpu"):
        if getattr(config, "quantization_config", None) is not None:
            method = dict(config.quantization_config).get("quant_method", "an unknown method")
            raise ValueError(
                f"{path} is quantised ({method}); streaming opens plain weights only: load it with transformers' "
                "dequantize option, save it, and open that"
            )
        self.path, self.device = path, device
        self.files = weight_files(path)
        opened = [os.open(file, os.O_RDONLY) for file in self.files]
        weakref.finalize(self, _close, opened)
        self.stored = {key: stored for file, fd in zip(self.files, opened) for key, stored in _header(file, fd)}
        config, dtype = modeling_utils._get_dtype(dtype, [str(f) for f in self.files], config, None, None, True)
        self.model: Any = _skeleton(model_class(config), config, dtype)
        plan = self.model._get_dtype_plan(dtype)
        _cast(self.model, plan)
        self._conversions = get_model_conversion_mapping(self.model)
        self._load_config = modeling_utils.LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=plan,
            weight_mapping=self._conversions,  # type: ignore[arg-type]
        )
        self._config_as_opened = copy.deepcopy(self.model.config)
        self.groups = self._grouped()
        self._tie()
        self.model._weight_conversions = [c for c in self._conversions if c.was_used()]
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # what is in the files needs no initial values; other buffers do
        self.model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
        self.model._initialize_missing_keys(False)
        self.model.eval()

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors, from the headers."""
        return sum(stored.nbytes for stored in self.stored.values())

    def _grouped(self) -> list[Group]:
        """Every stored tensor the model wants, by the conversion it takes part in: transformers' own renaming."""
        model, known = self.model, self.model.state_dict()
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        keys: dict[str, list[str]] = {}
        targets: dict[str, tuple[str, ...]] = {}
        for key in sorted(self.stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
            if name in known:
                keys.setdefault(name, []).append(key)
                names = by_pattern[pattern].target_patterns if pattern is not None else []
                targets[name] = tuple({name: 0, **{name.replace(names[0], n): 0 for n in names}})
        return [Group(tuple(keys[name]), tuple(t for t in targets[name] if t in known)) for name in keys]

    def _tie(self) -> None:
        """Tie what the checkpoint stores once, as `from_pretrained` does; refuse where something else is missing."""
        by_layer = [(t, s) for t, s in self.model.all_tied_weights_keys.items() if re.search(r"\.\d+\.", t + " " + s)]
        if by_layer:
            raise ValueError(
                f"{type(self.model).__name__} ties {by_layer[0][0]} to {by_layer[0][1]}, so its layers cannot be "
                "loaded one at a time; open it in memory (stream=False)"
            )
        by_target = {target: group for group in self.groups for target in group.targets}
        missing = set(self.model.state_dict()) - by_target.keys()
        both = [
            (target, source)
            for target, source in self.model.all_tied_weights_keys.items()
            if target not in missing and source not in missing
        ]
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for target, source in both:  # stored twice: one tensor if equal, two if not
            if self._same(by_target[target], by_target[source]):
                owner, _, attr = target.rpartition(".")
                setattr(self.model.get_submodule(owner), attr, self.model.get_parameter(source))
                self.groups.remove(by_target[target])
            else:
                self.model.all_tied_weights_keys.pop(target)
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors of {type(self.model).__name__}, {min(missing)} for one; "
                "it is incomplete, or of another family than its config says"
            )

    def _same(self, a: Group, b: Group) -> bool:
        pairs = [(self.stored[x], self.stored[y]) for x, y in zip(a.keys, b.keys)]
        return len(a.keys) == len(b.keys) and all(
            x.shape == y.shape and x.dtype == y.dtype and torch.equal(x[...], y[...]) for x, y in pairs
        )

    def under(self, *prefixes: str) -> list[Group]:
        """The groups with a tensor in one of these modules (names that end with a dot)."""
        return [g for g in self.groups if any(t.startswith(prefixes) for t in g.targets)]

    def size_of(self, groups: Iterable[Group]) -> int:
        return sum(self.stored[key].nbytes for group in groups for key in group.keys)

    def load(self, groups: Sequence[Group]) -> None:
        """Put these tensors into the model. Raises ValueError where a stored shape does not fit."""
        config, self.model.config = self.model.config, self._config_as_opened
        parts = {key: self.stored[key] for group in groups for key in group.keys}
        try:
            with _no_bar():
                info, _ = convert_and_load_state_dict_in_model(self.model, parts, self._load_config)
        finally:
            self.model.config = config
        if info.conversion_errors or info.mismatched_keys:
            problems = [f"{k}: {str(v).splitlines()[-1]}" for k, v in info.conversion_errors.items()]
            problems += [f"{k} has shape {tuple(a)}, not {tuple(b)}" for k, a, b in info.mismatched_keys]
            raise ValueError(f"{self.path} does not fit {type(self.model).__name__}: {'; '.join(sorted(problems)[:3])}")

    def fetch(self, groups: Iterable[Group]) -> None:
        """Read ahead what `load` of these groups will want."""
        for group in groups:
            for key in group.keys:
                self.stored[key].fetch()

    def forget(self) -> None:
        """Drop what was read ahead."""
        for stored in self.stored.values():
            stored.forget()

    def saved_names(self) -> set[str]:
        """The model's tensors that a checkpoint stores: tied ones once."""
        state = self.model.state_dict()
        for name in self.model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        return set(modeling_utils.remove_tied_weights_from_state_dict(state, self.model))

    def to_stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model under the names and in the form in which the family's checkpoints store them."""
        return revert_weight_conversion(self.model, dict(state))


def _close(files: Iterable[int]) -> None:
    for fd in files:
        os.close(fd)


def _header(file: Path, fd: int) -> Iterator[tuple[str, Stored]]:
    """The tensors that one safetensors file holds."""
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    for key, entry in json.loads(os.pread(fd, length, 8)).items():
        if key != "__metadata__":
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: {key} is of type {entry['dtype']}, which streaming cannot read")
            start = 8 + length + entry["data_offsets"][0]
            yield key, Stored(fd, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _skeleton(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model as `from_pretrained` makes it before it loads: on the meta device."""
    with ExitStack() as contexts:
        for context in cls.get_init_context(dtype, False, False, False):
            contexts.enter_context(context)
        return cls(config)


def _cast(model: nn.Module, plan: Mapping[str, torch.dtype]) -> None:
    """Give the tensors that the family keeps in fp32 their type already now."""
    if not plan:
        return
    pattern, policy, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan[policy[found.lastgroup]])


@contextmanager
def _no_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Writer:
    """Writes safetensors files whose tensors are known by name, type and shape, in whatever order they come.

    `layout`: {name: a tensor of that type and shape, on the meta device for instance}. One `model.safetensors` up to
    `shard_bytes`, else numbered files of at most that size each and their index.
    """

    def __init__(self, directory: Path, layout: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES):
        self._left = dict(layout)
        self._place: dict[str, tuple[int, int]] = {}
        shards = _split(layout, shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        self._files: list[int] = []
        for file, keys in zip(names, shards):
            fd = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files.append(fd)
            self._lay_out(fd, {key: layout[key] for key in keys})
        if len(shards) > 1:
            total = sum(t.nbytes for t in layout.values())
            parameters = sum(t.numel() for t in layout.values())
            index = {
                "metadata": {"total_parameters": parameters, "total_size": total},
                "weight_map": {key: file for file, keys in zip(names, shards) for key in keys},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _lay_out(self, fd: int, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # widest types first, so that every tensor is aligned
        for key in sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)):
            tensor = tensors[key]
            offsets = [end, end + tensor.nbytes]
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            self._place[key] = (fd, end)
            end += tensor.nbytes
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        _write(fd, struct.pack("<Q", len(head)) + head, 0)
        for key in tensors:
            self._place[key] = (fd, self._place[key][1] + 8 + len(head))
        os.truncate(fd, 8 + len(head) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self._left.pop(name)
        if planned.shape != tensor.shape or planned.dtype != tensor.dtype:
            raise RuntimeError(
                f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, not {planned.dtype} {tuple(planned.shape)}"
            )
        if tensor.numel():
            fd, offset = self._place[name]
            _write(fd, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), offset)

    def close(self) -> None:
        _close(self._files)
        self._files = []

    def finish(self) -> None:
        """Raise RuntimeError where a tensor never came; else everything is on disk."""
        if self._left:
            raise RuntimeError(f"{len(self._left)} tensors were not written, {min(self._left)} for one")
        for fd in self._files:
            os.fsync(fd)


def _write(fd: int, data: Any, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _READ_AT_ONCE], offset + done)


def _split(layout: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes each, in order; a larger tensor gets a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(layout, key=dot_natural_key):
        if shards[-1] and filled + layout[name].nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += layout[name].nbytes
    return shards
