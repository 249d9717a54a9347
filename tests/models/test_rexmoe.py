"""Experts shared by groups of layers, candidates that open by and by, and what that means for files and surgery."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import moestro
from moestro.analyze.load_balance import load_balance_violation, under_used
from moestro.fitting.plan import experts_to_keep
from moestro.layers.routers.baselines import HashRouter
from moestro.layers.routers.progressive import ProgressivePool, linear, stepwise
from moestro.layers.routers.top_k import TopKRouter
from moestro.models.lm import MoELMForCausalLM
from moestro.models.rexmoe import group_of
from moestro.routing import RoutingContext
from native_lm import check_generates, check_observed, check_round_trip, check_trains, gradients, small_lm, token_ids

N, R, LAYERS, K = 4, 2, 4, 2
SIZE: dict[str, Any] = dict(num_hidden_layers=LAYERS, num_experts=N, num_experts_per_tok=K)


def rexmoe(reuse: int = R, **options: Any) -> MoELMForCausalLM:
    config = {name: options.pop(name) for name in list(options) if name in ("tie_word_embeddings", "moe_layers")}
    return small_lm(**SIZE, **config, block={"kind": "rexmoe", "reuse": reuse, **options})


def expert_parameters(model: MoELMForCausalLM) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def context(progress: float, tokens: int = 6, layer: int = 0) -> RoutingContext:
    return RoutingContext(shape=(1, tokens), progress=progress, layer=layer)


def pool(**options: Any) -> ProgressivePool:
    return ProgressivePool(TopKRouter(8, 16, K), range(4, 8), **options).train()


def open_experts(router: ProgressivePool, progress: float, layer: int = 0) -> list[int]:
    logits = router(torch.zeros(1, 8), context(progress, tokens=1, layer=layer)).logits[0]
    return torch.isfinite(logits).nonzero()[:, 0].tolist()


def test_the_linear_schedule_has_the_papers_values() -> None:
    local, whole, start, end = 64, 256, 0.2, 0.6
    assert [linear(t, local, whole, start, end) for t in (0.0, 0.2, 0.4, 0.6, 1.0)] == [64, 64, 160, 256, 256]
    for step in range(101):
        t = step / 100
        exact = 64 * (1 + 3 * (step - 20) / 40) if 20 < step < 60 else 64 if step <= 20 else 256
        assert linear(t, local, whole, start, end) == math.floor(exact + 1e-9)


def test_the_stepwise_schedule_has_the_papers_values() -> None:
    at = [0.0, 0.19, 0.2, 0.39, 0.4, 0.59, 0.6, 1.0]
    assert [stepwise(t, 64, 256, 0.2, 0.6) for t in at] == [64, 64, 128, 128, 192, 192, 256, 256]
    assert [stepwise(t, 64, 128, 0.2, 0.6) for t in (0.1, 0.2, 0.7)] == [64, 128, 128]


def test_groups_tile_the_sparse_layers() -> None:
    assert [group_of(i, 2, [1, 2, 4, 5]) for i in (1, 2, 4, 5)] == [[1, 2], [1, 2], [4, 5], [4, 5]]
    with pytest.raises(ValueError, match="reuse=3 does not divide the 4"):
        group_of(1, 3, [1, 2, 4, 5])


def test_so_many_candidates_are_open_and_the_local_ones_always() -> None:
    router = pool()
    for progress in (0.0, 0.3, 0.45, 0.5, 0.7):
        found = open_experts(router, progress)
        assert len(found) == linear(progress, 4, 16)
        assert set(found) >= {4, 5, 6, 7}
    assert open_experts(router, 0.1) == [4, 5, 6, 7]


def test_unprotected_local_experts_are_closed_like_others() -> None:
    router = pool(protect_local=False)
    seen = [open_experts(router, step / 100) for step in range(20)]
    assert all(len(found) == 4 for found in seen)
    assert {e for found in seen for e in found} == set(range(16))


def test_the_draw_is_new_in_every_step_and_layer_and_the_same_on_every_rank() -> None:
    router, rank = pool(), pool()
    draws = [tuple(open_experts(router, step / 1000)) for step in range(350, 360)]
    assert len(set(draws)) > 5
    assert draws == [tuple(open_experts(rank, step / 1000)) for step in range(350, 360)]
    assert open_experts(router, 0.35, layer=0) != open_experts(router, 0.35, layer=3)
    assert open_experts(pool(seed=1), 0.35) != open_experts(router, 0.35)


def test_closed_experts_get_no_token_no_weight_and_no_gradient() -> None:
    router = pool()
    routing = router(torch.randn(50, 8), context(0.0, tokens=50))
    assert set(routing.indices.unique().tolist()) <= {4, 5, 6, 7}
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(50))
    (routing.weights[:, 0].sum() + router.probabilities(routing.logits).square().sum()).backward()
    rows = router.inner.weight.grad.abs().sum(dim=1)
    assert rows.isfinite().all()
    assert (rows > 0).tolist() == [4 <= e < 8 for e in range(16)]


def test_in_eval_mode_all_are_open_whatever_the_progress() -> None:
    router = pool().eval()
    hidden = torch.randn(50, 8)
    assert torch.equal(router(hidden, context(0.0, 50)).logits, router.inner(hidden).logits)


def test_a_forgotten_progress_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="set model.model.progress"):
        rexmoe().train()(token_ids())
    model = rexmoe().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for progress in (0.0, 0.9, 1.0):
            model.model.progress = progress
            model(token_ids())
        rexmoe().eval()(token_ids())
        rexmoe(schedule=None).train()(token_ids())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pool(schedule="cubic"), "cubic"),
        (lambda: pool(start=0.6, end=0.6), "start=0.6"),
        (lambda: ProgressivePool(TopKRouter(8, 16, 5), range(4)), "4 local experts of 16 for top_k=5"),
        (lambda: ProgressivePool(TopKRouter(8, 16, 2), range(14, 18)), "from 0 to 15"),
        (lambda: ProgressivePool(TopKRouter(8, 16, 2, bias_rate=0.1), range(4)), "bias_rate=0"),
        (lambda: ProgressivePool(HashRouter(8, 16, 2, vocab_size=9), range(4)), "looked up by token id"),
        (lambda: rexmoe(reuse=3), "reuse=3"),
        (lambda: rexmoe(schedule=None, start=0.1), "'start' is an option of a schedule"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_expert_parameters_are_those_of_the_base_model_and_routers_grow() -> None:
    base = small_lm(**SIZE)
    for reuse in (1, 2, 4):
        model = rexmoe(reuse)
        assert expert_parameters(model) == expert_parameters(base)
        assert model.model.layers[0].mlp.router.num_experts == reuse * N


def from_base(base: MoELMForCausalLM) -> MoELMForCausalLM:
    """A model with reuse R whose layers, down to their own experts, are those of the base model."""
    model = rexmoe()
    own, theirs = model.state_dict(), base.state_dict()
    state: dict[str, Tensor] = {name: theirs[name] for name in own if name in theirs and ".experts." not in name}
    for layer in range(LAYERS):
        first = layer // R * R
        router = own[f"model.layers.{layer}.mlp.router.inner.weight"].clone()
        router[(layer - first) * N : (layer - first + 1) * N] = theirs[f"model.layers.{layer}.mlp.router.weight"]
        state[f"model.layers.{layer}.mlp.router.inner.weight"] = router
        for name in ("gate_up_proj", "down_proj"):
            parts = [theirs[f"model.layers.{i}.mlp.experts.{name}"] for i in range(first, first + R)]
            state[f"model.layers.{layer}.mlp.experts.{name}"] = torch.cat(parts)
    model.load_state_dict(state)
    return model


def test_one_layer_to_a_group_is_the_base_model_bit_for_bit() -> None:
    with torch.no_grad():
        assert torch.equal(rexmoe(1)(token_ids()).logits, small_lm(**SIZE)(token_ids()).logits)


def test_down_to_their_own_experts_the_layers_are_the_base_model() -> None:
    base = small_lm(**SIZE)
    model = from_base(base).train()
    model.model.progress = 0.0
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()).logits, base(token_ids()).logits)
        assert not torch.allclose(model.eval()(token_ids()).logits, base(token_ids()).logits, atol=1e-3)


def test_a_shared_experts_gradient_is_the_sum_over_its_layers() -> None:
    together, apart = rexmoe(schedule=None), rexmoe(schedule=None)
    for layer in apart.model.layers:
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            setattr(layer.mlp.experts, name, torch.nn.Parameter(parameter.detach().clone()))
    shared, single = gradients(together, token_ids()), gradients(apart, token_ids())
    for first in (0, 2):
        for name in ("gate_up_proj", "down_proj"):
            parts = [single[f"model.layers.{i}.mlp.experts.{name}"] for i in (first, first + 1)]
            torch.testing.assert_close(shared[f"model.layers.{first}.mlp.experts.{name}"], parts[0] + parts[1])


@pytest.mark.parametrize("options", [{}, {"schedule": "stepwise", "protect_local": False}, {"schedule": None}])
def test_it_trains_generates_is_observed_and_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model = rexmoe(**options)
    model.model.progress = 0.35
    check_trains(model)
    check_generates(model)
    view = check_observed(model)
    assert [layer.num_experts for layer in view.layers] == [R * N] * LAYERS
    check_round_trip(model, tmp_path)


def test_recorded_router_logits_are_one_for_each_layer() -> None:
    out = rexmoe().eval()(token_ids(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(24, R * N)] * LAYERS


@pytest.mark.parametrize("tied", [True, False])
def test_files_hold_shared_experts_once_and_loaded_models_still_share_them(tied: bool, tmp_path: Path) -> None:
    model = rexmoe(tie_word_embeddings=tied)
    view = moestro.open(model)
    view.save(tmp_path / "view")
    with safe_open(tmp_path / "view" / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in stored) == view.num_bytes
    again = moestro.open(tmp_path / "view").model
    experts = [layer.mlp.experts.down_proj for layer in again.model.layers]
    assert experts[0] is experts[1]
    assert experts[1] is not experts[2]
    assert all(torch.equal(e, layer.mlp.experts.down_proj) for e, layer in zip(experts, model.model.layers))


def test_cuts_are_refused_before_anything_is_observed_or_changed() -> None:
    view = moestro.open(rexmoe())
    with pytest.raises(ValueError, match="layers 0 and 1 share their experts"):
        view.keep_experts({layer: [0, 1, 2] for layer in range(LAYERS)})
    with pytest.raises(ValueError, match="layers 0 and 1 share their experts"):
        experts_to_keep(view, None, "50%")
    assert [layer.num_experts for layer in view.layers] == [R * N] * LAYERS


def test_dense_layers_are_left_out_of_the_groups() -> None:
    model = rexmoe(moe_layers=[1, 3])
    experts = [model.model.layers[i].mlp.experts.down_proj for i in (1, 3)]
    assert experts[0] is experts[1]


def test_load_balance_violation_and_under_use() -> None:
    loads = {0: torch.tensor([[6.0, 0.0], [2.0, 0.0]]), 1: torch.tensor([[3.0, 5.0]])}
    violation = load_balance_violation(loads)
    assert violation[0].tolist() == [1.0, -1.0]
    assert violation[1].tolist() == [-0.25, 0.25]
    assert under_used(loads) == 0.25
    with pytest.raises(ValueError, match="layer 0 served no token"):
        load_balance_violation({0: torch.zeros(1, 3)})
