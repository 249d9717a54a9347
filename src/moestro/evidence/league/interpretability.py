"""What single neurons and single experts of a trained model of the league stand for."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moestro.analyze.feature_coverage import feature_coverage, neuron_activations, reconstruction
from moestro.evidence.league import measure
from moestro.evidence.league.tasks import Task
from moestro.evidence.moe_x import agreement
from moestro.evidence.removal import removal, rises
from moestro.layers.routers.sparsity_aware import SparsityAwareRouter
from moestro.models.lm import MoELMForCausalLM
from moestro.models.monet import HorizontalExperts, VerticalExperts

HELDOUT_ROWS = 8
"""Of each domain."""
OWNER_ROWS = 24
"""Of each domain, from the training part: by these, experts are given to domains."""


def interpretability(model: MoELMForCausalLM, task: Task) -> dict[str, float]:
    """What single neurons and experts stand for:

    - *coverage*: how well the best single neuron tells a domain from the others (F1), mean over domains.
    - *reconstruction*: how well the neurons that are precise about a domain on one half of the rows name the domains on
      the other half (F1 of the domains named, mean over tokens).
    - *active neurons*: of a token, in one layer.
    - *score agrees*: correlation over experts of the sparsity-aware score with the number of inactive neurons.
    - *own*, *others*: rise of the loss in nats on the domain whose experts are removed, and its mean rise elsewhere (in
      `dense`, neurons of the first layer are removed).

    The first four are means over layers, on held-out rows without their first token, which in the generated tasks is
    the domain's tag. A neuron counts times its gate weight. The measures are those of "Mixture of Experts Made
    Intrinsically Interpretable" (arXiv:2503.07639) and, for the removal, of "Monet" (arXiv:2412.04139).
    """
    few = task.first(HELDOUT_ROWS)
    return _neurons(model, few) | _score(model, few) | _removal(model, task, few)


def _neurons(model: MoELMForCausalLM, task: Task) -> dict[str, float]:
    rows, length = task.heldout.ids.shape
    truth = F.one_hot(task.heldout.domain, len(task.heldout.domains)).bool()[:, None].expand(-1, length - 1, -1)
    coverage, rebuilt, active = [], [], []
    for flat in _before_each(model, task.heldout.ids, {_neuron_site(layer.mlp): _read for layer in model.model.layers}):
        acts = flat.unflatten(0, (rows, length))[:, 1:]
        coverage.append(float(feature_coverage(acts.flatten(0, 1), truth.flatten(0, 1)).mean()))
        # rows are sorted by domain, so each half has all of them
        one, other = ((acts[half::2].flatten(0, 1), truth[half::2].flatten(0, 1)) for half in (0, 1))
        rebuilt.append(reconstruction(*one, *other))
        active.append(float((acts != 0).sum(dim=-1).float().mean()))
    return {"coverage": fmean(coverage), "reconstruction": fmean(rebuilt), "active neurons": fmean(active)}


@torch.no_grad()
def _score(model: MoELMForCausalLM, task: Task) -> dict[str, float]:
    modules: list[Any] = list(model.modules())
    blocks = [m for m in modules if isinstance(getattr(m, "router", None), SparsityAwareRouter)]
    inputs = _before_each(model, task.heldout.ids, {block.router: lambda _, args: args[0] for block in blocks})
    found = [agreement(h, block.experts.up_proj, block.router.top_k)[0] for h, block in zip(inputs, blocks)]
    return {"score agrees": fmean(found)} if found else {}


def _removal(model: MoELMForCausalLM, task: Task, few: Task) -> dict[str, float]:
    data = {
        name: list(task.data.ids[task.data.domain == number][:OWNER_ROWS].split(measure.BATCH))
        for number, name in enumerate(task.data.domains)
    }
    found = rises(removal(model, data), lambda: measure.heldout_loss(model, few)).values()
    own, others = zip(*found)
    return {"own": fmean(own), "others": fmean(others)}


@torch.no_grad()
def _before_each(
    model: MoELMForCausalLM, ids: Tensor, readers: dict[nn.Module, Callable[[Any, Any], Tensor]]
) -> list[Tensor]:
    """What each reader makes of its module's arguments, tokens of all rows one after the other."""
    model.eval()
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in readers}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, read=read: seen[m].append(read(m, args).flatten(0, -2)))
        for module, read in readers.items()
    ]
    try:
        for batch in ids.split(measure.BATCH):
            model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in seen.values()]


def _neuron_site(mlp: Any) -> nn.Module:
    """The module that is called with what the neurons are made of."""
    return mlp.experts if hasattr(mlp, "experts") else mlp.down_proj


def _read(module: Any, args: Any) -> Float[Tensor, "... f"]:
    """The neurons' activations times their gate weights."""
    if isinstance(module, nn.Linear):
        return args[0]
    if isinstance(module, HorizontalExperts | VerticalExperts):
        hidden, pairs = args
        sides = (
            [(module.up, pairs.left())]
            if isinstance(module, HorizontalExperts)
            else [(module.up_left, pairs.left()), (module.up_right, pairs.right())]
        )
        return torch.cat([up(hidden).relu().square() * _each(gates, up) for up, gates in sides], dim=-1)
    hidden, indices, weights = args
    return neuron_activations(module, hidden, weights, indices)


def _each(gates: Float[Tensor, "n s"], up: nn.Linear) -> Float[Tensor, "n f"]:
    """The gate of each neuron's part."""
    return gates.repeat_interleave(up.out_features // gates.shape[1], dim=1)
