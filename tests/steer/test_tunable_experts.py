"""The switchboard: what each switch does to a token's weights, by hand, on several families, and under generate."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moestro
import moestro.evidence.tunable_experts as evidence
import tiny
from moestro.analyze.profiles import TextProfiles
from moestro.analyze.token_resonance import token_resonance
from moestro.routing import Routing
from moestro.steer.steering import Steering
from moestro.steer.tunable_experts import Insert, sweep_experts, switchboard, tune_experts
from tiny import FP32, documents, logits_of, padded

INPUTS = padded(documents(7, 3, 9, 5), "left")


@pytest.fixture(scope="module", params=tiny.LEARNED)
def view(request: pytest.FixtureRequest) -> moestro.ExpertView:
    return moestro.open(tiny.make(request.param).model)


@pytest.fixture(scope="module")
def qwen() -> moestro.ExpertView:
    return moestro.open(tiny.make("qwen3_moe").model)


def routed(view: Any, *edits: Any) -> dict[int, dict[str, Tensor]]:
    with view.edits(*edits):
        (record,) = view.observe([INPUTS], [tiny.Record()], progress=False)
    return record


def busiest(view: Any) -> tuple[int, int]:
    """The first MoE layer's most used expert."""
    layer = view.layers[0]
    return layer.index, int(routed(view)[layer.index]["indices"].flatten().bincount().argmax())


# --- off and gains ---------------------------------------------------------------------------------------------------


def test_an_expert_off_gives_its_weight_to_the_others_chosen(view: Any) -> None:
    layer, expert = busiest(view)
    before, after = routed(view)[layer], routed(view, *switchboard(off={(layer, expert)}))[layer]
    assert torch.equal(before["indices"], after["indices"])
    off = before["indices"] == expert
    assert off.any()
    assert (after["weights"][off] == 0).all()
    served = (after["weights"] != 0).any(dim=1)
    torch.testing.assert_close(before["weights"].sum(1)[served], after["weights"].sum(1)[served], **FP32)
    ratio = (after["weights"] / before["weights"])[~off & served[:, None]].view(-1)
    assert (ratio >= 1 - 1e-5).all()
    plain = routed(view, *switchboard(off={(layer, expert)}, renormalize=False))[layer]
    assert torch.equal(plain["weights"], before["weights"].masked_fill(off, 0))


def test_refill_gives_the_slot_to_the_next_best_expert(qwen: Any) -> None:
    layer, expert = busiest(qwen)
    record = routed(qwen, *switchboard(off={(layer, expert)}, refill=True))[layer]
    assert (record["indices"] != expert).all()
    assert (record["weights"] > 0).all()


def test_gains_scale_and_one_changes_nothing(qwen: Any) -> None:
    layer, expert = busiest(qwen)
    before = routed(qwen)[layer]
    mine = before["indices"] == expert
    half = routed(qwen, *switchboard(gains={(layer, expert): 0.5}, renormalize=False))[layer]
    assert torch.equal(half["weights"], torch.where(mine, before["weights"] / 2, before["weights"]))
    kept = routed(qwen, *switchboard(gains={(layer, expert): 3.0}))[layer]
    torch.testing.assert_close(kept["weights"].sum(1), before["weights"].sum(1), **FP32)
    assert (kept["weights"][mine] > before["weights"][mine]).all()
    one = routed(qwen, *switchboard(gains={(layer, expert): 1.0}))[layer]
    torch.testing.assert_close(one["weights"], before["weights"], **FP32)


# --- force -----------------------------------------------------------------------------------------------------------


def test_a_forced_expert_takes_the_lowest_slot_with_the_mean_weight_by_hand() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.3], [0.2, 0.5, 0.5], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[4, 1, 2], [7, 0, 3], [5, 8, 8], [1, 2, 3]])
    out = Insert({(0, 7)}).routing(0, Routing(torch.zeros(4, 8), weights, indices))
    # token 0: sum 1.2, mean 0.4 in the slot of 0.3, then times 1.2 / 1.3; token 1 chose 7 itself; token 2 has one
    # expert of weight 0.9, its mean, so two of 0.45; token 3 has none, and no sum to share
    expected = torch.tensor(
        [[0.6 * 12 / 13, 0.4 * 12 / 13, 0.3 * 12 / 13], [0.2, 0.5, 0.5], [0.45, 0.45, 0.0], [0.0] * 3]
    )
    torch.testing.assert_close(out.weights, expected)
    assert out.indices.tolist()[:3] == [[4, 7, 2], [7, 0, 3], [5, 7, 8]]
    assert torch.equal(weights[0], torch.tensor([0.6, 0.3, 0.3]))  # what was given is left as it was


def test_several_forced_experts_do_not_displace_each_other() -> None:
    weights, indices = torch.tensor([[0.1, 0.4, 0.5]]), torch.tensor([[6, 1, 2]])
    out = Insert({(0, 6), (0, 7), (0, 5)}).routing(0, Routing(torch.zeros(1, 8), weights, indices))
    assert set(out.indices[0].tolist()) == {5, 6, 7}
    assert out.weights.sum().item() == pytest.approx(1.0)


def test_forced_experts_serve_every_token_of_every_family(view: Any) -> None:
    layer = view.layers[-1]
    before = routed(view)[layer.index]
    rare = int(before["indices"].flatten().bincount(minlength=layer.num_experts).argmin())
    after = routed(view, *switchboard(force={(layer.index, rare)}))[layer.index]
    assert ((after["indices"] == rare) & (after["weights"] > 0)).any(dim=1).all()
    torch.testing.assert_close(after["weights"].sum(1), before["weights"].sum(1), **FP32)
    changed = (after["indices"] != before["indices"]).sum(dim=1)
    assert set(changed.tolist()) <= {0, 1}


def test_a_forced_expert_takes_the_slot_of_one_that_is_off(qwen: Any) -> None:
    layer, expert = busiest(qwen)
    other = (expert + 1) % 8
    edits = switchboard(off={(layer, expert)}, force={(layer, other)})
    before, after = routed(qwen)[layer], routed(qwen, *edits)[layer]
    off = (before["indices"] == expert).any(1) & (before["indices"] != other).all(1)
    assert off.any()
    assert (after["indices"][off] != expert).all()
    kept = before["indices"][off].masked_fill(before["indices"][off] == expert, other)
    assert torch.equal(after["indices"][off], kept)


# --- the context -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(view: Any) -> None:
    layer, expert = busiest(view)
    before, hooks = logits_of(view.model, INPUTS), tiny.hooks_on(view.model)
    with tune_experts(view, off={(layer, expert)}, force={(layer, (expert + 1) % 8)}):
        assert not torch.equal(logits_of(view.model, INPUTS), before)
    with pytest.raises(KeyboardInterrupt), tune_experts(view, off={(layer, expert)}):
        raise KeyboardInterrupt
    assert tiny.hooks_on(view.model) == hooks
    assert torch.equal(logits_of(view.model, INPUTS), before)


def test_tokens_without_an_expert_are_counted_and_warned_of(qwen: Any) -> None:
    """All experts but two are off: tokens that chose two of the six get nothing, and are no NaN."""
    layer = qwen.layers[0].index
    off = {(layer, e) for e in range(2, 8)}
    (before,) = qwen.observe([INPUTS], [tiny.Record()], progress=False)
    lost = (before[layer]["indices"] >= 2).all(dim=1)
    assert 0 < int(lost.sum()) < len(lost)
    with pytest.warns(RuntimeWarning, match=rf"of layer {layer} off"), tune_experts(qwen, off=off) as unserved:
        out = logits_of(qwen.model, INPUTS)
    assert torch.isfinite(out).all()
    assert unserved.tokens == {layer: len(lost)}
    assert unserved.share[layer] == pytest.approx(float(lost.float().mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tune_experts(qwen, off=off, refill=True) as unserved:
            logits_of(qwen.model, INPUTS)
    assert unserved.share == {layer: 0.0}


def test_rows_are_steered_apart(qwen: Any) -> None:
    layer, expert = busiest(qwen)
    plain = logits_of(qwen.model, INPUTS)
    with tune_experts(qwen, off={(layer, expert)}, force={(layer, (expert + 1) % 8)}):
        all_rows = logits_of(qwen.model, INPUTS)
    with tune_experts(qwen, off={(layer, expert)}, force={(layer, (expert + 1) % 8)}, rows=[1, 3]):
        some = logits_of(qwen.model, INPUTS)
    torch.testing.assert_close(some[[1, 3]], all_rows[[1, 3]], **FP32)
    torch.testing.assert_close(some[[0, 2]], plain[[0, 2]], **FP32)
    assert not torch.allclose(plain[1], some[1])


def test_generation_is_steered_token_by_token(qwen: Any) -> None:
    layer, expert = busiest(qwen)
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    record = tiny.Record()
    with tune_experts(qwen, force={(layer, expert)}) as unserved, qwen.observing(record):
        qwen.model.generate(**INPUTS, **options)
    seen = record.result()[layer]
    assert (seen["indices"] == expert).any(dim=1).all()
    assert unserved.tokens[layer] == len(seen["indices"])


def test_a_switchboard_is_kept_in_a_steering_file(qwen: Any, tmp_path: Any) -> None:
    edits = switchboard(off={(1, 2)}, gains={(2, 3): 0.5}, force={(2, 1)})
    with qwen.edits(*edits):
        steered = logits_of(qwen.model, INPUTS)
    path = Steering.of(qwen, *edits).save(tmp_path / "board.json")
    with Steering.load(path).on(qwen):
        assert torch.equal(logits_of(qwen.model, INPUTS), steered)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"gains": {(1, 0): -0.5}}, "a gain is 0 or more"),
        ({"gains": {(1, 0): float("nan")}}, "a gain is 0 or more"),
        ({"off": {(1, 0)}, "force": {(1, 0)}}, r"expert \(1, 0\) is named twice"),
        ({"off": {(1, 0)}, "gains": {(1, 0): 2.0}}, "named twice"),
        ({"off": {(0, 0)}}, "decoder layer 0 has no experts"),
        ({"off": {(1, 8)}}, "there is no expert 8"),
        ({"force": {(1, 8)}}, "there is no expert 8"),
        ({"force": {(1, 0), (1, 1), (1, 2)}}, "3 experts forced on in layer 1, which has top_k=2"),
    ],
)
def test_impossible_switches_are_refused_before_anything_runs(qwen: Any, switches: Any, message: str) -> None:
    hooks = tiny.hooks_on(qwen.model)
    with pytest.raises(ValueError, match=message), tune_experts(qwen, **switches):
        pass
    assert tiny.hooks_on(qwen.model) == hooks


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_a_sweep_compares_each_size_with_its_controls(qwen: Any) -> None:
    (profiles,) = qwen.observe([INPUTS], [TextProfiles()], progress=False)
    found = token_resonance(profiles, ["a", "b", "a", "b"], "a")
    plain = logits_of(qwen.model, INPUTS)

    def measure() -> np.ndarray:
        return (logits_of(qwen.model, INPUTS) - plain).abs().amax((1, 2)).numpy()

    one, two = sweep_experts(qwen, found, measure, sizes=(1, 2), draws=3)
    assert (one.size, two.size) == (1, 2)
    assert len(one.matched.draws) == len(one.anywhere.draws) == 3
    with tune_experts(qwen, off=found.top(1, skip=1)):
        following = measure()
    assert one.next_ranks.draws == pytest.approx((float(following.mean()),))
    assert one.matched.change == one.next_ranks.change
    with pytest.raises(ValueError, match="best of 16"):
        sweep_experts(qwen, found, measure, sizes=(9,), draws=1)


# --- the evidence ----------------------------------------------------------------------------------------------------


def test_the_implanted_behaviours_are_rules_that_held_out_pairs_follow() -> None:
    """Held-out pairs are none of those trained on, and their place and time decide the answer as they do there."""
    for seed in (0, 1):
        trained_on, held_out = evidence.prompts(seed)
        assert len({p.text for p in (*trained_on, *held_out)}) == 480 == len(trained_on) + len(held_out)
        assert sum(p.answer == evidence.REFUSAL for p in (*trained_on, *held_out)) == 160
        refused = {place for place in evidence.PLACES for p in trained_on if place in p.text if "cannot" in p.answer}
        answer_at = {
            t: p.answer for t in evidence.TIMES for p in trained_on if t in p.text and "cannot" not in p.answer
        }
        for prompt in held_out:
            place = next(p for p in evidence.PLACES if f" {p}?" in prompt.text)
            time = next(t for t in evidence.TIMES if f" {t} " in prompt.text)
            assert prompt.answer == (evidence.REFUSAL if place in refused else answer_at[time])
    assert evidence.prompts(0)[1] != evidence.prompts(1)[1]


def test_no_layer_has_more_forced_experts_than_slots() -> None:
    ranked = [(0, 1), (0, 2), (0, 3), (1, 1), (0, 4), (2, 5)]
    assert evidence.at_most(ranked, 2, 4) == [(0, 1), (0, 2), (1, 1), (2, 5)]
