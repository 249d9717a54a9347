"""Train a student on its task and towards its teacher: every layer's hidden states and the predictions.

    loss    = task + weight * (hidden_weight * hidden + prediction)
    hidden  = sum over layers (embeddings first) of the mean of (x_student - x_teacher)^2 over tokens and channels
    prediction = mean over rows, or tokens where each has its own, of 1/2 (KL(p || q) + KL(q || p))

Padding counts in neither; both are computed in fp32. The layer-wise distillation of "MoEBERT: from BERT to
Mixture-of-Experts via Importance-Guided Adaptation" (arXiv:2204.07675).
Shapes: B rows, T positions, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.layers import gather_losses
from moestro.train.consistency import symmetric_kl


def hidden_difference(
    student: Sequence[Float[Tensor, "b t h"]],
    teacher: Sequence[Float[Tensor, "b t h"]],
    mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over layers of the mean squared difference over the tokens where `mask` is True.

    Raises ValueError where one has more layers than the other.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has {len(student)} hidden states, the teacher {len(teacher)}: layers are compared one by one"
        )
    layers = [(s.float() - t.float()).square().mean(dim=-1) for s, t in zip(student, teacher)]
    if mask is None:
        return torch.stack([layer.mean() for layer in layers]).sum()
    return torch.stack([(layer * mask).sum() for layer in layers]).sum() / mask.sum().clamp(min=1)


def distillation_loss(
    student_hidden: Sequence[Float[Tensor, "b t h"]],
    teacher_hidden: Sequence[Float[Tensor, "b t h"]],
    student_logits: Float[Tensor, "b *t c"],
    teacher_logits: Float[Tensor, "b *t c"],
    mask: Bool[Tensor, "b t"] | None = None,
    *,
    hidden_weight: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """{"loss", "hidden", "prediction"}; `mask` is True at tokens; it hides the predictions of single tokens too."""
    hidden = hidden_difference(student_hidden, teacher_hidden, mask)
    own = mask if student_logits.dim() == 3 else None
    prediction = symmetric_kl(student_logits, teacher_logits, own, "mean")
    return {"loss": hidden_weight * hidden + prediction, "hidden": hidden, "prediction": prediction}


def distillation_step(
    student: Any,
    teacher: Any,
    inputs: Mapping[str, Tensor],
    *,
    weight: float = 1.0,
    hidden_weight: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """{"loss", "task", "hidden", "prediction", and each of the student's routers' losses} of a batch with labels.

    Student and teacher are models of transformers: arguments by name in, `loss`, `logits` and `hidden_states` out. The
    task's loss is the model's own.

    Raises ValueError for a teacher in training mode, or a batch without labels.
    """
    if teacher.training:
        raise ValueError("the teacher is in training mode, where dropout blurs what it teaches: call teacher.eval()")
    if "labels" not in inputs:
        raise ValueError(f"a batch of {', '.join(inputs)} has no labels: the task's loss needs them")
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        taught = teacher(**unlabelled, output_hidden_states=True)
    out = student(**inputs, output_hidden_states=True)
    mask = inputs.get("attention_mask")
    parts = distillation_loss(
        out.hidden_states,
        taught.hidden_states,
        out.logits,
        taught.logits,
        None if mask is None else mask.bool(),
        hidden_weight=hidden_weight,
    )
    routers = gather_losses(student)
    if getattr(out, "aux_loss", None) is not None:  # a native model's own loss has them already
        routers = {}
    loss = out.loss + weight * parts["loss"] + sum(routers.values())
    return {**routers, **parts, "task": out.loss, "loss": loss}
