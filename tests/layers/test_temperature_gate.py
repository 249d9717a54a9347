"""The dense-to-sparse gate, and the mixture of Gaussian experts that says what its temperature can be learned from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moestro.layers.routers.temperature import TemperatureRouter, above, exponential, linear
from moestro.routing import RoutingContext, dense_weights
from moestro.train.gaussian_moe import (
    GaussianMoE,
    check_activation,
    fisher_spectrum,
    fit,
    fit_em,
    identity,
    split,
    voronoi_loss,
)
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm

N, H, E, K = 50, 12, 6, 2


def router(**options) -> TemperatureRouter:
    made = TemperatureRouter(H, E, K, **options)
    made.reset_parameters(std=0.4)
    torch.nn.init.normal_(made.bias)
    return made


def at(progress: float) -> RoutingContext:
    return RoutingContext((1, N), progress=progress)


@pytest.mark.parametrize("activation", [None, "sigmoid", "tanh", "gelu", "silu"])
def test_weights_are_the_softmax_over_the_temperature(activation: str | None) -> None:
    gate, hidden = router(activation=activation, start=2.0, end=0.5, curve="linear"), torch.randn(N, H)
    z = hidden @ gate.weight.T
    sigma = {None: identity, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}[activation]
    routing = gate(hidden, at(0.5))
    torch.testing.assert_close(dense_weights(routing, E), ((sigma(z) + gate.bias) / 1.25).softmax(dim=-1))


def test_annealing_goes_from_start_to_end() -> None:
    for curve, halfway in ((exponential, 1.0), (linear, 1.25)):
        assert [curve(p, 2.0, 0.5) for p in (0.0, 0.5, 1.0)] == pytest.approx([2.0, halfway, 0.5])


def test_weights_sharpen_and_experts_leave_as_the_temperature_falls() -> None:
    gate, hidden = router(start=5.0, end=0.1, threshold=0.05), torch.randn(N, H)
    active = [(gate(hidden, at(p)).weights > 0).sum().item() / N for p in (0.0, 0.5, 1.0)]
    assert active[0] > active[1] > active[2] >= 1
    assert active[0] == E


def test_a_threshold_never_leaves_a_token_without_an_expert() -> None:
    weights = torch.tensor([[0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    assert above(weights, 0.9).tolist() == [[0.0, pytest.approx(0.4), 0.0], [0.0, 0.0, pytest.approx(0.8)]]
    assert torch.equal(above(weights, 0.0), weights)
    gate, hidden = router(threshold=0.99), torch.randn(N, H)
    torch.testing.assert_close(gate(hidden).weights.sum(dim=1), torch.ones(N))


def test_top_k_begins_where_it_is_told_to() -> None:
    gate, hidden = router(top_k_from=0.8), torch.randn(N, H)
    assert gate(hidden, at(0.79)).indices.shape[1] == E
    late = gate(hidden, at(0.8))
    assert late.indices.shape[1] == K
    torch.testing.assert_close(late.weights.sum(dim=1), torch.ones(N))


def test_scaling_a_plain_gate_with_its_temperature_changes_nothing_but_an_activated_one() -> None:
    hidden = torch.randn(N, H)
    for activation, same in ((None, True), ("sigmoid", False)):
        one = router(activation=activation, start=1.0, end=1.0)
        other = TemperatureRouter(H, E, K, activation=activation, start=3.0, end=3.0)
        with torch.no_grad():
            other.weight.copy_(3 * one.weight)
            other.bias.copy_(3 * one.bias)
        assert torch.allclose(dense_weights(one(hidden), E), dense_weights(other(hidden), E), atol=1e-5) == same


def test_a_learned_temperature_starts_where_told_and_learns() -> None:
    gate = router(activation="sigmoid", learn_tau=True, start=2.0)
    assert gate.tau().item() == pytest.approx(2.0)
    dense_weights(gate(torch.randn(N, H)), E).square().sum().backward()
    assert gate.theta.grad.abs() > 0
    with pytest.warns(UserWarning, match="redundant"):
        router(learn_tau=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(end=0.0), "end=0.0"),
        (dict(activation="relu"), "'relu' is not known"),
        (dict(curve="cosine"), "'cosine' is not known"),
        (dict(threshold=1.0), "threshold=1.0"),
        (dict(top_k_from=2.0), "top_k_from=2.0"),
    ],
)
def test_the_gate_refuses(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TemperatureRouter(H, E, K, **wrong)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(activation="tanh", learn_tau=True, threshold=0.05), dict(activation="sigmoid", top_k_from=0.9)],
    ids=["plain", "learned tau", "top-k at the end"],
)
def test_in_a_language_model(options: dict, tmp_path: Path) -> None:
    model = small_lm(router={"kind": "temperature", **options}, router_losses={"load_balance": 0.01})
    check_trains(model)
    check_generates(model)
    check_round_trip(model, tmp_path)
    view = check_observed(model)
    assert (view.layers[0].rule is None) == ("threshold" in options)


def mixture(activation=identity, **changes) -> GaussianMoE:
    plain = dict(
        slope=[[1.5]], intercept=[0.3], tau=0.7, coefficient=[[1.0], [-1.0]], offset=[1.0, -0.5], sd=[0.5, 0.5]
    )
    return GaussianMoE.of(**{**plain, **changes}, activation=activation)


def test_density_is_the_mixtures() -> None:
    model = mixture(torch.tanh)
    x, y = model.sample(5, seed=0)
    gate = ((torch.tanh(1.5 * x[:, 0]) + 0.3) / 0.7).exp()
    share = torch.stack([gate, torch.ones_like(gate)], dim=1) / (gate + 1)[:, None]
    normal = torch.distributions.Normal(torch.stack([x[:, 0] + 1, -x[:, 0] - 0.5], dim=1), 0.5)
    expected = (share * normal.log_prob(y[:, None]).exp()).sum(dim=1).log()
    torch.testing.assert_close(model.log_prob(x, y), expected)


def test_vector_and_back() -> None:
    model = mixture()
    assert len(model.vector()) == 9
    assert torch.equal(model.at(model.vector()).vector(), model.vector())


def test_fisher_information_is_singular_exactly_for_homogeneous_activations() -> None:
    for activation, singular in ((identity, True), (F.relu, True), (torch.tanh, False), (F.silu, False)):
        model = mixture(activation)
        spectrum = fisher_spectrum(model, *model.sample(4000, seed=0))
        assert (abs(spectrum[0] / spectrum[-1]) < 1e-10) == singular, activation


@pytest.mark.parametrize("order", [1, 2])
def test_activations_are_told_apart(order: int) -> None:
    for bad in (identity, F.relu, F.leaky_relu, torch.square, lambda z: z**3):
        assert not check_activation(bad, order=order)
    for good in (torch.sigmoid, torch.tanh, F.gelu, F.silu):
        assert check_activation(good, order=order)


def test_both_fits_reach_the_likelihood_of_the_truth() -> None:
    truth = mixture(torch.sigmoid)
    x, y = truth.sample(1500, seed=1)
    start = truth.at(truth.vector() + 0.3 * torch.randn(9, dtype=torch.float64))
    by_bfgs, by_em = fit(x, y, start), fit_em(x, y, start, rounds=60)
    assert by_bfgs.converged
    assert by_bfgs.log_likelihood >= truth.log_prob(x, y).mean()
    assert by_em.log_likelihood == pytest.approx(by_bfgs.log_likelihood, abs=2e-3)


def test_a_collapsed_expert_is_reported() -> None:
    truth = mixture()
    x, _ = truth.sample(200, seed=0)
    assert not fit(x, x[:, 0] + 1, truth).converged


@pytest.mark.parametrize("which", [[0], [1], [0, 0], [1, 0]])
@pytest.mark.parametrize("activation", [identity, torch.sigmoid])
def test_a_split_expert_changes_neither_density_nor_distance(activation, which: list[int]) -> None:
    truth = mixture(activation)
    more = split(truth, which)
    assert more.atoms.tolist() == truth.atoms[[0, *which, 1]].tolist()
    x, y = truth.sample(10, seed=0)
    torch.testing.assert_close(more.log_prob(x, y), truth.log_prob(x, y))
    assert voronoi_loss(more, truth) == pytest.approx(0)


def test_voronoi_loss_by_hand() -> None:
    truth = mixture()
    assert voronoi_loss(truth, truth) == pytest.approx(0)
    apart = mixture(coefficient=[[1.1], [-1.0]])
    assert voronoi_loss(apart, truth) == pytest.approx(0.1 * torch.tensor(0.3 / 0.7).exp().item(), rel=1e-4)
    twice = split(truth, [1])  # coefficients of the last true expert's atoms off by 0.1 to the power 2, offset to 4
    moved = replace(twice, coefficient=twice.coefficient + torch.tensor([[0.0], [0.1], [0.0]]))
    assert voronoi_loss(moved, truth) == pytest.approx(0.1**2 / 2)
    moved = replace(twice, offset=twice.offset + torch.tensor([0.0, 0.1, 0.1]))
    assert voronoi_loss(moved, truth) == pytest.approx(0.1**4)


def test_mixtures_refuse() -> None:
    with pytest.raises(ValueError, match="tau=0"):
        mixture(tau=0.0)
    with pytest.raises(ValueError, match=r"experts; slope"):
        mixture(slope=[[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"sd=0.01"):
        mixture(sd=[0.5, 0.01])
    with pytest.raises(ValueError, match="expert 2 cannot be copied: there are 0 to 1"):
        split(mixture(), [0, 2])
    with pytest.raises(ValueError, match="2 fitted experts for 3 true ones"):
        voronoi_loss(mixture(), split(mixture(), [0]))
    with pytest.raises(ValueError, match="4 fitted experts share a true one; powers are known for up to 3"):
        voronoi_loss(split(mixture(), [0] * 3), mixture())
    with pytest.raises(ValueError, match="order=3"):
        check_activation(torch.tanh, order=3)
