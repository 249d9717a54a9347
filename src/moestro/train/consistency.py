"""Train stochastic experts to agree: two passes over each batch with independent draws, and a loss on their difference.

    loss = CE(p1, y) + CE(p2, y) + alpha * CR
    CR   = 1/2 (KL(p1 || p2) + KL(p2 || p1)) = 1/2 sum (p1 - p2) (log p1 - log p2)        over tokens that count

Gradients flow through both passes: each expert teaches the others. CE and CR are reduced alike, both summed or both
averaged over tokens; mixed, alpha would be off by the number of tokens.

"Taming Sparsely Activated Transformer with Stochastic Experts" (arXiv:2110.04260).
Shapes: N tokens, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.layers.routers.stochastic import set_dispatch

Reduction = Literal["sum", "mean"]
DEFAULT_ALPHA = 5.0  # the paper's translation script
LABEL_SMOOTHING = 0.1  # the paper's
IGNORED = -100
"""Label of what is not predicted: padding, for one."""


def symmetric_kl(
    logits_a: Float[Tensor, "... v"],
    logits_b: Float[Tensor, "... v"],
    mask: Bool[Tensor, ...] | None = None,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """1/2 (KL(a || b) + KL(b || a)) over the places where `mask` is True, in fp32. Finite for finite logits."""
    log_a, log_b = (logits.float().log_softmax(dim=-1) for logits in (logits_a, logits_b))
    divergence = ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=-1) / 2
    if mask is not None:
        divergence = divergence[mask]
    return divergence.sum() / (max(divergence.numel(), 1) if reduction == "mean" else 1)


def consistency_step(
    model: Callable[[Any], Float[Tensor, "... v"]],
    batch: Any,
    labels: Int[Tensor, ...],
    *,
    alpha: float = DEFAULT_ALPHA,
    label_smoothing: float = LABEL_SMOOTHING,
    reduction: Reduction = "sum",
) -> dict[str, Float[Tensor, ""]]:
    """{"loss", "ce", "consistency"} of two passes of `model(batch) -> logits`, in training mode; "ce" is of both.

    Places whose label is -100 count in neither part. For a language model, `model` gives the logits of all tokens but
    the last, and `labels` are the ids of all but the first. alpha=0 leaves the two passes to themselves.

    Raises ValueError for alpha < 0.
    """
    if alpha < 0:
        raise ValueError(f"alpha={alpha} would drive the experts apart; choose 0 or more")
    first, second = model(batch), model(batch)
    ce_first, ce_second = (
        F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        for logits in (first, second)
    )
    ce = ce_first + ce_second
    consistency = symmetric_kl(first, second, labels != IGNORED, reduction)
    return {"loss": ce + alpha * consistency, "ce": ce, "consistency": consistency}


@torch.no_grad()
def dispatch_agreement(
    model: nn.Module, batches: Iterable[Any], n: int = 2, *, call: Callable[[Any], Tensor] | None = None
) -> dict[str, float]:
    """How far predictions hang on the draw: {"sym_kl": mean nats, "disagreement": share with another arg-max}.

    Means over places and over all pairs of n draws (seeds 0 to n - 1), in eval mode; the seed is 0 afterwards.
    `call(batch)` gives the logits [..., V]; the model itself where it is not given.

    Raises ValueError for n < 2, a model without stochastic experts, or no data.
    """
    if n < 2:
        raise ValueError(f"n={n} draws have nothing to agree on; compare at least 2")
    call = model if call is None else call
    was_training = model.training
    divergence, differ, places = 0.0, 0.0, 0
    try:
        model.eval()
        for batch in batches:
            draws = []
            for seed in range(n):
                set_dispatch(model, seed=seed)
                draws.append(call(batch))
            for j in range(n):
                for i in range(j):
                    divergence += float(symmetric_kl(draws[i], draws[j]))
                    differ += float((draws[i].argmax(dim=-1) != draws[j].argmax(dim=-1)).sum())
                    places += draws[i][..., 0].numel()
    finally:
        set_dispatch(model, seed=0)
        model.train(was_training)
    if not places:
        raise ValueError("the data holds nothing to predict")
    return {"sym_kl": divergence / places, "disagreement": differ / places}
