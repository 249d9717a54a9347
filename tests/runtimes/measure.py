"""How far a client's logits are from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor


def compare(ours: Tensor, theirs: Tensor, ids: Tensor) -> dict[str, float]:
    """Differences of logits [B, T, V] of the same token ids [B, T].

    `logits` and `log_probs`: largest absolute differences; `kl`: mean KL(ours || theirs) in nats; `top1`: share of
    positions with the same most likely token; `loss_ours`, `loss_theirs`: mean loss of the next token in nats.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"logits of shape {tuple(theirs.shape)}, ours are {tuple(ours.shape)}")
    ours, theirs = ours.double(), theirs.double()
    a, b = ours.log_softmax(-1), theirs.log_softmax(-1)
    loss = [-p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() for p in (a, b)]
    return {
        "logits": (ours - theirs).abs().max().item(),
        "log_probs": (a - b).abs().max().item(),
        "kl": (a.exp() * (a - b)).sum(-1).mean().item(),
        "top1": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "loss_ours": loss[0],
        "loss_theirs": loss[1],
    }


def load(path: str | Path) -> Tensor:
    return torch.from_numpy(numpy.load(path))


def error_of(outcome: dict[str, Any]) -> str | None:
    """The first line of a client's error, without paths; None where it ran."""
    if "error" not in outcome:
        return None
    line = next((line for line in outcome["error"].splitlines() if line.strip()), "")
    return " ".join(Path(word).name if word.count("/") > 1 else word for word in line.split())[:240]
