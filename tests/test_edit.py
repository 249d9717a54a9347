"""Edits: each does to a model what its description says, to the rows it names, and leaves nothing behind.

Meanings are checked against the families' own code with the change made by hand. Models are fp32 unless a name says
otherwise; FP32 and BF16 are the tolerances of `tiny`.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moestro
import tiny
from moestro import Edit, ForceOn, Gain, LogitBias, Replace, Reselect, SwitchOff
from moestro.routing import Routing
from moestro.view.observe import SlotStats
from tiny import FP32, LEARNED, Record, documents, family_with_logits, logits_of, make, padded, watching_experts

DOCS = documents(7, 3, 9, 5)
INPUTS = padded(DOCS, "left")
REAL = INPUTS["attention_mask"].bool()


@pytest.fixture(scope="module", params=LEARNED)
def view(request: pytest.FixtureRequest) -> moestro.ExpertView:
    return moestro.open(make(request.param).model)


@pytest.fixture(scope="module")
def qwen() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe").model)


def biases(view: moestro.ExpertView, seed: int = 0, size: float = 1.5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.index: size * torch.randn(layer.num_experts, generator=generator) for layer in view.layers}


def in_every_layer(view: moestro.ExpertView, *experts: int) -> list[tuple[int, int]]:
    return [(layer.index, expert) for layer in view.layers for expert in experts]


def recorded(view: moestro.ExpertView, *edits: Edit) -> dict[int, dict[str, Tensor]]:
    with view.edits(*edits):
        (record,) = view.observe([INPUTS], [Record()])
    return record


# --- what each edit means --------------------------------------------------------------------------------------------


def test_switching_off_is_keeping_the_rest(view: moestro.ExpertView) -> None:
    off = {layer.index: [0, 5] if layer.index % 2 else [2, 7] for layer in view.layers}  # one of each group
    cut = moestro.open(copy.deepcopy(view.model))
    cut.keep_experts({i: [e for e in range(8) if e not in ids] for i, ids in off.items()})
    with view.edits(SwitchOff({(i, e) for i, ids in off.items() for e in ids})):
        assert_close(logits_of(view.model, INPUTS)[REAL], logits_of(cut.model, INPUTS)[REAL], **FP32)
    assert not torch.allclose(logits_of(view.model, INPUTS), logits_of(cut.model, INPUTS), atol=1e-3)


def test_a_bias_is_added_to_the_familys_own_logits(view: moestro.ExpertView) -> None:
    bias = biases(view)
    with family_with_logits(view, lambda layer, z: z + bias[layer]):
        expected = logits_of(view.model, INPUTS)
    with view.edits(LogitBias(bias)):
        assert_close(logits_of(view.model, INPUTS)[REAL], expected[REAL], **FP32)


def test_reselect_is_any_function_of_the_logits(view: moestro.ExpertView) -> None:
    def change(layer: int, z: Tensor) -> Tensor:
        return 0.7 * z.roll(layer, dims=-1) - 0.1 * z**2

    with family_with_logits(view, change):
        expected = logits_of(view.model, INPUTS)
    with view.edits(Reselect(change)):
        assert_close(logits_of(view.model, INPUTS)[REAL], expected[REAL], **FP32)


@pytest.mark.parametrize("only", [None, [2]])
def test_reselecting_by_the_logits_as_they_are_is_bit_equal(view: moestro.ExpertView, only: list[int] | None) -> None:
    before = logits_of(view.model, INPUTS)
    with view.edits(Reselect(lambda _, logits: logits, only)), watching_experts(view):
        assert torch.equal(logits_of(view.model, INPUTS)[REAL], before[REAL])


def test_forcing_on_gives_every_token_the_expert(view: moestro.ExpertView) -> None:
    plain = recorded(view)
    record = recorded(view, ForceOn(in_every_layer(view, 3)))
    first = view.layers[0].index
    for seen in record.values():
        is_forced = seen["indices"] == 3
        assert (is_forced.sum(dim=1) == 1).all()
        assert (seen["weights"][is_forced] > 0).all()
    # The other slot holds what the router likes best besides, from where it may choose.
    if view.model.config.model_type != "deepseek_v3":
        best = plain[first]["logits"].index_fill(1, torch.tensor([3]), float("-inf")).argmax(dim=1)
        seen = record[first]
        assert torch.equal(seen["indices"][seen["indices"] != 3], best)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_forced_expert_is_weighted_by_the_familys_rule(family: str) -> None:
    view = moestro.open(make(family).model)
    first = view.layers[0]
    seen, before = recorded(view, ForceOn({(first.index, 3)}))[first.index], recorded(view)[first.index]["logits"]
    raised = before.clone()
    raised[:, 3] = before.amax(dim=1)
    assert torch.equal(seen["logits"], raised)
    if family == "deepseek_v3":
        scores = raised.sigmoid().gather(1, seen["indices"])
        weights = 1.7 * scores / scores.sum(dim=1, keepdim=True)
    else:
        weights = raised.gather(1, seen["indices"]).softmax(dim=1)
    assert_close(seen["weights"], weights, **FP32)


def test_forcing_as_many_as_there_are_slots(view: moestro.ExpertView) -> None:
    for seen in recorded(view, ForceOn(in_every_layer(view, 1, 2))).values():
        assert torch.equal(seen["indices"].sort(dim=1).values, torch.tensor([[1, 2]]).expand(len(seen["indices"]), 2))


@pytest.mark.parametrize("renormalize", [False, True])
def test_gain_multiplies_gate_weights(view: moestro.ExpertView, renormalize: bool) -> None:
    gains = {0: 0.0, 1: 3.0, 4: 0.5}
    table = torch.ones(8).scatter(0, torch.tensor(list(gains)), torch.tensor(list(gains.values())))

    def by_hand(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, indices, weights = args
        new = weights * table[indices]
        if renormalize:
            total = new.sum(dim=1, keepdim=True)
            new = torch.where(total == 0, new, new * weights.sum(dim=1, keepdim=True) / total)
        return hidden, indices, new

    hooks = [layer.experts.register_forward_pre_hook(by_hand) for layer in view.layers]
    expected = logits_of(view.model, INPUTS)
    for hook in hooks:
        hook.remove()
    edit = Gain({(i, e): g for i in view.original_ids for e, g in gains.items()}, renormalize=renormalize)
    with view.edits(edit):
        assert_close(logits_of(view.model, INPUTS)[REAL], expected[REAL], **FP32)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moestro"])
def test_replace_puts_a_function_in_the_place_of_the_experts(implementation: str) -> None:
    small = make("qwen3_moe")
    small.model.set_experts_implementation(implementation)
    view = moestro.open(small.model)
    experts = copy.deepcopy(view.layer(1).experts)
    with watching_experts(view) as calls:
        before = logits_of(small, INPUTS)
    seen = []

    def other(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        seen.append((hidden, indices, weights))
        return experts(hidden, indices, weights)

    with view.edits(Replace({1: other})):
        assert_close(logits_of(small, INPUTS), before, **FP32)
        for mine, plain in zip(seen[0], calls[1][0]):
            assert torch.equal(mine, plain)
    with view.edits(Replace({1: lambda hidden, *_: torch.zeros_like(hidden)})):
        replaced = logits_of(small, INPUTS)
    hook = view.layer(1).experts.register_forward_hook(lambda *_: torch.zeros_like(_[2]))
    assert_close(replaced, logits_of(small, INPUTS), **FP32)
    hook.remove()


class Added(Edit):
    """An edit of one's own: a low-rank map beside the experts, on top of what they give."""

    def __init__(self, layer: int, width: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.layer = layer
        self.down, self.up = nn.Parameter(torch.randn(width, 4) / 8), nn.Parameter(torch.randn(4, width) / 8)

    def layers(self) -> list[int]:
        return [self.layer]

    def output(self, layer: int, hidden: Tensor, routing: Routing, output: Tensor) -> Tensor:
        return output + hidden @ self.down @ self.up


def test_an_edit_of_the_output_sees_what_the_experts_gave(qwen: moestro.ExpertView) -> None:
    edit = Added(2, 96)

    def by_hand(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + args[0] @ edit.down @ edit.up

    hook = qwen.layer(2).experts.register_forward_hook(by_hand)
    expected = logits_of(qwen.model, INPUTS)
    hook.remove()
    with qwen.edits(edit):
        assert_close(logits_of(qwen.model, INPUTS), expected, **FP32)
    with qwen.edits(Replace({2: lambda hidden, *_: hidden}), edit):
        both = recorded(qwen)[2]
    assert_close(both["combined"], both["hidden"] + (both["hidden"] @ edit.down @ edit.up).detach(), **FP32)


def test_a_hash_router_can_be_damped_and_replaced_but_not_rerouted() -> None:
    small = make("deepseek_v4")
    view = moestro.open(small.model)
    before = logits_of(small, INPUTS)
    with view.edits(Gain({(0, e): 1.0 for e in range(8)})):
        assert torch.equal(logits_of(small, INPUTS), before)
    with view.edits(Gain({(0, e): 0.0 for e in range(8)})):
        nothing = logits_of(small, INPUTS)
    with view.edits(Replace({0: lambda hidden, *_: torch.zeros_like(hidden)})):
        assert_close(logits_of(small, INPUTS), nothing, **FP32)
    for edit in (SwitchOff({(0, 1)}), ForceOn({(0, 1)}), LogitBias({0: torch.zeros(8)}), Reselect(lambda _, z: z)):
        with pytest.raises(ValueError, match=r"layer 0: its routing cannot be re-run.*token id"), view.edits(edit):
            raise AssertionError("nothing may run")
    with view.edits(Reselect(lambda _, z: z, only=[1, 2])):
        assert_close(logits_of(small, INPUTS), before, **FP32)


# --- rows ------------------------------------------------------------------------------------------------------------

ROW_EDITS: list[Callable[..., Edit]] = [
    lambda view, rows: SwitchOff(in_every_layer(view, 1, 6), rows=rows),
    lambda view, rows: ForceOn(in_every_layer(view, 3), rows=rows),
    lambda view, rows: LogitBias(biases(view), rows=rows),
    lambda view, rows: Gain(dict.fromkeys(in_every_layer(view, *range(8)), 0.5), rows=rows),
    lambda view, rows: Replace({view.layers[0].index: lambda hidden, *_: hidden}, rows=rows),
]


@pytest.mark.parametrize("edit", ROW_EDITS)
def test_only_the_named_rows_change(view: moestro.ExpertView, edit: Callable[..., Edit]) -> None:
    plain = logits_of(view.model, INPUTS)
    with view.edits(edit(view, None)):
        everywhere = logits_of(view.model, INPUTS)
    for rows in ([0, 2], [True, False, True, False], torch.tensor([2, 0])):
        with view.edits(edit(view, rows)):
            logits = logits_of(view.model, INPUTS)
        for row in range(4):
            expected = everywhere if row in (0, 2) else plain
            assert_close(logits[row][REAL[row]], expected[row][REAL[row]], **FP32)
            assert not torch.allclose(logits[row], (plain if row in (0, 2) else everywhere)[row], atol=1e-3)


def test_the_routing_of_other_rows_is_bit_equal(view: moestro.ExpertView) -> None:
    first = view.layers[0].index
    plain = recorded(view)[first]
    for edit in ROW_EDITS[:4]:
        seen = recorded(view, edit(view, [1]))[first]
        others = plain["sample"] != 1
        for name in ("logits", "weights", "indices"):
            assert torch.equal(seen[name][others], plain[name][others])


def test_rows_of_one_batch_carry_different_edits(view: moestro.ExpertView) -> None:
    edits: list[Callable[[Any], list[Edit]]] = [
        lambda rows: [SwitchOff(in_every_layer(view, 1, 6), rows=rows)],
        lambda rows: [LogitBias(biases(view), rows=rows), Gain({(2, 0): 0.1}, rows=rows)],
        lambda rows: [Replace({2: lambda hidden, *_: hidden}, rows=rows)],
        lambda rows: [],
    ]
    alone = []
    for make_edits in edits:
        with view.edits(*make_edits(None)):
            alone.append(logits_of(view.model, INPUTS))
    with view.edits(*(edit for row, make_edits in enumerate(edits) for edit in make_edits([row]))):
        together = logits_of(view.model, INPUTS)
    for row in range(4):
        assert_close(together[row][REAL[row]], alone[row][row][REAL[row]], **FP32)


def test_no_rows_is_no_edit(qwen: moestro.ExpertView) -> None:
    before = logits_of(qwen.model, INPUTS)
    for rows in ([], [False] * 4):
        with qwen.edits(SwitchOff(in_every_layer(qwen, 1), rows=rows), Gain({(1, 0): 0.0}, rows=rows)):
            assert torch.equal(logits_of(qwen.model, INPUTS), before)


# --- nesting and undoing ---------------------------------------------------------------------------------------------


def test_edits_act_in_the_order_given_and_nested(qwen: moestro.ExpertView) -> None:
    bias, double = biases(qwen), Reselect(lambda _, z: 2 * z)
    for first, second, expected in (
        (double, LogitBias(bias), lambda layer, z: 2 * z + bias[layer]),
        (LogitBias(bias), double, lambda layer, z: 2 * (z + bias[layer])),
    ):
        with family_with_logits(qwen, expected):
            by_hand = logits_of(qwen.model, INPUTS)
        with qwen.edits(first, second):
            assert_close(logits_of(qwen.model, INPUTS), by_hand, **FP32)
        with qwen.edits(first), qwen.edits(second):
            assert_close(logits_of(qwen.model, INPUTS), by_hand, **FP32)


def test_of_force_on_and_switch_off_the_later_wins(view: moestro.ExpertView) -> None:
    off, on = SwitchOff(in_every_layer(view, 3)), ForceOn(in_every_layer(view, 3))
    assert not any((seen["indices"] == 3).any() for seen in recorded(view, on, off).values())
    assert all((seen["indices"] == 3).any(dim=1).all() for seen in recorded(view, off, on).values())


def test_leaving_an_inner_block_leaves_the_outer_edit(qwen: moestro.ExpertView) -> None:
    outer, inner = LogitBias(biases(qwen)), SwitchOff(in_every_layer(qwen, 1))
    before = logits_of(qwen.model, INPUTS)
    with qwen.edits(outer):
        only_outer = logits_of(qwen.model, INPUTS)
        with qwen.edits(inner):
            assert not torch.equal(logits_of(qwen.model, INPUTS), only_outer)
        assert torch.equal(logits_of(qwen.model, INPUTS), only_outer)
    assert torch.equal(logits_of(qwen.model, INPUTS), before)


def test_edits_are_gone_after_any_exception(view: moestro.ExpertView) -> None:
    before, state = logits_of(view.model, INPUTS), tiny.state_of(view.model)

    def fail(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    for edit in (
        SwitchOff(in_every_layer(view, 1)),
        Reselect(fail),
        Replace({2: fail}),
        Reselect(lambda _, z: z[:, :3]),
        Replace({2: lambda hidden, *_: hidden[:, :3]}),
        LogitBias(biases(view), rows=[0, 9]),
    ):
        with pytest.raises((KeyboardInterrupt, ValueError)), view.edits(edit), view.observing(SlotStats()):  # noqa: PT012
            logits_of(view.model, INPUTS)
            raise KeyboardInterrupt
        assert torch.equal(logits_of(view.model, INPUTS), before)
        assert tiny.hooks_on(view.model) == 0
    assert tiny.same_state(view.model, state)


def test_experts_that_fail_under_replace_leave_no_trace(qwen: moestro.ExpertView) -> None:
    """What Replace remembers of a layer must not reach a later pass."""
    before = logits_of(qwen.model, INPUTS)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = qwen.layer(2).experts.register_forward_hook(fail, prepend=True)
    with pytest.raises(KeyboardInterrupt), qwen.edits(Replace({2: lambda hidden, *_: hidden})):
        logits_of(qwen.model, INPUTS)
    hook.remove()
    with qwen.edits(Gain({(1, 0): 1.0})):
        (record,) = qwen.observe([padded(DOCS[:2])], [Record()])
    assert len(record[2]["hidden"]) == 10
    assert torch.equal(logits_of(qwen.model, INPUTS), before)


def test_hooks_hang_where_an_edit_acts_and_nowhere_else(qwen: moestro.ExpertView) -> None:
    """Every hook costs time at every token."""
    blocks = [qwen.layer(i).block for i in (1, 2)]
    with qwen.edits(Gain({(2, 0): 0.5})):
        assert [tiny.hooks_on(block) for block in blocks] == [0, 1]
        with qwen.edits(Replace({1: lambda hidden, *_: hidden})):
            assert [tiny.hooks_on(block) for block in blocks] == [2, 1]
        assert [tiny.hooks_on(block) for block in blocks] == [0, 1]
    assert tiny.hooks_on(qwen.model) == 0


# --- generate --------------------------------------------------------------------------------------------------------

GREEDY = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)


def test_generate_under_an_edit_is_the_same_with_and_without_a_cache(view: moestro.ExpertView) -> None:
    plain = view.model.generate(**INPUTS, **GREEDY)
    with view.edits(SwitchOff(in_every_layer(view, 1, 6)), LogitBias(biases(view), rows=[1, 3])):
        cached = view.model.generate(**INPUTS, **GREEDY)
        uncached = view.model.generate(**INPUTS, **GREEDY, use_cache=False)
        assert torch.equal(cached, uncached)
        assert not torch.equal(cached, plain)
        with torch.inference_mode():
            assert torch.equal(view.model.generate(**INPUTS, **GREEDY), cached)
    assert torch.equal(view.model.generate(**INPUTS, **GREEDY), plain)


def test_under_beam_search_a_row_stands_for_all_its_beams(qwen: moestro.ExpertView) -> None:
    bias, beams = biases(qwen, size=4.0), dict(GREEDY, num_beams=3)
    plain = qwen.model.generate(**INPUTS, **beams)
    with qwen.edits(LogitBias(bias)):
        everywhere = qwen.model.generate(**INPUTS, **beams)
    with qwen.edits(LogitBias(bias, rows=[True, False, False, True])):
        mixed = qwen.model.generate(**INPUTS, **beams)
    assert not torch.equal(plain, everywhere)
    for row in range(4):
        assert torch.equal(mixed[row], (everywhere if row in (0, 3) else plain)[row])


# --- gradients -------------------------------------------------------------------------------------------------------


def gradient(view: moestro.ExpertView, bias: dict[int, Tensor]) -> list[Tensor]:
    loss = view.model(**INPUTS).logits[REAL].square().mean()
    return list(torch.autograd.grad(loss, list(bias.values())))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_reach_a_bias(family: str) -> None:
    view = moestro.open(make(family).model)
    bias = {i: b.requires_grad_() for i, b in biases(view).items()}
    with family_with_logits(view, lambda layer, z: z + bias[layer]):
        expected = gradient(view, bias)
    with view.edits(LogitBias(bias)):
        found = gradient(view, bias)
    for ours, theirs in zip(found, expected):
        assert theirs.abs().max() > 1e-6
        assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-3)


def test_gradients_reach_only_the_edited_rows() -> None:
    view = moestro.open(make("qwen3_moe").model)
    bias = {i: b.requires_grad_() for i, b in biases(view).items()}
    with view.edits(LogitBias(bias, rows=[0])):
        logits = view.model(**INPUTS).logits
    inside, outside = (
        torch.autograd.grad(logits[row][REAL[row]].square().mean(), list(bias.values()), retain_graph=True)
        for row in (0, 1)
    )
    assert all(g.abs().max() > 0 for g in inside)
    assert all((g == 0).all() for g in outside)


def test_gradients_reach_parameters_of_an_edit_and_of_the_model() -> None:
    small = make("qwen3_moe")
    view, edit = moestro.open(small.model), Added(2, 96)
    with view.edits(edit, Gain({(1, 0): 0.5})):
        small.model(**INPUTS).logits.square().mean().backward()
    for parameter in (edit.up, edit.down, view.layer(1).router.weight, view.layer(2).experts.down_proj):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    replaced = nn.Linear(96, 96)
    with view.edits(Replace({2: lambda hidden, *_: replaced(hidden)})):
        small.model(**INPUTS).logits.square().mean().backward()
    assert replaced.weight.grad is not None
    assert replaced.weight.grad.abs().max() > 0


def test_gradients_are_the_same_under_gradient_checkpointing() -> None:
    small = make("qwen3_moe")
    view = moestro.open(small.model)
    bias = {i: b.requires_grad_() for i, b in biases(view).items()}
    edit = LogitBias(bias, rows=[0, 2])
    small.model.train()
    with view.edits(edit):
        expected = gradient(view, bias)
        small.model.gradient_checkpointing_enable()
        for ours, theirs in zip(gradient(view, bias), expected):
            assert_close(ours, theirs, **FP32)


def test_a_model_in_training_mode_is_opened_and_edited() -> None:
    """Phi's router draws at random while it trains; what is derived and edited is the rule it has at inference."""
    small = make("phimoe")
    rules = repr(moestro.open(small.model))
    small.model.train()
    view = moestro.open(small.model)
    assert repr(view) == rules
    assert all(module.training for module in small.model.modules())
    small.model.eval()
    before = logits_of(small, INPUTS)
    with view.edits(Reselect(lambda _, z: z)):
        assert torch.equal(logits_of(small, INPUTS)[REAL], before[REAL])


# --- other dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LEARNED)
def test_bf16(family: str) -> None:
    small = tiny.build(family, dtype=torch.bfloat16, num_hidden_layers=3)
    view = moestro.open(small.model)
    before = logits_of(small, INPUTS)
    bias = {i: b.requires_grad_() for i, b in biases(view).items()}
    edits = [make_edit(view, rows) for make_edit in ROW_EDITS[::2] for rows in (None, [0, 1])]
    for edit in [*edits, LogitBias(bias), Reselect(lambda _, z: z.float() * 2)]:
        with view.edits(edit):
            logits = small.model(**INPUTS).logits
        assert logits.dtype == torch.bfloat16
        assert logits[REAL].isfinite().all()
        assert not torch.equal(logits, before)
    with view.edits(LogitBias(bias)):
        small.model(**INPUTS).logits.float().square().mean().backward()
    assert all(b.grad is not None and b.grad.isfinite().all() for b in bias.values())
    assert torch.equal(logits_of(small, INPUTS), before)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([SwitchOff({(9, 1)})], "layer 9 has no experts; MoE layers are .1, 2."),
        ([SwitchOff({(0, 1)})], "layer 0 has no experts"),  # dense
        ([SwitchOff({(1, 8)})], r"experts 0\.\.7; there is no expert 8"),
        ([SwitchOff({(1, -1)})], "there is no expert -1"),
        ([SwitchOff({(1, e) for e in range(7)})], "leaves 1 for top_k=2 in layer 1; leave at least 2"),
        ([SwitchOff({(1, e) for e in range(4)}), SwitchOff({(1, e) for e in range(3, 7)})], "leaves 1 for top_k=2"),
        ([SwitchOff({(1, 0)}, rows=[1]), SwitchOff({(1, e) for e in range(1, 7)}, rows=[0, 1])], "leaves 1 for"),
        ([ForceOn({(1, 0), (1, 1), (1, 2)})], "3 experts forced on in layer 1, which has top_k=2"),
        ([ForceOn({(1, 0)}), ForceOn({(1, 1), (1, 2)})], "3 experts forced on"),
        ([LogitBias({1: torch.zeros(7)})], r"\(7,\) for the 8 experts of layer 1"),
        ([Gain({(1, 8): 2.0})], "there is no expert 8"),
        ([Replace({0: lambda hidden, *_: hidden})], "layer 0 has no experts"),
        ([Reselect(lambda _, z: z, only=[0])], "layer 0 has no experts"),
        ([SwitchOff({(1, 0)}, rows=[-1])], "no row -1"),
    ],
)
def test_impossible_edits_are_refused_before_anything_runs(
    qwen: moestro.ExpertView, edits: list[Edit], message: str
) -> None:
    with pytest.raises(ValueError, match=message), qwen.edits(*edits):
        raise AssertionError("nothing may run")
    with pytest.raises(ValueError, match=message), ExitStack() as nested:  # noqa: PT012
        for edit in edits:
            nested.enter_context(qwen.edits(edit))
        raise AssertionError("nothing may run")
    assert tiny.hooks_on(qwen.model) == 0


def test_edits_of_different_rows_may_go_further_together(qwen: moestro.ExpertView) -> None:
    one, other = SwitchOff({(1, e) for e in range(4)}, rows=[0]), SwitchOff({(1, e) for e in range(4, 8)}, rows=[1])
    seen = recorded(qwen, one, other)[1]
    assert (seen["indices"][seen["sample"] == 0] >= 4).all()
    assert (seen["indices"][seen["sample"] == 1] < 4).all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ForceOn({(1, 0), (1, 4)}), r"\[0, 4\] of layer 1 lie in 2 groups.*opens 1"),
        (SwitchOff({(1, 0), (1, 1), (1, 2), (1, 4), (1, 5), (1, 6)}), r"leaves \[1, 1\] in its 2 groups"),
    ],
)
def test_grouped_routers_refuse_what_their_groups_cannot_give(edit: Edit, message: str) -> None:
    view = moestro.open(make("deepseek_v3").model)
    with pytest.raises(ValueError, match=message), view.edits(edit):
        raise AssertionError("nothing may run")
    with view.edits(SwitchOff({(1, 0), (1, 1), (1, 2)})):  # the whole first group falls out
        seen = recorded(view)[1]
    assert (seen["indices"] >= 4).all()
    with view.edits(ForceOn({(1, 4), (1, 5)})):
        recorded(view)


def test_rows_must_fit_the_batch(qwen: moestro.ExpertView) -> None:
    for rows, message in (
        ([0, 4], "the batch has 4 rows"),
        ([True] * 3, "tells of 3 rows, and the batch has 4"),
        ([True, False], "tells of 2 rows"),
    ):
        with pytest.raises(ValueError, match=message), qwen.edits(SwitchOff({(1, 0)}, rows=rows)):
            logits_of(qwen.model, INPUTS)


def test_one_gain_acts_in_models_with_other_numbers_of_experts(qwen: moestro.ExpertView) -> None:
    gain = Gain({(1, 3): 0.25, (2, 0): 2.0})
    small = copy.deepcopy(qwen)
    small.keep_experts({1: [0, 1, 2, 3], 2: [0, 1, 5]})
    with qwen.edits(gain):
        alone = logits_of(qwen.model, INPUTS)
    with small.edits(gain):
        small_alone = logits_of(small.model, INPUTS)
    with qwen.edits(gain), small.edits(gain):
        assert torch.equal(logits_of(qwen.model, INPUTS), alone)
        assert torch.equal(logits_of(small.model, INPUTS), small_alone)
