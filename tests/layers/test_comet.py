"""COMET: the trees give at most K experts once they are decided, and the search finds a permutation."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import moestro
from moestro.layers import MoE, after_step, gather_losses
from moestro.layers.experts import GatedExperts
from moestro.layers.routers.baselines import HashRouter
from moestro.layers.routers.comet import CometRouter, leaf_probabilities, smooth_step
from moestro.layers.routers.permutation import RELEASED_TAU, PermutationSearch, PermutedRouter, sinkhorn
from moestro.layers.routers.top_k import TopKRouter
from moestro.models.lm import MoELMForCausalLM
from moestro.routing import RoutingContext, dense_weights
from moestro.view.edit import SwitchOff
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm

N, H, E, K = 40, 12, 6, 2


def comet(**options) -> CometRouter:
    router = CometRouter(H, E, K, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.3)
    return router


def test_smooth_step_is_the_papers_cubic_and_flat_outside() -> None:
    gamma = 1.7
    z = torch.linspace(-2, 2, 101, dtype=torch.float64)
    left, right = smooth_step(z, gamma)
    inside = z.abs() <= gamma / 2
    torch.testing.assert_close(left[inside], (-2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5)[inside])
    assert (left[z <= -gamma / 2] == 0).all()
    assert (left[z >= gamma / 2] == 1).all()
    torch.testing.assert_close(left + right, torch.ones_like(left))


@pytest.mark.parametrize("experts", [2, 3, 5, 8, 11])
def test_leaf_probabilities_are_products_along_paths(experts: int) -> None:
    left = torch.rand(4, experts - 1)
    found = leaf_probabilities(left, 1 - left)
    for leaf in range(experts):
        node, product = leaf + experts - 1, torch.ones(4)
        while node:
            parent = (node - 1) // 2
            product = product * (left[:, parent] if node == 2 * parent + 1 else 1 - left[:, parent])
            node = parent
        torch.testing.assert_close(found[:, leaf], product)


def test_gate_is_one_softmax_over_all_leaves() -> None:
    router, hidden = comet(gamma=3.0), torch.randn(N, H)
    z = (hidden @ router.node_weight.T + router.node_bias).view(N, K, -1)
    p = leaf_probabilities(*smooth_step(z, 3.0))
    mass = p * (hidden @ router.leaf_weight.T + router.leaf_bias).view(N, K, E).exp()
    expected = mass.sum(dim=1) / mass.sum(dim=(1, 2))[:, None]
    routing = router(hidden)
    torch.testing.assert_close(dense_weights(routing, E), expected)
    torch.testing.assert_close(router.probabilities(routing.logits), expected)
    torch.testing.assert_close(router.parts(hidden).sum(dim=1), expected)


def test_every_expert_is_reached_at_the_start_and_no_node_is_saturated() -> None:
    router = CometRouter(H, E, K, gamma=0.01)
    assert (router.active_count(torch.randn(N, H)) == E).all()
    dense_weights(router(torch.randn(N, H)), E).square().sum().backward()
    assert (router.node_weight.grad.abs().sum(dim=1) > 0).all()


def test_a_hardened_gate_uses_at_most_k_experts() -> None:
    router, hidden = comet(gamma=3.0), torch.randn(N, H)
    assert router.active_count(hidden).max() > K
    router.harden()
    routing = router(hidden)
    assert routing.weights.shape[1] <= K
    assert router.active_count(hidden).max() <= K
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(N))


def test_hardening_a_saturated_gate_changes_nothing() -> None:
    router, hidden = comet(gamma=1e-4), torch.randn(N, H)
    before = router(hidden)
    router.harden()
    torch.testing.assert_close(dense_weights(router(hidden), E), dense_weights(before, E))


def test_gradients_stay_finite_where_subtrees_have_vanished() -> None:
    router, hidden = comet(gamma=0.2), torch.randn(N, H, requires_grad=True)
    routing = router.train()(hidden)
    assert torch.isneginf(routing.logits).any()
    loss = (routing.weights**2).sum() + router.losses["leaf_entropy"]
    loss = loss + router.probabilities(routing.logits).square().sum() + routing.logits.logsumexp(dim=-1).sum()
    loss.backward()
    assert hidden.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_entropy_loss_leaves_padding_out_and_rises_over_the_ramp() -> None:
    router, hidden = comet(gamma=3.0, entropy_coef=0.5, ramp=0.4), torch.randn(10, H)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)

    def loss(progress: float, mask=None, tokens=hidden) -> float:
        router.train()(tokens, RoutingContext((1, len(tokens)), mask=mask, progress=progress))
        return router.losses["leaf_entropy"].item()

    p = router.leaves(hidden)
    assert loss(1.0) == pytest.approx(0.5 * torch.special.entr(p).sum(dim=(1, 2)).mean().item(), rel=1e-5)
    assert loss(1.0, mask) == pytest.approx(loss(1.0, tokens=hidden[mask.reshape(-1)]), rel=1e-5)
    assert loss(0.0) == 0
    assert loss(0.2) == pytest.approx(loss(1.0) / 2)


def test_the_entropy_loss_decides_the_gate() -> None:
    router, hidden = CometRouter(H, E, K, entropy_coef=1.0).train(), torch.randn(N, H)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        router(hidden)
        optimiser.zero_grad()
        router.losses["leaf_entropy"].backward()
        optimiser.step()
    assert router.active_count(hidden).float().mean() <= K + 0.5


@pytest.mark.parametrize(
    "wrong", [dict(gamma=0.0), dict(entropy_coef=-1.0), dict(ramp=1.5), dict(top_k=9), dict(num_experts=1, top_k=1)]
)
def test_comet_refuses(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        CometRouter(**{"hidden_size": H, "num_experts": E, "top_k": K, **wrong})


def test_sinkhorn_is_doubly_stochastic_and_stands_the_released_temperature() -> None:
    logits = torch.rand(7, 7) * 0.1 - 0.05
    p = sinkhorn(logits / 1e-1, 150)
    torch.testing.assert_close(p.sum(dim=0), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(p.sum(dim=1), torch.ones(7, dtype=torch.float64))
    assert sinkhorn(logits / RELEASED_TAU[1], 150).isfinite().all()


def test_search_cools_hardens_and_freezes_to_the_best_assignment() -> None:
    search = PermutationSearch(4, steps=5, tau=(1e-1, 1e-3))
    assert search.temperature(0) == pytest.approx(1e-1)
    assert search.temperature(5) == pytest.approx(1e-3)
    with torch.no_grad():
        search.logits.normal_()
    best = max(
        itertools.permutations(range(4)), key=lambda order: sum(search.logits[0, i, j] for i, j in enumerate(order))
    )
    for _ in range(5):
        assert not search.frozen
        search.advance()
    assert search.frozen
    assert search.assignment[0].tolist() == list(best)
    with torch.no_grad():
        search.logits.neg_()
    assert search.hardened()[0].tolist() == list(best), "frozen means frozen"


def test_a_search_finds_a_scrambled_map() -> None:
    """Frozen experts, tokens hashed to the wrong ones: the only thing to learn is the permutation."""
    right = torch.randperm(8)
    router = PermutedRouter(HashRouter(2, 8, 1, vocab_size=8), PermutationSearch(8, steps=150, rounds=(20, 40)))
    router.router.table.copy_(torch.arange(8)[:, None])
    experts, ids = torch.randn(8, 4), torch.arange(8)[None]
    optimiser = torch.optim.Adam(router.search.parameters(), lr=2e-3)
    router.train()
    for _ in range(150):
        routing = router(torch.zeros(8, 2), RoutingContext((1, 8), input_ids=ids))
        loss = F.mse_loss(dense_weights(routing, 8) @ experts, experts[right]) + sum(router.losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        after_step(router, 0.0)
    assert router.search.assignment[0].tolist() == right.tolist()
    found = router(torch.zeros(8, 2), RoutingContext((1, 8), input_ids=ids))
    assert found.indices[:, 0].tolist() == right.tolist()


def test_soft_permutation_keeps_the_sum_of_the_gate_and_hard_one_its_slots() -> None:
    inner = TopKRouter(H, E, K, normalize=False)
    router, hidden = PermutedRouter(inner, PermutationSearch(E, steps=3)), torch.randn(N, H)
    plain = inner(hidden)
    soft = router.train()(hidden)
    torch.testing.assert_close(soft.weights.sum(dim=1), plain.weights.sum(dim=1))
    p = router.search.matrix()[0].float()
    mixed = dense_weights(plain, E) @ p
    torch.testing.assert_close(dense_weights(soft, E), mixed / mixed.sum(1, True) * plain.weights.sum(1, True))
    hard = router.eval()(hidden)
    order = router.search.hardened()[0]
    torch.testing.assert_close(hard.weights, plain.weights)
    assert (hard.indices == order[plain.indices]).all()
    torch.testing.assert_close(hard.logits[:, order], plain.logits)


def test_each_slot_and_each_tree_can_have_a_permutation_of_its_own() -> None:
    hidden = torch.randn(N, H)
    for inner in (TopKRouter(H, E, K), comet(gamma=3.0)):
        router = PermutedRouter(inner, PermutationSearch(E, steps=1, count=K))
        soft = dense_weights(router.train()(hidden), E)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(N))
        after_step(router, 1.0)
        hard = dense_weights(router(hidden), E)
        torch.testing.assert_close(hard.sum(dim=1), torch.ones(N))
        if isinstance(inner, CometRouter):
            orders = router.search.assignment
            parts = inner.parts(hidden)
            expected = sum(torch.zeros(N, E).index_add(1, orders[j], parts[:, j]) for j in range(K))
            torch.testing.assert_close(hard, expected)


def test_permutation_refuses() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        PermutationSearch(4, 0)
    with pytest.raises(ValueError, match=r"tau=\(0.1, 0\)"):
        PermutationSearch(4, 1, tau=(0.1, 0))
    with pytest.raises(ValueError, match="permutes 4 experts"):
        PermutedRouter(TopKRouter(H, E, K), PermutationSearch(4, 1))
    with pytest.raises(ValueError, match="count=3"):
        PermutedRouter(TopKRouter(H, E, K), PermutationSearch(E, 1, count=3))


def test_losses_of_search_and_router_are_both_gathered() -> None:
    moe = MoE(PermutedRouter(comet(), PermutationSearch(E, 5)), GatedExperts(E, H, 8), losses={"load_balance": 0.1})
    moe.train()(torch.randn(2, 5, H))
    assert set(gather_losses(moe)) == {"leaf_entropy", "permutation_entropy", "load_balance"}


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "comet", "gamma": 2.0},
        {"kind": "permuted", "steps": 3},
        {"kind": "permuted", "router": {"kind": "comet", "ramp": 0.5}, "steps": 3, "count": 2, "noise": 0.1},
    ],
    ids=["comet", "permuted top-k", "permuted comet"],
)
def test_in_a_language_model(router: dict, tmp_path: Path) -> None:
    model = small_lm(router=router, router_losses={"load_balance": 0.01, "router_z": 0.01})
    check_trains(model)
    check_generates(model)
    check_observed(model)
    check_round_trip(model, tmp_path)


def test_hardened_and_frozen_survive_saving(tmp_path: Path) -> None:
    model = small_lm(router={"kind": "permuted", "router": "comet", "steps": 1})
    for layer in model.model.layers:
        layer.mlp.router.router.harden()
        layer.mlp.router.search.freeze()
    check_round_trip(model, tmp_path)
    again = MoELMForCausalLM.from_pretrained(tmp_path)
    for layer in again.model.layers:
        assert layer.mlp.router.router.hard
        assert layer.mlp.router.search.frozen


def test_a_frozen_top_k_router_can_be_edited() -> None:
    model = small_lm(router={"kind": "permuted", "steps": 1})
    assert moestro.open(model).layers[0].rule is None
    for layer in model.model.layers:
        layer.mlp.router.search.freeze()
    view = moestro.open(model)
    assert view.layers[0].rule is not None
    with view.edits(SwitchOff({(0, 3)})):
        _, weights, indices = view.layers[0].router(torch.randn(N, 32))
    assert 3 not in indices[weights > 0]
