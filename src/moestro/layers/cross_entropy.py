"""Cross entropy of a language model's head that keeps no logits.

    loss[n] = logsumexp(W h[n]) - (W h[n])[target[n]]

Chunk by chunk, the forward computes logits, losses and the gradients of `h` and `W`, so that the logits of a chunk stay
in cache and are never computed twice; the backward only scales. Softmax in fp32, gradients of W summed in fp32.
Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.layers.linear import product

CHUNK = 256
"""Tokens whose logits exist at a time: 6 MB of fp32 at a vocabulary of 6144."""
CHUNK_BYTES = 8 << 20
IGNORED = -100
"""Target of tokens that are not predicted, as everywhere in torch."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        wanted = hidden.requires_grad or head.requires_grad
        each = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_head = torch.zeros(head.shape[::-1], dtype=torch.float32, device=head.device) if wanted else None
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            h, t = hidden[part], target[part, None]
            ignored, index = t == IGNORED, t.clamp(min=0)
            logits = product(h, head.t()).float()
            lse = logits.logsumexp(1, keepdim=True)
            each[part] = (lse - logits.gather(1, index)).masked_fill_(ignored, 0.0).squeeze(1)
            if d_hidden is None or d_head is None:
                continue
            g = logits.sub_(lse).exp_()  # the probabilities
            g.scatter_add_(1, index, torch.full_like(lse, -1.0))
            if bool(ignored.any()):
                g.masked_fill_(ignored, 0.0)
            g = g.to(hidden.dtype)
            d_hidden[part] = product(g, head)
            d_head += product(h.t().contiguous(), g)
        count = (target != IGNORED).sum().clamp(min=1)
        ctx.save_for_backward(d_hidden, d_head, count)
        ctx.dtype = head.dtype
        ctx.mark_non_differentiable(each)
        return each.sum() / count, each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_head, count = ctx.saved_tensors
        scale = grads[0].float() / count
        return d_hidden * scale.to(d_hidden.dtype), (d_head * scale).to(ctx.dtype).t(), None, None


def head_loss(
    hidden: Float[Tensor, "n h"], head: Float[Tensor, "v h"], target: Int[Tensor, " n"], *, chunk: int | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """(mean loss, loss of each token) of `target` under the logits hidden @ head^T.

    Tokens whose target is IGNORED have loss 0 and do not count. Only the mean has a gradient.
    """
    if chunk is None:
        chunk = max(16, min(CHUNK, CHUNK_BYTES // (4 * len(head))))
    return _HeadLoss.apply(hidden, head, target, chunk)
