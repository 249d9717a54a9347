"""Safetensors files: whether a checkpoint directory is whole, reading one tensor at a time, writing likewise.

Files are read with `pread`: a mapped file would count as resident memory. Writing: the files are laid out from names,
types and shapes, and every tensor goes to its place as soon as it is there.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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


def check_complete(path: str | Path) -> None:
    """Raise FileNotFoundError or ValueError where a checkpoint directory misses a file or a file is cut short."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no checkpoint: it has no config.json")
    for file in weight_files(path):
        if not file.is_file():
            raise FileNotFoundError(f"{path} misses the shard {file.name} that its index names; fetch it again")
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if 8 + length > size:
                raise ValueError(f"{file} is truncated ({size:,} bytes, not even its header is whole); fetch it again")
            try:
                header = json.loads(stream.read(length))
            except ValueError as e:
                raise ValueError(f"{file} is no safetensors file: its header does not parse") from e
        end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
        if size != 8 + length + end:
            raise ValueError(f"{file} is truncated: {size:,} of {8 + length + end:,} bytes; fetch it again")


def has_weights(path: Path) -> bool:
    """Whether a directory holds all the safetensors files that it should."""
    named = [path / "model.safetensors"]
    if (path / INDEX).is_file():
        named = [path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()]
    return all(file.is_file() for file in named)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory. Raises FileNotFoundError where there are none."""
    if (path / INDEX).is_file():
        return sorted({path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()})
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    others = [f.name for f in path.glob("*.bin")] + [f.name for f in path.glob("*.gguf")]
    raise FileNotFoundError(
        f"{path} holds no safetensors weights"
        + (f" (only {others[0]}; convert it with save_pretrained first)" if others else "")
    )


def close(files: Iterable[int]) -> None:
    for fd in files:
        os.close(fd)


def header(file: Path, fd: int) -> Iterator[tuple[str, Stored]]:
    """The tensors that one safetensors file holds."""
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    for key, entry in json.loads(os.pread(fd, length, 8)).items():
        if key != "__metadata__":
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: {key} is of type {entry['dtype']}, which streaming cannot read")
            start = 8 + length + entry["data_offsets"][0]
            yield key, Stored(fd, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))


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
        close(self._files)
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
