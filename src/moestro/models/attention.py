"""Qwen3's attention with a faster training step on CPU; its numbers are those of transformers up to rounding.

`blocked_causal`, an attention implementation that every transformers model can be given: causal softmax attention over
blocks of query rows, each of which sees only the keys up to its end, so that the upper triangle is never computed.

    out[block] = softmax(q[block] K[:end]^T * scale) V[:end]

It takes whole rows without padding on CPU, in training, and hands everything else to torch's own attention.
Shapes: B batch, A heads, G key-value heads, R = A / G, T sequence, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeConfig,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from moestro.layers.linear import Linear
from moestro.layers.norm import RMSNorm

NAME = "blocked_causal"
QUERY_BLOCK = 64  # fastest of 64, 128, 256 for T = 512
SCORE_BYTES = 2 << 20  # scores that exist at a time: they stay in cache


class _BlockedCausal(torch.autograd.Function):
    """The query heads of one key-value head are rows of one matrix: q [B G, T / rows, R rows, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, A, T, D = q.shape
        G, rows = k.shape[1], QUERY_BLOCK
        R, n = A // G, B * G
        k, v = k.reshape(n, T, D).contiguous(), v.reshape(n, T, D).contiguous()
        q = _to_blocks(q, n, R).mul_(scale)
        out = torch.empty_like(q)
        future = torch.full((rows, rows), float("-inf"), dtype=q.dtype).triu_(1)
        step = max(1, SCORE_BYTES // (R * rows * T * q.itemsize))
        kept = []
        for part in (slice(lo, lo + step) for lo in range(0, n, step)):
            for b in range(T // rows):
                end = (b + 1) * rows
                scores = torch.bmm(q[part, b], k[part, :end].transpose(1, 2))
                scores.unflatten(1, (R, rows))[..., end - rows :].add_(future)
                p = torch.softmax(scores, -1)
                out[part, b] = torch.bmm(p, v[part, :end])
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.sizes, ctx.step = scale, (B, A, G, T, D), step
        return _from_blocks(out, R).view(B, A, T, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        B, A, G, T, D = ctx.sizes
        R, n, rows, step = A // G, B * G, QUERY_BLOCK, ctx.step
        grad = _to_blocks(grads[0], n, R)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        probabilities = iter(kept)
        for part in (slice(lo, lo + step) for lo in range(0, n, step)):
            for b in range(T // rows):
                end, p, g = (b + 1) * rows, next(probabilities), grad[part, b]
                d_v[part, :end] += torch.bmm(p.transpose(1, 2), g)
                d_p = torch.bmm(g, v[part, :end].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
                d_q[part, b] = torch.bmm(d_scores, k[part, :end])
                d_k[part, :end] += torch.bmm(d_scores.transpose(1, 2), q[part, b])
        d_q = _from_blocks(d_q.mul_(ctx.scale), R).view(B, A, T, D)
        return d_q, d_k.view(B, G, T, D), d_v.view(B, G, T, D), None


def _to_blocks(x: Tensor, n: int, R: int) -> Tensor:
    """[B, A, T, D] -> a fresh [B G, T / rows, R rows, D]."""
    T, D = x.shape[-2:]
    blocks = x.reshape(n, R, T // QUERY_BLOCK, QUERY_BLOCK, D).transpose(1, 2)
    return torch.empty(blocks.shape, dtype=x.dtype).copy_(blocks).flatten(2, 3)


def _from_blocks(x: Tensor, R: int) -> Tensor:
    """The way back, to [B G, R, T, D]."""
    return x.unflatten(2, (R, QUERY_BLOCK)).transpose(1, 2).flatten(2, 3)


def blocked_causal(
    q: Float[Tensor, "b a t d"], k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t d"], scale: float
) -> Float[Tensor, "b a t d"]:
    """Causal attention; raises ValueError where T is no multiple of QUERY_BLOCK."""
    if q.shape[2] % QUERY_BLOCK or q.shape[2] != k.shape[2]:
        raise ValueError(f"T={q.shape[2]} queries of {k.shape[2]} keys: T must be a multiple of {QUERY_BLOCK}")
    return _BlockedCausal.apply(q, k, v, scale)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature."""
    blocked = (
        attention_mask is None
        and not dropout
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and query.shape[2] % QUERY_BLOCK == 0
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and kwargs.get("position_bias") is None
        and (kwargs.get("is_causal") is None or kwargs["is_causal"])
        and getattr(module, "is_causal", True)
        and not torch.compiler.is_compiling()
    )
    if not blocked:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_causal(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _Rotary(torch.autograd.Function):
    """x cos + rotate(x) sin for the rows of one tensor; the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-way)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=way)
    return out


def rotary(x: Float[Tensor, "b a t d"], cos: Float[Tensor, "p t d"], sin: Float[Tensor, "p t d"]) -> Tensor:
    """Rotary positions ("RoFormer", arXiv:2104.09864); the halves of cos and sin are equal, as in transformers."""
    return _Rotary.apply(x, cos.unsqueeze(1), sin.unsqueeze(1))


class Attention(Qwen3MoeAttention):
    """Grouped-query attention with normed queries and keys and rotary positions: Qwen3's."""

    def __init__(self, config: Qwen3MoeConfig, layer: int):
        super().__init__(config, layer)
        if not config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                plain = getattr(self, name)
                setattr(self, name, Linear(plain.in_features, plain.out_features))
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # type: ignore[assignment]
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if torch.compiler.is_compiling():
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        else:
            q, k = rotary(q, *position_embeddings), rotary(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights
