"""A dense language model made a mixture of sparse ReLU experts, to be trained on.

Each expert takes I of the dense layer's D neurons. Experts are dealt out D / I at a time, so that together they hold
every neuron once; each such hand is a new permutation, so that no two experts are the same (equal experts would have
equal scores, and top-K would always take the first). A token's K gate weights are near 1 / K and its experts hold K I
neurons; the output matrices are scaled by D / I so that their weighted sum stands for the whole layer.

Initialisation of "Mixture of Experts Made Intrinsically Interpretable" (arXiv:2503.07639); how the paper's experts are
cut from the dense layer is not said there. Shapes: D neurons of the dense layer, H hidden, E experts, I expert width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.layers.experts.feed_forward import UngatedExperts
from moestro.models.lm import MoELMForCausalLM

NOISE = 0.01
"""Standard deviation of the noise on the experts' input weights, as a part of that of the weights."""


def split_neurons(
    up: Float[Tensor, "d h"],
    down: Float[Tensor, "h d"],
    num_experts: int,
    width: int,
    *,
    noise: float = NOISE,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "e i h"], Float[Tensor, "e h i"]]:
    """(up, down) of the experts. Raises ValueError where the width does not divide the dense layer's."""
    neurons = up.shape[0]
    if not 1 <= width <= neurons or neurons % width:
        raise ValueError(f"width={width} does not divide the {neurons} neurons of the dense layer")
    hands = -(-num_experts * width // neurons)
    order = torch.cat([torch.randperm(neurons, generator=generator) for _ in range(hands)])
    chosen = order.view(-1, width)[:num_experts].to(up.device)
    jitter = torch.randn(*chosen.shape, up.shape[1], generator=generator).to(up) * noise * up.std()
    return up[chosen] + jitter, down.T[chosen].transpose(1, 2) * (neurons / width)


@torch.no_grad()
def upcycle_to_moe_x(
    dense: MoELMForCausalLM,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    width: int | None = None,
    noise: float = NOISE,
    seed: int = 0,
    router: str | dict[str, Any] = "sparsity_aware",
    activation: str = "relu",
) -> MoELMForCausalLM:
    """A model with `num_experts` in the place of every feed-forward layer; all else is copied.

    `dense`: a model of one ungated expert a layer (`num_experts=1`), which is a dense feed-forward layer. `width`
    defaults to the dense width / top_k, so that as many neurons are active as before. `router` and `activation` are for
    comparisons.

    Raises ValueError where a layer has several experts, or a gate: ReLU leaves no gated neuron at 0.
    """
    config = dense.config
    if config.num_experts != 1 or not all(_one_ungated(layer.mlp) for layer in dense.model.layers):
        raise ValueError(
            "every layer must have one ungated expert (num_experts=1, "
            'experts={"kind": "ungated", ...}): a gated or sparse layer cannot be cut into ReLU experts'
        )
    config = copy.deepcopy(config)
    config.num_experts, config.num_experts_per_tok = num_experts, top_k
    config.moe_intermediate_size = width or config.moe_intermediate_size // top_k
    config.router, config.experts = router, {"kind": "ungated", "activation": activation}
    model: Any = MoELMForCausalLM(config)  # type: ignore[arg-type]
    model = model.to(dense.device, dense.dtype)
    own = {n: p for n, p in dense.state_dict().items() if ".mlp." not in n}
    model.load_state_dict(own, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        one, experts = before.mlp.experts, after.mlp.experts
        up, down = split_neurons(
            one.up_proj[0],
            one.down_proj[0],
            num_experts,
            experts.up_proj.shape[1],
            noise=noise,
            generator=generator,
        )
        experts.up_proj.copy_(up)
        experts.down_proj.copy_(down)
    return model


def _one_ungated(block: Any) -> bool:
    experts = getattr(block, "experts", None)
    return isinstance(experts, UngatedExperts) and experts.num_experts == 1
