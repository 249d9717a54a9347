"""How replaceable a model's experts are: the three analyses of DeepSeekMoE, on any open model.

    redundancy_curve    close every token's best experts to it, a share r of all; route among the rest
    without_shared      leave the shared expert out and use one more routed expert
    loss_by_top_k       use fewer (or more) routed experts than the model was trained with

A model whose experts are more specialised loses more when they are closed. In all of them a gate weight stays the score
that the router gave; families that normalise the weights of the chosen experts still do.
`loss` is a function without arguments that measures the model, for instance

    lambda: fmean(l for l, _ in view.observe(data, [HeldoutLoss()])[0].values())

"DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models" (arXiv:2401.06066).
Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro.steer.reroute import top_k
from moestro.view.edit import Edit
from moestro.view.layers import MoELayer

RATIOS = (0.0, 1 / 16, 2 / 16, 3 / 16, 4 / 16)  # the paper's


@dataclass(eq=False)
class CloseBest(Edit):
    """Close to each token the experts it scores highest: the share `ratio` of a layer's experts, to whole experts."""

    ratio: float

    def check(self, layer: MoELayer) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: the share of the experts to close lies in [0, 1)")
        closed = self._closed(layer.num_experts)
        rule = layer.rule
        if rule is not None and rule.groups > 1:
            raise ValueError(
                f"layer {layer.index} routes in groups, of which a token's best experts may be the whole; "
                "its redundancy curve would measure the groups"
            )
        left = layer.num_experts - closed
        if left < layer.top_k:
            raise ValueError(
                f"ratio={self.ratio:g} closes {closed} of {layer.num_experts} experts in layer {layer.index} and "
                f"leaves {left} for top_k={layer.top_k}; leave at least {layer.top_k}"
            )

    def logits(self, layer: int, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.topk(self._closed(logits.shape[1]), dim=-1).indices
        return logits, prefer.scatter(1, best, float("-inf"))

    def _closed(self, num_experts: int) -> int:
        return round(self.ratio * num_experts)


def redundancy_curve(view: Any, loss: Callable[[], float], ratios: Sequence[float] = RATIOS) -> dict[float, float]:
    """{ratio: loss with that share of every token's best experts closed to it}

    Raises ValueError before anything runs where a ratio leaves a layer too few.
    """
    edits = {ratio: CloseBest(ratio) for ratio in ratios}
    for edit in edits.values():
        for layer in view.layers:
            edit.check(layer)
    curve = {}
    for ratio, edit in edits.items():
        with view.edits(edit):
            curve[ratio] = loss()
    return curve


def loss_by_top_k(view: Any, loss: Callable[[], float], numbers: Iterable[int]) -> dict[int, float]:
    """{k: loss with k routed experts a token}"""
    edits = {k: top_k(view, k) for k in numbers}
    losses = {}
    for k, edit in edits.items():
        with view.edits(edit):
            losses[k] = loss()
    return losses


@contextmanager
def without_shared(view: Any, extra_routed: int = 1) -> Iterator[None]:
    """Shared experts give nothing inside the block, and every token uses `extra_routed` more routed experts.

    Raises ValueError where a layer has no shared expert, or layers differ in top_k.
    """
    if lacking := [layer.index for layer in view.layers if layer.shared is None]:
        raise ValueError(f"layer {lacking[0]} has no shared expert to leave out")
    if len(numbers := {layer.top_k for layer in view.layers}) > 1:
        raise ValueError(f"the layers use different numbers of experts a token: {sorted(numbers)}")
    edit = top_k(view, numbers.pop() + extra_routed)
    hooks = [layer.shared.register_forward_hook(_nothing) for layer in view.layers]
    try:
        with view.edits(edit):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return torch.zeros_like(out)
