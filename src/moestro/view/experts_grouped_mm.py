"""The experts on other devices than a CPU: torch's grouped matrix product and autograd.

Shapes: N tokens, K slots per token, E experts, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.integrations.moe import _can_use_grouped_mm

from moestro.view.experts_family import Family, OnOutputs


def forward_grouped_mm(
    family: Family, hidden: Tensor, indices: Tensor, weights: Tensor, on_outputs: OnOutputs | None
) -> Tensor:
    """The layer with one grouped product per projection and autograd; no copy from device to host."""
    k, num_experts = indices.shape[1], family.up.shape[0]
    torch._assert_async((indices <= num_experts).all(), "a slot names an expert that is not there")
    sorted_experts, order = indices.reshape(-1).clamp(max=num_experts).sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(num_experts, device=hidden.device), right=True)
    offsets = ends.to(torch.int32)
    # Rows past offsets[-1] belong to sentinels: the kernel leaves them unwritten, so they are masked on both sides.
    sentinel = (sorted_experts == num_experts)[:, None]
    expert = sorted_experts.clamp(max=num_experts - 1)
    wide = torch.promote_types(family.dtype, torch.float32)  # sums over slots and over a bias's rows

    x = hidden.to(family.dtype)[order // k].masked_fill(sentinel, 0)
    u = _grouped_mm(x, family.up.to(family.dtype), offsets).masked_fill(sentinel, 0)
    if family.up_bias is not None:
        u = u + family.up_bias.to(wide)[expert].to(u.dtype)
    y = _grouped_mm(family.gate(u), family.down.to(family.dtype), offsets).masked_fill(sentinel, 0)
    if family.down_bias is not None:
        y = y + family.down_bias.to(wide)[expert].to(y.dtype)
    if family.norm is not None:
        y = family.norm(y)
    if on_outputs is not None:
        slots = order[: int(ends[-1])]
        on_outputs(slots // k, slots % k, y.detach()[: len(slots)])
    gated = y.masked_fill(sentinel, 0) * weights.reshape(-1)[order, None].masked_fill(sentinel, 0)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    out = gated[place].view(*indices.shape, hidden.shape[1]).sum(1, dtype=wide)
    return out.to(hidden.dtype)


def _grouped_mm(x: Tensor, weight: Float[Tensor, "e i o"], offsets: Int[Tensor, " e"]) -> Tensor:
    """x[r] @ weight[e] for the rows that end at offsets[e]; rows past the last offset are not written."""
    aligned = x.dtype.itemsize <= 4 and all(width * x.dtype.itemsize % 16 == 0 for width in weight.shape[1:])
    if aligned and _can_use_grouped_mm(x, weight, offsets):
        return F.grouped_mm(x, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offsets)
