"""The loss of a batch: next-token cross entropy of any causal language model, and what its routers add.

Native models leave their routers' losses on the modules (`gather_losses`). Those of transformers are given losses by
name: their routers are found as `moestro.open` finds them, and the functions of layers/losses.py see every router's
triple of the forward pass.
Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from moestro.layers import gather_losses
from moestro.layers.losses import LOSSES
from moestro.models.head import has_plain_head, next_token_loss
from moestro.routing import SCORES, Routing, RoutingContext
from moestro.view.layers import MoELayer, find_layers
from moestro.view.rules import logits_of


@dataclass(frozen=True)
class BatchLoss:
    """`mean` over the predictions, `each` [B, T - 1] without gradient, `terms`: other losses by name."""

    mean: Tensor
    each: Tensor
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return torch.stack([self.mean, *self.terms.values()]).sum()


class Objective:
    """Loss of `model`; the head's logits are not kept where they are plain products (measured once, on `probe`)."""

    def __init__(self, model: Any, probe: Int[Tensor, "b t"], router_losses: Mapping[str, Any] | None = None):
        self.model = model
        self.plain_head = has_plain_head(model, probe)
        self._routings: list[tuple[MoELayer, Routing]] = []
        self._losses = {name: _term(name, value) for name, value in (router_losses or {}).items()}
        if self._losses:
            if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
                raise ValueError("router_losses read the routers' outputs, which gradient checkpointing discards")
            for layer in find_layers(model):
                layer.router.register_forward_hook(partial(self._remember, layer))

    def _remember(self, layer: MoELayer, router: nn.Module, args: Any, out: Any) -> None:
        self._routings.append((layer, Routing(*out)))

    def __call__(self, ids: Int[Tensor, "b t"]) -> BatchLoss:
        self._routings.clear()
        if self.plain_head:
            hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            mean, each = next_token_loss(hidden, self.model.get_output_embeddings().weight, ids)
        else:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            mean, each = each.mean(), each.detach()
        return BatchLoss(mean, each, self._terms(ids) if self.model.training else {})

    def _terms(self, ids: Tensor) -> dict[str, Tensor]:
        terms = gather_losses(self.model)
        context = RoutingContext(shape=(ids.shape[0], ids.shape[1]), input_ids=ids)
        for name, (coefficient, options) in self._losses.items():
            parts = [LOSSES[name](*_scored(layer, r), context, **options) for layer, r in self._routings]
            added = coefficient * torch.stack(parts).sum()
            terms[name] = terms[name] + added if name in terms else added
        return terms


def _scored(layer: MoELayer, routing: Routing) -> tuple[Routing, Tensor]:
    """The triple with logits, and the distribution over experts that losses look at."""
    if layer.rule is None:
        return routing, routing.logits.float().softmax(dim=-1)
    logits = logits_of(layer.rule, routing.logits).float()
    scores = SCORES[layer.rule.score](logits)
    probabilities = scores if layer.rule.score == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
    return Routing(logits, routing.weights, routing.indices), probabilities


def _term(name: str, value: Any) -> tuple[float, dict[str, Any]]:
    if name not in LOSSES:
        raise ValueError(f"router loss {name!r} is not known; there are {', '.join(LOSSES)}")
    options = dict(value) if isinstance(value, Mapping) else {"coef": value}
    return float(options.pop("coef")), options
