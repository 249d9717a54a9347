"""The router that adds the logits of the layer below: its equation, what reaches it, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro.layers.routers.previous_logits import LOGITS, NUMBERS, PreviousLogitsRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.routing import Routing, RoutingContext
from moestro.view.edit import SwitchOff
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids

H, E, K, N, L = 12, 6, 2, 9, 4
ROUTER: dict[str, Any] = {"kind": "previous_logits", "ratio": 0.5}


def chain(ratio: float = 0.5) -> list[PreviousLogitsRouter]:
    torch.manual_seed(0)
    routers = [PreviousLogitsRouter(H, E, K, ratio=ratio) for _ in range(L)]
    for router in routers:
        router.reset_parameters(std=0.4)
    return routers


def run(routers: list[PreviousLogitsRouter], hidden: Tensor) -> list[Routing]:
    """Every layer's routing of its hidden states [L, N, H]."""
    context = RoutingContext(shape=(1, hidden.shape[1]))
    return [router(h, context) for router, h in zip(routers, hidden, strict=True)]


@pytest.mark.parametrize("ratio", [0.5, 1.0, -2.0])
def test_logits_are_the_layers_own_and_a_share_of_those_below(ratio: float) -> None:
    routers, hidden = chain(ratio), torch.randn(L, N, H)
    below = torch.zeros(N, E)
    for routing, router, h in zip(run(routers, hidden), routers, hidden, strict=True):
        own = h @ router.weight.T
        z, below = own + ratio * below, own
        torch.testing.assert_close(routing.logits, z)
        weights, indices = z.softmax(dim=-1).topk(K)
        assert torch.equal(routing.indices, indices)
        torch.testing.assert_close(routing.weights, weights / weights.sum(dim=-1, keepdim=True))


def test_by_hand() -> None:
    routers, context = [PreviousLogitsRouter(1, 2, 1, ratio=0.5) for _ in range(3)], RoutingContext(shape=(1, 1))
    logits = []
    for router, weight in zip(routers, ([4.0, 0.0], [0.0, 1.0], [-1.0, 0.0])):
        with torch.no_grad():
            router.weight.copy_(torch.tensor(weight)[:, None])
        logits.append(router(torch.ones(1, 1), context).logits.tolist())
    assert logits == [[[4.0, 0.0]], [[2.0, 1.0]], [[-1.0, 0.5]]]


def test_with_ratio_0_it_is_the_standard_router() -> None:
    routers, hidden = chain(0.0), torch.randn(L, N, H)
    for routing, router, h in zip(run(routers, hidden), routers, hidden, strict=True):
        plain = TopKRouter(H, E, K)
        plain.weight = router.weight
        assert all(torch.equal(a, b) for a, b in zip(routing, plain(h)))


def test_tokens_do_not_see_each_other() -> None:
    routers, hidden = chain(), torch.randn(L, N, H)
    torch.testing.assert_close(run(routers, hidden)[-1].logits[3:4], run(routers, hidden[:, 3:4])[-1].logits)


@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_a_layer_learns_from_the_next_one_in_proportion(ratio: float) -> None:
    routers, hidden = chain(ratio), torch.randn(L, N, H)  # the stream is cut: the logits are the only way
    run(routers, hidden)[-1].logits.sum().backward()
    for router, h, share in zip(routers[-2:], hidden[-2:], (ratio, 1.0), strict=True):
        torch.testing.assert_close(router.weight.grad, share * h.sum(dim=0).expand(E, H))
    assert all(router.weight.grad is None for router in routers[:-2])


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -float("inf")])
def test_a_ratio_that_is_not_finite_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"ratio={ratio}"):
        PreviousLogitsRouter(H, E, K, ratio=ratio)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({LOGITS: torch.zeros(4, E), NUMBERS: torch.arange(E)}, r"\(4, 6\), this layer's \(9, 6\)"),
        ({LOGITS: torch.zeros(N, 5), NUMBERS: torch.arange(5)}, r"\(9, 5\), this layer's \(9, 6\)"),
        (
            {LOGITS: torch.zeros(N, E), NUMBERS: torch.arange(E).flip(0)},
            r"experts \[5, 4, 3, 2, 1, 0\], this layer \[0, 1, 2, 3, 4, 5\]",
        ),
    ],
    ids=["other tokens", "another number of experts", "other experts"],
)
def test_logits_of_others_are_refused(state: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chain()[0](torch.randn(N, H), RoutingContext(shape=(1, N), state=state))


def test_a_model_with_it_trains_generates_is_observed_and_saved(tmp_path: Path) -> None:
    model = small_lm(router=ROUTER, num_hidden_layers=3, router_losses={"load_balance": 0.01})
    assert [layer.mlp.router.ratio for layer in model.model.layers] == [0.5] * 3
    check_generates(model)
    check_observed(model)
    check_round_trip(model, tmp_path)
    check_trains(model)


def test_every_forward_pass_starts_anew_and_dense_layers_hand_the_logits_on() -> None:
    model = small_lm(router=ROUTER, num_hidden_layers=4, moe_layers=[1, 3]).eval()
    ids, seen = token_ids(), []
    routers = [model.model.layers[i].mlp.router for i in (1, 3)]
    for router in routers:
        router.register_forward_hook(lambda router, args, out: seen.append((args[0] @ router.weight.T, out.logits)))
    with torch.no_grad():
        logits = model(ids).logits
        model(ids.flip(1))
        assert torch.equal(model(ids).logits, logits)
    for (first, z_first), (own, z) in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(z_first, first)
        torch.testing.assert_close(z, own + 0.5 * z_first)


def test_half_precision_adds_logits_in_fp32() -> None:
    router, context = PreviousLogitsRouter(H, E, K).bfloat16(), RoutingContext(shape=(1, N))
    hidden = torch.randn(N, H, dtype=torch.bfloat16)
    first, second = router(hidden, context).logits, router(hidden, context).logits
    assert context.state[LOGITS].dtype == second.dtype == torch.float32
    assert torch.equal(second, 1.5 * first)


def test_cut_to_the_same_experts_it_routes_as_with_the_others_switched_off(tmp_path: Path) -> None:
    model = small_lm(router=ROUTER).eval()
    ids, keep = token_ids(), [0, 1, 3, 4, 7]
    view = moestro.open(model)
    with torch.no_grad():
        with view.edits(SwitchOff([(layer, e) for layer in (0, 1) for e in range(8) if e not in keep])):
            expected = model(ids).logits
        view.keep_experts({0: keep, 1: keep})
        torch.testing.assert_close(model(ids).logits, expected)
    check_round_trip(model, tmp_path)
    assert model.model.layers[1].mlp.router.expert_numbers.tolist() == keep


def test_cut_to_different_experts_it_is_refused() -> None:
    model = small_lm(router=ROUTER).eval()
    moestro.open(model).keep_experts({0: [0, 1, 2], 1: [0, 1, 3]})
    with pytest.raises(ValueError, match=r"experts \[0, 1, 2\], this layer \[0, 1, 3\]: .* keep the same experts"):
        model(token_ids())
