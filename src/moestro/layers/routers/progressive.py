"""Progressive scaling routing: a router with many candidates is given them bit by bit while it trains.

    N_t = N up to t_s;  floor((1 + (r - 1) (t - t_s) / (t_e - t_s)) N) up to t_e;  r N afterwards       (linear)
    N_t = N, 2 N, ..., r N in equal steps of t, the first at t_s, the last at t_e                       (stepwise)

r N - N_t experts, drawn anew in every step of the training, are closed before the K best are chosen. In eval mode all
are open. "ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts" (arXiv:2510.17483), which closes by
setting scores to zero after the softmax; here closed experts also leave the softmax, so that a layer that is down to
its own N experts routes exactly as one that has no others.
Shapes: N tokens, E experts.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router
from moestro.routing import Routing, RoutingContext, RoutingRule

START, END = 0.2, 0.6
"""t_s and t_e as shares of the training: the paper's 10,000 and 30,000 of some 50,000 steps."""
ROUNDING = 1e-9
"""Keeps the floor from falling below a whole number that is only reached up to rounding."""


def linear(progress: float, local: int, pool: int, start: float = START, end: float = END) -> int:
    """How many of `pool` candidates are open: `local` at first, one after the other up to all."""
    if progress <= start:
        return local
    share = (progress - start) / (end - start) if progress < end else 1.0
    return local + math.floor(share * (pool - local) + ROUNDING)


def stepwise(progress: float, local: int, pool: int, start: float = START, end: float = END) -> int:
    """How many of `pool` candidates are open: `local` at first, then `local` more in every equal step of time."""
    if progress < start:
        return local
    jumps = pool // local - 1
    share = (progress - start) / (end - start) if progress < end else 1.0
    return min(pool, local * (2 + math.floor(share * (jumps - 1) + ROUNDING))) if progress < end else pool


SCHEDULES: dict[str, Callable[..., int]] = {"linear": linear, "stepwise": stepwise}


class ProgressivePool(Router):
    """Any router that chooses by a rule on its logits, with its candidates opened by and by.

    local: the experts that the pool starts from. protect_local: they stay open throughout; else any may be closed, as
    in the paper's text. The draw depends on the seed, the layer and the progress alone: it is the same on all ranks,
    and again when activations are recomputed. Balance losses count all experts, so the first phase's are r-fold.

    Raises ValueError for a router without a rule or with a correction bias, a `local` too small for top_k or outside of
    the router's experts, an unknown schedule, or times that are not 0 <= start < end <= 1.
    """

    def __init__(
        self,
        router: Router,
        local: Sequence[int],
        *,
        schedule: str = "linear",
        start: float = START,
        end: float = END,
        protect_local: bool = True,
        seed: int = 0,
    ):
        super().__init__(router.hidden_size, router.num_experts, router.top_k)
        if router.rule is None:
            raise ValueError(f"the candidates of {type(router).__name__} cannot be closed: {router.no_rule}")
        if router.rule.bias is not None:
            raise ValueError("a correction bias would rise for closed experts, which serve nothing; set bias_rate=0")
        if len(local) < router.top_k or not set(local) <= set(range(router.num_experts)):
            raise ValueError(
                f"{len(local)} local experts of {router.num_experts} for top_k={router.top_k}: give at least "
                f"{router.top_k}, each from 0 to {router.num_experts - 1}"
            )
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not known; there are {', '.join(SCHEDULES)}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start={start}, end={end}: shares of the training, the start before the end")
        self.inner = router
        self.local = tuple(local)
        self.schedule, self.start, self.end = schedule, start, end
        self.protect_local, self.seed = protect_local, seed
        self._scheduled = False

    @property
    def rule(self) -> RoutingRule | None:
        return self.inner.rule

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        # not a call, so that what records routers' outputs sees this one's alone
        routing = self.inner.forward(hidden, context)
        if not self.training:
            return routing
        progress = self._progress(context)
        count = self.open_at(progress)
        if count == self.num_experts:
            return routing
        closed = self.closed(count, progress, 0 if context is None else context.layer)
        rule = self.inner.rule
        assert rule is not None
        return rule(routing.logits.masked_fill(closed.to(hidden.device), float("-inf")))

    def _progress(self, context: RoutingContext | None) -> float:
        progress = 1.0 if context is None else context.progress
        if progress < 1:
            self._scheduled = True
        elif not self._scheduled:
            warnings.warn(
                "this model trains with progress=1, at which every expert is open, and has not seen less: set "
                "model.model.progress to the share of the training that is done before each step",
                stacklevel=2,
            )
        return progress

    def open_at(self, progress: float) -> int:
        """The number of open candidates."""
        return SCHEDULES[self.schedule](progress, len(self.local), self.num_experts, self.start, self.end)

    def closed(self, count: int, progress: float, layer: int) -> Bool[Tensor, " e"]:
        """Which experts this step leaves out, so that `count` stay."""
        key = hashlib.blake2b(f"{self.seed} {layer} {progress!r}".encode(), digest_size=7).digest()
        draw = torch.rand(self.num_experts, generator=torch.Generator().manual_seed(int.from_bytes(key)))
        if self.protect_local:
            draw[list(self.local)] = 2.0
        return torch.ones(self.num_experts, dtype=torch.bool).index_fill_(0, draw.topk(count).indices, False)

    def probabilities(self, logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        return self.inner.probabilities(logits)

    def bind(self, experts: nn.Module) -> None:
        self.inner.bind(experts)

    def extra_repr(self) -> str:
        return f"{len(self.local)} to {self.num_experts} candidates, {self.schedule}, {self.start:g} to {self.end:g}"
