"""Small language models, trained from scratch on the embedded sample: what experiments about training share.

One model of the default size takes about a minute on two cores. Runs that are compared get the same seed, and so the
same rows in the same order; the held-out part of the sample is never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.bundled import bundled_path
from moestro.data import embedded, embedded_domains
from moestro.data.embedded_sample import Split
from moestro.layers import after_step
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.view.layers import load_tokenizer
from moestro.view.observe import progress_bar

ROW = 128
"""Tokens of a row."""
SIZE: dict[str, Any] = dict(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=192,
    moe_intermediate_size=96,
    num_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=ROW,
    tie_word_embeddings=True,
    router_losses={"load_balance": 0.01},
)
"""The default model; a paper's experiment changes what it is about."""


@dataclass(frozen=True)
class Packed:
    """Rows of token ids [R, ROW], one domain each, and the domain's number."""

    ids: Tensor
    domain: Tensor
    domains: tuple[str, ...]


@dataclass
class Trained:
    model: MoELMForCausalLM
    losses: list[float]
    """Training loss of every step, without the routers' losses."""
    heldout: dict[str, float] = field(default_factory=dict)
    """Mean held-out loss by domain, nats per token."""

    @property
    def mean_heldout(self) -> float:
        """Mean over domains: every domain counts the same."""
        return float(np.mean(list(self.heldout.values())))


def _tokenizer() -> Any:
    path = bundled_path("quartet")
    assert path is not None, "quartet is part of the package"
    return load_tokenizer(path)


@cache
def packed(split: Split, domains: tuple[str, ...] | None = None) -> Packed:
    """The embedded sample's "calibration" or "heldout" part in rows: documents of one domain, one after the other."""
    names = domains or embedded_domains()
    tokenizer = _tokenizer()
    rows, labels = [], []
    for number, name in enumerate(names):
        texts = [document.text for document in embedded([name], split) if document.text]
        ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
        part = torch.tensor(ids[: len(ids) // ROW * ROW]).view(-1, ROW)
        rows.append(part)
        labels += [number] * len(part)
    return Packed(torch.cat(rows), torch.tensor(labels), tuple(names))


def train_lm(
    *,
    seed: int,
    steps: int = 400,
    batch_rows: int = 8,
    rate: float = 3e-3,
    warmup: int = 40,
    data: Packed | None = None,
    heldout: Packed | None = None,
    model: MoELMForCausalLM | None = None,
    on_step: Any = None,
    label: str = "training",
    progress: bool = True,
    **config: Any,
) -> Trained:
    """Train a model of SIZE, changed by `config`, with AdamW (0.9, 0.95), warm-up and cosine decay to a tenth.

    on_step(step, model): called after every optimiser step (snapshots, schedules).
    """
    data, heldout = data or packed("calibration"), heldout or packed("heldout")
    if model is None:
        torch.manual_seed(seed)
        model = MoELMForCausalLM(MoELMConfig(**{"vocab_size": _tokenizer().vocab_size, **SIZE, **config}))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * float(np.cos(np.pi * step / steps))),
    )
    order = torch.Generator().manual_seed(seed)
    result = Trained(model, [])
    model.train()
    with progress_bar(progress) as bar:
        task = bar.add_task(label, total=steps)
        queue = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            if len(queue) < batch_rows:
                queue = torch.cat([queue, torch.randperm(len(data.ids), generator=order)])
            chosen, queue = queue[:batch_rows], queue[batch_rows:]
            model.model.progress = step / steps
            ids = data.ids[chosen]
            out = model(input_ids=ids, labels=ids, use_cache=False)
            if not torch.isfinite(out.loss):
                raise FloatingPointError(f"the loss is {out.loss.item()} at step {step}")
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            shape.step()
            after_step(model, (step + 1) / steps)
            result.losses.append(float(out.loss.detach() - (0.0 if out.aux_loss is None else out.aux_loss.detach())))
            if on_step is not None:
                on_step(step, model)
            bar.advance(task)
    model.model.progress = 1.0
    result.heldout = losses_by_domain(model, heldout)
    return result


@torch.no_grad()
def losses_by_domain(model: MoELMForCausalLM, data: Packed, rows: int = 16) -> dict[str, float]:
    """Mean loss in nats per predicted token by domain, in eval mode; at most `rows` rows of each domain."""
    model.eval()
    losses = {}
    for number, name in enumerate(data.domains):
        ids = data.ids[data.domain == number][:rows]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses[name] = float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))
    return losses
