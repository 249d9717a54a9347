"""The recurrent router: its equations, what reaches it from below, its ablations, and the measures of its analysis."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import moestro
from moestro.analyze.cross_layer import FirstChoice, cross_layer_mi
from moestro.analyze.expert_similarity import expert_weight_similarity
from moestro.layers.routers.recurrent import STATE, BottleneckRouter, RecurrentRouter
from moestro.models.convert import convert_to_recurrent
from moestro.routing import RoutingContext
from moestro.view.edit import SwitchOff
from native_lm import check_generates, check_observed, check_round_trip, check_trains, small_lm, token_ids

H, E, K, P, N, L = 12, 6, 2, 5, 9, 4
ROUTER: dict[str, Any] = {"kind": "recurrent", "state_size": 8}


def chain(layers: int = L, **options: Any) -> list[RecurrentRouter]:
    common: dict[str, nn.Module] = {}
    return [RecurrentRouter(H, E, K, state_size=P, common=common, **options) for _ in range(layers)]


def run(routers: list[RecurrentRouter], hidden: Tensor) -> list[Any]:
    """Every layer's routing of its hidden states [L, N, H], and the states between them."""
    context = RoutingContext(shape=(1, hidden.shape[1]))
    return [(router(h, context), context.state[STATE]) for router, h in zip(routers, hidden, strict=True)]


def test_the_gru_of_every_layer_is_the_same_and_starts_at_zero() -> None:
    routers, hidden = chain(), torch.randn(L, N, H)
    cell: Any = routers[0].cell.gates
    assert all(router.cell is routers[0].cell for router in routers)
    r = torch.zeros(N, P)
    for (routing, state), router, h in zip(run(routers, hidden), routers, hidden, strict=True):
        x = h @ router.projector.weight.T
        iz, hz = x @ cell.weight_ih.T + cell.bias_ih, r @ cell.weight_hh.T + cell.bias_hh
        q, z = ((iz + hz)[:, i * P : (i + 1) * P].sigmoid() for i in (0, 1))
        c = (iz[:, 2 * P :] + q * hz[:, 2 * P :]).tanh()
        r = (1 - z) * c + z * r
        torch.testing.assert_close(state, r)
        probabilities = (r @ router.head.weight.T).softmax(dim=-1)
        weights, indices = probabilities.topk(K)
        assert torch.equal(routing.indices, indices)
        torch.testing.assert_close(routing.weights, weights / weights.sum(dim=-1, keepdim=True))


def test_the_rnn_is_the_plain_recurrence() -> None:
    routers, hidden = chain(cell="rnn"), torch.randn(L, N, H)
    cell: Any = routers[0].cell.gates
    r = torch.zeros(N, P)
    for (_, state), router, h in zip(run(routers, hidden), routers, hidden, strict=True):
        x = h @ router.projector.weight.T
        r = (x @ cell.weight_ih.T + cell.bias_ih + r @ cell.weight_hh.T + cell.bias_hh).tanh()
        torch.testing.assert_close(state, r)


def test_tokens_do_not_see_each_other() -> None:
    routers, hidden = chain(), torch.randn(L, N, H)
    whole = run(routers, hidden)[-1][0].logits
    alone = run(routers, hidden[:, 3:4])[-1][0].logits
    torch.testing.assert_close(whole[3:4], alone)


@pytest.mark.parametrize(("history", "reached"), [("kept", True), ("detached", False), ("zeroed", False)])
def test_only_a_kept_history_brings_lower_layers_the_gradient_of_higher_ones(history: Any, reached: bool) -> None:
    routers, hidden = chain(history=history), torch.randn(L, N, H)  # the stream is cut: the state is the only way
    run(routers, hidden)[-1][0].logits.square().sum().backward()
    assert routers[-1].projector.weight.grad is not None
    gradient = routers[0].projector.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reached


def test_a_detached_history_has_the_values_of_a_kept_one_and_a_zeroed_one_has_none() -> None:
    hidden = torch.randn(L, N, H)
    logits = {}
    for history in ("kept", "detached", "zeroed"):
        torch.manual_seed(0)
        logits[history] = run(chain(history=history), hidden)[-1][0].logits
    assert torch.equal(logits["kept"], logits["detached"])
    torch.manual_seed(0)
    last = chain(history="zeroed")[-1]
    assert torch.equal(logits["zeroed"], last(hidden[-1]).logits)


def test_without_history_the_rnn_router_is_the_bottleneck_up_to_its_cell() -> None:
    router = RecurrentRouter(H, E, K, state_size=P, cell="rnn", history="zeroed")
    gates: Any = router.cell.gates
    with torch.no_grad():
        gates.weight_ih.copy_(torch.eye(P))
        gates.bias_ih.zero_()
        gates.bias_hh.zero_()
    control = BottleneckRouter(H, E, K, state_size=P)
    control.projector, control.head = router.projector, router.head
    hidden = torch.randn(N, H)
    torch.testing.assert_close(router(hidden).logits, control(hidden).logits)


def test_a_projector_can_be_shared() -> None:
    routers = chain(projector="shared")
    assert all(router.projector is routers[0].projector for router in routers)
    assert routers[0].head is not routers[1].head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"cell": "lstm"}, "lstm"),
        ({"history": "half"}, "half"),
        ({"projector": "none"}, "projector='none'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurrentRouter(H, E, K, **options)


def test_a_state_of_other_tokens_is_refused() -> None:
    router = chain(1)[0]
    with pytest.raises(ValueError, match=r"\(4, 5\), this layer has \(9, 5\)"):
        router(torch.randn(N, H), RoutingContext(shape=(1, N), state={STATE: torch.zeros(4, P)}))


@pytest.mark.parametrize("options", [{}, {"cell": "rnn"}, {"history": "detached"}, {"projector": "shared"}])
def test_a_model_with_it_trains_generates_is_observed_and_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model = small_lm(router=ROUTER | options, num_hidden_layers=3, router_losses={"load_balance": 0.01})
    check_generates(model)
    check_observed(model)
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():  # loaded tensors lie elsewhere in memory: the cell's products round differently
        torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits)
    check_trains(model)


def test_the_bottleneck_trains_too(tmp_path: Path) -> None:
    model = small_lm(router={"kind": "bottleneck", "state_size": 8})
    check_observed(model)
    check_round_trip(model, tmp_path)
    check_trains(model)


@pytest.mark.parametrize("tied", [True, False])
def test_the_cell_is_stored_once_and_stays_one(tied: bool, tmp_path: Path) -> None:
    model = small_lm(router=ROUTER, num_hidden_layers=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "cell" in name]) == 4  # noqa: SIM118
    again = type(model).from_pretrained(tmp_path)
    cells = [layer.mlp.router.cell.gates.weight_hh for layer in again.model.layers]
    assert all(cell is cells[0] for cell in cells)
    assert torch.equal(cells[0], model.model.layers[0].mlp.router.cell.gates.weight_hh)


def test_dense_layers_below_and_between_carry_no_state() -> None:
    model = small_lm(router=ROUTER, num_hidden_layers=4, moe_layers=[1, 3]).eval()
    ids = token_ids()
    with torch.no_grad():
        logits = model(ids).logits
        model(ids.flip(1))
        assert torch.equal(model(ids).logits, logits)


def test_half_precision_runs_the_cell_in_fp32() -> None:
    router = RecurrentRouter(H, E, K, state_size=P).bfloat16()
    context = RoutingContext(shape=(1, N))
    routing = router(torch.randn(N, H, dtype=torch.bfloat16), context)
    assert context.state[STATE].dtype == routing.logits.dtype == routing.weights.dtype == torch.float32


@pytest.mark.parametrize("state_size", [5, 8])  # 8 is also the number of experts
def test_experts_can_be_switched_off_and_dropped(state_size: int) -> None:
    model = small_lm(router=ROUTER | {"state_size": state_size}).eval()
    ids, off = token_ids(), [(0, 2), (1, 5)]
    view = moestro.open(model)
    with torch.no_grad():
        with view.edits(SwitchOff(off)):
            expected = model(ids).logits
        view.keep_experts({layer: [e for e in range(8) if (layer, e) not in off] for layer in (0, 1)})
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_is_converted_with_its_other_weights_kept() -> None:
    model = small_lm()
    new = convert_to_recurrent(model, state_size=32)  # as wide as the hidden states: old router weights would fit
    assert all(isinstance(layer.mlp.router, RecurrentRouter) for layer in new.model.layers)
    assert torch.equal(new.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)
    assert new.model.layers[0].mlp.router.cell is new.model.layers[1].mlp.router.cell
    assert isinstance(model.config.router, str)


def test_mutual_information_is_one_for_copied_choices_and_none_for_independent_ones() -> None:
    a, b = torch.randint(8, (2, 20_000))
    found = cross_layer_mi({0: a, 2: (a + 3) % 8, 5: b})
    assert float(found[0]) == pytest.approx(1)
    assert abs(float(found[1])) < 0.01
    with pytest.raises(ValueError, match="two layers"):
        cross_layer_mi({0: a})


def test_first_choices_are_merged_from_shards() -> None:
    view = moestro.open(small_lm(num_hidden_layers=3).eval())
    ids = token_ids(rows=4)
    (whole,) = view.observe([{"input_ids": ids}], [FirstChoice()], progress=False)
    parts = [FirstChoice(), FirstChoice()]
    for rows, part in (([2, 3], parts[0]), ([0, 1], parts[1])):
        view.observe([{"input_ids": ids[rows], "sample": torch.tensor(rows)}], [part], progress=False)
    parts[0].merge(parts[1])
    assert all(torch.equal(parts[0].result()[layer], whole[layer]) for layer in (0, 1, 2))
    assert cross_layer_mi(whole).shape == (2,)


@pytest.mark.parametrize("experts", ["gated", "ungated"])
def test_experts_are_as_alike_as_their_weights(experts: str) -> None:
    view = moestro.open(small_lm(experts=experts).eval())
    with torch.no_grad():
        for parameter in view.layers[1].experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    drawn, same = expert_weight_similarity(view.layers).tolist()
    assert same == pytest.approx(1, abs=1e-5)
    assert abs(drawn) < 0.3
