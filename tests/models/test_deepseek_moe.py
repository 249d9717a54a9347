"""DeepSeekMoE: segmentation keeps parameters and cost, its losses are their formulas, and the analyses measure it."""

from math import comb
from pathlib import Path

import pytest
import torch

import moestro
from moestro.analyze.expert_redundancy import CloseBest, loss_by_top_k, redundancy_curve, without_shared
from moestro.layers.losses import device_balance, expert_balance
from moestro.models.deepseek_moe import deepseek_moe, segment
from moestro.models.lm import MoELMForCausalLM
from moestro.routing import Routing, RoutingContext
from native_lm import SMALL, check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids
from tiny import make

SIZES = {
    name: SMALL[name] for name in SMALL if name not in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
}


def model(**options: object) -> MoELMForCausalLM:
    torch.manual_seed(0)
    given = {"m": 2, "shared": 1, "initializer_range": 0.2, **SIZES, **options}
    return MoELMForCausalLM(deepseek_moe(4, 2, 24, **given))


def test_segment_of_the_paper() -> None:
    assert segment(16, 2, 1024, m=4, shared=1) == dict(
        num_experts=63, num_experts_per_tok=7, moe_intermediate_size=256, shared_intermediate_size=256
    )
    assert comb(16, 2) == 120
    whole = segment(16, 2, 1024, m=4)
    assert comb(whole["num_experts"], whole["num_experts_per_tok"]) == 4_426_165_368


def test_segmentation_keeps_total_and_active_parameters() -> None:
    def parameters(m: int, shared: int) -> tuple[int, int]:
        config = deepseek_moe(8, 2, 24, m=m, shared=shared, **SIZES)
        block = MoELMForCausalLM(config).model.layers[0].mlp
        one = sum(p[0].numel() for p in block.experts.parameters())
        always = sum(p.numel() for p in block.shared.parameters()) if shared else 0
        return one * config.num_experts + always, one * config.num_experts_per_tok + always

    assert len({parameters(m, shared) for m, shared in [(1, 0), (1, 1), (2, 1), (4, 1), (4, 2)]}) == 1


def test_one_segment_and_nothing_shared_is_the_plain_layer() -> None:
    plain = small_lm(norm_topk_prob=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ours = model(m=1, shared=0)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=token_ids()).logits, ours.eval()(input_ids=token_ids()).logits)


def test_the_layer_is_its_equation() -> None:
    block = model().model.layers[0].mlp
    u = torch.randn(5, 32)
    scores = (u @ block.router.weight.T).softmax(dim=-1)
    expected = block.shared(u)
    for n in range(5):
        for e in scores[n].topk(3).indices:
            gate, up = (block.experts.gate_up_proj[e] @ u[n]).chunk(2)
            expected[n] += scores[n, e] * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(block(u), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(m=5), "cannot be split into m=5"),
        (dict(m=2, shared=4), "shared=4"),
        (dict(m=2, shared=-1), "shared=-1"),
        (dict(m=2, top_k=9), "top_k=9"),
    ],
)
def test_impossible_segments_are_refused(given: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        segment(8, given.pop("top_k", 2), 24, **given)


def even(tokens: int = 8, experts: int = 4, slots: int = 2) -> tuple[Routing, torch.Tensor]:
    indices = (torch.arange(tokens * slots) % experts).view(tokens, slots)
    flat = torch.full((tokens, experts), 1 / experts)
    return Routing(flat.log(), flat[:, :slots], indices), flat


def test_even_routing_costs_one() -> None:
    routing, flat = even()
    context = RoutingContext((2, 4))
    torch.testing.assert_close(expert_balance(routing, flat, context), torch.tensor(1.0))
    for groups in ([[0, 1], [2, 3]], [[0], [1, 2, 3]]):
        torch.testing.assert_close(device_balance(routing, flat, context, groups=groups), torch.tensor(1.0))


def test_losses_are_their_formulas_by_sequence_and_without_padding() -> None:
    routing = small_lm().model.layers[0].mlp.router(torch.randn(12, 32), RoutingContext((2, 6)))
    scores = routing.logits.softmax(dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    groups = [[0, 3, 5], [1, 2], [4, 6, 7]]
    by_expert, by_device = [], []
    for row in range(2):
        kept = [row * 6 + t for t in range(6) if mask[row, t]]
        f = torch.stack([(routing.indices[kept] == e).sum() * 8 / (2 * len(kept)) for e in range(8)])
        p = scores[kept].mean(dim=0)
        by_expert.append((f * p).sum())
        by_device.append(sum(f[g].mean() * p[g].sum() for g in groups))
    context = RoutingContext((2, 6), mask)
    torch.testing.assert_close(expert_balance(routing, scores, context), sum(by_expert) / 2)
    torch.testing.assert_close(device_balance(routing, scores, context, groups=groups), sum(by_device) / 2)


def test_groups_must_partition_the_routed_experts() -> None:
    with pytest.raises(ValueError, match="partition"):
        device_balance(*even(), RoutingContext((2, 4)), groups=[[0, 1], [1, 2, 3]])
    with pytest.raises(ValueError, match="needs groups"):
        model(device_balance=0.05)


def test_it_works_in_the_language_model(tmp_path: Path) -> None:
    small = model(device_balance=0.05, groups=[[0, 1, 2], [3, 4, 5, 6]])
    small.train()
    out = small(input_ids=token_ids(), labels=token_ids())
    assert out.aux_loss > 0
    check_trains(small)
    check_generates(small)
    check_round_trip(small, tmp_path)
    view = check_observed(small)
    assert (view.layers[0].num_experts, view.layers[0].top_k, view.layers[0].rule.normalize) == (7, 3, False)


def test_the_first_layers_can_stay_dense() -> None:
    assert [layer.index for layer in moestro.open(model(first_dense=1)).layers] == [1]


def logits(small: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return small(input_ids=token_ids()).logits


def test_closing_the_best_leaves_the_next_with_their_scores() -> None:
    small = model().eval()
    view, seen = moestro.open(small), []
    with view.edits(CloseBest(2 / 7)):
        hook = small.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        logits(small)
        hook.remove()
    hidden, indices, weights = seen[0]
    scores = (hidden @ small.model.layers[0].mlp.router.weight.T).softmax(dim=-1)
    values, order = scores.topk(5, dim=-1)
    assert torch.equal(indices, order[:, 2:])
    torch.testing.assert_close(weights, values[:, 2:])


def test_analyses_measure_the_model_and_leave_no_trace() -> None:
    small = model().eval()
    before, view = logits(small), moestro.open(small)

    def distance() -> float:
        return float((logits(small) - before).abs().max())

    curve = redundancy_curve(view, distance, (0.0, 1 / 7, 3 / 7))
    assert curve[0.0] < 1e-5 < curve[1 / 7]
    by_k = loss_by_top_k(view, distance, (1, 3, 7))
    assert by_k[3] < 1e-5 < min(by_k[1], by_k[7])
    with without_shared(view):
        assert distance() > 1e-3
        changed = logits(small)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.mlp.shared.down_proj.weight.zero_()
    with view.edits(), torch.no_grad():
        assert not torch.allclose(logits(small), changed)  # three routed experts, not four
    with without_shared(view):
        torch.testing.assert_close(logits(small), changed)


def test_analyses_run_on_a_family_of_transformers() -> None:
    small = make("deepseek_v3", n_group=1, topk_group=1).model.eval()
    view = moestro.open(small)
    before = logits(small)
    with without_shared(view, extra_routed=0):
        assert not torch.allclose(logits(small), before)
    assert set(redundancy_curve(view, lambda: float(logits(small).mean()), (0.0, 1 / 8))) == {0.0, 1 / 8}
    assert torch.equal(logits(small), before)


def test_analyses_refuse_what_cannot_be() -> None:
    view = moestro.open(model().eval())
    with pytest.raises(ValueError, match="leaves 2 for top_k=3"):
        redundancy_curve(view, lambda: 0.0, (0.0, 5 / 7))
    with pytest.raises(ValueError, match="no shared expert"), without_shared(moestro.open(small_lm().eval())):
        pass
    with pytest.raises(ValueError, match="in groups"):
        redundancy_curve(moestro.open(make("deepseek_v3").model), lambda: 0.0)
