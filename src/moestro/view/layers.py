"""Find the experts of a model: every MoE layer, its router, its experts and the rule between them.

Nothing is known about a family beforehand. An experts module is one that dispatches through transformers'
ExpertsInterface; its router is the sibling that answers hidden states with the router triple; the rule is derived and
verified by `rules`. A model that does not answer this way is refused with the layer's name and what was measured.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moestro.formats.quantised import check_method
from moestro.formats.source import Source, plain_dtype, quantisation_of, without_quantisation
from moestro.formats.tensors import check_complete
from moestro.layers.routers.base import Router
from moestro.routing import RoutingRule
from moestro.view.rules import RouterCall, derive_rule


@dataclass(eq=False)
class MoELayer:
    """One mixture-of-experts layer of an open model."""

    index: int
    """Number of the decoder layer it sits in (dense layers count too)."""
    name: str
    """Qualified name of the block that owns router and experts."""
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    router_name: str
    experts_name: str
    rule: RoutingRule | None
    """None where the router cannot be re-run from logits; `no_rule` says why."""
    no_rule: str = ""
    routed: int = 0
    """Experts that the router knows, where `experts` was replaced by a module that holds none."""

    @property
    def experts(self) -> nn.Module:
        return getattr(self.block, self.experts_name)

    @property
    def shared(self) -> nn.Module | None:
        """The shared expert, which every token passes; None where there is none."""
        return next((m for n, m in self.block.named_children() if "shared" in n and "gate" not in n), None)

    @property
    def num_experts(self) -> int:
        return num_experts_of(self.experts) if _stacked(self.experts) else self.routed

    @property
    def top_k(self) -> int:
        if self.rule is not None:
            return self.rule.top_k
        return int(self.router.top_k)  # type: ignore[arg-type]

    def __str__(self) -> str:
        rule = self.rule.describe() if self.rule else self.no_rule
        return f"layer {self.index} ({self.name}): {self.num_experts} experts, {rule}"


def is_experts(module: nn.Module) -> bool:
    """Whether the module's forward dispatches through transformers' ExpertsInterface, or keeps its contract."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate") and bool(_stacked(module))


def _stacked(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters(recurse=False) if p.dim() == 3]


def num_experts_of(experts: nn.Module) -> int:
    return _stacked(experts)[0].shape[0]


def find_layers(model: nn.Module, part: str | None = None) -> list[MoELayer]:
    """The MoE layers of `model`, in order. Raises ValueError where there are none or one is not understood."""
    places = [
        place
        for name, module in model.named_modules()
        if is_experts(module) and (place := _place(name)) and place[2] is not None
    ]
    if not places:
        raise ValueError(_nothing_found(model))
    stacks: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
    for block_name, experts_name, index, stack in ((b, e, i, s) for b, e, i, s in places if i is not None):
        suffix = re.sub(r"\d+", "*", block_name[len(stack) :])
        stacks.setdefault((stack, suffix), []).append((block_name, experts_name, index))
    names = [f"{stack}{suffix}" for stack, suffix in stacks]
    chosen = [i for i, name in enumerate(names) if part in name] if part else [0]
    if len(chosen) != 1:
        raise ValueError(f"part={part!r} matches {len(chosen)} of the model's expert stacks {names}; name exactly one")
    layers: list[MoELayer] = []
    for block_name, experts_name, index in list(stacks.values())[chosen[0]]:
        like = layers[-1].rule if layers else None
        layers.append(_attach(model, block_name, experts_name, index, like))
    return layers


def _place(experts_name: str) -> tuple[str, str, int | None, str] | None:
    """(block name, experts attribute, decoder layer number, name of the stack) from a qualified name."""
    block_name, _, attribute = experts_name.rpartition(".")
    numbers = list(re.finditer(r"(?:^|\.)(\d+)(?=\.|$)", block_name))
    if not numbers:
        return (block_name, attribute, 0, block_name)
    return (block_name, attribute, int(numbers[-1].group(1)), block_name[: numbers[-1].start()])


def _attach(model: nn.Module, block_name: str, experts_name: str, index: int, like: RoutingRule | None) -> MoELayer:
    block = model.get_submodule(block_name)
    experts = getattr(block, experts_name)
    num_experts = num_experts_of(experts)
    attempts = []
    for name, child in block.named_children():
        if child is experts or not _could_route(child, num_experts):
            continue
        if isinstance(child, Router) and child.rule is None:
            return MoELayer(index, block_name, block, child, name, experts_name, None, child.no_rule)
        if any(p.is_meta for p in child.parameters()):
            attempts.append(f"{name}: its weights are on the meta device; load them, or open with stream=True")
            continue
        try:
            call = RouterCall(block, child)
            routing = call(call.hidden(0))
        except TypeError as e:
            attempts.append(f"{name}: {e}")
            continue
        layer = MoELayer(index, block_name, block, child, name, experts_name, None)
        if isinstance(child, Router) and child.rule is not None and child.rule.top_p is not None:
            layer.rule = child.rule  # the number of slots depends on the tokens: no probe could tell the rule
        elif call.by_token_id:
            layer.no_rule = "experts are looked up by token id: there is no choice to re-run"
        elif routing.logits.shape[1] < num_experts:
            layer.no_rule = f"returns {routing.logits.shape[1]} logits for {num_experts} experts"
        else:
            try:
                layer.rule = derive_rule(call, num_experts, like)
            except ValueError as e:
                raise ValueError(f"layer {index} ({block_name}.{name}): {e}") from None
        return layer
    raise ValueError(
        f"layer {index} ({block_name}): no router beside the experts returns (logits [N, E], weights [N, K], indices "
        f"[N, K]); tried {'; '.join(attempts) or 'nothing: no child has a weight with one row per expert'}"
    )


def _could_route(module: nn.Module, num_experts: int) -> bool:
    if isinstance(module, Router):
        return True
    return any(p.dim() >= 1 and num_experts <= p.shape[0] <= num_experts + 8 for p in module.parameters())


def _nothing_found(model: nn.Module) -> str:
    custom = type(model).__module__.startswith("transformers_modules")
    lists = [
        n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("experts") and len(m) > 1
    ]
    if custom or lists:
        where = f" (it keeps its experts in {lists[0]})" if lists else ""
        return (
            f"{type(model).__name__} does not use transformers' experts interface{where}, so its experts cannot be "
            "reached; load the same checkpoint with the family's class in transformers (trust_remote_code=False)"
        )
    closed = next(((n, m.no_triple) for n, m in model.named_modules() if hasattr(m, "no_triple")), None)
    if closed:
        return f"{type(model).__name__} cannot be opened: {closed[0]} {closed[1]}"
    return f"{type(model).__name__} is a dense model: it has no experts to open (experts=False opens its heads)"


TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load(path: str | Path, **kwargs: Any) -> tuple[nn.Module, Any, float]:
    """Model, tokenizer (None where the directory has none) and seconds to load the model, from a directory or the hub.

    Quantised weights (see `formats.quantised`) are dequantised.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete, or quantised in a way that is not read; nothing has
            been loaded. ValueError too where it turns out to miss weights of the model.
    """
    from transformers import AutoConfig

    from moestro.view.checkpoint import model_class

    if Path(path).is_dir():
        check_complete(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    quantisation = quantisation_of(config.to_dict())
    if quantisation is not None:
        check_method(path, quantisation)
        if not Path(path).is_dir():
            raise ValueError(
                f"{path} is quantised ({quantisation['quant_method']}), and moestro dequantises directories: fetch it "
                f"(`hf download {path} --local-dir DIR`) and open DIR"
            )
    kwargs.setdefault("dtype", "auto")
    family = model_class(config)
    start = time.perf_counter()
    if quantisation is None:
        loaded: Any = family.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
    else:
        model, info = _load_dequantised(family, Path(path), config, **kwargs)
    seconds = time.perf_counter() - start
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of {family.__name__}, {missing[0]} for one, so they would be random; "
            "it is incomplete, or of another family than its config says"
        )
    return model.eval(), load_tokenizer(path), seconds


def _load_dequantised(family: Any, path: Path, config: Any, *, dtype: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
    """The model of a quantised checkpoint with plain weights, each dequantised when transformers asks for it."""
    dtype = plain_dtype(path, config, dtype)
    source = Source(path, dtype)
    plain = without_quantisation(config)
    kwargs |= {"config": plain, "state_dict": source.plain, "dtype": dtype, "output_loading_info": True}
    model, info = family.from_pretrained(None, **kwargs)
    model.config._name_or_path = str(path)
    adopt_generation_config(model, path)
    return model, info


def adopt_generation_config(model: Any, path: Path) -> None:
    """Give the model the generation config of its directory, as `from_pretrained` does."""
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer; None where it has none."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(next(Path(path).glob(pattern), None) for pattern in TOKENIZER_FILES):
        return None  # for some families transformers would make up an empty one
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, AttributeError):  # a checkpoint may come without one: texts then need it
        return None


def stack_of(model: nn.Module, layers: list[MoELayer]) -> nn.Module:
    """The sub-model that turns token ids into hidden states: the innermost PreTrainedModel around the layers."""
    from transformers import PreTrainedModel

    inner, depth = model, -1
    for name, module in model.named_modules():
        holds = name == "" or layers[0].name.startswith(name + ".")
        if isinstance(module, PreTrainedModel) and holds and name.count(".") + (name != "") > depth:
            inner, depth = module, name.count(".") + (name != "")
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of any language model that turns token ids into hidden states."""
    get = getattr(model, "get_decoder", None)
    found = get() if get is not None else None
    return found if isinstance(found, nn.Module) else getattr(model, "base_model", model)


def decoder_layer(stack: nn.Module, layer: MoELayer) -> nn.Module:
    """The decoder layer around an MoE block: the innermost numbered module that holds it."""
    for name, module in stack.named_modules():
        if name.rpartition(".")[2].isdigit() and any(m is layer.block for m in module.modules()):
            found = module
    return found
