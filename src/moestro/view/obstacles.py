"""What stands between moestro and a model's plain tensors, named as what it is: adapters, quantised tensors, offloaded
layers, and families whose experts no interface reaches.

Each refusal names a way out. Classes of optional packages are asked for only where the package is loaded already: else
no model can hold one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from moestro.view.experts import dispatches, own_tensors

MERGE = "merge it into the weights first: model = model.merge_and_unload(), of the PeftModel"
MERGE_INJECTED = (
    "merge it into the weights first: model.save_pretrained(DIR) writes the adapter alone, and "
    "peft.PeftModel.from_pretrained(BASE, DIR).merge_and_unload(), with BASE the model without it, merges it"
)
LOOKALIKES = re.compile(r"(Experts|MoE|Moe|MoeBlock|SparseMLP)$")
"""How transformers' families name the classes that hold experts."""


# --- adapters --------------------------------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every layer that PEFT has wrapped: its weights are not what the layer computes with."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield name, module


def _peft_model(model: nn.Module) -> nn.Module | None:
    """The PeftModel around or in `model`; None where there is none."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    return next((m for m in model.modules() if isinstance(m, PeftModel)), None)


def _way_out(model: nn.Module) -> str:
    return MERGE_INJECTED if getattr(model, "_hf_peft_config_loaded", False) else MERGE


def adapter_on(model: nn.Module, *parts: nn.Module) -> str | None:
    """Words for the first PEFT adapter that acts on one of these modules; None where none does."""
    inside = {id(m) for part in parts for m in part.modules()}
    for name, module in adapters(model):
        around = any(id(m) in inside for m in module.modules())
        if around:
            return f"a PEFT adapter ({type(module).__name__} at {name})"
    return None


def check_no_adapter_on_experts(model: nn.Module, experts: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise ValueError where an adapter wraps experts: their weights are put together anew at every forward."""
    for name, module in experts:
        found = adapter_on(model, module)
        if found:
            raise ValueError(
                f"{name} carries {found}, which hides its experts; {_way_out(model)}, then open that model"
            )


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError where the model cannot be saved because PEFT adapters are in it."""
    found = next(iter(adapters(model)), None)
    if found is not None:
        raise ValueError(
            f"{found[0]} carries a PEFT adapter ({type(found[1]).__name__}), which a plain checkpoint has no place "
            f"for; {_way_out(model)}, then open and save that model"
        )
    if _peft_model(model) is not None:
        raise ValueError(
            f"{type(model).__name__} is a PEFT model whose adapter lies beside the layers (a learned prompt), and a "
            "plain checkpoint has no place for it; model.get_base_model() is the model without it"
        )


# --- tensors that are no plain ones ----------------------------------------------------------------------------------


def kind_of(tensor: Tensor) -> str | None:
    """What the tensor is where it is not a plain one of floats: quantised, sharded; None where it is plain."""
    data = tensor.data
    if type(data).__name__ == "DTensor":
        return "sharded over devices (DTensor)"
    if type(data) is not Tensor:
        return f"quantised ({type(data).__module__.partition('.')[0]}, {type(data).__name__})"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"packed ({type(tensor).__module__.partition('.')[0]}, {type(tensor).__name__})"
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return f"packed ({str(tensor.dtype).removeprefix('torch.')})"
    return None


def packed_in(module: nn.Module) -> tuple[str, Tensor, str] | None:
    """(name, tensor, words) of the first parameter that is no plain tensor of floats."""
    for prefix, owner in module.named_modules():
        for name in owner._parameters:
            tensor = owner._parameters[name]
            if tensor is not None and (kind := kind_of(tensor)) is not None:
                return (f"{prefix}.{name}" if prefix else name), tensor, kind
    return None


def _unpack(model: nn.Module, name: str, tensor: Tensor) -> str:
    """How to get plain weights in the place of this one."""
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    if method is not None:
        return (
            "load it dequantised (from_pretrained with the quantisation config's dequantize option where it has one, "
            "or moestro.open on the checkpoint's directory), or cut the checkpoint it was quantised from and quantise "
            "the result"
        )
    if hasattr(type(tensor), "dequantize") and type(tensor.data) is not Tensor:
        owner, _, attribute = name.rpartition(".")
        return (
            "cut the model first and quantise the result, or make its experts plain again: "
            f"module.{attribute} = torch.nn.Parameter(module.{attribute}.dequantize()) for module = {owner}"
        )
    return "cut the checkpoint it was made from, and quantise or shard the result"


def offloaded(module: nn.Module) -> str | None:
    """Words for where accelerate keeps the module's weights between forwards; None where they are in the module."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "offload", False):
                return "offloaded by accelerate (to the CPU or a disk)"
    return None


def check_plain(model: nn.Module, name: str, block: nn.Module, parts: Sequence[nn.Module], *, streamed: bool) -> None:
    """Raise ValueError where the tensors of an MoE block cannot be cut: adapted, packed, or not there.

    `parts`: its router and experts. `streamed`: weights on the meta device are to be loaded layer by layer.
    """
    if found := adapter_on(model, *parts):
        raise ValueError(f"{name} carries {found}: its tensors cannot be cut; {_way_out(model)}, then open that model")
    for part in parts:
        if where := offloaded(part):
            raise ValueError(
                f"{name}: its weights are {where} and cannot be cut there; open the checkpoint's directory with "
                "stream=True, or load the model whole (device_map='cpu')"
            )
        if packed := packed_in(part):
            tensor_name, tensor, words = packed
            prefix = next((n for n, m in model.named_modules() if m is part), name)
            raise ValueError(
                f"{prefix}.{tensor_name} is {words}: it cannot be cut; "
                f"{_unpack(model, f'{prefix}.{tensor_name}', tensor)}"
            )
    tensors = [t for _, t in own_tensors(block)] + [t for part in parts for t in (*part.parameters(), *part.buffers())]
    if not streamed and any(t.is_meta for t in tensors):
        raise ValueError(
            f"{name}: its weights are on the meta device, where there is nothing to cut; load them, or open the "
            "checkpoint's directory with stream=True"
        )


def why_no_slots(experts: nn.Module) -> str | None:
    """Why single slots of these experts cannot be observed; None where they can."""
    if not dispatches(experts):
        return f"{type(experts).__name__} does not go through transformers' experts interface, and has no slots to see"
    packed = packed_in(experts)
    if packed is None:
        return None
    return f"{packed[0]} is {packed[2]}, which moestro's backend cannot compute with slot by slot"


# --- models without experts that can be reached ----------------------------------------------------------------------


def why_no_experts(model: nn.Module) -> str:
    """Why `model` cannot be opened for its experts: dense, or a mixture of another make."""
    family = type(model).__name__
    closed = next(((n, m.no_triple) for n, m in model.named_modules() if hasattr(m, "no_triple")), None)
    if closed:
        return f"{family} cannot be opened: {closed[0]} {closed[1]}"
    alike = [(n, m) for n, m in model.named_modules() if n and _looks_like_experts(n, m)]
    held = next((found for found in alike if found[0].endswith("experts")), alike[0] if alike else None)
    custom = type(model).__module__.startswith("transformers_modules")
    if held is None and not custom:
        return f"{family} is a dense model: it has no experts to open (experts=False opens its heads)"
    where = "" if held is None else f" (it keeps its experts in {held[0]}, a {type(held[1]).__name__})"
    if type(model).__module__.startswith("transformers."):
        reason = f"transformers {transformers.__version__} has not brought this family behind its experts interface"
        if held is not None and type(held[1]).__name__ == "NllbMoeExperts":
            reason += (
                "; besides, that version computes its experts 0 and 1 for all tokens, whatever the router chose (it "
                "takes the router's mask, which is one-hot already, for expert numbers), so nothing measured on it "
                "would be of the model that was trained"
            )
        way = "experts=False opens its attention heads"
    else:
        reason = "its code is not transformers' own"
        way = "load the same checkpoint with the family's class in transformers (trust_remote_code=False)"
    return (
        f"{family} is a mixture of experts that does not use transformers' experts interface{where}, so its experts "
        f"cannot be reached: {reason}; {way}"
    )


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    """By what it is called, and that it holds something more than once."""
    if not (name.rpartition(".")[2].endswith("experts") or LOOKALIKES.search(type(module).__name__)):
        return False
    if "shared" in name.rpartition(".")[2]:
        return False
    several = isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
    stacked = any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))
    stated = getattr(module, "num_experts", None)
    return several or stacked or (isinstance(stated, int) and stated > 1)
