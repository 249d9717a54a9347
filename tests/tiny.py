"""A few tiny models that stand for the styles of routing, and plain code to hold moestro against.

The references use hooks and the families' own code only: nothing of moestro.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.tiny import FIRST_WORD, TinyModel, build
from moestro.view.events import MoEEvent, Tokens

OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},  # softmax, normalised; its first layer is dense
    "deepseek_v3": {},  # sigmoid, correction bias, 2 groups of 4, shared expert; its first layer is dense
    "gpt_oss": {},  # softmax over the chosen, biases everywhere, transposed weights
    "phimoe": {},  # SparseMixer, LayerNorm with bias
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},  # its first router looks tokens up
}
LEARNED = [family for family in OVERRIDES if family != "deepseek_v4"]
"""Families whose routers all choose by logits."""

EXACT = dict(rtol=0.0, atol=0.0)
FP32 = dict(rtol=1e-4, atol=1e-4)
BF16 = dict(rtol=4e-2, atol=4e-2)


def make(family: str, **overrides: Any) -> TinyModel:
    return build(family, **{"num_hidden_layers": 3, **OVERRIDES[family], **overrides})


def logits_of(small: TinyModel | nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model = small.model if isinstance(small, TinyModel) else small
    with torch.no_grad():
        return model(**inputs).logits


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Token ids [T] of random documents."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST_WORD, 131, (length,), generator=generator) for length in lengths]


def padded(docs: Sequence[Tensor], side: str = "right", **more: Any) -> dict[str, Any]:
    """One batch of documents, with a column of padding beyond the longest."""
    length = max(map(len, docs)) + 1
    ids, mask = torch.zeros(len(docs), length, dtype=torch.long), torch.zeros(len(docs), length, dtype=torch.long)
    for row, doc in enumerate(docs):
        place = slice(0, len(doc)) if side == "right" else slice(length - len(doc), length)
        ids[row, place], mask[row, place] = doc, 1
    return {"input_ids": ids, "attention_mask": mask, **more}


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


@contextmanager
def watching_experts(view: Any) -> Iterator[dict[int, list[tuple[Tensor, Tensor, Tensor]]]]:
    """{layer: [(hidden, indices, weights) of each call of its experts]}"""
    calls: dict[int, list[Any]] = {layer.index: [] for layer in view.layers}
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args, seen=calls[layer.index]: seen.append(args))
        for layer in view.layers
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def slot_outputs(experts: nn.Module, hidden: Tensor, indices: Tensor) -> Tensor:
    """[N, K, H]: each slot's output before its gate weight, by the family's own code, one slot at a time."""
    one = hidden.new_ones(len(hidden), 1)
    with torch.no_grad():
        outputs = [type(experts).forward.__wrapped__(experts, hidden, i[:, None], one) for i in indices.T]
    return torch.stack(outputs, dim=1)


@contextmanager
def family_with_logits(view: Any, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """The families' own routers, with `change(layer, logits)` in the place of what their linear map gives."""
    linear = F.linear

    def patched(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(F, "linear", lambda *a, **k: change(index, linear(*a, **k))):
                return forward(*args, **kwargs)

        return call

    for layer in view.layers:
        layer.router.forward = patched(layer.index, layer.router.forward)
    try:
        yield
    finally:
        for layer in view.layers:
            del layer.router.forward


class Record:
    """An observer that keeps everything: {layer: {"hidden": [N, H], ...}}, tokens by sample and position."""

    def __init__(self, *needs: str):
        self.needs = frozenset(needs)
        self.kept: dict[int, list[tuple[Tokens, dict[str, Tensor]]]] = {}

    def update(self, event: MoEEvent) -> None:
        values = dict(event.routing._asdict(), hidden=event.hidden, combined=event.combined)
        values |= {need: getattr(event, need) for need in self.needs}
        if "maxima" in self.needs:
            values["channels"] = event.channels
        assert {len(v) for v in values.values()} == {len(event.tokens)}
        self.kept.setdefault(event.layer, []).append((event.tokens, {n: v.clone() for n, v in values.items()}))

    def merge(self, other: "Record") -> None:
        for layer, parts in other.kept.items():
            self.kept.setdefault(layer, []).extend(parts)

    def result(self) -> dict[int, dict[str, Tensor]]:
        joined = {}
        for layer, parts in self.kept.items():
            tokens = Tokens.cat([t for t, _ in parts])
            order = (tokens.sample * 10_000 + tokens.position).argsort()
            joined[layer] = {name: torch.cat([v[name] for _, v in parts])[order] for name in parts[0][1]}
            joined[layer] |= {n: getattr(tokens, n)[order] for n in ("sample", "position", "id", "domain")}
        return joined
