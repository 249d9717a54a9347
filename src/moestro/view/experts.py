"""What a layer's experts offer, whoever made them: the contract that observation, surgery and budgets rely on.

`Experts` is the contract. transformers' fused experts are seen through the adapter `FusedExperts`; a module that
offers the contract itself is used as it is. Which tensors carry one entry per expert is declared by their owner
(`expert_axes`), else known from transformers' experts interface, else read off their shapes, unless the number of
experts is a width of the layer as well: then nothing is guessed.
Shapes: E experts, H hidden, I expert width, N tokens, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.view.experts_backend import experts_forward

Undo = Callable[[], None]
"""Puts back what a change took away; changes are undone in reverse order."""

ROW_BYTES = 16
"""torch's grouped matrix product, transformers' default experts backend, takes rows of a multiple of this alone."""

_FUSED = ("gate_up_proj", "up_proj", "down_proj")
_KNOWN = frozenset([*_FUSED, *(f"{name}_bias" for name in _FUSED)])


class Experts(Protocol):
    """What an experts module offers. moestro's surgery calls `num_experts`, `nbytes` and `slice`; a module that has all
    three is taken as it is, any other is found by transformers' experts interface, which its forward goes through.

    Optional members, which have a meaning of their own where they are absent:

    - `expert_axes`: {own tensor's name: axis with one entry per expert}, on the class or the module that owns the
      tensors. Tensors that are not named have none. Absent: read off names and shapes.
    - `prepare(ids, precision)`, called before a forward that will use these experts (fetch them, unpack so many bits).
      Absent: the experts are there, in the one precision they have.
    - `aux_losses() -> {name: loss}` of the last forward in training mode. Absent: none.
    - `slice_neurons(ids [E, I'])`: keep these inner neurons of every expert, in place. Absent: widths are fixed.
    """

    @property
    def num_experts(self) -> int: ...

    def nbytes(self, ids: Sequence[int] | None = None) -> int:
        """Bytes of these experts' own tensors in memory; None: of all of them."""
        ...

    def slice(self, ids: Sequence[int]) -> Undo:
        """Keep these experts, in this order, in place. Raises before anything changes where that cannot be done."""
        ...

    def forward(
        self, hidden: Float[Tensor, "n h"], indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n h"]:
        """Weighted sum over slots. A slot is unused at index E exactly; its weight adds nothing."""
        ...


@dataclass(frozen=True)
class PerExpert:
    """A tensor with one entry per expert along `axis`: attribute `name` of `owner`."""

    owner: nn.Module
    name: str
    axis: int

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.name)

    def slice(self, ids: Sequence[int]) -> Undo:
        """Keep these entries in place."""
        old = self.tensor
        new = old.data.index_select(self.axis, torch.tensor(ids, device=old.device))
        return self.put(new)

    def put(self, new: Tensor) -> Undo:
        old = self.tensor
        setattr(self.owner, self.name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        return partial(setattr, self.owner, self.name, old)


class FusedExperts:
    """The contract over a module that keeps all experts of a layer in stacked tensors.

    Raises ValueError where the module keeps no such tensors, or it cannot be told which have an entry per expert.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def num_experts(self) -> int:
        first = _first(self.module)
        if first is None:
            raise ValueError(f"{type(self.module).__name__} holds no experts: it has none of {', '.join(_FUSED)}")
        name, axis = first
        return getattr(self.module, name).shape[axis]

    def per_expert(self) -> list[PerExpert]:
        """Every tensor with one entry per expert, those of submodules included."""
        count = self.num_experts
        found = []
        for owner in self.module.modules():
            for name, tensor in own_tensors(owner):
                axis = self._axis(owner, name, tensor, count)
                if axis is not None:
                    found.append(PerExpert(owner, name, axis))
        return found

    def _axis(self, owner: nn.Module, name: str, tensor: Tensor, count: int) -> int | None:
        declared = axes_of(owner)
        if declared is not None:
            axis = declared.get(name)
            if axis is not None and tensor.shape[axis] != count:
                raise ValueError(
                    f"{type(owner).__name__}.{name} is declared to have one entry per expert on axis {axis}, and has "
                    f"shape {tuple(tensor.shape)} for {count} experts"
                )
            return axis
        if owner is self.module and name in _KNOWN:
            return 0
        if not tensor.dim() or tensor.shape[0] != count:
            return None
        if count in self.widths:
            raise ValueError(
                f"{type(owner).__name__}.{name} of shape {tuple(tensor.shape)} may have an entry for each of {count} "
                f"experts or for each of {count} channels: nothing tells which. Declare it on the class: "
                f"expert_axes = {{{name!r}: 0, ...}}"
            )
        return 0

    @property
    def widths(self) -> set[int]:
        """The sizes of the experts' matrices: H, I, 2I."""
        return {size for name in _FUSED if (t := self.module._parameters.get(name)) is not None for size in t.shape[1:]}

    def nbytes(self, ids: Sequence[int] | None = None) -> int:
        count = self.num_experts
        whole = sum(p.tensor.nbytes for p in self.per_expert())
        return whole if ids is None else whole // count * len(ids)

    def slice(self, ids: Sequence[int]) -> Undo:
        done: list[Undo] = []
        try:
            for part in self.per_expert():
                done.append(part.slice(ids))
        except BaseException:
            undo_all(done)
            raise
        return partial(undo_all, done)

    def average(self, groups: Sequence[Sequence[int]], share: Float[Tensor, " e"]) -> Undo:
        """Put each group's mean, weighted by `share`, into the place of its smallest id."""
        done: list[Undo] = []
        try:
            for part in self.per_expert():
                done.append(average(part.tensor.data, groups, share, part.axis))
        except BaseException:
            undo_all(done)
            raise
        return partial(undo_all, done)

    def slice_neurons(self, ids: Int[Tensor, "e i"]) -> Undo:
        """Keep inner neurons `ids[e]` of every expert e, as many in each.

        Raises ValueError for ids out of range, named twice, or a width whose rows would be no multiple of 16 bytes.
        """
        module: Any = self.module
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        width = module.down_proj.shape[1 if module.is_transposed else 2]
        check_neurons(ids, self.num_experts, width, module.down_proj.element_size())
        rows = ids
        if module.has_gate:
            rows = torch.cat([ids, ids + width], 1) if module.is_concatenated else _interleaved(ids)
        wide, narrow = (2, 1) if module.is_transposed else (1, 2)
        cut = [(up_name, rows, wide), ("down_proj", ids, narrow)]
        if module.has_bias:
            cut.append((f"{up_name}_bias", rows, 1))
        done: list[Undo] = []
        for name, places, axis in cut:
            done.append(PerExpert(module, name, axis).put(_picked(getattr(module, name).data, places, axis)))
        for name, value in list(vars(module).items()):
            if "intermediate" in name and value == width:
                done.append(partial(setattr, module, name, value))
                setattr(module, name, ids.shape[1])
        return partial(undo_all, done)

    def outputs(
        self, hidden: Float[Tensor, "n h"], indices: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n k h"]:
        """What each slot's expert gives before its weight; zeros in unused slots."""
        out = hidden.new_zeros(*indices.shape, hidden.shape[1])

        def put(token: Tensor, slot: Tensor, rows: Tensor) -> None:
            out[token, slot] = rows.to(out.dtype)

        experts_forward(self.module, hidden, indices, weights, on_outputs=put)
        return out


def experts_of(module: nn.Module) -> Any:
    """The module as `Experts`: itself where it offers the contract, else an adapter."""
    return module if offers_contract(module) else FusedExperts(module)


def offers_contract(module: nn.Module) -> bool:
    """Whether the module itself has what `Experts` requires."""
    own = type(module)
    return callable(getattr(own, "nbytes", None)) and callable(getattr(own, "slice", None)) and _counts(module)


def _counts(module: nn.Module) -> bool:
    return type(getattr(module, "num_experts", None)) is int


def dispatches(module: nn.Module) -> bool:
    """Whether the module's forward goes through transformers' experts interface, so that a backend can run it."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether the module offers the contract of `Experts`, by itself or through the adapter."""
    return offers_contract(module) or (dispatches(module) and _first(module) is not None)


def num_experts_of(experts: nn.Module) -> int:
    """E of an experts module."""
    return experts_of(experts).num_experts


def axes_of(owner: nn.Module) -> Mapping[str, int] | None:
    """What the owner declares of its own tensors; None where it declares nothing."""
    if getattr(owner, "holds_no_experts", False):
        return {}
    return getattr(owner, "expert_axes", None)


def own_tensors(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the module's own parameters and buffers."""
    for name in [*owner._parameters, *owner._buffers]:
        if (tensor := getattr(owner, name)) is not None:
            yield name, tensor


def _first(module: nn.Module) -> tuple[str, int] | None:
    """An own tensor with one entry per expert, and its axis: as declared, else by the interface's names."""
    known = axes_of(module) or dict.fromkeys(_FUSED, 0)
    return next(((name, axis) for name, axis in known.items() if getattr(module, name, None) is not None), None)


def undo_all(done: Sequence[Undo]) -> None:
    for restore in reversed(done):
        restore()


def average(tensor: Tensor, groups: Sequence[Sequence[int]], share: Float[Tensor, " e"], axis: int) -> Undo:
    """Write each group's weighted mean into the place of its smallest id, in fp32, one group in memory at a time."""
    rows = tensor.movedim(axis, 0)
    kept: list[tuple[int, Tensor]] = []

    def restore() -> None:
        for place, row in kept:
            rows[place] = row

    try:
        for group in groups:
            if len(group) > 1:
                part = (share[list(group)] / share[list(group)].sum().clamp_min(1e-12)).to(rows.device)
                mean = torch.tensordot(part, rows[list(group)].float(), dims=1)
                kept.append((min(group), rows[min(group)].clone()))
                rows[min(group)] = mean.to(rows.dtype)
    except BaseException:
        restore()
        raise
    return restore


def _picked(tensor: Tensor, places: Int[Tensor, "e m"], axis: int) -> Tensor:
    """Entries `places[e]` along `axis` of every expert e's matrix or vector."""
    index = places.to(tensor.device).unsqueeze(2) if axis == 1 and tensor.dim() == 3 else places.to(tensor.device)
    if axis == 2:
        index = index.unsqueeze(1)
    shape = list(tensor.shape)
    shape[axis] = places.shape[1]
    return tensor.gather(axis, index.expand(shape)).contiguous()


def _interleaved(ids: Int[Tensor, "e i"]) -> Int[Tensor, "e u"]:
    return torch.stack([2 * ids, 2 * ids + 1], dim=2).flatten(1)


def check_neurons(ids: Int[Tensor, "e i"], experts: int, width: int, itemsize: int) -> None:
    """Raise ValueError where these neurons cannot be kept, or their rows would stop transformers' default backend."""
    if ids.dim() != 2 or len(ids) != experts or ids.is_floating_point() or not ids.shape[1]:
        raise ValueError(f"neurons to keep have shape {tuple(ids.shape)}; give ids [{experts}, kept] of whole numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= width:
        raise ValueError(f"experts have neurons 0..{width - 1}; asked for {int(ids.min())}..{int(ids.max())}")
    if any(len(set(row)) != len(row) for row in ids.tolist()):
        raise ValueError("a neuron of an expert is named twice")
    if ids.shape[1] * itemsize % ROW_BYTES:
        step = ROW_BYTES // itemsize
        raise ValueError(
            f"{ids.shape[1]} neurons make rows of {ids.shape[1] * itemsize} bytes, and transformers' default backend "
            f"takes multiples of {ROW_BYTES} alone; keep a multiple of {step}, {-(-ids.shape[1] // step) * step} say"
        )


def misaligned_rows(module: nn.Module) -> str | None:
    """What about the experts' widths stops transformers' default backend (grouped_mm); None where it can run."""
    if not dispatches(module):
        return None
    for name in _FUSED:
        tensor = module._parameters.get(name)
        if tensor is not None and tensor.dim() == 3:
            for size in tensor.shape[1:]:
                if size * tensor.element_size() % ROW_BYTES:
                    return f"{name} {tuple(tensor.shape)} has rows of {size} x {tensor.element_size()} bytes"
    return None
