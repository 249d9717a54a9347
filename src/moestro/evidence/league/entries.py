"""Who takes part: changes to the league's model, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moestro.evidence.league.interpretability import interpretability
from moestro.evidence.league.tasks import Task
from moestro.models.deepseek_moe import segment
from moestro.models.lm import MoELMForCausalLM

SIZE: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    initializer_range=0.1,  # about H^-1/2: at 0.02, layers this narrow hand on almost nothing at first
    tie_word_embeddings=True,
    router_losses={"load_balance": 0.01},
)
"""The league's model. A dense layer is as wide as the experts that a token uses."""

ENTRIES: dict[str, dict[str, Any]] = {
    # plain baselines
    "dense": dict(moe_layers=[]),
    "switch": dict(router="switch", num_experts_per_tok=1, num_experts=8, moe_intermediate_size=32),
    "top_k": dict(router="top_k"),
    "sigmoid": dict(router="sigmoid", router_losses={}),
    "expert_choice": dict(router="expert_choice", router_losses={}),
    "hash": dict(router="hash", router_losses={}),
    "row": dict(router="row", router_losses={}),
    "random": dict(router="random", router_losses={}),
    # published methods, by their papers' keys
    "comet": dict(router="comet", router_losses={}),
    "comet-search": dict(router={"kind": "permuted", "router": "comet", "steps": 100}, router_losses={}),
    "deepseek-moe": dict(
        **segment(16, 2, 16, m=4, shared=1), norm_topk_prob=False, router_losses={"expert_balance": 0.01}
    ),
    "dynamic-routing": dict(router="top_p", router_losses={"top_p_balance": 0.01, "router_entropy": 1e-4}),
    "moe-x": dict(router="sparsity_aware", experts={"kind": "ungated", "activation": "relu"}, moe_intermediate_size=24),
    "momentum-smoe": dict(residual="heavy_ball"),
    "monet": dict(block={"kind": "monet", "parts": 19, "width": 2, "heads": 4, "top_k": 3}, router_losses={}),
    "rexmoe": dict(block={"kind": "rexmoe", "reuse": 4}),
    "rmoe": dict(router={"kind": "recurrent", "state_size": 32}),
    "rmoe-bottleneck": dict(router={"kind": "bottleneck", "state_size": 32}),
    "rmoe-previous": dict(router={"kind": "previous_logits", "ratio": 0.5}),
    "temperature-gate": dict(router={"kind": "temperature", "activation": "sigmoid", "top_k_from": 0.5}),
    "thor": dict(router="stochastic", num_experts_per_tok=1, num_experts=8, moe_intermediate_size=32, router_losses={}),
    "token-graph": dict(router="similarity_aware"),
    "token-graph-attention": dict(router="attention_aware", attn_implementation="eager"),
    "token-graph-uniform": dict(router="uniform_graph"),
    "union-of-experts": dict(block={"kind": "union"}, router_losses={}),
}
"""{name: changes to SIZE}. `ENTRIES["mine"] = {"router": "mine"}` adds one."""

NOTES: dict[str, str] = {
    "comet": "a token begins with all experts, and keeps those that its trees come to reach",
    "monet": "computes every part for every token: all its parameters are active, so it has no more than `dense`",
    "comet-search": "comet, with the local search over permutations in the first 100 steps",
    "rmoe-bottleneck": "a control of rmoe: its small state, made anew in every layer",
    "rmoe-previous": "another: linear routers that add half of the logits of the layer below",
    "token-graph-attention": "needs attention weights, so attention is computed the slower way that gives them",
    "token-graph-uniform": "the control of token-graph: a mixture that knows nothing of the tokens",
    "thor": "its draws alone: the loss that makes two of them agree needs two passes a step",
    "temperature-gate": "all experts in the first half of the training, the two best afterwards",
}
"""What a reader of the table has to know about an entry."""

MEASURES: dict[str, Callable[[MoELMForCausalLM, Task], dict[str, float]]] = dict.fromkeys(
    ("dense", "top_k", "moe-x", "monet"), interpretability
)
"""{entry: what else to measure on its trained model, {name: number}}; it stands in a table of its own."""
