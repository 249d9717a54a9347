"""Mixtures of experts in the place of the feed-forward layers of a transformers model, which knows nothing of them.

Found are modules of two linear maps, or of three with a gate, by the names in IN and OUT (Llama, Qwen, ViT), and pairs
`intermediate.dense`, `output.dense` (BERT and its family, whose `output` also holds dropout, residual and norm: these
stay; a dropout within a module that is replaced goes). Each is computed once from its weights, and refused where that
is not what the model computes.

The model's own layers pass on hidden states alone. What else routers look at (padding, token ids, progress of training)
is read from the arguments of each forward of the base model, and there for its duration.
Shapes: H hidden, I neurons, W of them, B rows, T positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.build.equivalent_split import IN, LARGEST_DIFFERENCE, OUT, split_ffn
from moestro.layers import MoE
from moestro.routing import RoutingContext
from moestro.view.experts import is_experts


class PlainFFN(nn.Module):
    """act(x W1 + b1) W2 + b2."""

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1, self.fc2, self.act = fc1, fc2, act

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


@dataclass(frozen=True)
class DenseFFN:
    """A feed-forward layer and where it stands: `name` is the module that experts replace."""

    name: str
    mlp: nn.Module
    """Its linear maps, live, as `split_ffn` reads them."""
    then: str = ""
    """The output map, where that stands elsewhere."""

    @property
    def inputs(self) -> list[nn.Linear]:
        """The maps from hidden states to neurons: up, or gate and up."""
        return [m for n, m in self.mlp.named_children() if isinstance(m, nn.Linear) and n not in OUT]

    @property
    def output(self) -> nn.Linear:
        return next(m for n, m in self.mlp.named_children() if isinstance(m, nn.Linear) and n in OUT)

    @property
    def width(self) -> int:
        return self.output.in_features

    def replace(self, model: nn.Module, module: nn.Module) -> None:
        """Put `module`, which maps hidden states to hidden states, into this place of `model`."""
        model.set_submodule(self.name, module)
        if self.then:
            model.set_submodule(self.then, nn.Identity())

    def put(self, model: nn.Module, mlp: nn.Module) -> None:
        """Put a layer of the same make, with other neurons, into this place of `model`."""
        if not self.then:
            return model.set_submodule(self.name, mlp)
        model.set_submodule(f"{self.name}.dense", mlp.fc1)  # type: ignore[arg-type]
        model.set_submodule(self.then, mlp.fc2)  # type: ignore[arg-type]


def find_ffns(model: nn.Module) -> list[DenseFFN]:
    """The dense feed-forward layers of `model`, in order.

    Raises ValueError where there are none, the model has experts already, or a layer computes something else.
    """
    if name := next((n for n, m in model.named_modules() if is_experts(m)), None):
        raise ValueError(f"{type(model).__name__} has experts already, at {name}: only a dense model can be split")
    found = [ffn for name, module in model.named_modules() if (ffn := _ffn_at(name, module))]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layer that is known: looked for modules of nothing but linear "
            f"maps {', '.join(IN)} and {', '.join(OUT)} (and gate_proj), and for pairs intermediate.dense, output.dense"
        )
    for ffn in found:
        _check_computes(model, ffn)
    return found


def _ffn_at(name: str, module: nn.Module) -> DenseFFN | None:
    children = dict(module.named_children())
    before, after = children.get("intermediate"), children.get("output")
    first, last = getattr(before, "dense", None), getattr(after, "dense", None)
    act: Any = getattr(before, "intermediate_act_fn", None)
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and first.out_features == last.in_features and act:
        dot = name and f"{name}."
        return DenseFFN(f"{dot}intermediate", PlainFFN(first, last, act), then=f"{dot}output.dense")
    linears = {n: m for n, m in children.items() if isinstance(m, nn.Linear)}
    ups, downs = (set(linears) & set(names) for names in (IN, OUT))
    own = {id(p) for m in linears.values() for p in m.parameters()}
    plain = set(linears) <= ups | downs | {"gate_proj"} and all(id(p) in own for p in module.parameters())
    return DenseFFN(name, module) if plain and len(ups) == len(downs) == 1 else None


@torch.no_grad()
def _check_computes(model: nn.Module, ffn: DenseFFN) -> None:
    """That the layer is what `split_ffn` takes it for, on random tokens."""
    weight = ffn.output.weight
    hidden = torch.randn(8, ffn.inputs[0].in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    place = model.get_submodule(ffn.name)
    was_training = place.training
    theirs = place.eval()(hidden)
    place.train(was_training)
    theirs = ffn.output(theirs) if ffn.then else theirs
    ours = split_ffn(ffn.mlp, 1)(hidden)
    difference = float((theirs - ours).abs().max() / theirs.abs().max().clamp_min(1e-20))
    if not difference <= (LARGEST_DIFFERENCE if weight.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"{ffn.name} differs from its two or three linear maps by {difference:.2g} of its largest output: it "
            "computes something else, and cannot be split"
        )


def select_neurons(mlp: nn.Module, neurons: Int[Tensor, " w"]) -> nn.Module:
    """A copy of the layer with these neurons alone, in this order; one named twice is there twice."""
    chosen = copy.deepcopy(mlp)
    for name, linear in chosen.named_children():
        if not isinstance(linear, nn.Linear):
            continue
        at = neurons.to(linear.weight.device)
        if name in OUT:
            linear.weight, linear.in_features = nn.Parameter(linear.weight.detach()[:, at]), len(at)
        else:
            linear.weight, linear.out_features = nn.Parameter(linear.weight.detach()[at]), len(at)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[at])
    return chosen


class InnerMoE(MoE):
    """A MoE whose model knows of no context: `handed` is that of the forward that is running."""

    def __init__(self, *args: Any, layer: int, **options: Any):
        super().__init__(*args, **options)
        self.layer = layer
        self.handed: RoutingContext | None = None

    def forward(self, hidden: Float[Tensor, "... h"], context: RoutingContext | None = None) -> Float[Tensor, "... h"]:
        return super().forward(hidden, self.handed if context is None else context)


def hand_contexts(model: Any) -> None:
    """Let the routers of every InnerMoE know what each forward of `model` is called with.

    `model.base_model.progress` is the share of the training that is done; a trainer sets it.
    """
    base = model.base_model
    base.progress = 1.0
    base.register_forward_pre_hook(_hand, with_kwargs=True)
    base.register_forward_hook(_take_back, always_call=True)


def _inner(base: nn.Module) -> list[InnerMoE]:
    return [m for m in base.modules() if isinstance(m, InnerMoE)]


def _hand(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if base.training and base.is_activation_checkpointing:
        raise ValueError(
            "layers are computed again without a routing context under gradient checkpointing: turn it off"
        )
    given: Any = inspect.signature(base.forward).bind_partial(*args, **kwargs).arguments
    ids, mask, past = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    inputs = given["inputs_embeds"] if ids is None else ids
    rows, length = inputs.shape[:2]
    two_dimensional = isinstance(mask, Tensor) and mask.dim() == 2
    state: dict[str, Tensor] = {}  # one for all layers: they run in order, and hand on through it
    for moe in _inner(base):
        moe.handed = RoutingContext(
            shape=(rows, length),
            mask=mask[:, -length:].bool() if two_dimensional else None,
            input_ids=ids,
            layer=moe.layer,
            start=0 if past is None else int(past.get_seq_length()),
            progress=base.progress,
            state=state,
        )


def _take_back(base: nn.Module, args: Any, out: Any) -> None:
    for moe in _inner(base):
        moe.handed = None
