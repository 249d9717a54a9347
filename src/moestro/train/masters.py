"""Mixed precision: weights and optimiser in fp32, compute in bf16 on copies of the weights.

    gradients of the copies -> added to the masters' in fp32 -> step -> masters rounded into the copies

Buffers (rotary frequencies, routers' biases and counts) stay in their own type. In fp32 the model's parameters are
the masters themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.train.plan import Precision


class Masters:
    """`weights`: {name: fp32 master} of the parameters that are trained, each once, in the model's order."""

    def __init__(self, model: nn.Module, precision: Precision):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of the model is trained: all have requires_grad=False")
        self.mixed = precision == "bf16"
        for p in model.parameters():
            p.data = p.data.float()
        self.weights = {name: p.detach().clone() if self.mixed else p for name, p in self.parameters.items()}
        if self.mixed:
            for p in model.parameters():
                p.data = p.data.bfloat16()

    def collect_gradients(self) -> None:
        """Add the gradients of the copies to those of the masters."""
        if not self.mixed:
            return
        for name, weight in self.weights.items():
            p = self.parameters[name]
            if p.grad is not None:
                weight.grad = p.grad.float() if weight.grad is None else weight.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the copies."""
        if self.mixed:
            for name, p in self.parameters.items():
                p.copy_(self.weights[name])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take saved masters over."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        self.publish()

    def groups(self, weight_decay: float) -> list[dict]:
        """AdamW's parameter groups: decay on matrices only."""
        decayed = [w for w in self.weights.values() if w.ndim > 1]
        plain = [w for w in self.weights.values() if w.ndim <= 1]
        parts = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return [part for part in parts if part["params"]]
