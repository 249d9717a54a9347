"""RMSNorm with a gradient by hand: torch's is a chain of a dozen kernels on CPU.

    r = 1 / sqrt(mean(x^2) + eps)        y = w * (x r)
    dx = r (w dy - (x r) mean(w dy (x r)))        dw = sum dy (x r)

"Root Mean Square Layer Normalization" (arXiv:1910.07467). r is computed in fp32 whatever the type of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        return (x * r).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, r, weight = ctx.saved_tensors
        size, grad = x.shape[-1], grads[0].contiguous()
        normed = (x * r).to(x.dtype)
        products = grad * normed
        mean = torch.mv(products.view(-1, size), weight).view(r.shape).div_(size)
        d_x = torch.addcmul(grad * weight, normed, mean, value=-1)
        return (d_x * r).to(x.dtype), products.view(-1, size).sum(0), None


def rms_norm(x: Float[Tensor, "... h"], weight: Float[Tensor, " h"], eps: float) -> Float[Tensor, "... h"]:
    """x / sqrt(mean(x^2) + eps) * weight."""
    by_hand = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
    )
    if not by_hand:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.Module):
    """Keeps `weight` [H], 1 at first."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... h"]) -> Float[Tensor, "... h"]:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
