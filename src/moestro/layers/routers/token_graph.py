"""Routers that let a token's choice follow the tokens it is related to, so that related tokens agree on their experts.

A token first picks a parent j with probability S_ij, then takes the parent's distribution over experts:

    r(u)  = softmax(W u + b)                              the ordinary gate
    r~_i  = sum over j of S_ij r(u_j)                     top-K of it, normalised, are the gate weights
    similarity-aware:   S = softmax over j of (u_i W_s u_j / tau)
    attention-aware:    S = attention weights of the same decoder layer, averaged over heads
    uniform:            S = 1 / number of tokens so far   (a control: mixing that knows nothing of the tokens)

    with rho < 1:       r~_i = (1 - rho) r(u_i) + rho * the above
    with mix="logits":  r~_i = softmax of the mixture of logits

Experts still see token i alone. j runs over the same sequence, no padding, and with `causal` no later token. Mixing
fixed distributions raises their mean entropy; that the entropy falls is left to training.

After "Improving Routing in Sparse Mixture of Experts with Graph of Tokens" (arXiv:2505.00792). The equations are
reconstructed from its abstract: they define these routers, and may differ from the paper's in detail.
Shapes: B rows, T positions, P = past + T positions, N = B * T tokens, H hidden, E experts, A heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32, needs
from moestro.routing import Routing, RoutingContext, RoutingRule

CHUNK = 512
"""Rows of S that exist at a time."""
MIXED = ("probs", "logits")


class TokenGraphRouter(Router):
    """Mixing by `parents`, which the routers of this module define.

    Raises ValueError for a rho outside 0..1 or an unknown mix, and in a call without the sequence shape.
    """

    no_rule = "a token's experts depend on other tokens: one token's logits have no choice to re-run"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        rho: float = 1.0,
        mix: str = "probs",
        causal: bool = True,
        normalize: bool = True,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if not 0 <= rho <= 1:
            raise ValueError(f"rho={rho}: the share of the mixture, between 0 and 1")
        if mix not in MIXED:
            raise ValueError(f"mix={mix!r} is not known; there are {', '.join(MIXED)}")
        self.rho, self.mix, self.causal, self.normalize = rho, mix, causal, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))

    def keys(self, hidden: Float[Tensor, "b t h"]) -> dict[str, Float[Tensor, "b t d"]]:
        """What `parents` needs of each position, later positions' tokens included: kept beside the KV cache."""
        return {}

    def parents(
        self,
        hidden: Float[Tensor, "b t h"],
        kept: dict[str, Tensor],
        allowed: Bool[Tensor, "b t p"],
        rows: slice,
        context: RoutingContext,
    ) -> Float[Tensor, "b t p"]:
        """Rows of S for the tokens `hidden`, which are the positions `rows` of the T; 0 where not `allowed`."""
        raise NotImplementedError

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        context = needs(context, "the other tokens of the sequence")
        B, T = context.shape
        if len(hidden) != B * T:
            raise ValueError(f"context.shape={context.shape} is for {B * T} tokens; the router was given {len(hidden)}")
        logits = linear_fp32(hidden, self.weight) + self.bias.float()
        own = logits.softmax(dim=-1) if self.mix == "probs" else logits
        sequence, own = hidden.float().view(B, T, -1), own.view(B, T, -1)
        kept = self._with_past(
            context, {"gate": own, "real": self._real(context, hidden.device), **self.keys(sequence)}
        )
        parts = []
        for start in range(0, T, CHUNK):
            rows = slice(start, min(start + CHUNK, T))
            allowed = self._allowed(kept["real"], context.start, rows)
            s = self.parents(sequence[:, rows], kept, allowed, rows, context)
            alone = ~allowed.any(dim=-1, keepdim=True)  # padding in front of the first token
            parts.append(torch.where(alone, own[:, rows], s @ kept["gate"]))
        mixed = torch.lerp(own, torch.cat(parts, dim=1), self.rho).flatten(0, 1)
        if self.mix == "probs":
            mixed = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
        return RoutingRule(self.top_k, normalize=self.normalize)(mixed)

    def _real(self, context: RoutingContext, device: torch.device) -> Bool[Tensor, "b t"]:
        return context.mask if context.mask is not None else torch.ones(context.shape, dtype=torch.bool, device=device)

    def _with_past(self, context: RoutingContext, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """`new` behind what was kept of the past; the memory keeps it all."""
        past = context.memory or {}
        known = past["gate"].shape[1] if "gate" in past else 0
        if known != context.start:
            raise ValueError(
                f"{context.start} positions are cached and this router knows {known} of them: start with an empty "
                "DynamicCache (or use_cache=True alone) and go on with the past_key_values that the model returns"
            )
        if context.start and not self.causal:
            raise ValueError("causal=False looks at later tokens and cannot decode with a cache; pass use_cache=False")
        kept = {name: torch.cat([past[name], t], dim=1) if name in past else t for name, t in new.items()}
        if context.memory is not None:
            context.memory.update(kept)
        return kept

    def _allowed(self, real: Bool[Tensor, "b p"], past: int, rows: slice) -> Bool[Tensor, "b t p"]:
        """Which positions may be a row's parent."""
        columns = torch.arange(real.shape[1], device=real.device)
        positions = past + torch.arange(rows.start, rows.stop, device=real.device)
        before = columns <= positions[:, None] if self.causal else torch.ones_like(columns, dtype=torch.bool)
        return (real[:, None] & before).expand(len(real), len(positions), len(columns))


def masked_softmax(scores: Float[Tensor, "b t p"], allowed: Bool[Tensor, "b t p"]) -> Float[Tensor, "b t p"]:
    """Softmax over the allowed columns; 0 elsewhere, and in rows that allow none."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, lowest).softmax(dim=-1).masked_fill(~allowed, 0.0)


class SimilarityAwareRouter(TokenGraphRouter):
    """S from the similarity of the tokens: W_s learned, from I / sqrt(H) on.

    `rank`: None for a full W_s [H, H], a number for W_s = Q^T K / sqrt(rank), 0 for I / sqrt(H) and nothing learned.
    `neighbours`: only so many of the most similar tokens can be parents; None for all.

    Raises ValueError for a temperature, rank or number of neighbours out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        temperature: float = 1.0,
        rank: int | None = None,
        neighbours: int | None = None,
        rho: float = 1.0,
        mix: str = "probs",
        causal: bool = True,
        normalize: bool = True,
    ):
        super().__init__(hidden_size, num_experts, top_k, rho=rho, mix=mix, causal=causal, normalize=normalize)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: it is positive")
        if rank is not None and not 0 <= rank <= hidden_size:
            raise ValueError(f"rank={rank} of a {hidden_size} x {hidden_size} map: between 0 and {hidden_size}")
        if neighbours is not None and neighbours < 1:
            raise ValueError(f"neighbours={neighbours}: 1 or more, or None for all")
        self.temperature, self.rank, self.neighbours = temperature, rank, neighbours
        if rank != 0:
            self.key = nn.Parameter(torch.empty(rank or hidden_size, hidden_size))
        if rank:
            self.query = nn.Parameter(torch.empty(rank, hidden_size))
        self.reset_parameters(std=0.02)

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        if self.rank is None:
            nn.init.eye_(self.key)
        elif self.rank:
            for projection in (self.key, self.query):
                nn.init.normal_(projection, std=self.hidden_size**-0.5)

    def keys(self, hidden: Float[Tensor, "b t h"]) -> dict[str, Float[Tensor, "b t d"]]:
        return {"keys": hidden if self.rank == 0 else hidden @ self.key.float().T}

    def parents(
        self,
        hidden: Float[Tensor, "b t h"],
        kept: dict[str, Tensor],
        allowed: Bool[Tensor, "b t p"],
        rows: slice,
        context: RoutingContext,
    ) -> Float[Tensor, "b t p"]:
        queries = hidden @ self.query.float().T if self.rank else hidden
        scores = queries @ kept["keys"].mT / (queries.shape[-1] ** 0.5 * self.temperature)
        if self.neighbours is not None and self.neighbours < scores.shape[-1]:
            best = scores.masked_fill(~allowed, float("-inf")).topk(self.neighbours, dim=-1).indices
            allowed = allowed & torch.zeros_like(allowed).scatter(-1, best, True)
        return masked_softmax(scores, allowed)


class AttentionAwareRouter(TokenGraphRouter):
    """S is the attention of the same decoder layer, averaged over `heads` (None: all). No parameters beside the gate.

    The attention implementation must return its weights: load or build the model with attn_implementation="eager".
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        heads: Sequence[int] | None = None,
        rho: float = 1.0,
        mix: str = "probs",
        causal: bool = True,
        normalize: bool = True,
    ):
        super().__init__(hidden_size, num_experts, top_k, rho=rho, mix=mix, causal=causal, normalize=normalize)
        self.heads = None if heads is None else list(heads)
        self.reset_parameters(std=0.02)

    def parents(
        self,
        hidden: Float[Tensor, "b t h"],
        kept: dict[str, Tensor],
        allowed: Bool[Tensor, "b t p"],
        rows: slice,
        context: RoutingContext,
    ) -> Float[Tensor, "b t p"]:
        weights = context.attentions
        if weights is None:
            raise ValueError(
                "attention-aware routing needs attention weights, and this attention implementation returns none: "
                'build or load the model with attn_implementation="eager"'
            )
        if weights.shape[-1] != allowed.shape[-1]:
            raise ValueError(
                f"attention covers {weights.shape[-1]} positions and the sequence has {allowed.shape[-1]}: a sliding "
                "window or a cache of fixed size does not fit attention-aware routing"
            )
        chosen = weights if self.heads is None else weights[:, self.heads]
        return chosen[:, :, rows].float().mean(dim=1).masked_fill(~allowed, 0.0)


class UniformGraphRouter(TokenGraphRouter):
    """The control: all tokens so far are parents alike."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options):
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.reset_parameters(std=0.02)

    def parents(
        self,
        hidden: Float[Tensor, "b t h"],
        kept: dict[str, Tensor],
        allowed: Bool[Tensor, "b t p"],
        rows: slice,
        context: RoutingContext,
    ) -> Float[Tensor, "b t p"]:
        return F.normalize(allowed.float(), p=1.0, dim=-1)
