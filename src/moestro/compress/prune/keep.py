"""Choose what to keep: how many experts a budget pays for, and which.

The same number in every layer, so that any family's checkpoint format can store the result. Grouped routers keep the
same number in each group.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.view.layers import MoELayer
from moestro.view.surgery import check_keep, per_expert_tensors

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_share(text: str, what: str = "memory") -> float:
    """A share like "50%" as a number in (0, 1]. Raises ValueError with examples of what is understood."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
    if not match or not 0 < float(match.group(1)) <= 100:
        raise ValueError(f"{what}={text!r} is no share: write a percentage above 0% and up to 100%, such as 50%")
    return float(match.group(1)) / 100


def parse_memory(text: str, whole: int) -> int:
    """A memory budget in bytes: "6GB", "800 MiB", or a share of `whole` such as "50%".

    Raises ValueError for anything else: a bare number, zero, a negative size.
    """
    if "%" in text:
        return int(parse_share(text) * whole)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(
            f"memory={text!r} is not understood: write a size with its unit (6GB, 800MiB) or a share of the whole "
            "checkpoint (50%)"
        )
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint: what every expert shares, and one expert of each layer."""

    shared: int
    expert: dict[int, int]

    @property
    def whole_layer_set(self) -> int:
        """One expert in each layer."""
        return sum(self.expert.values())

    def with_experts(self, count: int) -> int:
        return self.shared + count * self.whole_layer_set


def measure(layers: Sequence[MoELayer], total: int, expert_bytes: Mapping[int, int] | None = None) -> Sizes:
    """Sizes of a model whose saved checkpoint takes `total` bytes.

    expert_bytes: {layer: bytes of one expert} there; by default as in memory.
    """
    if expert_bytes is not None:
        experts = sum(expert_bytes[layer.index] * layer.num_experts for layer in layers)
        return Sizes(total - experts, dict(expert_bytes))
    expert, experts = {}, 0
    for layer in layers:
        size = 0
        if layer.rule is not None:
            for _, owner, attr, _ in per_expert_tensors(layer):
                tensor = getattr(owner, attr)
                size += tensor.numel() * tensor.element_size()
        expert[layer.index] = size // layer.num_experts
        experts += size
    return Sizes(total - experts, expert)


def affordable(layers: Sequence[MoELayer], sizes: Sizes, budget: int) -> int:
    """The largest number of experts per layer that fits `budget` bytes.

    Raises ValueError with the least possible budget where not even top_k experts fit.
    """
    least = max(least_experts(layer) for layer in layers)
    count = (budget - sizes.shared) // sizes.whole_layer_set
    step = _step(layers)
    count = min(count // step * step, min(layer.num_experts for layer in layers))
    if count < least:
        raise ValueError(
            f"a budget of {budget:,} bytes is too small: the shared parts take {sizes.shared:,}, and the least of "
            f"{least} experts in each of {len(layers)} layers {least * sizes.whole_layer_set:,} more; "
            f"allow at least {sizes.with_experts(least):,} bytes"
        )
    return count


def share_of_experts(layers: Sequence[MoELayer], share: float) -> int:
    """`share` of the experts per layer, rounded down to what the groups allow. Raises ValueError below top_k."""
    step, most = _step(layers), min(layer.num_experts for layer in layers)
    count = int(share * most) // step * step
    least = max(least_experts(layer) for layer in layers)
    if count < least:
        raise ValueError(
            f"{share:.0%} of {most} experts are {count}, and a layer needs at least {least}; ask for at least "
            f"{least / most:.1%}, or lower top_k first"
        )
    return count


def least_experts(layer: MoELayer) -> int:
    """The smallest number of experts the layer's router can work with."""
    rule = layer.rule
    if rule is None or rule.groups == 1:
        return layer.top_k
    return rule.groups * max(2, -(-rule.top_k // rule.top_groups))


def _step(layers: Sequence[MoELayer]) -> int:
    return max(layer.rule.groups if layer.rule else 1 for layer in layers)


def keep_best(
    layers: Sequence[MoELayer],
    scores: Mapping[int, Float[Tensor, " e"]],
    count: int,
    *,
    protect: Collection[tuple[int, int]] = (),
) -> dict[int, list[int]]:
    """{layer: the `count` best experts, ascending}, equal numbers per group; unseen experts (NaN) come last.

    `protect`: (layer, expert) pairs that are kept whatever their score. Raises ValueError where they are too many.
    """
    keep = {}
    for layer in layers:
        groups = layer.rule.groups if layer.rule else 1
        score = scores[layer.index].double().nan_to_num(nan=float("-inf"))
        kept_always = [e for i, e in protect if i == layer.index]
        score[kept_always] = float("inf")
        best = score.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, : count // groups]
        offset = torch.arange(groups)[:, None] * (layer.num_experts // groups)
        keep[layer.index] = sorted((best + offset).flatten().tolist())
        lost = set(kept_always) - set(keep[layer.index])
        if lost:
            raise ValueError(
                f"layer {layer.index}: {len(kept_always)} protected experts do not fit into {count} "
                f"({count // groups} a group); keep more or protect fewer"
            )
        check_keep(layer, keep[layer.index])
    return keep
