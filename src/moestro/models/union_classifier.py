"""Sequences and images classified by unions of experts: selective attention and union blocks without a causal order.

    x = x + attention(norm(x));  x = x + block(norm(x));  logits = W mean of the norm of x over positions

Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (arXiv:2503.02495).
Shapes: B batch, T sequence, F features of a patch, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.layers.norm import RMSNorm
from moestro.models.union_of_experts import SelectiveAttention, union_block
from moestro.routing import RoutingContext


class UnionLayer(nn.Module):
    def __init__(self, config: Any, layer: int, attention: dict[str, Any], block: dict[str, Any]):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelectiveAttention(config, layer, causal=False, **attention)
        self.block = union_block(config, causal=False, **block)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attention_mask=mask)[0]
        return x + self.block(self.block_norm(x), RoutingContext(shape=(x.shape[0], x.shape[1]), mask=mask))


class UnionOfExpertsForSequenceClassification(nn.Module):
    """Token ids [B, T], or features [B, T, F] of patches, to class logits [B, classes]: the mean of all positions.

    config: sizes as a MoELMConfig names them; attention, block: options of SelectiveAttention and of `union_block`.
    """

    def __init__(
        self,
        config: Any,
        *,
        classes: int,
        length: int,
        features: int | None = None,
        attention: dict[str, Any] | None = None,
        block: dict[str, Any] | None = None,
    ):
        super().__init__()
        size = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, size) if features is None else nn.Linear(features, size)
        self.positions = nn.Parameter(torch.randn(length, size) / math.sqrt(size))
        self.layers = nn.ModuleList(
            UnionLayer(config, i, attention or {"select": "top_c"}, block or {})
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.head = nn.Linear(size, classes)

    def forward(self, inputs: Tensor, mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b c"]:
        x = self.embed(inputs) + self.positions[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if mask is None:
            return self.head(x.mean(dim=1))
        real = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * real).sum(dim=1) / real.sum(dim=1).clamp_min(1))
