"""A router that knows how the layers below routed the token: a recurrent cell runs across depth, not across time.

    x_l = A_l u_l                      projector, each layer's own
    r_l = cell(x_l, r_{l-1}),  r_0 = 0     GRU or tanh RNN, one for all layers
    z_l = G_l r_l                      each layer's own
    softmax, the K best, normalised

Every token has its own state; it starts at zero in the first sparse layer of a forward pass, so the KV cache holds
nothing of it. "Layerwise Recurrent Router for Mixture-of-Experts" (arXiv:2408.06793).
Shapes: N tokens, H hidden, E experts, P state size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.layers.routers.base import Router, linear_fp32
from moestro.routing import Routing, RoutingContext, RoutingRule

STATE = "recurrent_router"
"""Under this name r travels from layer to layer (`RoutingContext.state`)."""

CELLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "gru": (nn.GRUCell, torch.gru_cell),
    "rnn": (nn.RNNCell, torch.rnn_tanh_cell),
}


class RouterCell(nn.Module):
    """torch's GRU cell (z = update, q = reset; h = (1 - z) c + z r) or tanh RNN cell, computed in fp32."""

    def __init__(self, state_size: int, kind: str = "gru"):
        super().__init__()
        if state_size < 1:
            raise ValueError(f"state_size={state_size}: the state has at least one number")
        if kind not in CELLS:
            raise ValueError(f"cell={kind!r} is not known; there are {', '.join(CELLS)}")
        self.kind = kind
        self.gates = CELLS[kind][0](state_size, state_size)
        self.gates.holds_no_experts = True  # type: ignore[assignment]

    def forward(self, x: Float[Tensor, "n p"], state: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        gates: Any = self.gates
        weights = [w.float() for w in (gates.weight_ih, gates.weight_hh, gates.bias_ih, gates.bias_hh)]
        with torch.autocast(x.device.type, enabled=False):
            return CELLS[self.kind][1](x, state, *weights)


class Map(nn.Module):
    """W x in fp32.

    Drawn with a standard deviation of one over the root of the inputs: in a chain of small maps, the usual 0.02 would
    leave the logits all alike.
    """

    def __init__(self, inputs: int, outputs: int, *, holds_no_experts: bool = False):
        super().__init__()
        self.holds_no_experts = holds_no_experts
        """Where the rows are no experts, whose number they may happen to have: surgery leaves them alone."""
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        return linear_fp32(x, self.weight)


class RecurrentRouter(Router):
    """`common` holds what the model's layers share (see models/lm.py); without it, the router has a cell of its own.

    history: what a layer sees of r_{l-1}. "kept": all of it; "detached": its values, without the gradient from the
    layers above; "zeroed": nothing, which leaves a bottleneck. The last two are the paper's ablations.
    projector: "own" to each layer, or "shared" by all.

    Raises ValueError for a state_size below 1 or an unknown cell, history or projector.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        state_size: int = 128,
        cell: str = "gru",
        history: str = "kept",
        projector: str = "own",
        normalize: bool = True,
        common: dict[str, nn.Module] | None = None,
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if history not in ("kept", "detached", "zeroed"):
            raise ValueError(f"history={history!r} is not known; there are kept, detached, zeroed")
        if projector not in ("own", "shared"):
            raise ValueError(f"projector={projector!r} is not known; there are own and shared")
        common = {} if common is None else common
        self.history, self.normalize, self.state_size = history, normalize, state_size
        if "router_cell" not in common:
            common["router_cell"] = RouterCell(state_size, cell)
        self.projector: nn.Module
        if projector == "own":
            self.projector = Map(hidden_size, state_size, holds_no_experts=True)
        else:
            self.projector = common.setdefault("router_projector", Map(hidden_size, state_size, holds_no_experts=True))
        self.cell = common["router_cell"]
        self.head = Map(state_size, num_experts)

    @property
    def rule(self) -> RoutingRule:
        return RoutingRule(self.top_k, normalize=self.normalize)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        """Without a context the layer is taken for the first one."""
        x = self.projector(hidden)
        before = None if context is None or self.history == "zeroed" else context.state.get(STATE)
        if before is None:
            before = torch.zeros_like(x)
        if before.shape != x.shape:
            raise ValueError(
                f"the routing state of the layer below is {tuple(before.shape)}, this layer has {tuple(x.shape)}: all "
                "layers of a forward pass see the same tokens and have one state_size"
            )
        state = self.cell(x, before.detach() if self.history == "detached" else before)
        if context is not None:
            context.state[STATE] = state
        return self.rule(self.head(state))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, state_size={self.state_size}, history={self.history}"


class BottleneckRouter(Router):
    """z = G tanh(A u): as deep as the recurrent router, and without a memory. Its control."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, state_size: int = 128, normalize: bool = True
    ):
        super().__init__(hidden_size, num_experts, top_k)
        if state_size < 1:
            raise ValueError(f"state_size={state_size}: the bottleneck has at least one number")
        self.normalize = normalize
        self.projector = Map(hidden_size, state_size, holds_no_experts=True)
        self.head = Map(state_size, num_experts)

    @property
    def rule(self) -> RoutingRule:
        return RoutingRule(self.top_k, normalize=self.normalize)

    def forward(self, hidden: Float[Tensor, "n h"], context: RoutingContext | None = None) -> Routing:
        return self.rule(self.head(self.projector(hidden).tanh()))
