"""What the model card reports: held-out loss per domain, and how much an expert tells about the domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from moestro.data import TokenBatch


@dataclass(frozen=True)
class Measured:
    """losses: nats per predicted token by domain; counts: [L, D, E] slots by domain, and the same with the domain
    labels of the rows shuffled (both empty for a dense model)."""

    losses: dict[str, float]
    tokens: dict[str, int]
    counts: np.ndarray
    shuffled: np.ndarray

    @property
    def mean_loss(self) -> float:
        """Mean over domains: every domain counts the same."""
        return float(np.mean(list(self.losses.values())))


def mutual_information(counts: np.ndarray) -> float:
    """I(domain; expert) in bits of slot counts [D, E], every domain given the same weight.

    I = sum_{d,e} p(d) p(e|d) log2(p(e|d) / p(e)).
    """
    given = counts / counts.sum(1, keepdims=True)  # p(e | d)
    marginal = given.mean(0, keepdims=True)
    terms = np.where(given > 0, given * np.log2(np.where(given > 0, given, 1.0) / np.maximum(marginal, 1e-30)), 0.0)
    return float(terms.sum(1).mean())


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Iterable[TokenBatch], *, seed: int = 0) -> Measured:
    """Losses per domain, and slots per layer, domain and expert; one pass."""
    model.eval()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    chosen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for gate in gates]
    E = getattr(model.config, "num_experts", 0)
    rng = np.random.default_rng(seed)
    summed: dict[str, float] = {}
    predicted: dict[str, int] = {}
    rows: list[np.ndarray] = []  # slots of each row [L, E]
    row_domain: list[int] = []
    domains: tuple[str, ...] = ()
    try:
        for batch in batches:
            chosen.clear()
            domains = tuple(batch.domains)
            ids, mask = batch.input_ids, batch.attention_mask
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            for row, domain in enumerate(batch.domain.tolist()):
                name = domains[domain]
                summed[name] = summed.get(name, 0.0) + float(each[row].double().sum())
                predicted[name] = predicted.get(name, 0) + int((target[row] != -100).sum())
                real = mask[row].bool()
                picks = [index.view(*ids.shape, -1)[row][real].reshape(-1) for index in chosen]
                rows.append(np.array([torch.bincount(p, minlength=E).numpy() for p in picks]))
                row_domain.append(domain)
    finally:
        for hook in hooks:
            hook.remove()
    losses = {name: summed[name] / max(predicted[name], 1) for name in sorted(summed)}
    if not gates:
        return Measured(losses, predicted, np.empty(0), np.empty(0))
    stacked, label = np.stack(rows), np.array(row_domain)
    counts, shuffled = (by_domain(stacked, labels, len(domains)) for labels in (label, rng.permutation(label)))
    return Measured(losses, predicted, counts, shuffled)


def by_domain(rows: np.ndarray, label: np.ndarray, domains: int) -> np.ndarray:
    """Slot counts [L, D, E] of rows [R, L, E] with domain labels [R]."""
    return np.stack([rows[label == d].sum(0) for d in range(domains)], axis=1)
