"""Taking a domain's experts away: whose they are, and what each domain then loses.

An expert belongs to the domain with at least twice the mass of the next (`moestro.steer.expert_masking`). Mass is the
mean routing mass of Monet's experts; in a plain mixture the mean gate weight; in a dense model the mean absolute
activation of the first layer's neurons, which stand for experts there. Where a domain would own none of a mixture's
experts or of the neurons by that rule, it is given those with the largest ratio (one of each layer), as otherwise
nothing could be removed. Monet: Mixture of Monosemantic Experts for Transformers (arXiv:2412.04139).
Shapes: D domains, G routers or layers, E experts or neurons of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import moestro.view.open as opening
from moestro.models.lm import MoELMForCausalLM
from moestro.models.monet import MonetRouter
from moestro.routing import dense_weights
from moestro.steer.expert_masking import assign_experts, expert_mass, mask_experts
from moestro.view.edit import Gain


@dataclass(frozen=True)
class Removal:
    without: dict[str, Callable[[], AbstractContextManager[None]]]
    """{domain: what runs the model without its experts, as long as it is entered}"""
    owned: float
    """Share of the experts that a domain owns, mean over domains."""


def removal(model: MoELMForCausalLM, data: Mapping[str, Sequence[Tensor]]) -> Removal:
    """Whose experts are whose, by the texts of each domain: {domain: batches of token ids [B, T]}."""
    if any(isinstance(module, MonetRouter) for module in model.modules()):
        return _of_monet(model, data)
    return _of_mixture(model, data) if model.config.moe_layers else _of_dense(model, data)


def rises(of: Removal, losses: Callable[[], Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """{domain: how its own loss rises without its experts, and how the others' do on average}.

    `losses` measures the model as it is at that moment, by domain.
    """
    whole = losses()
    found = {}
    for domain, without in of.without.items():
        with without():
            rise = {d: loss - whole[d] for d, loss in losses().items()}
        found[domain] = rise[domain], fmean(rise[d] for d in rise if d != domain)
    return found


def _of_monet(model: MoELMForCausalLM, data: Mapping[str, Sequence[Tensor]]) -> Removal:
    owned = assign_experts(expert_mass(model, data))
    return Removal({d: partial(mask_experts, model, mask) for d, mask in zip(data, owned)}, float(owned.float().mean()))


@torch.no_grad()
def _of_mixture(model: MoELMForCausalLM, data: Mapping[str, Sequence[Tensor]]) -> Removal:
    """Removed is what the experts add."""
    view = opening.open(model)
    seen: list[Tensor] = []
    hooks = [
        layer.router.register_forward_hook(
            lambda _, args, out, experts=layer.num_experts: seen.append(dense_weights(out, experts).mean(dim=0))
        )
        for layer in view.layers
    ]
    try:
        for batches in data.values():
            model(input_ids=torch.cat(list(batches)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    owned = _at_least_one(torch.stack(seen).unflatten(0, (len(data), -1)).permute(1, 2, 0))
    closed = [Gain({(view.layers[g].index, e): 0.0 for g, e in mask.nonzero().tolist()}) for mask in owned]
    return Removal({d: partial(view.edits, gain) for d, gain in zip(data, closed)}, float(owned.float().mean()))


@torch.no_grad()
def _of_dense(model: MoELMForCausalLM, data: Mapping[str, Sequence[Tensor]]) -> Removal:
    down: Any = model.model.layers[0].mlp.down_proj
    seen: list[Tensor] = []
    hook = down.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().flatten(0, -2).mean(dim=0, keepdim=True))
    )
    try:
        for batches in data.values():
            model(input_ids=torch.cat(list(batches)), use_cache=False)
    finally:
        hook.remove()
    owned = _at_least_one(torch.stack(seen, dim=-1))

    @contextmanager
    def silenced(mask: Tensor) -> Iterator[None]:
        hook = down.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(mask, 0.0),))
        try:
            yield
        finally:
            hook.remove()

    return Removal({d: partial(silenced, mask) for d, mask in zip(data, owned[:, 0])}, float(owned.float().mean()))


def _at_least_one(mass: Float[Tensor, "g e d"]) -> Bool[Tensor, "d g e"]:
    """The rule; a domain that owns nothing by it gets the expert with the largest ratio in every layer."""
    owned = assign_experts(mass)
    for d in range(mass.shape[-1]):
        others = mass[..., [o for o in range(mass.shape[-1]) if o != d]].amax(dim=-1)
        best = (mass[..., d] / others.clamp_min(1e-9)).argmax(dim=-1)
        if not owned[d].any():
            owned[d, torch.arange(len(best)), best] = True
    return owned
