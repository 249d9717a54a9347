"""The same language model with other parts: a residual rule or a router in the place of the one it has.

Weights are carried over by name; what the new parts bring is drawn. The model given stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from moestro.models.lm import MoELMForCausalLM


def rebuilt(model: nn.Module, **changes: Any) -> MoELMForCausalLM:
    """A model whose config has `changes` (router="...", residual={"kind": ...}, ...), with this one's weights.

    New routers are drawn. Raises ValueError where another weight has no place in the new model: it would be lost.
    """
    if not isinstance(model, MoELMForCausalLM):
        raise ValueError(
            f"{type(model).__name__} fixes its routers and residual connections in its own code; only a "
            "MoELMForCausalLM is assembled from names and can be given others"
        )
    config: Any = copy.deepcopy(model.config)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(f"the config has no entry {name!r}")
        setattr(config, name, value)
    new: Any = MoELMForCausalLM(config)
    new.to(device=model.device, dtype=model.dtype)
    ours, theirs = model.state_dict(), new.state_dict()
    drawn = ".router." if "router" in changes else None
    kept = {
        name: tensor
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape == tensor.shape and not (drawn and drawn in name)
    }
    lost = [name for name in ours if name not in kept and not (drawn and drawn in name)]
    if lost:
        raise ValueError(f"{lost[0]} of shape {tuple(ours[lost[0]].shape)} has no place in the changed model")
    with torch.no_grad():
        new.load_state_dict(kept, strict=False)
    return new.train(model.training)


def add_momentum(model: nn.Module, rule: str = "heavy_ball", **options: Any) -> MoELMForCausalLM:
    """The model with a momentum rule around its sparse blocks (see layers/momentum.py), all weights as they are.

    Momentum enlarges what the blocks add by up to 1 / (1 - mu): a trained model needs further training.
    "MomentumSMoE" (arXiv:2410.14574).
    """
    return rebuilt(model, residual={"kind": rule, **options})


def convert_to_recurrent(model: nn.Module, **options: Any) -> MoELMForCausalLM:
    """The model with recurrent routers, new and untrained, and one cell for all layers (layers/routers/recurrent.py).

    No recurrent router can be folded back into a linear one. "Layerwise Recurrent Router" (arXiv:2408.06793).
    """
    return rebuilt(model, router={"kind": "recurrent", **options})
