"""What an experts module says about its family, and its gate, forward and pulled back.

Shapes: E experts, H hidden, I expert width, U = 2I (gated) or I; R rows. Expert weights are handled as views
[E, in, out], whichever way a family stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

# token [S], slot [S], outputs [S, H]: outputs before gate weights, sorted by expert, sentinels left out.
OnOutputs = Callable[[Tensor, Tensor, Tensor], None]
Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    up: Tensor  # [E, H, U]
    down: Tensor  # [E, I, H]
    up_bias: Tensor | None  # [E, U]
    down_bias: Tensor | None  # [E, H]
    gate: Callable[[Tensor], Tensor]  # [..., U] -> [..., I]
    norm: Callable[[Tensor], Tensor] | None
    is_swiglu: bool  # gate is transformers' default one with SiLU: done by hand
    others: tuple[Tensor, ...]  # parameters of gate and norm
    dtype: torch.dtype  # of the matrix products


def read_family(module: Any, hidden: Tensor) -> Family:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name), module.down_proj
    up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    own = {id(p) for p in (up, down, up_bias, down_bias)}
    device = hidden.device.type
    return Family(
        up=up if module.is_transposed else up.transpose(1, 2),
        down=down if module.is_transposed else down.transpose(1, 2),
        up_bias=up_bias,
        down_bias=down_bias,
        gate=module._apply_gate if module.has_gate else module.act_fn,
        norm=module.post_expert_norm if module.has_post_expert_norm else None,
        is_swiglu=module.has_gate
        and type(module)._apply_gate is _default_apply_gate
        and type(module.act_fn).__name__ in ("SiLUActivation", "SiLU"),
        others=tuple(p for p in module.parameters() if id(p) not in own),
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.dtype,
    )


def swiglu(u: Float[Tensor, "r u"]) -> tuple[Float[Tensor, "r i"], Pullback]:
    gate, up = u.chunk(2, dim=-1)
    gate = gate.contiguous()  # SiLU over short strided rows takes three times as long
    silu = F.silu(gate)

    def pull(grad: Tensor) -> Tensor:
        d_u = torch.empty_like(u)
        d_gate, d_up = d_u.chunk(2, dim=-1)
        torch.mul(grad, silu, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return d_u

    return silu * up, pull


def with_pullback(
    fn: Callable[[Tensor], Tensor], x: Tensor, params: list[Tensor], d_params: list[Tensor | None]
) -> tuple[Tensor, Pullback]:
    """fn(x) by autograd. The pullback adds to the gradients in `d_params` of those parameters that want one."""
    wanted = [(p, d) for p, d in zip(params, d_params) if d is not None]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = fn(x)

    def pull(grad: Tensor) -> Tensor:
        d_x, *more = torch.autograd.grad(y, [x, *(p for p, _ in wanted)], grad, allow_unused=True)
        for (_, d), d_more in zip(wanted, more):
            if d_more is not None:
                d += d_more
        return d_x

    return y.detach(), pull
