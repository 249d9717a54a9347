"""Push a router towards experts, or away from them: its logits are edited, and the family's own selection runs again.

    soft     z_e <- z_e + strength * std(z)       std over the token's logits; a negative strength pushes away
    hard     z_e <- max(z), or min(z) to suppress; ties are broken at random, by eps ~ N(0, 1e-6)

z are the logits before softmax or sigmoid; correction biases, groups, normalisation, shared experts stay the family's.
It acts on every token, of the prompt and of what is generated. Which experts: `analyze/multilingual_routing.py`.

    with view.edits(SoftSteer(experts, strength=0.5)):
        view.model.generate(...)

"Multilingual Routing in Mixture-of-Experts" (arXiv:2510.04694).
Shapes: N tokens, E experts, M steered experts.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.view.edit import OnExperts
from moestro.view.layers import MoELayer

STABLE = 1.0
"""The largest strength that the paper calls stable."""
EPSILON = 1e-6


@dataclass(eq=False)
class _Steer(OnExperts):
    """Base of the edits below: refuses to steer nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ids:
            raise ValueError(f"{type(self).__name__}: the set of experts is empty; a lower threshold chooses some")


@dataclass(eq=False)
class SoftSteer(_Steer):
    """Add `strength` standard deviations of a token's logits to those of the experts; closed experts stay closed."""

    strength: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.strength):
            raise ValueError(f"strength={self.strength}; give a finite number, at most {STABLE:g} in size")
        if abs(self.strength) > STABLE:
            warnings.warn(f"strength={self.strength} is beyond the stable range of ±{STABLE:g}", stacklevel=3)

    def logits(self, layer: int, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.tensor(self.ids[layer], device=logits.device)
        push = (self.strength * open_std(logits)).to(logits.dtype)
        return logits.index_add(1, columns, push[:, None].expand(-1, len(columns))), prefer


@dataclass(eq=False)
class _HardSteer(_Steer):
    """Set the experts' logits to one of the token's own, ties broken at random."""

    seed: int = field(default=0, kw_only=True)

    def _set(self, layer: int, logits: Tensor, prefer: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.tensor(self.ids[layer], device=logits.device)
        old = logits.index_select(1, columns)
        new = torch.where(torch.isneginf(old), old, level[:, None])
        # in fp32, on the scores that top-k compares: in bf16, and beside large logits, so little would vanish
        draw = torch.Generator().manual_seed(self.seed * 1009 + layer)
        noise = EPSILON * torch.randn(old.shape, generator=draw).to(logits.device)
        return logits.index_copy(1, columns, new), prefer.float().index_add(1, columns, noise)


@dataclass(eq=False)
class HardActivate(_HardSteer):
    """Raise experts to the token's largest logit; several share the weight. Of more than top_k, some get no slot.

    Groups and correction biases still have their say, unlike under `ForceOn`.
    """

    def check(self, layer: MoELayer) -> None:
        super().check(layer)
        if len(self.ids[layer.index]) > layer.top_k:
            warnings.warn(
                f"{len(self.ids[layer.index])} experts of layer {layer.index} are activated, and a token uses "
                f"top_k={layer.top_k}: which of them serve it is random",
                stacklevel=2,
            )

    def logits(self, layer: int, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        return self._set(layer, logits, prefer, logits.amax(dim=1))


@dataclass(eq=False)
class HardSuppress(_HardSteer):
    """Lower experts to the token's smallest logit: they serve it only where too few others can."""

    def logits(self, layer: int, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        smallest = logits.masked_fill(torch.isneginf(logits), float("inf")).amin(dim=1)
        return self._set(layer, logits, prefer, smallest)


def open_std(logits: Float[Tensor, "n e"]) -> Float[Tensor, " n"]:
    """Standard deviation (over E - 1) of each token's logits in fp32, those of closed experts left out."""
    closed = torch.isneginf(logits)
    count = (~closed).sum(dim=1)
    z = logits.float().masked_fill(closed, 0)
    off = (z - (z.sum(dim=1) / count.clamp_min(1))[:, None]).masked_fill(closed, 0)
    return (off.square().sum(dim=1) / (count - 1).clamp_min(1)).sqrt()
