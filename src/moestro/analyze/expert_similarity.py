"""How alike the experts of a layer are, by their weights.

    s = mean over pairs of experts of the mean cosine between their parts,
    parts of an expert: the mean row of its up matrix, of its gate matrix, and the mean column of its down matrix

"Layerwise Recurrent Router for Mixture-of-Experts" (arXiv:2408.06793), as in the released analysis up to the division
by the number of parts, which makes s = 1 where all experts are the same.
Shapes: E experts, H hidden, I expert width, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moestro.view.layers import MoELayer


@torch.no_grad()
def expert_weight_similarity(layers: Sequence[MoELayer]) -> Float[Tensor, " l"]:
    """Of every layer, from -1 to 1; 0 for experts drawn independently, up to noise. `layers`: those of a view.

    Raises ValueError for a layer of one expert, or one whose experts hold no stacked matrices.
    """
    return torch.tensor([_similarity(_parts(layer)) for layer in layers])


def _similarity(parts: Sequence[Float[Tensor, "e h"]]) -> float:
    count = len(parts[0])
    cosines = torch.stack([(unit := F.normalize(part.float(), dim=1)) @ unit.T for part in parts]).mean(dim=0)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def _parts(layer: MoELayer) -> list[Float[Tensor, "e h"]]:
    experts: Any = layer.experts
    if layer.num_experts < 2:
        raise ValueError(f"layer {layer.index} has {layer.num_experts} expert: two are the least that can be alike")
    if not hasattr(experts, "down_proj"):
        raise ValueError(f"layer {layer.index}: its experts were replaced by {type(experts).__name__}")
    transposed = getattr(experts, "is_transposed", False)
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    up = up.transpose(1, 2) if transposed else up
    down = experts.down_proj.transpose(1, 2) if transposed else experts.down_proj
    if not experts.has_gate:
        inner = [up]
    elif getattr(experts, "is_concatenated", True):
        inner = list(up.chunk(2, dim=1))
    else:  # gate and up rows take turns
        inner = [up[:, 0::2], up[:, 1::2]]
    return [*(part.mean(dim=1) for part in inner), down.mean(dim=2)]
