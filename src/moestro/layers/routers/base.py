"""What every router of this package is: hidden states in, the router triple out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.routing import Routing, RoutingContext, RoutingRule


class Router(nn.Module):
    """Chooses experts for tokens.

    A new router overrides `forward(hidden [N, H], context) -> Routing`; everything else has a default. Logits, weights
    and probabilities are computed in fp32 whatever the model's type. Slots may be unused: index E, weight 0.
    """

    no_rule = "this router does not choose by a rule on its logits"
    """Why routing cannot be re-run from edited logits; shown where `rule` is None."""
    counts: tuple[str, ...] = ()
    """Buffers that count over one step: several processes of a training add them up before `after_step`."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts: choose between 1 and {num_experts}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.losses: dict[str, Tensor] = {}
        """Losses of the last forward that only this router knows, coefficients included."""

    @property
    def rule(self) -> RoutingRule | None:
        """How logits become weights and indices; None where they alone do not decide."""
        return None

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        raise NotImplementedError

    def probabilities(self, logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """The distribution over experts that losses look at."""
        return logits.softmax(dim=-1)

    def bind(self, experts: nn.Module) -> None:
        """Called once with the layer's experts, for routers that read their weights."""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step, for what is scheduled or counted."""

    def reset_parameters(self, std: float) -> None:
        """Draw the initial values of this module's own parameters."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=std) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, top_k={self.top_k}"


def recomputing() -> bool:
    """Whether this forward repeats an earlier one in the backward pass, as gradient checkpointing does: what counts
    tokens has counted these."""
    return torch._C._current_graph_task_id() != -1


def needs(context: RoutingContext | None, what: str) -> RoutingContext:
    """The context, where a router cannot do without: raises ValueError that says for `what`."""
    if context is None:
        raise ValueError(f"this router needs a RoutingContext: it looks at {what}")
    return context


def linear_fp32(hidden: Float[Tensor, "n h"], weight: Float[Tensor, "o h"]) -> Float[Tensor, "n o"]:
    """hidden @ weight^T in fp32, also under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), weight.float())
