"""Linear maps, norms, rotary positions, attention and loss of the training step compute what torch's own compute."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

from moestro.layers.cross_entropy import IGNORED, head_loss
from moestro.layers.linear import Linear
from moestro.layers.norm import rms_norm
from moestro.models.attention import blocked_causal, rotary
from moestro.models.head import next_token_loss

TOLERANCE = {torch.float32: dict(atol=1e-4, rtol=1e-4), torch.bfloat16: dict(atol=0.1, rtol=0.05)}


def same(ours, torchs, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients of two functions of the same inputs."""
    a, b = ours(*inputs), torchs(*inputs)
    assert a.dtype == dtype
    assert_close(a, b, **TOLERANCE[dtype])
    direction = torch.randn(a.shape).to(dtype)
    for ours_grad, torchs_grad in zip(*(torch.autograd.grad(y, inputs, direction) for y in (a, b))):
        assert_close(ours_grad, torchs_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 12), (3, 100, 128)])
def test_linear_is_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    layer = Linear(shape[-1], 96).to(dtype)
    same(lambda x, w: layer(x), F.linear, (x, layer.weight), dtype)


def test_linear_takes_strided_inputs_and_leaves_autocast_alone() -> None:
    layer = Linear(64, 300)
    x = torch.randn(64, 400, requires_grad=True)
    same(lambda x, w: layer(x.T), lambda x, w: F.linear(x.T, w), (x, layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.T).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7, 32), (2, 6, 5, 16)])
def test_rms_norm_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.rand(shape[-1]).to(dtype).requires_grad_()
    same(
        lambda x, w: rms_norm(x, w, 1e-6).transpose(0, 1),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6).transpose(0, 1),
        (x, weight),
        dtype,
    )
    with torch.no_grad():
        assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, weight.shape, weight, 1e-6))


def test_rotary_is_that_of_transformers() -> None:
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    angle = torch.randn(1, 9, 4).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    same(lambda x: rotary(x, cos, sin), lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], (x,))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_blocked_attention_is_causal_attention(heads: int, groups: int, dtype: torch.dtype) -> None:
    q = torch.randn(2, 192, heads, 16).to(dtype).transpose(1, 2).detach().requires_grad_()
    k, v = (torch.randn(2, groups, 192, 16).to(dtype).requires_grad_() for _ in range(2))
    same(
        lambda q, k, v: blocked_causal(q, k, v, 0.25),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.25),
        (q, k, v),
        dtype,
    )


def test_blocked_attention_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="T=70 queries of 70 keys: T must be a multiple of 64"):
        blocked_causal(*[torch.zeros(1, 1, 70, 4)] * 3, 1.0)


@pytest.mark.parametrize("chunk", [7, 64, 1000, None])
def test_head_loss_is_cross_entropy(chunk: int | None) -> None:
    hidden, head = torch.randn(100, 12, requires_grad=True), torch.randn(50, 12, requires_grad=True)
    target = torch.randint(0, 50, (100,))
    target[::7] = IGNORED
    _, each = head_loss(hidden, head, target, chunk=chunk)
    assert_close(each, F.cross_entropy(hidden @ head.T, target, reduction="none"), atol=1e-5, rtol=1e-5)
    assert not each.requires_grad
    same(
        lambda h, w: 3 * head_loss(h, w, target, chunk=chunk)[0],
        lambda h, w: 3 * F.cross_entropy(h @ w.T, target),
        (hidden, head),
    )


def test_head_loss_in_bf16_and_without_targets() -> None:
    hidden, head = torch.randn(40, 12).bfloat16(), torch.randn(50, 12).bfloat16()
    target = torch.randint(0, 50, (40,))
    expected = F.cross_entropy((hidden @ head.T).float(), target)
    assert_close(head_loss(hidden, head, target)[0], expected)
    leaf = hidden.clone().requires_grad_()
    mean, _ = head_loss(leaf, head.requires_grad_(), torch.full((40,), IGNORED))
    mean.backward()
    assert float(mean.detach()) == 0
    assert not leaf.grad.any()


def test_next_token_loss_predicts_the_next_token_and_divides_by_the_items_given() -> None:
    hidden, head = torch.randn(3, 8, 12), torch.randn(50, 12)
    ids = torch.randint(0, 50, (3, 8))
    mean, each = next_token_loss(hidden, head, ids)
    expected = F.cross_entropy((hidden @ head.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert_close(each, expected.view(3, 7))
    assert_close(mean, expected.mean())
    assert_close(next_token_loss(hidden, head, ids, num_items_in_batch=42)[0], expected.sum() / 42)
