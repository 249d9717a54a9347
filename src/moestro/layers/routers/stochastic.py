"""Experts drawn at random, with no gate to learn: THOR, a transformer with stochastic experts.

    training     one draw for each layer and forward pass: the whole batch goes through one expert
    inference    a draw for the batch, for each sentence (a row), or for each token
    weights      1 / K; there are no scores, so logits are 0 and mean nothing

Every expert is trained on as much as every other, so nothing needs balancing. The draws of training become one model by
two passes over each batch and a loss on their difference: see `moestro.train.consistency`.

"Taming Sparsely Activated Transformer with Stochastic Experts" (arXiv:2110.04260).
Shapes: B rows, T positions, N = B * T tokens, H hidden, E experts, K slots.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.layers.routers.base import Router
from moestro.routing import Routing, RoutingContext

LEVELS = ("batch", "sentence", "token")
LAYER_SEED = 1_000_003
"""Seeds of neighbouring layers lie this far apart, so that runs with neighbouring seeds share no draws."""


class StochasticRouter(Router):
    """The paper's has top_k=1; more slots are distinct experts of equal weight.

    level: of the draws at inference. seed: of these draws; one seed gives the same draws in every call, and with a KV
    cache the same as without. beams: neighbouring rows that are beams of one sentence and share its draw.

    Raises ValueError for an unknown level, and at level "sentence" where a batch's rows are not told.
    """

    no_rule = "experts are drawn at random: there are no scores to choose by"

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 1, *, level: str = "sentence", seed: int = 0):
        super().__init__(hidden_size, num_experts, top_k)
        self.level: str = "sentence"
        self.seed, self.beams = seed, 1
        self.dispatch(level=level)

    def dispatch(self, *, level: str | None = None, seed: int | None = None, beams: int | None = None) -> None:
        """Change how experts are drawn at inference; None: as before."""
        if level is not None and level not in LEVELS:
            raise ValueError(f"level={level!r} is not known; there are {', '.join(LEVELS)}")
        if beams is not None and beams < 1:
            raise ValueError(f"beams={beams}: a sentence has at least one row")
        self.level = self.level if level is None else level
        self.seed = self.seed if seed is None else seed
        self.beams = self.beams if beams is None else beams

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        if self.training:  # the global generator: gradient checkpointing draws the same again
            indices = torch.rand(self.num_experts, device=hidden.device).topk(self.top_k).indices[None]
        else:
            indices = self._drawn(len(hidden), context).to(hidden.device)
        indices = indices.expand(len(hidden), -1)
        weights = torch.full(indices.shape, 1 / self.top_k, device=hidden.device)
        return Routing(torch.zeros(len(hidden), self.num_experts, device=hidden.device), weights, indices)

    def _drawn(self, tokens: int, context: RoutingContext | None) -> Int[Tensor, "n k"]:
        """[1, K] or [N, K]. Draws are made in order of positions, so those of a prefix stay when more follow."""
        if context is None and self.level == "sentence":
            raise ValueError('level="sentence" needs a RoutingContext: its shape says which tokens are one sentence')
        layer, start = (0, 0) if context is None else (context.layer, context.start)
        generator = torch.Generator().manual_seed(self.seed * LAYER_SEED + layer)
        rows, length = (1, tokens) if context is None else context.shape
        if self.level == "batch":
            return self._draw(generator, 1)
        sentences = -(-rows // self.beams)
        of_row = torch.arange(rows) // self.beams
        if self.level == "sentence":
            return self._draw(generator, sentences)[of_row].repeat_interleave(length, dim=0)
        positions = self._draw(generator, (start + length) * sentences).view(start + length, sentences, self.top_k)
        return positions[start:, of_row].transpose(0, 1).reshape(tokens, self.top_k)

    def _draw(self, generator: torch.Generator, count: int) -> Int[Tensor, "c k"]:
        return torch.rand(count, self.num_experts, generator=generator).topk(self.top_k, dim=-1).indices

    def probabilities(self, logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        raise ValueError("stochastic experts have no router probabilities, and need no balance loss: leave losses out")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, level={self.level}"


def set_dispatch(
    model: nn.Module, *, level: str | None = None, seed: int | None = None, beams: int | None = None
) -> None:
    """How all stochastic routers of `model` draw at inference. Raises ValueError where it has none."""
    routers = [module for module in model.modules() if isinstance(module, StochasticRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no stochastic experts; nothing is drawn in it")
    for router in routers:
        router.dispatch(level=level, seed=seed, beams=beams)
