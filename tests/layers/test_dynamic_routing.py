"""Top-p routing: the mass property, its losses, its statistics, and the override of a model trained otherwise."""

from pathlib import Path

import pytest
import torch

import moestro
from moestro.analyze.active_experts import ActiveExperts, Difficulty
from moestro.layers import MoE
from moestro.layers.experts import GatedExperts
from moestro.layers.losses import router_entropy, top_p_balance
from moestro.layers.routers.top_p import TopPRouter
from moestro.routing import Routing, RoutingContext, RoutingRule, dense_weights
from moestro.steer.reroute import top_k, top_p
from moestro.view.edit import SwitchOff
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids
from tiny import make

LM = dict(router={"kind": "top_p", "p": 0.5}, router_losses={"top_p_balance": 0.01, "router_entropy": 0.01})


def routed(p: float, tokens: int = 200, experts: int = 16, **options: object) -> Routing:
    router = TopPRouter(8, experts, p=p, **options)
    torch.nn.init.normal_(router.weight, std=0.7)
    return router(torch.randn(tokens, 8))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.7, 0.95])
def test_the_kept_experts_hold_p_and_none_is_too_many(p: float) -> None:
    logits, weights, indices = routed(p)
    probabilities = logits.softmax(dim=-1)
    used = indices < 16
    assert torch.equal(used, weights > 0)
    torch.testing.assert_close(weights[used], probabilities[used.nonzero()[:, 0], indices[used]])  # not normalised
    kept = weights.sum(dim=1)
    last = weights.gather(1, used.sum(dim=1, keepdim=True) - 1)[:, 0]
    assert (kept >= p - 1e-6).all()
    assert (kept - last < p).all()
    left_out = torch.where(dense_weights(Routing(logits, weights, indices), 16) == 0, probabilities, 0).amax(dim=1)
    assert (left_out <= last).all()


def test_a_tie_with_p_is_enough() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert RoutingRule(1, top_p=0.5)(logits).indices.tolist() == [[0]]
    assert RoutingRule(1, top_p=0.75)(logits).indices.tolist() == [[0, 1]]


def test_one_expert_at_least_and_all_at_p_1() -> None:
    assert routed(1e-6).indices.shape == (200, 1)
    everything = routed(1.0)
    assert (everything.indices.sort(dim=1).values == torch.arange(16)).all()


def test_unused_slots_are_marked_and_cropped() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0]])
    routing = RoutingRule(1, top_p=0.6)(logits)
    assert routing.indices[0].tolist() == [0, 5]
    assert routing.weights[0, 1] == 0
    assert set(routing.indices[1].tolist()) == {0, 1}


def test_max_experts_is_a_bound() -> None:
    assert routed(0.99, max_experts=3).indices.shape[1] == 3


def test_normalised_weights_sum_to_one() -> None:
    torch.testing.assert_close(routed(0.4, norm_weights=True).weights.sum(dim=1), torch.ones(200))


def test_closed_experts_are_never_used() -> None:
    logits = torch.randn(50, 6)
    logits[:, 2:] = float("-inf")
    routing = RoutingRule(1, top_p=1.0)(logits)
    assert (routing.indices < 2).all()
    assert routing.indices.shape[1] == 2


def test_no_tokens() -> None:
    assert routed(0.4, tokens=0).indices.shape == (0, 1)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 1.1}, {"p": float("nan")}, {"p": 0.4, "max_experts": 0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"p=|max_experts="):
        TopPRouter(8, 4, **options)


def context(tokens: int, mask: list[int] | None = None) -> RoutingContext:
    return RoutingContext((1, tokens), None if mask is None else torch.tensor([mask]).bool())


def test_balance_of_even_routing_is_the_mean_number_of_experts() -> None:
    indices = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    even = Routing(torch.zeros(4, 4), torch.full((4, 2), 0.25), indices)
    torch.testing.assert_close(top_p_balance(even, torch.full((4, 4), 0.25), context(4)), torch.tensor(2.0))


def test_balance_is_its_formula_and_padding_does_not_count() -> None:
    routing = routed(0.5, tokens=9, experts=4)
    probabilities = routing.logits.softmax(dim=-1)
    mask = [1, 1, 1, 1, 1, 1, 0, 0, 0]
    f = (dense_weights(routing, 4) > 0).float()[:6].mean(dim=0)
    expected = 4 * (f * probabilities[:6].mean(dim=0)).sum()
    torch.testing.assert_close(top_p_balance(routing, probabilities, context(9, mask)), expected)
    entropy = -(probabilities[:6] * probabilities[:6].log()).sum(dim=1).mean()
    torch.testing.assert_close(router_entropy(routing, probabilities, context(9, mask)), entropy)


def test_the_entropy_loss_lets_tokens_use_fewer_experts() -> None:
    layer = MoE(TopPRouter(8, 8, p=0.6), GatedExperts(8, 8, 8), losses={"router_entropy": 1.0})
    optimiser, hidden = torch.optim.Adam(layer.router.parameters(), 0.05), torch.randn(64, 8)

    def used() -> float:
        return float((layer.router(hidden).weights > 0).sum(dim=1).float().mean())

    before = used()
    for _ in range(60):
        layer(hidden)
        layer.losses["router_entropy"].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert used() < 0.6 * before


def test_it_works_in_the_language_model(tmp_path: Path) -> None:
    model = small_lm(**LM)
    check_trains(model)
    check_generates(model)
    check_round_trip(model, tmp_path)
    view = check_observed(model)
    assert view.layers[0].rule == model.model.layers[0].mlp.router.rule


def test_edits_route_again_with_as_many_experts_as_needed() -> None:
    model = small_lm(**LM)
    view = moestro.open(model.eval())
    with view.edits(SwitchOff([(0, e) for e in range(6)])):
        (active,) = view.observe([token_ids()], [ActiveExperts()], progress=False)
    assert active.by_layer()[0] <= 2


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def test_p_of_an_open_model_and_back() -> None:
    model = small_lm().eval()
    before, view = logits(model), moestro.open(model)
    with view.edits(top_p(view, 1.0)):
        everything = logits(model)
        (active,) = view.observe([token_ids()], [ActiveExperts()], progress=False)
    assert active.mean() == 8
    with view.edits(top_k(view, 8)):
        torch.testing.assert_close(logits(model), everything)
    with view.edits(top_k(view, 2)):
        torch.testing.assert_close(logits(model), before)
    with view.edits(top_p(view, 1e-6)):
        few = logits(model)
    with view.edits(top_k(view, 1)):
        torch.testing.assert_close(logits(model), few)
    assert torch.equal(logits(model), before)


def test_overrides_work_with_every_experts_implementation() -> None:
    found = []
    for implementation in ("eager", "moestro"):
        small = make("qwen3_moe").model.eval()
        small.set_experts_implementation(implementation)
        view = moestro.open(small)
        with view.edits(top_p(view, 0.3)), torch.no_grad():
            found.append(small(input_ids=token_ids()).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_an_override_of_some_rows_leaves_the_others() -> None:
    model = small_lm().eval()
    before, view = logits(model), moestro.open(model)
    with view.edits(top_p(view, 1.0)):
        everything = logits(model)
    edit = top_p(view, 1.0)
    edit.rows = [1]
    with view.edits(edit):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([before[0], everything[1]]))


def test_overrides_refuse_what_cannot_be() -> None:
    view = moestro.open(small_lm().eval())
    with pytest.raises(ValueError, match="p=0"):
        top_p(view, 0.0)
    with pytest.raises(ValueError, match="k=9"):
        top_k(view, 9)
    with pytest.raises(ValueError, match="drawn at random"):
        top_p(moestro.open(small_lm(router="random").eval()), 0.5)


def test_statistics_are_those_of_the_routing() -> None:
    view = moestro.open(small_lm(**LM).eval())
    ids = token_ids(4, 10)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "domain": torch.tensor([0, 0, 1, 1]), "domains": ("a", "b")}
    active, found = view.observe([batch], [ActiveExperts(), Difficulty()], progress=False)
    with torch.no_grad():
        out = view.model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    used = torch.stack([(RoutingRule(1, top_p=0.5)(z).weights > 0).sum(dim=1).view(4, 10) for z in out.router_logits])
    assert active.by_layer()[1] == pytest.approx(float(used[1][mask.bool()].float().mean()))
    assert active.by_domain()["b"] == pytest.approx(float(used[:, 2:].float().mean()))
    assert active.quantile(1.0)[0] == int(used[0][mask.bool()].max())
    assert len(found.loss) == 6 + 3 * 9
    first = torch.nn.functional.cross_entropy(out.logits[0, :6], ids[0, 1:7], reduction="none")
    torch.testing.assert_close(found.loss[:6], first)
    assert torch.equal(found.experts[:6], used[:, 0, :6].sum(dim=0))
    halves = [ActiveExperts(), ActiveExperts()]
    for half, rows in zip(halves, (slice(0, 2), slice(2, 4))):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        view.observe([part], [half], progress=False)
    halves[0].merge(halves[1])
    assert halves[0].result().by_domain() == pytest.approx(active.by_domain())


def test_difficulty_is_the_same_of_a_streamed_model(tmp_path: Path) -> None:
    small_lm(**LM).eval().save_pretrained(tmp_path)
    data = [token_ids(2, 10), token_ids(3, 7), token_ids(1, 5)]
    inside, streamed = (
        moestro.open(tmp_path, stream=stream).observe(data, [Difficulty()], progress=False)[0]
        for stream in (False, True)
    )
    assert len(inside.loss) == 2 * 9 + 3 * 6 + 4
    assert len(inside.experts.unique()) > 1
    assert torch.equal(streamed.experts, inside.experts)
    assert torch.equal(streamed.loss, inside.loss)
