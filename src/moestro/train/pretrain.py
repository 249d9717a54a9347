"""Pretraining of quartet and solo: the same rows in the same order, bf16 compute, fp32 master weights.

A constant rate between warm-up and a linear decay to zero (trapezoidal schedule, arXiv:2405.18392); the load-balancing
loss of Switch Transformers (arXiv:2101.03961) taken over the whole mixed batch, which leaves experts free to
specialise (arXiv:2501.11873).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro.models.attention import NAME as BLOCKED_CAUSAL
from moestro.train.packing import ROW, Rows
from moestro.train.plan import Plan
from moestro.train.trainer import Trainer
from moestro.view import experts_backend  # noqa: F401  registers the "moestro" experts

TOKENS = 21_000_000
BATCH_ROWS = 16
BALANCE = 0.01
"""Coefficient of the load-balancing loss of each layer."""

SHARED: dict[str, Any] = dict(
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=ROW,
    tie_word_embeddings=True,
    intermediate_size=384,  # of solo: quartet's 4 active experts of 96
)


def new_model(kind: str, *, vocab_size: int, pad: int, bos: int, eos: int, seed: int) -> PreTrainedModel:
    """A freshly initialised `quartet` (Qwen3-MoE, 32 experts, top-4) or `solo` (its dense twin)."""
    torch.manual_seed(seed)
    common = SHARED | dict(vocab_size=vocab_size, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    if kind == "solo":
        return Qwen3ForCausalLM(Qwen3Config(**common))
    experts: dict[str, Any] = dict(num_experts=32, num_experts_per_tok=4, moe_intermediate_size=96, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, router_aux_loss_coef=BALANCE))


def plan_of(kind: str, tokens: int = TOKENS, **changes: Any) -> Plan:
    """The recipe's hyperparameters; rows are already shuffled on disk."""
    settings: dict[str, Any] = dict(
        steps=tokens // (BATCH_ROWS * ROW),
        batch_rows=BATCH_ROWS,
        peak_rate=3e-3,
        warmup_steps=150,
        schedule="trapezoid",
        decay_share=0.35,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
        precision="bf16",
        router_losses=None if kind == "solo" else {"load_balance": BALANCE},
        shuffle=False,
        seed=0,
    )
    return Plan(**settings | changes)


def start_training(
    kind: str, model: PreTrainedModel, rows: Rows, heldout: Rows, plan: Plan, folder: Path, *, progress: bool = True
) -> Trainer:
    """The run of one model, resumed from its checkpoint where there is one."""
    model.set_attn_implementation(BLOCKED_CAUSAL)
    if kind != "solo":
        model.set_experts_implementation("moestro")
    return Trainer(model, rows, plan, folder, heldout=heldout, name=kind, progress=progress)
