"""The training step: its kernels compute what torch computes, and a resumed run continues where it stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moestro.train.kernels import BlockedCausalAttention, NextTokenLoss
from moestro.train.measure import mutual_information
from moestro.train.packing import ROW, Rows
from moestro.train.pretrain import Plan, Training, balance_loss, new_model

DOUBLE = torch.float64


def grads(output: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_blocked_attention_is_causal_attention(heads: int, groups: int) -> None:
    q = torch.randn(2, heads, 256, 16, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(2, groups, 256, 16, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    ours = BlockedCausalAttention.apply(q, k, v, 0.25)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.25)
    torch.testing.assert_close(ours, torchs)
    for a, b in zip(grads(ours, (q, k, v)), grads(torchs, (q, k, v))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_chunked_loss_is_cross_entropy(chunk: int) -> None:
    hidden = torch.randn(100, 12, requires_grad=True)
    head = torch.randn(50, 12, requires_grad=True)
    target = torch.randint(0, 50, (100,))
    mean, each = NextTokenLoss.apply(hidden, head, target, chunk)
    expected = F.cross_entropy(hidden @ head.T, target)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(each.mean(), mean)
    for a, b in zip(torch.autograd.grad(3 * mean, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_balance_is_one_a_layer_when_even_and_more_when_not() -> None:
    even = torch.arange(8).view(-1, 1).expand(8, 2).clone()
    even[:, 1] = (even[:, 0] + 1) % 8
    assert float(balance_loss([(torch.zeros(8, 8), torch.empty(0), even)])) == pytest.approx(1.0)
    skewed = torch.zeros(8, 8)
    skewed[:, 0] = 5.0
    assert float(balance_loss([(skewed, torch.empty(0), torch.zeros(8, 2, dtype=torch.long))])) > 4


def test_the_rate_warms_up_holds_and_decays_to_zero() -> None:
    plan = Plan(tokens=1000 * 16 * ROW)
    rates = [plan.rate(step) for step in range(plan.steps + 1)]
    assert rates[0] < rates[100] < rates[plan.warmup_steps] == plan.peak_rate == rates[500]
    assert rates[-1] == 0.0
    assert rates[900] < rates[700]


def some_rows(count: int) -> Rows:
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 40, (count, ROW)).astype(np.uint16)
    return Rows(tokens, np.arange(count) % 2, ["a", "b"])


def run_of(kind: str, folder: Path) -> Training:
    plan = Plan(tokens=6 * 2 * ROW, batch_rows=2, warmup_steps=2)
    model = new_model(kind, vocab_size=64, pad=0, bos=1, eos=2, seed=0)
    training = Training(model, some_rows(12), plan, folder)
    training.resume()
    return training


@pytest.mark.parametrize("kind", ["quartet", "solo"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    straight = run_of(kind, tmp_path / "straight")
    straight_losses = [straight.train_step()[0] for _ in range(4)]
    stopped = run_of(kind, tmp_path / "stopped")
    losses = [stopped.train_step()[0] for _ in range(2)]
    stopped.save()
    resumed = run_of(kind, tmp_path / "stopped")
    assert resumed.step == 2
    losses += [resumed.train_step()[0] for _ in range(2)]
    assert losses == straight_losses
    assert all(torch.equal(a, b) for a, b in zip(straight.master, resumed.master))


def test_training_lowers_the_loss_and_reports_it_per_domain(tmp_path: Path) -> None:
    training = run_of("quartet", tmp_path)
    before = training.evaluate(some_rows(4), 2)
    training.run(some_rows(4), log_every=3, save_every=3, evaluate_every=6)
    after = training.evaluate(some_rows(4), 2)
    assert set(after) == {"a", "b"}
    assert all(after[domain] < before[domain] for domain in after)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.full((4, 8), 10.0)) == pytest.approx(0.0)
    assert mutual_information(np.eye(4) * 7) == pytest.approx(2.0)
    assert mutual_information(np.array([[1.0, 0.0], [100.0, 0.0]])) == pytest.approx(0.0)
