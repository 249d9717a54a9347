"""A linear map that trains faster in fp32 on CPU; elsewhere it is torch's.

    y = x W^T,  dx = dy W,  dW = dy^T x

torch.mm gives fp32 products to MKL, which takes a slow path on processors that are not Intel's; oneDNN, also part of
torch, computes them at up to twice the speed. 16-bit products go to oneDNN anyway. oneDNN compiles a kernel per shape,
so this is for training, where shapes recur; without gradients torch.mm stays.
Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL_PRODUCT = 1 << 20
"""Multiply-adds below which a product stays with torch.mm: it is over before oneDNN has found its kernel."""


def product(a: Float[Tensor, "n i"], b: Float[Tensor, "i o"]) -> Float[Tensor, "n o"]:
    """a @ b without a graph, by the faster library."""
    onednn = HAS_ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu"
    if not onednn or a.shape[0] * a.shape[1] * b.shape[1] < SMALL_PRODUCT:
        return torch.mm(a, b)
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, need_weight = ctx.needs_input_grad
        return (
            product(grad, weight) if need_x else None,
            # dW^T = x^T dy: the smaller factor is the one that is copied
            product(x.t().contiguous(), grad).t() if need_weight else None,
        )


def linear(x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "... o"]:
    """x W^T."""
    by_hand = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if not by_hand:
        return F.linear(x, weight)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear without bias, through `linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return linear(x, self.weight)
