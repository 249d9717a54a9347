"""Quantised checkpoints: read as plain tensors, and written in their own format again.

Two formats are read, by what their files hold:

    fp8     `X.weight` in e4m3 (or e5m2) and `X.weight_scale_inv`, one scale for each block of `weight_block_size` (128
            x 128) or for the whole tensor: weight = q * scale. The last block of a row or column may be cut off.
            (DeepSeek-V3, Qwen3-FP8, MiniMax-M2; DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.)
    mxfp4   `X_blocks` [E, R, C/32, 16] and `X_scales` [E, R, C/32]: two e2m1 values a byte, the low nibble first, and a
            power of two for each 32 of them. The plain tensor is [E, C, R]. (gpt-oss; OCP Microscaling Formats 1.0.)

A tensor that is still what the source holds is written with the source's own bytes; one that was changed is quantised
again. Which source expert an expert is, is found by its values.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moestro.formats.tensors import Stored

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that four bits can say beside the sign."""
MX_BLOCK = 32
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = ("_scale_inv", "_scale")
ACTIVATION_SCALES = ("activation_scale", "input_scale")
METHODS = ("fp8", "mxfp4")


def check_method(path: Any, stated: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint's `quantization_config` names a method that is not read here."""
    method = str(stated.get("quant_method", "an unnamed method"))
    if method not in METHODS:
        raise ValueError(
            f"{path} is quantised with {method}; moestro reads {' and '.join(METHODS)}. Open the checkpoint that it "
            "was quantised from"
        )


@dataclass(eq=False)
class Dequantised:
    """A quantised tensor of a checkpoint that reads like a plain one: `tensor[...]`."""

    parts: Mapping[str, Stored]
    """{what follows the name of the plain tensor: a tensor of the file}"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    """One matrix [R, C] in fp32 from its parts."""
    encode: Callable[[Tensor], dict[str, Tensor]]
    """The parts of one matrix [R, C] in fp32."""
    block_rows: int
    """Rows that share a scale: as many can be decoded alone."""
    stacked: bool
    """Whether the first dimension counts experts."""
    transposed: bool = False
    """Whether the plain matrices are [C, R]."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, _: Any) -> Tensor:
        read = {suffix: part[...] for suffix, part in self.parts.items()}
        if not self.stacked:
            return self.decode(read).to(self.dtype)
        out = torch.empty(self.shape, dtype=self.dtype)
        for e in range(self.shape[0]):  # one at a time: fp32 takes eight times the room of what is read
            out[e] = self.oriented(self.decode({suffix: part[e] for suffix, part in read.items()}))
        return out

    def fetch(self) -> None:
        for part in self.parts.values():
            part.fetch()

    def forget(self) -> None:
        for part in self.parts.values():
            part.forget()

    def oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def matrices(self) -> list[dict[str, Stored]]:
        """The parts of each expert's matrix, where the tensor counts experts; of the one matrix, where not."""
        if not self.stacked:
            return [dict(self.parts)]
        return [{suffix: _row(part, e) for suffix, part in self.parts.items()} for e in range(self.shape[0])]

    def first_rows(self, parts: Mapping[str, Stored]) -> Tensor:
        """[block_rows, C] of one matrix, read alone."""
        heads = {
            suffix: _first(part, self.block_rows if _is_weight(suffix) else 1) if part.shape else part
            for suffix, part in parts.items()
        }
        return self.decode({suffix: part[...] for suffix, part in heads.items()}).to(self.dtype)

    def layout_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """Types and shapes (on the meta device) of the parts in which a plain tensor would be stored."""
        matrix = torch.empty(self.oriented(tensor[0] if self.stacked else tensor).shape, device="meta")
        found = {}
        for suffix, part in self.parts.items():
            shape = self._part_shape(suffix, part, matrix)
            lead = (tensor.shape[0],) if self.stacked else ()
            found[suffix] = torch.empty((*lead, *shape), dtype=part.dtype, device="meta")
        return found

    def _part_shape(self, suffix: str, part: Stored, matrix: Tensor) -> tuple[int, ...]:
        own, whole = (part.shape[1:], self.shape[1:]) if self.stacked else (part.shape, self.shape)
        if tuple(self.oriented(torch.empty(whole, device="meta")).shape) == tuple(matrix.shape):
            return own
        raise ValueError(
            f"a matrix of {tuple(matrix.shape)} cannot be stored as the source stores its {whole}; save it with "
            'format="hf"'
        )


def _is_weight(suffix: str) -> bool:
    return suffix in ("", "_blocks")


def _row(part: Stored, index: int) -> Stored:
    step = math.prod(part.shape[1:]) * part.dtype.itemsize
    return Stored(part.file, part.offset + index * step, part.dtype, part.shape[1:])


def _first(part: Stored, rows: int) -> Stored:
    return Stored(part.file, part.offset, part.dtype, (min(rows, part.shape[0]), *part.shape[1:]))


def dequantised(
    stored: Mapping[str, Stored], stated: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Stored | Dequantised]:
    """A checkpoint's tensors as a plain one would hold them, of type `dtype` where they were quantised.

    Raises ValueError where a quantised tensor has no scale, or its shape does not follow from the block size.
    """
    plain: dict[str, Stored | Dequantised] = {}
    scales: set[str] = set()
    for key, tensor in stored.items():
        if key.endswith("_blocks") and (scale := key.removesuffix("_blocks") + "_scales") in stored:
            plain[key.removesuffix("_blocks")] = _mxfp4(key, tensor, stored[scale], dtype)
            scales.add(scale)
        elif tensor.dtype in FP8_TYPES:
            names = [key + suffix for suffix in SCALE_SUFFIXES if key + suffix in stored]
            if not names:
                raise ValueError(
                    f"{key} is stored in {tensor.dtype}, and neither {key}_scale_inv nor {key}_scale is beside it; "
                    "open the checkpoint that it was quantised from"
                )
            plain[key] = _fp8(key, tensor, names[0], stored[names[0]], stated, dtype)
            scales.add(names[0])
        else:
            plain[key] = tensor
    left = [key for key in plain if key not in scales and not _is_activation_scale(key, stored)]
    if not any(isinstance(plain[key], Dequantised) for key in left):
        raise ValueError(
            f"this checkpoint states that it is quantised with {stated.get('quant_method')}, and none of its "
            "tensors is: delete quantization_config from its config.json if the weights are plain"
        )
    odd = [k for k in left if isinstance(plain[k], Stored) and k.endswith(("_scale_inv", "_scales", "_blocks"))]
    if odd:
        raise ValueError(f"{odd[0]} belongs to no quantised tensor that moestro can read: open a plain checkpoint")
    return {key: plain[key] for key in left}


def _is_activation_scale(key: str, stored: Mapping[str, Stored]) -> bool:
    owner, _, name = key.rpartition(".")
    weight = stored.get(f"{owner}.weight")
    return name in ACTIVATION_SCALES and weight is not None and weight.dtype in FP8_TYPES


def activation_scales(stored: Mapping[str, Stored]) -> list[str]:
    """The names of scales that were calibrated for activations: no weight could be quantised again for them."""
    return [key for key in stored if _is_activation_scale(key, stored)]


# fp8


def _fp8(
    key: str, weight: Stored, scale_name: str, scale: Stored, stated: Mapping[str, Any], dtype: torch.dtype
) -> Dequantised:
    rows, cols = weight.shape[-2:]
    stacked = len(weight.shape) == 3
    if stacked and scale.shape[:1] != weight.shape[:1]:
        raise ValueError(f"{key} holds {weight.shape[0]} experts, and its scales have shape {scale.shape}")
    grid = scale.shape[1:] if stacked else scale.shape
    block = _block(f"{key} of {weight.shape}", (rows, cols), grid, stated.get("weight_block_size"))
    suffix = scale_name.removeprefix(key)

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        return fp8_decode(parts[""], parts[suffix], block)

    def encode(matrix: Tensor) -> dict[str, Tensor]:
        power_of_two = stated.get("scale_fmt") == "ue8m0" or scale.dtype in (torch.float8_e8m0fnu, torch.uint8)
        q, s = fp8_encode(matrix, block, weight.dtype, scale.dtype, power_of_two=power_of_two)
        return {"": q, suffix: s.reshape(grid)}

    parts = {"": weight, suffix: scale}
    return Dequantised(parts, weight.shape, dtype, decode, encode, block[0], stacked)


def _block(what: str, shape: tuple[int, int], grid: Sequence[int], stated: Sequence[int] | None) -> tuple[int, int]:
    """(rows, columns) that share a scale."""
    if math.prod(grid) == 1:
        return shape
    if stated is not None and tuple(grid) == tuple(-(-n // b) for n, b in zip(shape, stated)):
        return int(stated[0]), int(stated[1])
    if stated is None and len(grid) == 2 and all(n % g == 0 for n, g in zip(shape, grid)):
        return shape[0] // grid[0], shape[1] // grid[1]
    raise ValueError(f"{what} has scales of {tuple(grid)}, which its weight_block_size={stated} does not explain")


def _scale_value(scale: Tensor) -> Tensor:
    """Scales in fp32; a byte is the exponent of a power of two."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def fp8_decode(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] in fp32: every block of `block` rows and columns times its scale."""
    rows, cols = q.shape
    value = _scale_value(scale)
    if value.numel() == 1:
        return q.float() * value.reshape(1, 1)
    out = q.float()
    wide = value.repeat_interleave(block[1], dim=1)[:, :cols]
    for i, start in enumerate(range(0, rows, block[0])):
        out[start : start + block[0]] *= wide[i]
    return out


def fp8_encode(
    matrix: Tensor, block: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype, *, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """(q [R, C], scales [ceil(R/rows), ceil(C/cols)]): each block's largest value becomes the type's largest."""
    largest = torch.finfo(dtype).max
    rows, cols = matrix.shape
    down, across = -(-rows // block[0]), -(-cols // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :cols] = matrix
    blocks = padded.view(down, block[0], across, block[1])
    scale = blocks.abs().amax(dim=(1, 3)) / largest
    scale[scale == 0] = 1
    if power_of_two:
        exponent = _exponent_above(scale).clamp(-127, 127)
        stored = (exponent + 127).to(torch.uint8) if scale_dtype == torch.uint8 else exponent.exp2().to(scale_dtype)
    else:
        stored = scale.to(scale_dtype)
    q = (blocks / _scale_value(stored)[:, None, :, None]).clamp(-largest, largest).to(dtype)
    return q.view(padded.shape)[:rows, :cols].contiguous(), stored


def _exponent_above(value: Tensor) -> Tensor:
    """The smallest whole e with 2^e >= value, as fp32."""
    mantissa, exponent = torch.frexp(value)
    return torch.where(mantissa == 0.5, exponent - 1, exponent).float()


# mxfp4


def _mxfp4(key: str, blocks: Stored, scales: Stored, dtype: torch.dtype) -> Dequantised:
    if len(blocks.shape) != 4 or blocks.shape[-1] != MX_BLOCK // 2 or tuple(scales.shape) != blocks.shape[:-1]:
        raise ValueError(
            f"{key} has shape {blocks.shape} and its scales {scales.shape}; MXFP4 experts are [E, R, C/32, 16] and "
            "[E, R, C/32]"
        )
    e, r, groups, _ = blocks.shape
    return Dequantised(
        {"_blocks": blocks, "_scales": scales},
        (e, groups * MX_BLOCK, r),
        dtype,
        lambda parts: mxfp4_decode(parts["_blocks"], parts["_scales"]),
        lambda matrix: dict(zip(("_blocks", "_scales"), mxfp4_encode(matrix))),
        1,
        stacked=True,
        transposed=True,
    )


def mxfp4_decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """[R, C] in fp32 from blocks [R, C/32, 16] and the exponents [R, C/32] of their scales, which are 127 too high."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    low, high = values[(blocks & 15).int()], values[(blocks >> 4).int()]
    pairs = torch.stack([low, high], dim=-1).flatten(-2)
    return (pairs * (scales.float() - 127).exp2()[..., None]).flatten(-2)


def mxfp4_encode(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks [R, C/32, 16], scales [R, C/32]); exact for whatever `mxfp4_decode` gives.

    A block's scale is the smallest power of two with which nothing exceeds 6, the largest magnitude; values in the
    middle go to the neighbour with an even code.
    """
    groups = matrix.float().contiguous().unflatten(-1, (-1, MX_BLOCK))
    exponent = _exponent_above(groups.abs().amax(-1) / E2M1[-1]).clamp(-127, 127)
    scaled = groups / exponent.exp2()[..., None]
    size = scaled.abs().clamp(max=E2M1[-1])
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    code = torch.where(below % 2 == 0, below, above).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


# Writing in the source's own format


def pattern_of(key: str) -> str:
    """A stored name without the number of its expert."""
    return re.sub(r"(experts?\.)\d+(?=\.|$)", r"\1*", key)


class Requantiser:
    """Turns plain tensors, by their stored names, into the tensors in which the source's format stores them."""

    def __init__(self, plain: Mapping[str, Stored | Dequantised]):
        self._alike: dict[str, list[Stored | Dequantised]] = {}
        for key, tensor in plain.items():
            self._alike.setdefault(pattern_of(key), []).append(tensor)
        for pattern, tensors in self._alike.items():
            if len({isinstance(tensor, Dequantised) for tensor in tensors}) > 1:
                raise ValueError(
                    f"{pattern} is quantised for some experts and not for others, which the source's format cannot be "
                    'written for; save with format="hf"'
                )
        self._known: dict[str, dict[bytes, list[dict[str, Stored]]]] = {}

    def layout(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """{stored name: a tensor of its type and shape on the meta device} for the plain tensor `name`."""
        like = self._like(name)
        if like is None:
            return {name: tensor}
        return {name + suffix: part for suffix, part in like.layout_of(tensor).items()}

    def encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """{stored name: tensor}: the source's own bytes where one of its matrices has these values, else new ones."""
        like = self._like(name)
        if like is None:
            return {name: tensor}
        matrices = tensor if like.stacked else tensor[None]
        parts = [self._one(pattern_of(name), like, like.oriented(matrix.cpu())) for matrix in matrices]
        if not like.stacked:
            return {name + suffix: part for suffix, part in parts[0].items()}
        return {name + suffix: torch.stack([part[suffix] for part in parts]) for suffix in like.parts}

    def _like(self, name: str) -> Dequantised | None:
        like = self._alike.get(pattern_of(name), [None])[0]
        return like if isinstance(like, Dequantised) else None

    def _one(self, pattern: str, like: Dequantised, matrix: Tensor) -> dict[str, Tensor]:
        for parts in self._candidates(pattern, like).get(_print(matrix[: like.block_rows]), []):
            read = {suffix: part[...] for suffix, part in parts.items()}
            if torch.equal(like.decode(read).to(like.dtype).to(matrix.dtype), matrix):
                return read
        return like.encode(matrix.float())

    def _candidates(self, pattern: str, like: Dequantised) -> dict[bytes, list[dict[str, Stored]]]:
        """The source's matrices of one pattern by what their first rows hold."""
        if pattern not in self._known:
            found: dict[bytes, list[dict[str, Stored]]] = {}
            for parts in self._matrices(pattern):
                found.setdefault(_print(like.first_rows(parts)), []).append(parts)
            self._known[pattern] = found
        return self._known[pattern]

    def _matrices(self, pattern: str) -> Iterator[dict[str, Stored]]:
        for tensor in self._alike[pattern]:
            assert isinstance(tensor, Dequantised)
            yield from tensor.matrices()


def _print(rows: Tensor) -> bytes:
    """What a matrix is looked up by: its first rows."""
    return hashlib.blake2b(rows.float().contiguous().numpy().tobytes(), digest_size=16).digest()
