"""Momentum across depth: the recursions and their stability, and what holds for a model that uses them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.layers.momentum import AdamFirst, HeavyBall, RobustMomentum, stability_limit
from moestro.models.convert import add_momentum
from moestro.models.lm import MoELMForCausalLM
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids

RULES: dict[str, dict[str, Any]] = {
    "heavy_ball": {"mu": 0.7},
    "adam_first": {},
    "robust_momentum": {"k": 4.0},
}


def tiny(residual: Any = "plain", **config: Any) -> MoELMForCausalLM:
    return small_lm(**{"residual": residual, "num_hidden_layers": 4, **config}).eval()


IDS = token_ids()


def descend(rule: HeavyBall, sigma: float, layers: int = 400) -> float:
    """|x| after so many layers whose blocks are v = -sigma x, from x = 1."""
    x, memory = torch.ones(1, dtype=torch.float64), {}
    for _ in range(layers):
        y = rule.look_ahead(x, memory) if isinstance(rule, RobustMomentum) else x
        x, memory = rule.step(x, -sigma * y, memory)
    return float(x.abs())


@pytest.mark.parametrize(
    ("sigma", "plain", "momentum"),
    [(1.9, True, True), (2.1, False, True), (2.5, False, True), (3.3, False, True), (3.5, False, False)],
)
def test_heavy_ball_is_stable_where_plain_descent_is_not(sigma: float, plain: bool, momentum: bool) -> None:
    assert (descend(HeavyBall(mu=0.0), sigma) < 1e-3) == plain
    assert (descend(HeavyBall(mu=0.7), sigma) < 1e-3) == momentum


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_limit_is_where_the_theory_says(mu: float, gamma: float) -> None:
    inside, outside = (stability_limit(mu) * by / gamma for by in (0.99, 1.01))
    assert descend(HeavyBall(mu, gamma), inside, layers=3000) < 1e-3
    assert descend(HeavyBall(mu, gamma), outside, layers=3000) > 1e3


def test_heavy_ball_follows_the_recursion_of_the_paper_whose_momentum_has_the_other_sign() -> None:
    rule = HeavyBall(mu=0.6, gamma=0.4)
    x = theirs = torch.randn(3, 5)
    p = torch.zeros(3, 5)
    memory: dict[str, Tensor] = {}
    for _ in range(4):
        v = torch.randn(3, 5)
        x, memory = rule.step(x, v, memory)
        p = -v + 0.6 * p  # the released code: m = mu m + gamma v with experts of opposite sign, x - m
        theirs = theirs - 0.4 * p
    torch.testing.assert_close(x, theirs)


def test_adam_takes_its_step_in_the_first_layer_and_heavy_ball_follows() -> None:
    rule = AdamFirst(mu=0.5, gamma=0.1, first=0.2)
    x, v1, v2 = torch.randn(3, 2, 4)
    first, memory = rule.step(x, v1, {})
    torch.testing.assert_close(first, x + 0.2 * (0.1 * v1) / (0.001 * v1**2 + 1e-8).sqrt())
    second, _ = rule.step(first, v2, memory)
    torch.testing.assert_close(second, first + 0.1 * (0.5 * v1 + v2))


def test_kappa_one_inside_a_second_residual_connection_is_the_rule_without_decay() -> None:
    x, v = torch.randn(2, 3, 4)
    released = x + AdamFirst(kappa=1.0).step(x, v, {})[0]
    torch.testing.assert_close(released, AdamFirst().step(x, v, {})[0])


def test_a_token_that_no_expert_served_has_finite_gradients_and_still_moves() -> None:
    rule = AdamFirst()
    v = torch.zeros(1, 4, requires_grad=True)
    x, _ = rule.step(torch.ones(1, 4), v, {})
    x.sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert torch.equal(HeavyBall(mu=0.5).step(x, torch.zeros(1, 4), {"momentum": torch.ones(1, 4)})[0], x + 0.5)


def test_the_robust_rule_is_the_robust_momentum_method() -> None:
    k, p, lipschitz, sigma = 10.0, 0.75, 3.0, 1.3
    rule = RobustMomentum(k, p, lipschitz)
    step = k * (1 - p) ** 2 * (1 + p) / lipschitz
    keep = k * p**3 / (k - 1)
    ahead = p**3 / ((k - 1) * (1 - p) ** 2 * (1 + p))
    before, now = 1.0, 1.0
    x, memory = torch.ones(1, dtype=torch.float64), {}
    for _ in range(6):
        y = now + ahead * (now - before)
        before, now = now, now + keep * (now - before) - step * sigma * y
        x, memory = rule.step(x, -sigma * rule.look_ahead(x, memory), memory)
        assert float(x) == pytest.approx(now, rel=1e-9)


@pytest.mark.parametrize("p", [None, 0.8])
def test_the_robust_rule_shrinks_every_curvature_it_is_made_for_at_rate_p(p: float | None) -> None:
    rule = RobustMomentum(k=16.0, p=p, lipschitz=2.0)
    rate = p or 1 - 1 / 4
    for sigma in (2.0, 1.0, 0.5, 2.0 / 16):
        state = []
        for x, m in ((1.0, 0.0), (0.0, 1.0)):  # the columns of the linear map (x, m) -> (x, m)
            memory = {"momentum": torch.tensor([m], dtype=torch.float64)}
            start = torch.tensor([x], dtype=torch.float64)
            after, memory = rule.step(start, -sigma * rule.look_ahead(start, memory), memory)
            state.append(torch.stack([after[0], memory["momentum"][0]]))
        assert float(torch.linalg.eigvals(torch.stack(state, 1)).abs().max()) <= rate + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeavyBall(mu=1.0), "mu=1"),
        (lambda: HeavyBall(mu=-0.1), "mu=-0.1"),
        (lambda: HeavyBall(gamma=0.0), "gamma=0"),
        (lambda: AdamFirst(beta2=1.0), "beta2=1"),
        (lambda: AdamFirst(kappa=2.0), "kappa=2"),
        (lambda: AdamFirst(first=0.0), "first=0"),
        (lambda: RobustMomentum(k=1.0), "k=1"),
        (lambda: RobustMomentum(k=4.0, p=0.9), "between 0.5"),
        (lambda: RobustMomentum(lipschitz=0.0), "lipschitz=0"),
        (lambda: tiny({"kind": "nesterov"}), "nesterov"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_momentum_the_model_is_the_plain_one_bit_for_bit() -> None:
    with torch.no_grad():
        plain = tiny()(IDS).logits
        assert torch.equal(tiny({"kind": "heavy_ball", "mu": 0.0, "gamma": 1.0})(IDS).logits, plain)
        assert not torch.equal(tiny({"kind": "heavy_ball", "mu": 0.5})(IDS).logits, plain)


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_pass_remembers_nothing_of_the_one_before(rule: str) -> None:
    model = tiny({"kind": rule, **RULES[rule]}, moe_layers=[1, 3])
    with torch.no_grad():
        first = model(IDS).logits
        model(IDS.flip(1))
        assert torch.equal(model(IDS).logits, first)


@pytest.mark.parametrize("rule", RULES)
def test_dense_layers_are_skipped_and_pass_the_momentum_on(rule: str) -> None:
    model = tiny({"kind": rule, **RULES[rule]}, moe_layers=[1, 3])
    kinds = [type(layer.residual).__name__ for layer in model.model.layers]
    assert kinds[0] == kinds[2] == "PlainResidual"
    alone = tiny({"kind": rule, **RULES[rule]}, moe_layers=[1, 3])
    alone.model.layers[1].residual.register_forward_hook(lambda m, args, out: args[2].state.clear())
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, alone(IDS).logits)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_with_the_rule_trains_generates_is_observed_and_saved(rule: str, tmp_path: Path) -> None:
    model = tiny({"kind": rule, **RULES[rule]})
    check_generates(model)
    check_observed(model)
    check_round_trip(model, tmp_path)
    check_trains(model)


def test_a_model_in_half_precision_keeps_its_momentum_in_fp32() -> None:
    x, memory = HeavyBall().step(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16), {})
    assert x.dtype == torch.bfloat16
    assert memory["momentum"].dtype == torch.float32
    with torch.no_grad():
        assert tiny({"kind": "adam_first"}).bfloat16()(IDS).logits.isfinite().all()


def test_momentum_can_be_added_to_a_model_with_its_weights_kept() -> None:
    plain = tiny()
    model = add_momentum(plain, "heavy_ball", mu=0.5)
    assert model.config.residual == {"kind": "heavy_ball", "mu": 0.5}
    assert plain.config.residual == "plain"
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(
            model(IDS).logits, tiny({"kind": "heavy_ball", "mu": 0.5}, tie_word_embeddings=True)(IDS).logits
        )


def test_a_model_that_adds_in_its_own_code_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear fixes its routers and residual"):
        add_momentum(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
