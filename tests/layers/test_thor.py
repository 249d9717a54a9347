"""Stochastic experts: how they are drawn, in training and at inference, and the loss that makes them agree."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.layers import MoE
from moestro.layers.experts import GatedExperts
from moestro.layers.routers.stochastic import StochasticRouter, set_dispatch
from moestro.models.lm import MoELMForCausalLM
from moestro.routing import RoutingContext
from moestro.steer.reroute import top_p
from moestro.train.consistency import consistency_step, dispatch_agreement, symmetric_kl
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids


def lm(**router: object) -> MoELMForCausalLM:
    return small_lm(router={"kind": "stochastic", **router}, num_experts_per_tok=1)


def router(experts: int = 4, **options: object) -> StochasticRouter:
    return StochasticRouter(8, experts, **options)


def test_training_draws_one_expert_for_the_whole_batch_evenly() -> None:
    thor = router()
    drawn = torch.cat([thor(torch.randn(6, 8)).indices.T for _ in range(400)])
    assert (drawn == drawn[:, :1]).all()
    counts = drawn[:, 0].bincount(minlength=4)
    assert ((counts - 100).abs() < 5 * 75**0.5).all()  # five standard deviations of a binomial
    routing = thor(torch.randn(6, 8))
    assert (routing.weights == 1).all()
    assert (routing.logits == 0).all()


@pytest.mark.parametrize("level", ["batch", "sentence", "token"])
def test_levels_share_draws_as_far_as_they_say(level: str) -> None:
    thor = router(8, level=level).eval()
    indices = thor(torch.randn(60, 8), RoutingContext((6, 10))).indices.view(6, 10)
    by_row = (indices == indices[:, :1]).all(dim=1)
    assert by_row.all() == (level != "token")
    assert (indices[:, 0] == indices[0, 0]).all() == (level == "batch")


def test_draws_at_inference_are_even_and_change_with_seed_and_layer() -> None:
    thor = router(level="token").eval()
    context = RoutingContext((40, 100))
    first = thor(torch.randn(4000, 8), context).indices
    assert ((first.flatten().bincount(minlength=4) - 1000).abs() < 5 * 750**0.5).all()
    assert torch.equal(first, thor(torch.randn(4000, 8), context).indices)
    for other in (RoutingContext((40, 100), layer=1), None):
        thor.dispatch(seed=0 if other else 1)
        share = (thor(torch.randn(4000, 8), other or context).indices == first).float().mean()
        assert share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("level", ["sentence", "token"])
def test_a_cached_step_draws_what_the_whole_would(level: str) -> None:
    thor = router(8, level=level).eval()
    whole = thor(torch.randn(30, 8), RoutingContext((3, 10), layer=2)).indices.view(3, 10)
    step = thor(torch.randn(3, 8), RoutingContext((3, 1), layer=2, start=7)).indices.view(3, 1)
    assert torch.equal(step, whole[:, 7:8])


def test_beams_of_one_sentence_share_its_draw() -> None:
    thor = router(16, level="sentence").eval()
    thor.dispatch(beams=3)
    indices = thor(torch.randn(12, 8), RoutingContext((12, 1))).indices.view(4, 3)
    assert (indices == indices[:, :1]).all()
    assert len(indices[:, 0].unique()) > 1


def test_several_slots_are_distinct_experts_of_equal_weight() -> None:
    for thor in (router(top_k=3), router(top_k=3, level="token").eval()):
        routing = thor(torch.randn(5, 8), RoutingContext((1, 5)))
        assert all(len(set(row)) == 3 for row in routing.indices.tolist())
        torch.testing.assert_close(routing.weights, torch.full((5, 3), 1 / 3))


def test_one_expert_is_the_plain_layer() -> None:
    layer = MoE(router(1), GatedExperts(1, 8, 8))
    hidden = torch.randn(2, 3, 8)
    gate, up = (layer.experts.gate_up_proj[0] @ hidden[..., None])[..., 0].chunk(2, dim=-1)
    expected = (layer.experts.down_proj[0] @ (F.silu(gate) * up)[..., None])[..., 0]
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="0 experts"):
        router(0)
    with pytest.raises(ValueError, match="level='word'"):
        router(level="word")
    with pytest.raises(ValueError, match="beams=0"):
        router().dispatch(beams=0)
    with pytest.raises(ValueError, match="which tokens are one sentence"):
        router().eval()(torch.randn(3, 8))
    with pytest.raises(ValueError, match="no balance loss"):
        MoE(router(), GatedExperts(4, 8, 8), losses={"load_balance": 0.01})(torch.randn(3, 8))
    with pytest.raises(ValueError, match="no stochastic experts"):
        set_dispatch(small_lm(), seed=1)
    with pytest.raises(ValueError, match="no scores to choose by"):
        top_p(check_observed(lm()), 0.5)


@pytest.mark.parametrize("level", ["batch", "sentence", "token"])
def test_it_works_in_the_language_model(level: str, tmp_path: Path) -> None:
    model = lm(level=level)
    check_trains(model)
    check_generates(model)
    check_round_trip(model, tmp_path)
    check_observed(model)


def test_symmetric_kl_is_its_formula() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2
    torch.testing.assert_close(symmetric_kl(a, b), expected.sum())
    torch.testing.assert_close(symmetric_kl(a, b, reduction="mean"), expected.mean())
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(symmetric_kl(a, b, mask), expected[mask].sum())
    assert symmetric_kl(a, b, torch.zeros(5, dtype=torch.bool), "mean") == 0
    assert symmetric_kl(a, a) == 0


def test_symmetric_kl_stays_finite_in_half_precision() -> None:
    far = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert symmetric_kl(far, -far).isfinite()


class Net(nn.Module):
    """A classifier whose one hidden layer is stochastic."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(router(level="token"), GatedExperts(4, 8, 16))
        nn.init.normal_(self.moe.experts.down_proj, std=0.5)
        nn.init.normal_(self.moe.experts.gate_up_proj, std=0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.moe(x))


def test_the_step_adds_up_two_independent_passes() -> None:
    net, seen = Net(), []
    x, y = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, -100])

    def model(batch: Tensor) -> Tensor:
        seen.append(net(batch))
        return seen[-1]

    different = 0
    for _ in range(20):
        parts = consistency_step(model, x, y, alpha=2.0, label_smoothing=0.0)
        a, b = seen[-2:]
        different += not torch.equal(a, b)
        torch.testing.assert_close(parts["ce"], sum(F.cross_entropy(z[:5], y[:5], reduction="sum") for z in (a, b)))
        torch.testing.assert_close(parts["consistency"], symmetric_kl(a[:5], b[:5]))
        torch.testing.assert_close(parts["loss"], parts["ce"] + 2.0 * parts["consistency"])
    assert 8 <= different < 20  # three draws of four differ


def test_gradients_flow_through_both_passes() -> None:
    outputs = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    left = iter(outputs)
    parts = consistency_step(lambda batch: next(left), None, torch.zeros(4, dtype=torch.long))
    gradients = torch.autograd.grad(parts["consistency"], outputs)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_mean_step_is_a_sum_step_over_the_tokens() -> None:
    outputs = [torch.randn(4, 3) for _ in range(2)]
    found = []
    for reduction in ("sum", "mean"):
        left = iter(outputs)
        labels = torch.tensor([0, 2, -100, 1])
        found.append(consistency_step(lambda batch, left=left: next(left), None, labels, reduction=reduction)["loss"])
    torch.testing.assert_close(found[0], 3 * found[1])


def test_consistency_makes_draws_agree() -> None:
    net, x = Net(), torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    before = dispatch_agreement(net, [x])
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        consistency_step(net.train(), x, y, alpha=5.0, reduction="mean")["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    after = dispatch_agreement(net, [x])
    assert after["sym_kl"] < 0.5 * before["sym_kl"]
    assert net.training


def test_agreement_of_one_expert_is_full_and_bad_requests_are_refused() -> None:
    net = Net()
    net.moe = MoE(router(1, level="token"), GatedExperts(1, 8, 16))
    assert dispatch_agreement(net, [torch.randn(6, 8)], n=3) == {"sym_kl": 0.0, "disagreement": 0.0}
    with pytest.raises(ValueError, match="n=1"):
        dispatch_agreement(net, [torch.randn(6, 8)], n=1)
    with pytest.raises(ValueError, match="nothing to predict"):
        dispatch_agreement(net, [])
    with pytest.raises(ValueError, match="alpha=-1"):
        consistency_step(net, torch.randn(1, 8), torch.zeros(1, dtype=torch.long), alpha=-1)


def test_a_language_model_takes_the_step() -> None:
    model, ids = lm(), token_ids()
    model.train()
    parts = consistency_step(lambda batch: model(input_ids=batch).logits[:, :-1], ids, ids[:, 1:])
    parts["loss"].backward()
    assert parts["consistency"] > 0
    agreement = dispatch_agreement(model, [ids], call=lambda batch: model(input_ids=batch).logits)
    assert agreement["sym_kl"] > 0
