"""Find the experts of a model: every MoE layer, its router, its experts and the rule between them.

Nothing is known about a family beforehand. An experts module is one that dispatches through transformers'
ExpertsInterface; its router is the sibling that answers hidden states with the router triple; the rule is derived and
verified by `rules`. A model that does not answer this way is refused with the layer's name and what was measured.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moestro.formats.quantised import check_method
from moestro.formats.source import Source, directory_of, plain_dtype, quantisation_of, without_quantisation
from moestro.formats.tensors import check_complete, has_weights
from moestro.layers.routers.base import Router
from moestro.routing import RoutingRule
from moestro.view.experts import is_experts, num_experts_of
from moestro.view.obstacles import check_no_adapter_on_experts, offloaded, why_no_experts
from moestro.view.rules import RouterCall, derive_rule

LayerKey = int | str
"""What a layer is called by: its number where that is unique in the view, or the name of its MoE block."""


@dataclass(eq=False)
class Routed:
    """What is known of a router. It lives with the router, so that all views of the model know the same."""

    rule: RoutingRule | None = None
    no_rule: str = ""
    experts: int = 0
    """Experts that the router knows, where its experts were replaced by a module that holds none."""
    experts_name: str = ""


@dataclass(eq=False)
class MoELayer:
    """One mixture-of-experts layer of an open model."""

    index: Any
    """Number of the decoder layer it sits in (dense layers count too): int."""
    name: str
    """Qualified name of the block that owns router and experts."""
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    router_name: str
    experts_name: str
    known: Routed = field(repr=False)
    path: str = ""
    """The name within the stack, the part of the model that turns token ids into hidden states."""

    @property
    def experts(self) -> nn.Module:
        return getattr(self.block, self.experts_name)

    @property
    def shared(self) -> nn.Module | None:
        """The shared expert, which every token passes; None where there is none."""
        return next((m for n, m in self.block.named_children() if "shared" in n and "gate" not in n), None)

    @property
    def rule(self) -> RoutingRule | None:
        """None where the router cannot be re-run from logits; `no_rule` says why."""
        return self.known.rule

    @rule.setter
    def rule(self, rule: RoutingRule | None) -> None:
        self.known.rule = rule

    @property
    def no_rule(self) -> str:
        return self.known.no_rule

    @property
    def routed(self) -> int:
        """Experts that the router knows, where `experts` was replaced by a module that holds none; else 0."""
        return self.known.experts

    @routed.setter
    def routed(self, count: int) -> None:
        self.known.experts = count

    @property
    def num_experts(self) -> int:
        return num_experts_of(self.experts) if is_experts(self.experts) else self.routed

    @property
    def top_k(self) -> int:
        if self.rule is not None:
            return self.rule.top_k
        return int(self.router.top_k)  # type: ignore[arg-type]

    def __str__(self) -> str:
        rule = self.rule.describe() if self.rule else self.no_rule
        return f"layer {self.index} ({self.name}): {self.num_experts} experts, {rule}"


ALL = "all"
"""The `part` that stands for all expert stacks of a model."""


def find_layers(model: nn.Module, part: str | None = None) -> list[MoELayer]:
    """The MoE layers of `model`, in order: of one stack, the first or that whose name holds `part`, or of `part="all"`.

    Warns where stacks are left out. Raises ValueError where there are none or one is not understood.
    """
    stacks = _stacks(model)
    if not stacks:
        raise ValueError(why_no_experts(model))
    if part == ALL:
        chosen = [*stacks]
    else:
        chosen = [name for name in stacks if part in name] if part else [next(iter(stacks))]
        if len(chosen) != 1:
            raise ValueError(
                f"part={part!r} matches {len(chosen)} of the model's expert stacks {[*stacks]}; name exactly one, or "
                f"open them together with part={ALL!r}"
            )
    if part is None and (left := [name for name in stacks if name not in chosen]):
        warnings.warn(
            f"{type(model).__name__} has {len(stacks)} stacks of experts: opened {chosen[0]}, left {', '.join(left)} "
            f"as they are; part= names another one, and part={ALL!r} opens all",
            stacklevel=4,
        )
    layers: list[MoELayer] = []
    for name in chosen:
        like = None
        for block_name, experts_name, index in stacks[name]:
            layers.append(_attach(model, block_name, experts_name, index, like))
            like = layers[-1].rule
    return layers


def _stacks(model: nn.Module) -> dict[str, list[tuple[str, str, int]]]:
    """{name of a stack of experts: (block, experts attribute, number of the decoder layer) of each layer}"""
    stacks: dict[str, list[tuple[str, str, int]]] = {}
    check_no_adapter_on_experts(model, [(n, m) for n, m in model.named_modules() if is_experts(m)])
    seen: set[tuple[nn.Module, int]] = set()
    # layers may share one module: it then has several names
    for name, module in model.named_modules(remove_duplicate=False):
        known = vars(module).get(_KNOWN)
        if is_experts(module):
            block_name, experts_name, index, stack = _place(name)
        elif known is not None and known.experts:  # a router whose experts were replaced
            block_name, _, index, stack = _place(name)
            experts_name = known.experts_name
        else:
            continue
        block = model.get_submodule(block_name)
        if (block, index) in seen:
            continue  # one module under two names
        seen.add((block, index))
        suffix = re.sub(r"\d+", "*", block_name[len(stack) :])
        stacks.setdefault(f"{stack}{suffix}", []).append((block_name, experts_name, index))
    return stacks


def left_out(model: nn.Module, layers: Sequence[MoELayer]) -> list[tuple[str, int]]:
    """(block, number of experts) of the MoE layers in `model` that are not among `layers`."""
    known = {layer.name for layer in layers}
    return [
        (block, num_experts_of(experts))
        for places in _stacks(model).values()
        for block, attribute, _ in places
        if block not in known and is_experts(experts := model.get_submodule(f"{block}.{attribute}"))
    ]


def _place(name: str) -> tuple[str, str, int, str]:
    """(block name, attribute, decoder layer number, name of the stack) from the qualified name of a block's part."""
    block_name, _, attribute = name.rpartition(".")
    numbers = list(re.finditer(r"(?:^|\.)(\d+)(?=\.|$)", block_name))
    if not numbers:
        return (block_name, attribute, 0, block_name)
    return (block_name, attribute, int(numbers[-1].group(1)), block_name[: numbers[-1].start()])


_KNOWN = "_moestro_router"


def _attach(model: nn.Module, block_name: str, experts_name: str, index: int, like: RoutingRule | None) -> MoELayer:
    block = model.get_submodule(block_name)
    experts = getattr(block, experts_name)
    attempts = []
    for name, child in block.named_children():
        known = vars(child).get(_KNOWN) or Routed(experts_name=experts_name)
        num_experts = known.experts or (num_experts_of(experts) if is_experts(experts) else 0)
        if child is experts or not num_experts or not _could_route(child, num_experts):
            continue
        if isinstance(child, Router) and child.rule is None:
            known.no_rule = child.no_rule
        elif any(p.is_meta for p in child.parameters()):
            why = offloaded(child) or "not loaded"
            attempts.append(
                f"{name}: its weights are on the meta device, {why}; load the model whole, or open its directory with "
                "stream=True"
            )
            continue
        else:
            try:
                known.rule, known.no_rule = _rule(RouterCall(block, child), num_experts, like)
            except TypeError as e:
                attempts.append(f"{name}: {e}")
                continue
            except ValueError as e:
                raise ValueError(f"layer {index} ({block_name}.{name}): {e}") from None
        vars(child)[_KNOWN] = known
        return MoELayer(index, block_name, block, child, name, experts_name, known)
    raise ValueError(
        f"layer {index} ({block_name}): no router beside the experts returns (logits [N, E], weights [N, K], indices "
        f"[N, K]); tried {'; '.join(attempts) or 'nothing: no child has a weight with one row per expert'}"
    )


def _rule(call: RouterCall, num_experts: int, like: RoutingRule | None) -> tuple[RoutingRule | None, str]:
    """(the router's rule, why there is none). Raises TypeError where it is no router, ValueError where no rule fits."""
    router, routing = call.router, call(call.hidden(0))
    if isinstance(router, Router) and router.rule is not None and router.rule.top_p is not None:
        return router.rule, ""  # the number of slots depends on the tokens: no probe could tell the rule
    if call.by_token_id:
        return None, "experts are looked up by token id: there is no choice to re-run"
    if routing.logits.shape[1] < num_experts:
        return None, f"returns {routing.logits.shape[1]} logits for {num_experts} experts"
    return derive_rule(call, num_experts, like), ""


def _could_route(module: nn.Module, num_experts: int) -> bool:
    if isinstance(module, Router):
        return True
    return any(p.dim() >= 1 and num_experts <= p.shape[0] <= num_experts + 8 for p in module.parameters())


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
    quantisation, directory = quantisation_of(config.to_dict()), directory_of(path)
    if quantisation is not None:
        check_method(path, quantisation)
        if directory is None or not has_weights(directory):
            raise ValueError(
                f"{path} is quantised ({quantisation['quant_method']}), and its files, which would be read, are not "
                f"here: fetch them with `hf download {path}`, or open a directory"
            )
    kwargs.setdefault("dtype", "auto")
    family = model_class(config)
    start = time.perf_counter()
    if quantisation is None or directory is None:
        loaded: Any = family.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
    else:
        model, info = _load_dequantised(family, directory, config, **kwargs)
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
    """The sub-model that turns token ids into hidden states: the innermost PreTrainedModel around all the layers."""
    from transformers import PreTrainedModel

    inner, depth = model, -1
    for name, module in model.named_modules():
        holds = name == "" or all(layer.name.startswith(name + ".") for layer in layers)
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
