"""Union of Experts: slices of a dense layer, or heads of an attention, as experts that add up to the whole.

Every slice computes a part of the dense layer's output, so all of them together are the layer itself (see
moestro.build.equivalent_split), and gate weights are 1: what is chosen is added, not averaged. Two ways to choose:

    data selection    P = softmax(W x);  each token keeps its top-K experts;  each expert then takes the C tokens of the
                      sequence with the highest kept P
    expert selection  P = softmax(W [all of the sample]);  the sample's top-K experts take all its tokens

Data selection of attention heads is selective attention: a head sees only its own tokens, at the positions 0, 1, 2, ...
that they have among themselves. A token that no expert takes passes by.

The best C of a sequence are not known before its end: a causal model cannot choose by them. Its experts take the tokens
whose P reaches a threshold in the place of the best C, the one that let C through in training.

Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (arXiv:2503.02495).
Shapes: B batch, T sequence, N = B * T tokens, H hidden, E experts, K slots, C tokens of an expert, G groups of heads
that share key and value (a group is one expert), R query heads of a group, D head size.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moestro.layers import MoE
from moestro.layers.experts import EXPERTS
from moestro.layers.kinds import named
from moestro.layers.norm import RMSNorm
from moestro.layers.routers.base import Router, linear_fp32, needs
from moestro.models.attention import rotary
from moestro.routing import Routing, RoutingContext, sparsify

WEIGHTINGS = ("none", "probability", "straight_through")
SELECTIONS = ("own", "top_c", "threshold")
THRESHOLD_MOMENTUM = 0.1


class DataSelection(Router):
    """Tokens keep experts, experts take tokens.

    select: "own", each token's top-K as they are; "top_c", the best `capacity` * T tokens of every sequence;
        "threshold", its causal stand-in, learned in training by following the batches.
    weighting: "none", gate weight 1 as in the paper's code: the gate gets no gradient and stays as drawn;
        "probability", P; "straight_through", 1 with the gradient of P.
    batch_normalised: the literal rule of the paper's code, which divides kept P by their sum over the batch.

    Raises ValueError for `top_c` in a causal model, and for a capacity outside (0, 1].
    """

    no_rule = "experts choose among the tokens of a sequence: a token's logits alone do not decide"
    threshold: Tensor
    lowest: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        select: str = "top_c",
        capacity: float = 0.5,
        weighting: str = "straight_through",
        causal: bool = False,
        batch_normalised: bool = False,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        _check(select, SELECTIONS, "select")
        _check(weighting, WEIGHTINGS, "weighting")
        if causal and select == "top_c":
            raise ValueError(
                'select="top_c" compares a token with later ones, which a causal model has not seen; use '
                'select="threshold" or "own"'
            )
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity={capacity}: it is the share of a sequence's tokens an expert takes, up to 1")
        if batch_normalised:
            warnings.warn("batch_normalised: a sample's routing depends on the others in its batch", stacklevel=2)
        self.select, self.capacity, self.weighting = select, capacity, weighting
        self.batch_normalised = batch_normalised
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("threshold", torch.zeros(num_experts))
        self.register_buffer("lowest", torch.zeros(num_experts), persistent=False)
        self.reset_parameters(std=0.02)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        shape, mask = needs(context, "whole sequences").shape, context.mask if context else None
        logits, weights = self.choose(hidden.view(*shape, -1), mask)
        return Routing(logits.flatten(0, 1), *sparsify(weights.flatten(0, 1)))

    def choose(
        self, hidden: Float[Tensor, "b t h"], mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b t e"]]:
        """(logits, gate weights, 0 where not taken). Padding is never taken."""
        rows, length, _ = hidden.shape
        logits = linear_fp32(hidden.flatten(0, 1), self.weight).view(rows, length, -1)
        p = logits.softmax(dim=-1)
        scores = p.detach()
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(self.top_k, dim=-1).indices, True)
        if mask is not None:
            kept = kept & mask.unsqueeze(-1)
        if self.select == "top_c":
            chosen = kept & self._best(scores.masked_fill(~kept, 0.0), mask)
        elif self.select == "threshold":
            chosen = kept & (scores >= self.threshold)
            if self.training:
                self._note(scores, kept, rows * length if mask is None else int(mask.sum()))
        else:
            chosen = kept
        return logits, _weights(p, chosen, self.weighting)

    def _best(self, scores: Tensor, mask: Tensor | None) -> Bool[Tensor, "b t e"]:
        """The C highest of each sequence and expert, C = capacity * its tokens, at least 1."""
        rows, length, _ = scores.shape
        if self.batch_normalised:
            scores = scores / (scores.sum(dim=0) + 1e-8) * int(self.capacity * rows)
        tokens = torch.full((rows,), length) if mask is None else mask.sum(dim=1)
        count = (self.capacity * tokens).ceil().clamp_min(1).to(scores.device)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank < count[:, None, None]

    def _note(self, scores: Tensor, kept: Tensor, tokens: int) -> None:
        """Note the thresholds that would have let `capacity` of these tokens through."""
        count = min(max(1, round(self.capacity * tokens)), scores.shape[0] * scores.shape[1])
        lowest = scores.masked_fill(~kept, 0.0).flatten(0, 1).topk(count, dim=0).values[-1]
        self.lowest.copy_(lowest)

    def after_step(self, progress: float) -> None:
        """Move the thresholds towards those of the last batch; in the forward they stay, for it may be run again."""
        if self.select == "threshold":
            self.threshold.lerp_(self.lowest, THRESHOLD_MOMENTUM)


class ExpertSelection(Router):
    """A sample's top-K experts for all its tokens.

    pool: "mean" of its tokens, or "flatten", all of them side by side, which fixes their number to `length`.

    Raises ValueError in a causal model (the choice looks at the whole sample), and for samples of another length.
    """

    no_rule = "experts are chosen for a whole sample: a token's logits alone do not decide"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        pool: str = "mean",
        length: int | None = None,
        weighting: str = "straight_through",
        causal: bool = False,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        _check(pool, ("mean", "flatten"), "pool")
        _check(weighting, WEIGHTINGS, "weighting")
        if causal:
            raise ValueError(
                "expert selection looks at a whole sample, also at tokens that a causal model has not seen"
            )
        if (length is None) == (pool == "flatten"):
            raise ValueError(
                f"pool={pool!r}, length={length}: flattened samples need a length, averaged ones have none"
            )
        self.pool, self.length, self.weighting = pool, length, weighting
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size * (length or 1)))
        self.reset_parameters(std=0.02)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        context = needs(context, "whole samples")
        rows, length = context.shape
        if self.length not in (None, length):
            raise ValueError(
                f"samples of {length} tokens; this gate reads {self.length} (pool='mean' takes any number)"
            )
        real = hidden.new_ones(rows, length) if context.mask is None else context.mask.to(hidden.dtype)
        x = hidden.view(rows, length, -1) * real.unsqueeze(-1)
        x = x.flatten(1) if self.pool == "flatten" else x.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1)
        logits = linear_fp32(x, self.weight)
        p = logits.softmax(dim=-1)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(self.top_k, dim=-1).indices, True)
        weights = _weights(p, chosen, self.weighting)[:, None] * real.unsqueeze(-1)
        logits = logits[:, None].expand(-1, length, -1)
        return Routing(logits.flatten(0, 1), *sparsify(weights.flatten(0, 1)))


def _weights(p: Tensor, chosen: Tensor, weighting: str) -> Tensor:
    if weighting == "probability":
        return p * chosen
    return chosen * (1 + (p - p.detach())) if weighting == "straight_through" else chosen.to(p.dtype)


def _check(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        raise ValueError(f"{what}={name!r} is not known; there are {', '.join(known)}")


class Constant(nn.Module):
    """The output bias of a union: added once a token, however many experts it has."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.bias.expand_as(hidden)


CHOICES = {"data": DataSelection, "expert": ExpertSelection}


def union_block(config: Any, *, choose: str = "data", causal: bool, **options: Any) -> MoE:
    """`num_experts` slices of width `moe_intermediate_size`, chosen by data or by expert selection."""
    _check(choose, tuple(CHOICES), "choose")
    make_experts, expert_options = named(EXPERTS, config.experts, "experts")
    sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
    # outside a transformers model the config names no backend: the experts then bring their own
    backend = config if getattr(config, "_experts_implementation", None) else None
    experts = make_experts(*sizes, config=backend, **expert_options)
    router = CHOICES[choose](
        config.hidden_size, config.num_experts, config.num_experts_per_tok, causal=causal, **options
    )
    return MoE(router, experts, losses=config.router_losses)


def build_union(config: Any, layer: int, common: dict[str, nn.Module], **options: Any) -> MoE:
    """The union block of a causal language model: options of DataSelection, `select` "threshold" unless given."""
    return union_block(config, causal=True, **{"select": "threshold"} | options)


class SelectiveAttention(nn.Module):
    """Attention whose heads each see the tokens they choose; queries and keys are normed where Qwen3's are.

    The key-value cache holds every position's keys, with one number more that says whether the head took the token.
    Raises ValueError for a sliding window, or what DataSelection refuses.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        top_k: int | None = None,
        select: str = "threshold",
        capacity: float = 0.5,
        weighting: str = "straight_through",
        causal: bool = True,
        norm: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        if getattr(config, "sliding_window", None):
            raise ValueError("selective attention counts positions among chosen tokens: it has no sliding window")
        self.groups, self.head_dim, self.layer, self.causal = config.num_key_value_heads, config.head_dim, layer, causal
        self.per_group = config.num_attention_heads // self.groups
        inner, kv = config.num_attention_heads * self.head_dim, self.groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norm else nn.Identity()
        self.gate = DataSelection(
            config.hidden_size,
            self.groups,
            self.groups if top_k is None else top_k,
            select=select,
            capacity=capacity,
            weighting=weighting,
            causal=causal,
        )
        self.rotary = Qwen3MoeRotaryEmbedding(config=config)
        self.scale = self.head_dim**-0.5

    def forward(
        self,
        hidden_states: Float[Tensor, "b t h"],
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b t h"], None]:
        """Positions are counted here: `position_embeddings` is what other attentions are given and not looked at."""
        x, (B, T, H), (G, R, D) = hidden_states, hidden_states.shape, (self.groups, self.per_group, self.head_dim)
        _, weights = self.gate.choose(x, _real(attention_mask, T))
        taken = (weights != 0).transpose(1, 2)  # [B, G, T]
        past_k = past_v = None
        if past_key_values is not None and past_key_values.get_seq_length(self.layer):
            cached: Any = past_key_values.layers[self.layer]
            past_k, past_v = cached.keys, cached.values

        # Each group's tokens, in order, in C places; places beyond its own are filled with others and masked.
        C = max(1, int(taken.sum(dim=-1).max()))
        at = (~taken).long().argsort(dim=-1, stable=True)[..., :C]  # [B, G, C]
        own = taken.gather(2, at)
        index = at.unsqueeze(-1)
        chosen = x.unsqueeze(1).expand(B, G, T, H).gather(2, index.expand(B, G, C, H))
        q = self.q_norm(_by_group(chosen, self.q_proj, G).unflatten(-1, (R, D))).transpose(2, 3)  # [B, G, R, C, D]
        k, v = self.k_norm(_by_group(chosen, self.k_proj, G)), _by_group(chosen, self.v_proj, G)

        before = 0 if past_k is None else past_k[..., -1].sum(dim=-1, keepdim=True).long()
        rank = (before + torch.arange(C, device=x.device)).expand(B, G, C).flatten(0, 1)
        cos, sin = self.rotary(x, rank)
        q, k = rotary(q.flatten(0, 1), cos, sin), rotary(k.reshape(B * G, 1, C, D), cos, sin)
        if past_key_values is not None:
            flagged = torch.cat([k.view(B, G, C, D), own.unsqueeze(-1).to(k.dtype)], dim=-1)
            rows = k.new_zeros(B, G, T, D + 1).scatter(2, index.expand(B, G, C, D + 1), flagged * own.unsqueeze(-1))
            values = v.new_zeros(B, G, T, D).scatter(2, index.expand(B, G, C, D), v * own.unsqueeze(-1))
            past_key_values.update(rows, values, self.layer)

        sees = own.unsqueeze(2).expand(B, G, C, C)
        if self.causal:
            sees = sees.tril()
        sees = sees | torch.eye(C, dtype=torch.bool, device=x.device)  # a filled place sees itself: no empty softmax
        keys, values = k, v.reshape(B * G, 1, C, D)
        if past_k is not None and past_v is not None:
            S = past_k.shape[2]
            sees = torch.cat([(past_k[..., -1] > 0).unsqueeze(2).expand(B, G, C, S), sees], dim=-1)
            keys = torch.cat([past_k[..., :-1].reshape(B * G, 1, S, D), keys], dim=2)
            values = torch.cat([past_v.reshape(B * G, 1, S, D), values], dim=2)
        mask = sees.reshape(B * G, 1, C, -1)
        out = F.scaled_dot_product_attention(
            q, keys.expand(-1, R, -1, -1), values.expand(-1, R, -1, -1), attn_mask=mask, scale=self.scale
        )
        out = out.view(B, G, R, C, D).transpose(2, 3).flatten(3)  # [B, G, C, R * D]
        parts = out @ self.o_proj.weight.view(H, G, R * D).permute(1, 2, 0)
        parts = parts * (weights.transpose(1, 2).gather(2, at) * own).unsqueeze(-1).to(parts.dtype)
        combined = torch.zeros_like(x).scatter_add(
            1, at.flatten(1).unsqueeze(-1).expand(-1, -1, H), parts.flatten(1, 2)
        )
        return (combined if self.o_proj.bias is None else combined + self.o_proj.bias), None


def _by_group(chosen: Float[Tensor, "b g c h"], linear: nn.Linear, groups: int) -> Float[Tensor, "b g c d"]:
    """Each group's rows of a projection, applied to that group's tokens."""
    out = chosen @ linear.weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return out if linear.bias is None else out + linear.bias.view(groups, 1, -1)


def _real(mask: Tensor | None, length: int) -> Bool[Tensor, "b t"] | None:
    """Which of the last `length` positions are tokens, from an attention mask in any of transformers' forms."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed[:, 0, -1, -length:]


def build_selective(config: Any, layer: int, **options: Any) -> SelectiveAttention:
    """The selective attention of a causal language model."""
    return SelectiveAttention(config, layer, **options)
