"""The loss of a language model from its last hidden states, without its logits.

For models whose logits are lm_head(hidden) and nothing more: no cap, no scale, no bias. `has_plain_head` finds out.
Shapes: B batch, T sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.layers.cross_entropy import IGNORED, head_loss


def next_token_loss(
    hidden: Float[Tensor, "b t h"],
    head: Float[Tensor, "v h"],
    labels: Int[Tensor, "b t"],
    *,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "b p"]]:
    """(mean loss, loss of each of the T - 1 predictions); labels that are -100 are not predicted.

    `num_items_in_batch`: what the sum is divided by in the place of the number of predictions (transformers' Trainer
    gives it where gradients are accumulated).
    """
    target = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    mean, each = head_loss(hidden.flatten(0, 1), head, target.reshape(-1))
    if num_items_in_batch is not None:
        mean = mean * (target != IGNORED).sum() / num_items_in_batch
    return mean, each.view(target.shape)[:, :-1]


@torch.no_grad()
def has_plain_head(model: Any, ids: Int[Tensor, "b t"]) -> bool:
    """Whether the model's logits are its decoder's output times its output embedding, measured on `ids`."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or not isinstance(decoder, nn.Module):
        return False
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        ours = F.linear(decoder(input_ids=ids, use_cache=False).last_hidden_state, head.weight).float()
    finally:
        model.train(was_training)
    return ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-2, atol=1e-3)
