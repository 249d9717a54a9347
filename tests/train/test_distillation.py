"""Distillation: nothing to learn from oneself, padding has no say, and gradients go to the student alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from moestro.build.moebert import split_by_importance
from moestro.layers import gather_losses
from moestro.train.distillation import distillation_loss, distillation_step, hidden_difference

B, T, H, C, LAYERS = 3, 5, 4, 6, 3


def states(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, generator=generator) for _ in range(LAYERS)]


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 3:] = real[2, 1:] = False
    return real


def test_the_loss_by_hand() -> None:
    student = [torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])]
    teacher = [torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)]
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    parts = distillation_loss(student, teacher, p.log()[None], q.log()[None], hidden_weight=0.5)
    assert float(parts["hidden"]) == pytest.approx(5 / 4 + 9 / 4)  # 4 numbers a layer
    kl = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert float(parts["prediction"]) == pytest.approx(float(kl))
    assert float(parts["loss"]) == pytest.approx(0.5 * 3.5 + float(kl))
    first = torch.tensor([[True, False]])
    assert float(hidden_difference(student, teacher, first)) == pytest.approx(5 / 2)


def test_nothing_is_lost_on_oneself() -> None:
    parts = distillation_loss(states(0), states(0), logits(0, B, C), logits(0, B, C), mask())
    assert all(float(part) == 0 for part in parts.values())


@pytest.mark.parametrize("shape", [(B, C), (B, T, C)])
def test_padding_has_no_say(shape: tuple[int, ...]) -> None:
    real, ours, theirs = mask(), states(0), states(1)
    a, b = logits(2, *shape), logits(3, *shape)
    parts = distillation_loss(ours, theirs, a, b, real)
    other = [torch.where(real[..., None], s, 1e3) for s in ours]
    changed = torch.where(real[..., None], a, -50.0) if len(shape) == 3 else a
    for name, value in distillation_loss(other, theirs, changed, b, real).items():
        torch.testing.assert_close(value, parts[name])
    kept = [torch.stack([s[real] for s in layers]) for layers in (ours, theirs)]
    expected = (kept[0] - kept[1]).square().mean(dim=(1, 2)).sum()
    torch.testing.assert_close(parts["hidden"], expected)
    assert float(distillation_loss(other, theirs, a, b)["hidden"]) > 10 * float(parts["hidden"])


def test_half_precision_is_compared_in_fp32() -> None:
    half = [[s.half() for s in states(seed)] for seed in (0, 1)]
    a, b = logits(2, B, C).half(), logits(3, B, C).half()
    parts = distillation_loss(*half, a, b)
    exact = distillation_loss(*[[s.float() for s in h] for h in half], a.float(), b.float())
    for name, part in parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, exact[name])


def test_layers_are_compared_one_by_one() -> None:
    with pytest.raises(ValueError, match="the student has 2 hidden states, the teacher 3"):
        hidden_difference(states(0)[:2], states(1))


# A step


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    options = dict(num_labels=C, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)
    return BertForSequenceClassification(BertConfig(**sizes, **options)).eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 30, (B, T), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": mask().long(), "labels": torch.tensor([0, 3, 5])}


def student_of(teacher: Any) -> Any:
    return split_by_importance(teacher, None, 2, router="comet").train()


def test_a_step_adds_up_all_losses_and_teaches_the_student_alone(teacher: Any) -> None:
    student, batch = student_of(teacher), inputs()
    parts = distillation_step(student, teacher, batch, weight=3.0, hidden_weight=0.5)
    unlabelled = {n: t for n, t in batch.items() if n != "labels"}
    out, taught = (m(**unlabelled, output_hidden_states=True) for m in (student, teacher))
    pairs = distillation_loss(out.hidden_states, taught.hidden_states, out.logits, taught.logits, mask())
    task = torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    entropy = gather_losses(student)["leaf_entropy"]
    assert entropy > 0
    expected = task + 3 * (0.5 * pairs["hidden"] + pairs["prediction"]) + entropy
    torch.testing.assert_close(parts["loss"], expected)
    assert set(parts) == {"loss", "task", "hidden", "prediction", "leaf_entropy"}
    parts["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in student.named_parameters() if ".router." in n)


def test_a_student_comes_to_resemble_its_teacher(teacher: Any) -> None:
    student, batch = student_of(teacher), inputs()
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
    values = []
    for _ in range(30):
        parts = distillation_step(student, teacher, batch, weight=5.0)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        values.append(float(parts["hidden"]))
    assert values[-1] < 0.5 * values[0]


def test_steps_that_make_no_sense_are_refused(teacher: Any) -> None:
    student, batch = student_of(teacher), inputs()
    with pytest.raises(ValueError, match=r"call teacher\.eval\(\)"):
        distillation_step(student, teacher.train(), batch)
    del batch["labels"]
    with pytest.raises(ValueError, match="a batch of input_ids, attention_mask has no labels"):
        distillation_step(student, teacher.eval(), batch)
