"""CPU kernels of the training step: blocked causal attention and a loss that keeps no logits.

They compute what transformers' own implementations compute; only the order of the work differs. The experts run on
the `moestro` backend. Shape letters: `B` batch, `T` sequence, `N` tokens, `H` hidden, `A` heads, `G` key-value heads,
`D` head size, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

QUERY_BLOCK = 64  # fastest of 64/128/256 for T = 512 in bf16


class BlockedCausalAttention(torch.autograd.Function):
    """Causal softmax attention over blocks of query rows; each block sees only the keys up to its end.

    q [B, A, T, D], k and v [B, G, T, D]; T a multiple of QUERY_BLOCK. The query heads of one key-value head are
    rows of one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, A, T, D = q.shape
        G, rows = k.shape[1], QUERY_BLOCK
        R = A // G
        k, v = k.reshape(B * G, T, D).contiguous(), v.reshape(B * G, T, D).contiguous()
        q = (q.reshape(B * G, R, T, D) * scale).contiguous()
        future = torch.full((rows, rows), float("-inf"), dtype=q.dtype).triu_(1)
        outputs, probabilities = [], []
        for start in range(0, T, rows):
            end = start + rows
            scores = torch.bmm(q[:, :, start:end].reshape(B * G, R * rows, D), k[:, :end].transpose(1, 2))
            scores.view(B * G, R, rows, end)[..., start:].add_(future)
            p = torch.softmax(scores, -1)
            probabilities.append(p)
            outputs.append(torch.bmm(p, v[:, :end]).view(B * G, R, rows, D))
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.shape = scale, (B, A, G, T, D)
        return torch.cat(outputs, 2).view(B, A, T, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        B, A, G, T, D = ctx.shape
        R, rows = A // G, QUERY_BLOCK
        grad = grads[0].reshape(B * G, R, T, D)
        grad_k, grad_v, grad_q = torch.zeros_like(k), torch.zeros_like(v), []
        for p, start in zip(probabilities, range(0, T, rows), strict=True):
            end = start + rows
            g = grad[:, :, start:end].reshape(B * G, R * rows, D)
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
            grad_p = torch.bmm(g, v[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, :end]).view(B * G, R, rows, D))
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, :, start:end].reshape(B * G, R * rows, D))
        full = torch.cat(grad_q, 2).mul_(ctx.scale).view(B, A, T, D)
        return full, grad_k.view(B, G, T, D), grad_v.view(B, G, T, D), None


def blocked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature; causal, no padding."""
    return BlockedCausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


class NextTokenLoss(torch.autograd.Function):
    """Cross entropy of every token, its gradient computed chunk by chunk in the forward pass.

    hidden [N, H], head [V, H], target [N] -> (mean loss, loss of each token [N]); softmax in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        losses, grad_hidden = [], torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(target), chunk):
            h, t = hidden[start : start + chunk], target[start : start + chunk, None]
            p = torch.softmax(torch.mm(h, head.t()).float(), 1)
            picked = p.gather(1, t)
            losses.append(-picked.clamp(min=torch.finfo(p.dtype).tiny).log().squeeze(1))
            p.scatter_(1, t, picked - 1.0)
            g = p.to(hidden.dtype)
            torch.mm(g, head, out=grad_hidden[start : start + chunk])
            grad_head += torch.mm(g.t(), h)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.count, ctx.dtype = len(target), head.dtype
        each = torch.cat(losses)
        ctx.mark_non_differentiable(each)
        return each.mean(), each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0].float() / ctx.count
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_head * scale).to(ctx.dtype), None, None


def register() -> None:
    """Make the attention selectable by name in transformers: `blocked_causal`."""
    AttentionInterface.register("blocked_causal", blocked_attention)
    AttentionMaskInterface.register("blocked_causal", lambda *args, **kwargs: None)
