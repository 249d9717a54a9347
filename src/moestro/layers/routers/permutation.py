"""Local search over which expert stands behind which gate output, for any router.

    P  = Sinkhorn(L / tau)          L [E, E] learned with everything else; rows and columns normalised in turn
    g' = g P, scaled to sum g       soft, while the search runs
    P -> assignment                 frozen at the end: the permutation that P is nearest to (Hungarian method)
    loss = zeta * (entropy of P + entropy of P with rows normalised)

Over the steps of the search, log tau falls linearly and the number of Sinkhorn rounds rises. In eval mode the gate is
always permuted by the assignment.

"COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (arXiv:2306.02824).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moestro.layers.routers.base import Router
from moestro.layers.routers.comet import CometRouter, entropy_terms, log_or_closed
from moestro.routing import Routing, RoutingContext, RoutingRule, dense_weights, sparsify

RELEASED_TAU = (1e-3, 1e-7)  # as released; a learning rate as small as theirs hardly moves L at such temperatures
WARM_TAU = (1e-1, 1e-3)
SINKHORN_ROUNDS = (20, 150)  # as released
START = 0.05  # L starts uniform in -START..START, as released


def sinkhorn(logits: Float[Tensor, "... e e"], rounds: int) -> Float[Tensor, "... e e"]:
    """exp(logits) with rows and columns normalised in turn, columns last. In the log domain and fp64.

    Sinkhorn networks: "Learning Latent Permutations with Gumbel-Sinkhorn Networks" (arXiv:1802.08665).
    """
    z = logits.double()
    for _ in range(rounds):
        z = z - z.logsumexp(dim=-1, keepdim=True)
        z = z - z.logsumexp(dim=-2, keepdim=True)
    return z.exp()


class PermutationSearch(nn.Module):
    """A soft permutation of experts that hardens over `steps` optimiser steps and is then frozen.

    `count`: one permutation for the whole gate, or one for each of that many slots. `noise` scales Gumbel noise on L in
    training.

    Raises ValueError for fewer than 2 experts, no steps, or a temperature that is not positive.
    """

    step: Tensor
    assignment: Tensor

    def __init__(
        self,
        num_experts: int,
        steps: int,
        *,
        count: int = 1,
        tau: tuple[float, float] = WARM_TAU,
        rounds: tuple[int, int] = SINKHORN_ROUNDS,
        entropy_coef: float = 1e-4,
        noise: float = 0.0,
    ):
        super().__init__()
        if num_experts < 2 or count < 1:
            raise ValueError(f"num_experts={num_experts}, count={count}: at least 2 experts and 1 permutation")
        if steps < 1:
            raise ValueError(f"steps={steps}: a search takes at least 1")
        if min(tau) <= 0 or min(rounds) < 1:
            raise ValueError(f"tau={tuple(tau)}, rounds={tuple(rounds)}: temperatures are positive, rounds 1 or more")
        self.steps, self.tau, self.rounds = steps, tuple(tau), tuple(rounds)
        self.entropy_coef, self.noise = entropy_coef, noise
        self.logits = nn.Parameter(torch.empty(count, num_experts, num_experts))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("assignment", torch.arange(num_experts).repeat(count, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.logits, -START, START)

    @property
    def frozen(self) -> bool:
        return int(self.step) >= self.steps

    def temperature(self, step: int) -> float:
        """tau after `step` of the steps: linear in its logarithm."""
        first, last = (math.log(tau) for tau in self.tau)
        return math.exp(first + (last - first) * min(step / self.steps, 1.0))

    def matrix(self, step: int | None = None) -> Float[Tensor, "c e e"]:
        """The soft P after `step` steps; without a number, after those taken."""
        step = int(self.step) if step is None else step
        first, last = self.rounds
        logits = self.logits.double()
        if self.training and self.noise:
            logits = logits - self.noise * torch.empty_like(logits).exponential_().log()
        rounds = round(first + (last - first) * min(step / self.steps, 1.0))
        return sinkhorn(logits / self.temperature(step), rounds)

    @torch.no_grad()
    def hardened(self) -> Int[Tensor, "c e"]:
        """The expert behind each gate output, by the permutation nearest to P; what is frozen once it is."""
        if self.frozen:
            return self.assignment
        logits = (self.logits.double() / self.temperature(int(self.step))).cpu()
        soft = sinkhorn(logits, self.rounds[1])
        best = [torch.from_numpy(linear_sum_assignment(p.numpy(), maximize=True)[1]) for p in soft]
        return torch.stack(best).to(self.logits.device)

    def advance(self) -> None:
        """Count a step; the last one freezes the assignment."""
        if not self.frozen:
            if int(self.step) == self.steps - 1:
                self.freeze()
            else:
                self.step += 1

    def freeze(self) -> None:
        """Fix the permutation and end the search."""
        self.assignment.copy_(self.hardened())
        self.step.fill_(self.steps)

    def entropy(self, p: Float[Tensor, "c e e"]) -> Float[Tensor, ""]:
        """Entropy of P, whose columns are normalised, plus that with rows normalised: 0 for a permutation."""
        by_row = p / p.sum(dim=-1, keepdim=True)
        return (entropy_terms(p).sum() + entropy_terms(by_row).sum()).float()


class PermutedRouter(Router):
    """A router whose experts are permuted by a search. While the search trains, a token has up to E slots.

    With several permutations, each slot (or tree) of the router has its own. The search is stepped by `after_step`.

    Raises ValueError where router and search differ in the number of experts, or slots and permutations in theirs.
    """

    def __init__(self, router: Router, search: PermutationSearch):
        super().__init__(router.hidden_size, router.num_experts, router.top_k)
        count, experts = search.logits.shape[:2]
        if experts != router.num_experts:
            raise ValueError(f"the search permutes {experts} experts; the router chooses among {router.num_experts}")
        if count not in (1, router.top_k):
            raise ValueError(f"count={count} permutations for {router.top_k} slots; there is 1 for all or 1 for each")
        self.router, self.search = router, search

    @property
    def no_rule(self) -> str:  # type: ignore[override]
        if not self.search.frozen:
            return "the permutation of its experts is not frozen yet: train on, or call search.freeze()"
        return self.router.no_rule

    @property
    def rule(self) -> RoutingRule | None:
        """That of the router, once a single permutation is frozen and nothing in the rule is one expert's own."""
        rule = self.router.rule
        plain = rule is not None and rule.bias is None and rule.expert_scale is None and rule.groups == 1
        return rule if plain and self.search.frozen and len(self.search.logits) == 1 else None

    def bind(self, experts: nn.Module) -> None:
        self.router.bind(experts)

    def after_step(self, progress: float) -> None:
        """The router within is told by itself."""
        self.search.advance()

    def reset_parameters(self, std: float) -> None:
        self.search.reset_parameters()

    def probabilities(self, logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        return self.router.probabilities(logits) if self._hard else logits.softmax(dim=-1)

    @property
    def _hard(self) -> bool:
        return self.search.frozen or not self.training

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        routing = self.router(hidden, context)
        self.losses = {}
        if self._hard:
            return self._permute(hidden, routing, self.search.hardened())
        p = self.search.matrix()
        if self.search.entropy_coef:
            self.losses = {"permutation_entropy": self.search.entropy_coef * self.search.entropy(p)}
        weights = torch.einsum("nce,cef->nf", self._parts(hidden, routing), p.float())
        total = routing.weights.sum(dim=-1, keepdim=True)
        weights = weights * (total / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20))
        probabilities = self.router.probabilities(routing.logits) @ p.mean(dim=0).float()
        return Routing(log_or_closed(probabilities), *sparsify(weights))

    def _permute(self, hidden: Tensor, routing: Routing, assignment: Tensor) -> Routing:
        """By the hard permutations. Logits by the first: they belong to the gate, not to a slot."""
        logits = torch.empty_like(routing.logits).index_copy(1, assignment[0], routing.logits)
        if len(assignment) == 1:
            unused = assignment.new_full((1,), self.num_experts)
            return Routing(logits, routing.weights, torch.cat([assignment[0], unused])[routing.indices])
        parts = self._parts(hidden, routing)
        weights = [torch.empty_like(g).index_copy(1, a, g) for g, a in zip(parts.unbind(1), assignment)]
        return Routing(logits, *sparsify(torch.stack(weights).sum(dim=0)))

    def _parts(self, hidden: Tensor, routing: Routing) -> Float[Tensor, "n c e"]:
        """The gate in as many parts as there are permutations."""
        if len(self.search.logits) == 1:
            return dense_weights(routing, self.num_experts)[:, None]
        if isinstance(self.router, CometRouter):
            return self.router.parts(hidden)
        if routing.weights.shape[1] != len(self.search.logits):
            raise ValueError(
                f"{len(self.search.logits)} permutations for {routing.weights.shape[1]} slots: a router whose tokens "
                "differ in their slots takes a single permutation, count=1"
            )
        slots = routing.weights.new_zeros(*routing.weights.shape, self.num_experts + 1)
        return slots.scatter(2, routing.indices[..., None], routing.weights[..., None])[..., : self.num_experts]
