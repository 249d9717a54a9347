"""Feed-forward experts, all of one layer in two stacked tensors.

    gated:    y = down[e] @ (act(gate[e] @ x) * (up[e] @ x))
    ungated:  y = down[e] @ act(up[e] @ x)

They are called through transformers' experts interface, so every backend there computes them (`moestro` above all),
and everything that works on a Hugging Face mixture of experts works on them.
Shapes: N tokens, K slots, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate


class SquaredReLU(nn.Module):
    """max(x, 0)^2 ("Primer", arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
}


class FeedForwardExperts(nn.Module):
    """What gated and ungated experts share: the call, and what backends ask an experts module."""

    has_gate: bool
    expert_axes: ClassVar[dict[str, int]]
    """{own tensor: axis with one entry per expert}"""
    has_bias = has_post_expert_norm = is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False

    def __init__(self, num_experts: int, hidden_size: int, width: int, *, activation: str = "silu", config: Any = None):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: a layer has at least one")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not known; there are {', '.join(ACTIVATIONS)}")
        self.config = config if config is not None else SimpleNamespace(_experts_implementation="moestro")
        """Whatever says in `_experts_implementation` which backend runs."""
        self.num_experts = num_experts
        self.act_fn = ACTIVATIONS[activation]()
        inner = 2 * width if self.has_gate else width
        up = nn.Parameter(torch.empty(num_experts, inner, hidden_size))
        self.register_parameter("gate_up_proj" if self.has_gate else "up_proj", up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.reset_parameters(std=0.02)

    def reset_parameters(self, std: float) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=std)

    def forward(
        self, hidden: Float[Tensor, "n h"], indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n h"]:
        run = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, _one_by_one)
        return run(self, hidden, indices, weights)


class GatedExperts(FeedForwardExperts):
    """SwiGLU experts (with `activation="silu"`): `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]."""

    has_gate = True
    expert_axes: ClassVar = {"gate_up_proj": 0, "down_proj": 0}
    _apply_gate = _default_apply_gate


class UngatedExperts(FeedForwardExperts):
    """Two-matrix experts: `up_proj` [E, I, H], `down_proj` [E, H, I]."""

    has_gate = False
    expert_axes: ClassVar = {"up_proj": 0, "down_proj": 0}


def _one_by_one(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The plain way, expert after expert: what transformers calls "eager"."""
    out = torch.zeros_like(hidden)
    for e in range(experts.num_experts):
        token, slot = (indices == e).nonzero(as_tuple=True)
        if len(token):
            up = experts.gate_up_proj[e] if experts.has_gate else experts.up_proj[e]
            u = nn.functional.linear(hidden[token], up)
            a = experts._apply_gate(u) if experts.has_gate else experts.act_fn(u)
            y = nn.functional.linear(a, experts.down_proj[e]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
    return out
