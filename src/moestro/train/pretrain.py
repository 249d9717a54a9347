"""Pretraining of quartet and solo: the same rows in the same order, bf16 compute, fp32 master weights.

AdamW (Loshchilov & Hutter, arXiv:1711.05101) with linear warm-up, a constant rate and a linear decay to zero
(trapezoidal schedule, Haegele et al., arXiv:2405.18392); the load-balancing loss of Switch Transformers
(arXiv:2101.03961) taken over the whole mixed batch, which leaves experts free to specialise (arXiv:2501.11873).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro.train import kernels
from moestro.train.packing import ROW, Rows
from moestro.view import experts_backend  # noqa: F401  registers the "moestro" experts

LOSS_CHUNK = 512  # tokens whose logits exist at a time: they stay in cache


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of one training run."""

    tokens: int = 21_000_000
    batch_rows: int = 16
    peak_rate: float = 3e-3
    warmup_steps: int = 150
    decay_share: float = 0.35
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 0.01  # coefficient of the load-balancing loss of each layer
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch_rows * ROW)

    def rate(self, step: int) -> float:
        """Learning rate of `step`: linear warm-up, constant, linear decay to zero."""
        decay_from = round(self.steps * (1 - self.decay_share))
        up = min(1.0, (step + 1) / self.warmup_steps)
        down = 1.0 if step < decay_from else (self.steps - step) / (self.steps - decay_from)
        return self.peak_rate * up * down


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
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, router_aux_loss_coef=0.01))


def balance_loss(routings: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Sum over layers of E sum_e f_e P_e, f the share of slots and P the mean probability; 1 a layer when even."""
    total = torch.zeros(())
    for logits, _, index in routings:
        E = logits.shape[-1]
        share = torch.bincount(index.reshape(-1), minlength=E).float() / index.numel()
        total = total + E * (share * torch.softmax(logits.float(), -1).mean(0)).sum()
    return total


class Training:
    """A run that can be stopped and resumed at any checkpoint; `folder` holds its checkpoint and its log."""

    def __init__(self, model: PreTrainedModel, rows: Rows, plan: Plan, folder: Path):
        kernels.register()
        self.plan, self.rows, self.folder, self.step = plan, rows, folder, 0
        self.master = [p.detach().float().clone() for p in model.parameters()]
        self.model = model.bfloat16().train()
        self.model.set_attn_implementation("blocked_causal")
        self.weights = list(self.model.parameters())
        self.routings: list[tuple[Tensor, Tensor, Tensor]] = []
        self.balance = 0.0
        if hasattr(model.config, "num_experts"):
            self.model.set_experts_implementation("moestro")
            for layer in self.model.model.layers:
                layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.routings.append(out))
        decayed = [m for m in self.master if m.ndim > 1]
        plain = [m for m in self.master if m.ndim == 1]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.peak_rate, betas=plan.betas, fused=True)
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint beside the old one, then take its place."""
        state = {"step": self.step, "seconds": self.seconds, "plan": asdict(self.plan), "master": self.master}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, self.folder / "checkpoint.part")
        os.replace(self.folder / "checkpoint.part", self.checkpoint)

    def resume(self) -> None:
        """Continue from the checkpoint where there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for mine, saved in zip(self.master, state["master"], strict=True):
                mine.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 master weights into the bf16 model."""
        for weight, master in zip(self.weights, self.master, strict=True):
            weight.copy_(master)

    def losses(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """(mean loss, loss of each row) of rows [B, T]; next-token targets within each row."""
        ids = torch.from_numpy(tokens.astype(np.int64))
        self.routings.clear()
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        H = hidden.shape[-1]
        mean, each = kernels.NextTokenLoss.apply(
            hidden[:, :-1].reshape(-1, H), self.model.lm_head.weight, ids[:, 1:].reshape(-1), LOSS_CHUNK
        )
        return mean, each.view(len(ids), -1).mean(1)

    def train_step(self) -> tuple[float, Tensor, np.ndarray]:
        """One optimizer step; returns the mean loss, the rows' losses and their domains."""
        start = self.step * self.plan.batch_rows
        batch = slice(start, start + self.plan.batch_rows)
        loss, by_row = self.losses(self.rows.tokens[batch])
        total = loss
        if self.routings:
            balance = balance_loss(self.routings)
            self.balance = float(balance.detach()) / len(self.routings)
            total = loss + self.plan.balance * balance
        total.backward()
        for weight, master in zip(self.weights, self.master, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimizer.step()
        self.publish()
        self.step += 1
        return float(loss.detach()), by_row, self.rows.domain[batch]

    @torch.no_grad()
    def evaluate(self, heldout: Rows, rows_per_domain: int) -> dict[str, float]:
        """Held-out loss per domain over the first `rows_per_domain` rows of each."""
        self.model.eval()
        result = {}
        for index, domain in enumerate(heldout.domains):
            chosen = np.flatnonzero(heldout.domain == index)[:rows_per_domain]
            parts = [self.losses(heldout.tokens[chosen[i : i + 8]])[1] for i in range(0, len(chosen), 8)]
            result[domain] = float(torch.cat(parts).mean())
        self.model.train()
        return result

    def log(self, record: dict) -> None:
        """Append one line to the run's log and print it."""
        line = json.dumps({"step": self.step, "tokens": self.step * self.plan.batch_rows * ROW, **record})
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def run(self, heldout: Rows, *, log_every: int = 25, save_every: int = 100, evaluate_every: int = 300) -> None:
        """Train to the end of the plan."""
        sums, counts = np.zeros(len(self.rows.domains)), np.zeros(len(self.rows.domains))
        since, losses = time.monotonic(), []
        while self.step < self.plan.steps:
            loss, by_row, domain = self.train_step()
            losses.append(loss)
            np.add.at(sums, domain, by_row.float().numpy())
            np.add.at(counts, domain, 1)
            if self.step % log_every == 0:
                elapsed = time.monotonic() - since
                self.seconds += elapsed
                by_domain = {d: round(float(s / n), 3) for d, s, n in zip(self.rows.domains, sums, counts) if n}
                speed = round(log_every * self.plan.batch_rows * ROW / elapsed)
                self.log(
                    {"loss": round(float(np.mean(losses)), 4), "balance": round(self.balance, 3), "speed": speed}
                    | {"seconds": round(self.seconds), "domains": by_domain}
                )
                sums[:], counts[:] = 0, 0
                since, losses = time.monotonic(), []
            if self.step % save_every == 0 or self.step == self.plan.steps:
                self.save()
            if self.step % evaluate_every == 0 or self.step == self.plan.steps:
                by_domain = self.evaluate(heldout, 4)
                self.log({"heldout": float(np.mean(list(by_domain.values()))), "heldout_domains": by_domain})
