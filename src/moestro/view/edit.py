"""Edits: change what a forward pass does and leave the weights alone.

An edit acts at up to three places of an MoE layer, each a method that returns its argument by default:

    logits   before the family's own rule turns them into weights and indices
    routing  on the finished triple
    output   on the routed experts' weighted sum

so logits edits keep the weights right (softmax, normalisation, groups and scales are redone), and routing edits say
exactly what they do to a weight. Edits nest in the order given; `rows` limits one to some rows of the batch.
Shapes: N tokens, E experts, K slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.routing import Routing
from moestro.sets import by_layer
from moestro.view.events import Batch
from moestro.view.layers import LayerKey, MoELayer

ExpertId = tuple[int, int] | tuple[str, int]
"""(decoder layer number or name of the MoE block, expert number in that layer)"""


@dataclass(eq=False)
class RowChoice:
    """Which rows of a batch an edit acts on."""

    rows: Sequence[int] | Sequence[bool] | Tensor | None = field(default=None, kw_only=True)
    """Rows of the batch that are edited: their numbers, or one bool per row. None: all.

    Rows are those that the caller hands in: while `generate` runs several beams or returns several sequences, each row
    stands for all of them."""

    def row_numbers(self) -> set[int] | None:
        """The edited rows; None: all. Raises ValueError where they are no row numbers."""
        if self.rows is None:
            return None
        rows = torch.as_tensor(self.rows)
        numbers = set((rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist())
        if wrong := [r for r in numbers if r < 0 or r != int(r)]:
            raise ValueError(f"{type(self).__name__}: there is no row {wrong[0]}; rows are counted from 0")
        return numbers

    def row_mask(self, count: int, copies: int = 1) -> Bool[Tensor, " b"]:
        """Which of the batch's `count` rows are edited; `copies` of them in turn stand for one row of the caller's.

        Raises ValueError where the batch does not have them all.
        """
        rows = torch.as_tensor(self.rows)
        if rows.dtype == torch.bool:
            if len(rows) != count // copies:
                raise ValueError(
                    f"{type(self).__name__}: rows tells of {len(rows)} rows, and the batch has {count // copies}"
                )
            return rows.cpu().repeat_interleave(copies)
        if len(rows) and int(rows.max()) >= count // copies:
            raise ValueError(f"{type(self).__name__}(rows={rows.tolist()}): the batch has {count // copies} rows")
        mask = torch.zeros(count // copies, dtype=torch.bool).index_fill(0, rows.cpu().long(), True)
        return mask.repeat_interleave(copies)


@dataclass(eq=False)
class Edit(RowChoice):
    """Base of all edits of experts: acts on `layers()`, does nothing anywhere."""

    def layers(self) -> Collection[LayerKey] | None:
        """The layers it acts on, by number (or name, see MoELayer); None: all MoE layers."""
        return None

    def check(self, layer: MoELayer) -> None:
        """Raise ValueError where the layer cannot be edited like this. Called before anything runs."""

    def logits(
        self, layer: Any, logits: Float[Tensor, "n e"], prefer: Float[Tensor, "n e"]
    ) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
        """New logits, and what is added to the scores that top-k looks at (see RoutingRule)."""
        return logits, prefer

    def routing(self, layer: Any, routing: Routing) -> Routing:
        return routing

    def routing_at(self, layer: Any, routing: Routing, batch: Batch) -> Routing:
        """Like `routing`, for edits that must know which row and position each of the B * T places holds."""
        return routing

    def output(
        self, layer: Any, hidden: Float[Tensor, "n h"], routing: Routing, output: Float[Tensor, "n h"]
    ) -> Float[Tensor, "n h"]:
        return output

    @property
    def changes_logits(self) -> bool:
        return type(self).logits is not Edit.logits

    @property
    def changes_routing(self) -> bool:
        return self.reads_batch or type(self).routing is not Edit.routing

    @property
    def reads_batch(self) -> bool:
        return type(self).routing_at is not Edit.routing_at

    @property
    def changes_output(self) -> bool:
        return type(self).output is not Edit.output

    uses_output = True
    """Whether `output` looks at the output it is given; where no edit does, the experts are not run."""


def _check_ids(layer: MoELayer, ids: Sequence[int]) -> None:
    wrong = [e for e in ids if not 0 <= e < layer.num_experts]
    if wrong:
        raise ValueError(f"layer {layer.index} has experts 0..{layer.num_experts - 1}; there is no expert {wrong[0]}")


@dataclass(eq=False)
class OnExperts(Edit):
    """Base of the edits of single experts."""

    experts: Iterable[ExpertId]

    def __post_init__(self) -> None:
        self.ids = by_layer(self.experts)
        self._columns = {layer: torch.tensor(ids) for layer, ids in self.ids.items()}

    def layers(self) -> Collection[LayerKey]:
        return self.ids

    def check(self, layer: MoELayer) -> None:
        _check_ids(layer, self.ids[layer.index])

    def columns(self, layer: Any, logits: Tensor) -> Tensor:
        """The layer's experts on the device of the logits, where they stay for the tokens to come."""
        if self._columns[layer].device != logits.device:
            self._columns[layer] = self._columns[layer].to(logits.device)
        return self._columns[layer]


@dataclass(eq=False)
class SwitchOff(OnExperts):
    """Close experts to the router: other experts take their slots, as if they had been pruned."""

    def check(self, layer: MoELayer) -> None:
        super().check(layer)
        ids = self.ids[layer.index]
        left = layer.num_experts - len(ids)
        if left < layer.top_k:
            raise ValueError(
                f"switching off {len(ids)} of {layer.num_experts} experts leaves {left} for top_k={layer.top_k} in "
                f"layer {layer.index}; leave at least {layer.top_k} on"
            )
        rule = layer.rule
        if rule is not None and rule.groups > 1:
            size = layer.num_experts // rule.groups
            on = sorted(size - sum(e // size == group for e in ids) for group in range(rule.groups))
            able = [n for n in on if n >= (2 if rule.group_score == "top2" else 1)]  # others get a group score of -inf
            if len(able) < rule.top_groups or sum(able[: rule.top_groups]) < layer.top_k:
                raise ValueError(
                    f"switching off experts {ids} of layer {layer.index} leaves {on} in its {rule.groups} groups, and "
                    f"its router takes top_k={layer.top_k} from the best {rule.top_groups}; leave more on in each group"
                )

    def logits(self, layer: Any, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        return logits.index_fill(1, self.columns(layer, logits), float("-inf")), prefer


@dataclass(eq=False)
class ForceOn(OnExperts):
    """Give experts a slot for every token: their logits are raised to the token's largest, and top-k must take them."""

    def check(self, layer: MoELayer) -> None:
        super().check(layer)
        ids = self.ids[layer.index]
        if len(ids) > layer.top_k:
            raise ValueError(
                f"{len(ids)} experts forced on in layer {layer.index}, which has top_k={layer.top_k} slots; "
                f"force at most {layer.top_k}"
            )
        rule = layer.rule
        if rule is not None and rule.groups > 1:
            groups = {e * rule.groups // layer.num_experts for e in ids}
            if len(groups) > rule.top_groups:
                raise ValueError(
                    f"experts {ids} of layer {layer.index} lie in {len(groups)} groups, and its router opens "
                    f"{rule.top_groups} a token; force experts of at most {rule.top_groups} groups"
                )

    def logits(self, layer: Any, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        columns = self.columns(layer, logits)
        top = logits.amax(dim=1, keepdim=True).expand(-1, len(columns))
        return logits.index_copy(1, columns, top), prefer.index_fill(1, columns, float("inf"))


@dataclass(eq=False)
class LogitBias(Edit):
    """Add a vector to the router logits of each layer. Gradients reach it."""

    bias: Mapping[Any, Float[Tensor, " e"]]
    """{layer: one number per expert}"""

    def layers(self) -> Collection[LayerKey]:
        return self.bias.keys()

    def check(self, layer: MoELayer) -> None:
        shape = tuple(self.bias[layer.index].shape)
        if shape != (layer.num_experts,):
            raise ValueError(f"bias of shape {shape} for the {layer.num_experts} experts of layer {layer.index}")

    def logits(self, layer: Any, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.bias[layer].to(logits)
        spare = logits.shape[1] - len(bias)  # classes that stand for "no expert"
        return logits + (torch.cat([bias, bias.new_zeros(spare)]) if spare else bias), prefer


@dataclass(eq=False)
class Reselect(Edit):
    """Route by any function of the logits: `fn(layer, logits [N, E]) -> logits [N, E]`, then the family's own rule."""

    fn: Callable[[Any, Tensor], Tensor]
    only: Collection[LayerKey] | None = None
    """Layers to act on; None: all."""

    def layers(self) -> Collection[LayerKey] | None:
        return self.only

    def logits(self, layer: Any, logits: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        new = self.fn(layer, logits)
        if new.shape != logits.shape:
            raise ValueError(
                f"Reselect: the function returned {tuple(new.shape)} for logits {tuple(logits.shape)} of layer {layer}"
            )
        return new, prefer


@dataclass(eq=False)
class Gain(Edit):
    """Multiply the gate weights of experts: 0 removes a contribution and refills nothing, unlike SwitchOff."""

    gains: Mapping[Any, float]
    renormalize: bool = field(default=False, kw_only=True)
    """Afterwards scale a token's weights to their former sum (not where nothing is left)."""

    def __post_init__(self) -> None:
        self.ids = by_layer(self.gains)
        self._tables: dict[Any, Tensor] = {}

    def layers(self) -> Collection[LayerKey]:
        return self.ids

    def check(self, layer: MoELayer) -> None:
        _check_ids(layer, self.ids[layer.index])
        ids = self.ids[layer.index]
        # one edit may act in several models at a time: the largest number of experts serves all
        table = torch.ones(max(layer.num_experts + 1, len(self._tables.get(layer.index, ()))))
        for expert in ids:
            table[expert] = self.gains[layer.index, expert]
        self._tables[layer.index] = table

    def routing(self, layer: Any, routing: Routing) -> Routing:
        weights = routing.weights * self._table(layer, routing.weights)[routing.indices]
        if self.renormalize:
            total = weights.sum(dim=-1, keepdim=True)
            kept = routing.weights.sum(dim=-1, keepdim=True) / torch.where(total == 0, 1.0, total)
            weights = weights * kept
        return routing._replace(weights=weights)

    def _table(self, layer: Any, weights: Tensor) -> Tensor:
        """Gain of every expert, and of the index after the last that unused slots may have."""
        table = self._tables[layer]
        if (table.device, table.dtype) != (weights.device, weights.dtype):
            table = self._tables[layer] = table.to(weights)
        return table


@dataclass(eq=False)
class Replace(Edit):
    """Put functions in the place of layers' routed experts: `fn(hidden [N, H], indices, weights) -> [N, H]`."""

    functions: Mapping[Any, Callable[[Tensor, Tensor, Tensor], Tensor]]

    uses_output = False

    def layers(self) -> Collection[LayerKey]:
        return self.functions.keys()

    def output(self, layer: Any, hidden: Tensor, routing: Routing, output: Tensor) -> Tensor:
        new = self.functions[layer](hidden, routing.indices, routing.weights)
        if new.shape != output.shape:
            raise ValueError(
                f"Replace: layer {layer} must give {tuple(output.shape)}; the function gave {tuple(new.shape)}"
            )
        return new
