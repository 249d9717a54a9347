"""The `moestro` experts backend computes what each family's own eager experts compute, and its gradients."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moestro.view import experts_backend
from moestro.view.experts_backend import experts_forward

H, I, E, K = 32, 12, 8, 3


def qwen3(act: str = "silu") -> nn.Module:
    """Gated, concatenated, [E, out, in]."""
    return Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, hidden_act=act))


def gpt_oss() -> nn.Module:
    """Interleaved, transposed, biased, with a gate of its own."""
    return GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))


def aria() -> nn.Module:
    """Concatenated and transposed."""
    return AriaExperts(AriaTextConfig(hidden_size=H, intermediate_size=I, moe_num_experts=E))


def nemotron_h() -> nn.Module:
    """Ungated."""
    return NemotronHExperts(NemotronHConfig(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E))


def muse_spark() -> nn.Module:
    """A norm after each expert."""
    return MuseSparkExperts(MuseSparkTextConfig(moe_hidden_size=H, moe_intermediate_size=I, num_local_experts=E))


FAMILIES: list[Callable[[], nn.Module]] = [
    qwen3,
    gpt_oss,
    aria,
    nemotron_h,
    muse_spark,
    pytest.param(lambda: qwen3("gelu"), id="qwen3-gelu"),
    pytest.param(lambda: qwen3("prelu"), id="qwen3-learned-activation"),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def build(family: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    module = family()
    if module.has_post_expert_norm and dtype == torch.float64:
        module.post_expert_norm = nn.RMSNorm(H)  # the family's own computes in fp32 whatever it is given
    module = module.to(dtype)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    module.config._experts_implementation = "eager"
    return module


def route(
    n: int, k: int = K, *, skew: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, H).to(dtype).requires_grad_()
    weights, indices = (torch.randn(n, E) + skew * torch.randn(E)).softmax(-1).topk(k)
    return hidden, indices, weights.to(dtype).detach().requires_grad_()


def run(module: nn.Module, how: str, hidden: Tensor, indices: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and the gradients to hidden, weights and every parameter that wants one."""
    module.config._experts_implementation = how
    out = module(hidden, indices, weights)
    wanted = [t for t in (hidden, weights, *module.parameters()) if t.requires_grad]
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, wanted, direction)]


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * (b.double().norm() + 1e-6)


@pytest.fixture(params=["groups", "grouped_mm"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute the layer; the one for GPUs runs on CPU too."""
    if request.param == "grouped_mm":
        monkeypatch.setattr(experts_backend, "_forward_groups", experts_backend.forward_grouped_mm)
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "skew"), [(100, 0.0), (30, 3.0)], ids=["even", "empty-experts"])
def test_every_layout_matches_eager(family, dtype, n, skew, path):
    module = build(family, dtype)
    inputs = route(n, skew=skew, dtype=dtype)
    assert_close(run(module, "moestro", *inputs), run(module, "eager", *inputs), dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [3, 30], ids=["slot-by-slot", "groups"])
def test_inference_equals_training_forward(family, n):
    module = build(family)
    module.config._experts_implementation = "moestro"
    hidden, indices, weights = route(n)
    with torch.no_grad():
        inferred = module(hidden, indices, weights)
    torch.testing.assert_close(inferred, module(hidden, indices, weights).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(family):
    module = build(family)
    hidden, indices, weights = route(12, k=2, skew=2.0)
    indices[3, 1] = E
    params = list(module.parameters())

    def layer(hidden: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return experts_forward(module, hidden, indices, weights)

    assert torch.autograd.gradcheck(layer, (hidden, weights, *params), fast_mode=True)


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("cost", [0, 10**9], ids=["single-experts", "one-group"])
def test_any_grouping_gives_the_same(monkeypatch, skew, k, cost):
    monkeypatch.setattr(experts_backend, "CALL_COST", dict.fromkeys((2, 4, 8), cost))
    monkeypatch.setattr(experts_backend, "CHUNK_BYTES", 40 * H * 8)
    module = build(qwen3)
    inputs = route(200, k, skew=skew)
    assert_close(run(module, "moestro", *inputs), run(module, "eager", *inputs), torch.float64)


@pytest.mark.parametrize("n", [2, 60], ids=["slot-by-slot", "groups"])
def test_sentinels_add_nothing_whatever_their_weight(n, path):
    module = build(qwen3, torch.float32)
    hidden, indices, weights = route(n, dtype=torch.float32)
    sentinel = torch.rand(indices.shape) < 0.4
    indices = indices.masked_fill(sentinel, E)
    indices[0] = E  # a token without any expert
    sentinel[0] = True
    noise = weights.detach().masked_fill(sentinel, float("nan")).requires_grad_()
    zeros = weights.detach().masked_fill(sentinel, 0.0).requires_grad_()
    want = run(module, "eager", hidden, indices, zeros)
    got = run(module, "moestro", hidden, indices, noise)
    assert_close(got, want, torch.float32)
    assert (got[0][0] == 0).all()
    assert (got[2][sentinel] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(module(hidden, indices, noise), want[0].detach())


def test_no_tokens(path):
    module = build(qwen3, torch.float32)
    got = run(module, "moestro", *route(0, dtype=torch.float32))
    assert got[0].shape == (0, H)
    assert all((g == 0).all() for g in got[3:])
    with torch.no_grad():
        assert module(torch.empty(0, H), torch.empty(0, K, dtype=torch.long), torch.empty(0, K)).shape == (0, H)


def test_non_contiguous_inputs():
    module = build(gpt_oss)
    hidden, indices, weights = route(50)
    strided = [t.detach().T.contiguous().T for t in (hidden, indices, weights)]
    assert not any(t.is_contiguous() for t in strided)
    strided[0].requires_grad_()
    strided[2].requires_grad_()
    assert_close(run(module, "moestro", *strided), run(module, "eager", hidden, indices, weights), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["nothing", "hidden", "weights", "last parameter"])
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(family, trained):
    module = build(family).requires_grad_(False)
    hidden, indices, weights = route(30)
    hidden.requires_grad_(trained == "hidden")
    weights.requires_grad_(trained == "weights")
    if trained == "last parameter":
        list(module.parameters())[-1].requires_grad_()
    if trained == "nothing":
        module.config._experts_implementation = "moestro"
        assert not module(hidden, indices, weights).requires_grad
    else:
        inputs = (hidden, indices, weights)
        assert_close(run(module, "moestro", *inputs), run(module, "eager", *inputs), torch.float64)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_wide_parameters_and_gradients(hidden_dtype, path):
    module = build(qwen3, torch.float32)
    hidden, indices, weights = route(80, dtype=torch.float32)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (run(module, how, hidden, indices, weights) for how in ("moestro", "eager"))
    assert_close(got, want, torch.bfloat16)


def test_gradient_checkpointing():
    module = build(gpt_oss)
    module.config._experts_implementation = "moestro"
    hidden, indices, weights = route(40)
    plain = torch.autograd.grad(module(hidden, indices, weights).sum(), [hidden, weights, *module.parameters()])
    again = checkpoint(module, hidden, indices, weights, use_reentrant=False).sum()
    assert_close(list(torch.autograd.grad(again, [hidden, weights, *module.parameters()])), list(plain), torch.float64)


def test_layers_of_different_size_in_one_graph():
    first, second = build(qwen3), build(aria)
    small = build(lambda: Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=4, num_experts=2)))
    hidden, indices, weights = route(30)
    results = []
    for how in ("moestro", "eager"):
        x = hidden
        for module, chosen in ((first, indices), (small, indices % 2), (second, indices), (first, indices)):
            module.config._experts_implementation = how
            x = x + module(x, chosen, weights)
        params = [*first.parameters(), *small.parameters(), *second.parameters()]
        results.append([x, *torch.autograd.grad(x.square().sum(), [hidden, weights, *params])])
    assert_close(*results, torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 70], ids=["slot-by-slot", "groups"])
@pytest.mark.parametrize("grad", [False, True])
def test_on_outputs_sees_every_slot_ungated_in_expert_order(monkeypatch, family, n, grad):
    monkeypatch.setattr(experts_backend, "CALLBACK_ROWS", 17)
    module = build(family)
    hidden, indices, weights = route(n)
    indices[1, 0] = E
    seen = []
    with nullcontext() if grad else torch.no_grad():
        out = experts_forward(module, hidden, indices, weights, on_outputs=lambda *s: seen.append(s))
    token, slot, outputs = (torch.cat(part) for part in zip(*seen))
    expert = indices[token, slot]
    assert (expert.diff() >= 0).all()
    assert not outputs.requires_grad
    assert sorted((token * K + slot).tolist()) == (indices.flatten() < E).nonzero().flatten().tolist()

    combined = torch.zeros_like(hidden).index_add(0, token, outputs * weights[token, slot, None]).detach()
    torch.testing.assert_close(combined, out.detach())
    module.config._experts_implementation = "eager"
    for t, s, y in zip(token, slot, outputs):  # one expert, gate weight one
        one = module(hidden[t, None], indices[t, s].view(1, 1), torch.ones(1, 1, dtype=y.dtype))
        torch.testing.assert_close(y, one[0].detach())


def test_outputs_are_held_for_a_block_of_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(experts_backend, "OUTPUT_BYTES", 10 * K * H * 8)
    module = build(qwen3)
    hidden, indices, weights = route(64)
    seen = []
    with torch.no_grad():
        out = experts_forward(module, hidden, indices, weights, on_outputs=lambda *s: seen.append(s))
    assert max(len(token) for token, _, _ in seen) <= 10 * K
    token, slot, outputs = (torch.cat(part) for part in zip(*seen))
    torch.testing.assert_close(torch.zeros_like(out).index_add(0, token, outputs * weights[token, slot, None]), out)


def test_compiled_models_run():
    module = build(qwen3, torch.float32)
    module.config._experts_implementation = "moestro"
    hidden, indices, weights = route(20, dtype=torch.float32)
    compiled = torch.compile(lambda h: module(h * 2, indices, weights) + 1, backend="eager")
    torch.testing.assert_close(compiled(hidden), module(hidden * 2, indices, weights) + 1)
