"""Small random models with super experts put in by hand: what a profile must find.

A text opens with one token, BOS, which sees nothing but itself, so its hidden states are the same in every text. In
each planted expert's layer, with h what BOS gives its router and C the second moment of what other tokens give:

    router row = d * (largest logit + MARGIN)       d = C^-1 h, scaled to d . h = 1: as little as can be on other tokens
    gate and up rows = h / |h|^2 * EXCITATION
    one row of the down projection is scaled until BOS's output there is MAGNITUDE

Shapes: N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

import moestro.view.open as opening
from moestro.sets import Chosen
from moestro.view.events import MoEEvent
from moestro.view.experts_family import read_family

BOS = 1
CHANNEL = 5
MARGIN, EXCITATION, MAGNITUDE = 2.0, 8.0, 2000.0
SHARPNESS = 2.0
"""Of the language head, so that a random model has something to lose."""
PLANTED: Chosen = frozenset({(1, 3), (2, 9), (3, 0)})
EXPERTS = 16
HIDDEN = 64
VOCABULARY = 6144
"""The bundled tokenizer's."""

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=HIDDEN**-0.5,  # logits and activations of about 1
    num_experts_per_tok=2,
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=2,
    pad_token_id=0,
)
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **(_COMMON | {"head_dim": 16}),  # not among the fields that its class declares
        num_experts=EXPERTS,
        moe_intermediate_size=48,
        num_key_value_heads=2,
        mlp_only_layers=[],
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=EXPERTS, intermediate_size=48, num_key_value_heads=2, sliding_window=None
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_COMMON,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=48,
        intermediate_size=96,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}


def planted_model(family: str, seed: int, members: Collection[tuple[int, int]] = PLANTED) -> Any:
    """A view of a random model of the family, in whose layers these experts are planted, first layer first."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        view = opening.open(AutoModelForCausalLM.from_config(FAMILIES[family]()).eval())
    with torch.no_grad():
        view.model.lm_head.weight.mul_(SHARPNESS)
    for layer, expert in sorted(members):
        _plant(view, layer, expert)
    return view


@torch.no_grad()
def _plant(view: Any, layer: int, expert: int) -> None:
    ids = torch.randint(6, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ((hidden, logits),) = view.observe([ids], [_RouterInput(layer)], progress=False)
    first = torch.arange(len(hidden)) % ids.shape[1] == 0
    h, others = hidden[0], hidden[~first]
    moment = others.T @ others / len(others) + 1e-2 * torch.eye(HIDDEN)
    direction = torch.linalg.solve(moment, h)
    at = view.layer(layer)
    at.router.weight[expert] = direction / (direction @ h) * (logits[0].max() + MARGIN)
    family = read_family(at.experts, hidden)
    family.up[expert] = (h / h.square().sum())[:, None] * EXCITATION
    output = family.gate(hidden[:1] @ family.up[expert]) @ family.down[expert]
    family.down[expert][:, CHANNEL] *= MAGNITUDE / output[0, CHANNEL]


class _RouterInput:
    """Observer: one layer's (input [N, H], logits [N, E]) of one batch."""

    needs: frozenset[str] = frozenset()

    def __init__(self, layer: int):
        self.layer = layer
        self._seen: tuple[Float[Tensor, "n h"], Float[Tensor, "n e"]] | None = None

    def update(self, event: MoEEvent) -> None:
        if event.layer == self.layer:
            self._seen = event.hidden, event.routing.logits

    def merge(self, other: Self) -> None:
        raise NotImplementedError("planting reads one batch")

    def result(self) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n e"]]:
        assert self._seen is not None
        return self._seen
