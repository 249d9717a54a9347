"""Surgery: what is left computes what it computed before, what cannot be done is refused and changes nothing.

Models are fp32; FP32 is the tolerance of `tiny`.
"""

import copy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moestro
import tiny
from moestro import ForceOn, SwitchOff
from moestro.view import surgery
from moestro.view.experts import PerExpert
from moestro.view.observe import SlotStats
from moestro.view.surgery import pad_to_uniform
from tiny import FP32, LEARNED, Record, documents, logits_of, make, padded

DOCS = documents(7, 3, 9, 5)
INPUTS = padded(DOCS, "left")
REAL = INPUTS["attention_mask"].bool()


@pytest.fixture(params=LEARNED)
def view(request: pytest.FixtureRequest) -> moestro.ExpertView:
    return moestro.open(make(request.param).model)


@pytest.fixture
def qwen() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe").model)


def off_except(view: moestro.ExpertView, keep: dict[int, list[int]]) -> SwitchOff:
    return SwitchOff({(i, e) for i, ids in keep.items() for e in range(8) if e not in ids})


# --- keep ------------------------------------------------------------------------------------------------------------


def test_keeping_all_changes_no_bit(view: moestro.ExpertView) -> None:
    before, state = logits_of(view.model, INPUTS), tiny.state_of(view.model)
    view.keep_experts({layer.index: list(range(8)) for layer in view.layers})
    view.keep_experts({})
    assert torch.equal(logits_of(view.model, INPUTS), before)
    assert tiny.same_state(view.model, state)


def test_keeping_some_is_switching_off_the_rest(view: moestro.ExpertView) -> None:
    keep = {layer.index: [0, 3, 5, 6] if layer.index % 2 else [1, 2, 4, 7] for layer in view.layers}
    with view.edits(off_except(view, keep)):
        expected = logits_of(view.model, INPUTS)
    state = tiny.state_of(view.model)
    view.keep_experts(keep)
    assert_close(logits_of(view.model, INPUTS)[REAL], expected[REAL], **FP32)
    assert view.original_ids == keep
    for layer in view.layers:
        assert (layer.num_experts, layer.top_k) == (4, 2)
        prefix = f"{layer.name}.{layer.experts_name}"
        for name, tensor in layer.experts.named_parameters():
            assert torch.equal(tensor, state[f"{prefix}.{name}"][keep[layer.index]])
            assert tensor.is_contiguous()
    (stats,) = view.observe([INPUTS], [SlotStats()])
    assert all(slots.count.shape == (4,) for slots in stats.layers.values())


def test_experts_are_kept_in_the_order_given(qwen: moestro.ExpertView) -> None:
    other = moestro.open(copy.deepcopy(qwen.model))
    qwen.keep_experts({1: [0, 3, 5]})
    other.keep_experts({1: [5, 0, 3]})
    assert other.original_ids[1] == [5, 0, 3]
    assert_close(logits_of(other.model, INPUTS), logits_of(qwen.model, INPUTS), **FP32)


def test_layers_may_keep_different_numbers(qwen: moestro.ExpertView) -> None:
    keep = {1: [0, 3, 5], 2: [1, 2, 4, 6, 7]}
    with qwen.edits(off_except(qwen, keep)):
        expected = logits_of(qwen.model, INPUTS)
    qwen.keep_experts(keep)
    assert [layer.num_experts for layer in qwen.layers] == [3, 5]
    assert_close(logits_of(qwen.model, INPUTS), expected, **FP32)
    with qwen.edits(SwitchOff({(1, 0), (2, 4)}), ForceOn({(1, 2)})):
        assert logits_of(qwen.model, INPUTS).isfinite().all()


def test_grouped_routers_keep_their_groups() -> None:
    small = make("deepseek_v3")
    view = moestro.open(small.model)
    bias = view.layer(1).router.e_score_correction_bias.clone()
    view.keep_experts({layer.index: [0, 2, 3, 4, 6, 7] for layer in view.layers})
    assert torch.equal(view.layer(1).router.e_score_correction_bias, bias[[0, 2, 3, 4, 6, 7]])
    (record,) = view.observe([INPUTS], [Record()])
    for seen in record.values():
        assert (seen["indices"] // 3).diff(dim=1).eq(0).all()  # both of one group


def test_keeping_again_remembers_the_numbers_at_opening(qwen: moestro.ExpertView) -> None:
    once = moestro.open(copy.deepcopy(qwen.model))
    once.keep_experts({1: [2, 4, 7], 2: [0, 5]})
    qwen.keep_experts({1: [0, 2, 4, 6, 7], 2: [0, 3, 5]})
    qwen.keep_experts({1: [1, 2, 4]})
    qwen.keep_experts({2: [0, 2]})
    assert qwen.original_ids == once.original_ids == {1: [2, 4, 7], 2: [0, 5]}
    assert torch.equal(logits_of(qwen.model, INPUTS), logits_of(once.model, INPUTS))


def test_a_cut_model_trains_and_generates(view: moestro.ExpertView) -> None:
    view.keep_experts({layer.index: [0, 1, 4, 5] for layer in view.layers})
    view.model(**INPUTS).logits.square().mean().backward()
    for layer in view.layers:
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape[0] == 4
    out = view.model.generate(**INPUTS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= INPUTS["input_ids"].shape[1] + 3


def test_config_says_how_many_are_left(view: moestro.ExpertView) -> None:
    view.keep_experts({layer.index: [0, 1, 4, 5] for layer in view.layers})
    fresh = type(view.model)(view.model.config)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {
        n: t.shape for n, t in view.model.state_dict().items()
    }


def test_bf16_experts_are_cut_bit_for_bit() -> None:
    small = tiny.build("gpt_oss", dtype=torch.bfloat16, num_hidden_layers=2)
    view = moestro.open(small.model)
    state = tiny.state_of(small.model)
    view.keep_experts({0: [1, 2, 6], 1: [3, 4, 5]})
    for name, tensor in small.model.state_dict().items():
        ids = [1, 2, 6] if "layers.0" in name else [3, 4, 5]
        before = state[name]
        assert torch.equal(tensor, before[ids] if before.dim() and before.shape[0] == 8 else before)


# --- top_k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_top_k_is_followed_by_router_rule_and_config(family: str, top_k: int) -> None:
    view = moestro.open(make(family).model)
    fresh = make(family, num_experts_per_tok=top_k)
    fresh.model.load_state_dict(view.model.state_dict())
    view.set_top_k(top_k)
    assert torch.equal(logits_of(view.model, INPUTS)[REAL], logits_of(fresh, INPUTS)[REAL])
    assert all(layer.top_k == top_k for layer in view.layers)
    before = logits_of(view.model, INPUTS)
    with view.edits(moestro.Reselect(lambda _, z: z)):
        assert_close(logits_of(view.model, INPUTS)[REAL], before[REAL], **FP32)
    assert view.model.config.num_experts_per_tok == top_k


# --- merge -----------------------------------------------------------------------------------------------------------


def twins(view: moestro.ExpertView) -> None:
    """Make experts 1 and 3 of every layer the same as 0 and 2, router rows included."""
    for layer in view.layers:
        for tensor in [*layer.experts.parameters(), *layer.router.parameters(), *layer.router.buffers()]:
            if tensor.shape[0] == 8:
                tensor.data[[1, 3]] = tensor.data[[0, 2]].clone()


def test_merging_identical_experts_keeps_the_expert(view: moestro.ExpertView) -> None:
    """The merged expert is its twins, to the rounding of their mean; their second copy is what goes."""
    twins(view)
    clusters = [[0, 1], [2, 3], [4], [5], [6], [7]] if view.layers[0].rule.groups == 1 else [[0, 1], [2, 3], [4], [6]]
    kept = [group[0] for group in clusters]
    other = moestro.open(copy.deepcopy(view.model))
    view.merge_experts({layer.index: clusters for layer in view.layers})
    other.keep_experts({layer.index: kept for layer in view.layers})
    assert view.original_ids == other.original_ids == {layer.index: kept for layer in view.layers}
    assert_close(logits_of(view.model, INPUTS)[REAL], logits_of(other.model, INPUTS)[REAL], **FP32)


def test_merge_weights_weigh_the_mean(qwen: moestro.ExpertView) -> None:
    layer = qwen.layer(1)
    old = {n: p.detach().clone() for n, p in [*layer.experts.named_parameters(), *layer.router.named_parameters()]}
    share = {1: torch.tensor([1.0, 3.0, 9, 9, 0.5, 0, 0.5, 9]), 2: torch.ones(8)}
    qwen.merge_experts({1: [[4, 6, 5], [1, 0], [7]]}, share)
    assert qwen.original_ids == {1: [4, 0, 7], 2: list(range(8))}
    for name, new in [*layer.experts.named_parameters(), *layer.router.named_parameters()]:
        t = old[name]
        assert_close(new, torch.stack([0.5 * t[4] + 0.5 * t[6], 0.25 * t[0] + 0.75 * t[1], t[7]]), **FP32)


def test_merging_all_singles_is_keeping(view: moestro.ExpertView) -> None:
    other = moestro.open(copy.deepcopy(view.model))
    view.merge_experts({layer.index: [[e] for e in (0, 2, 4, 7)] for layer in view.layers})
    other.keep_experts({layer.index: [0, 2, 4, 7] for layer in view.layers})
    assert torch.equal(logits_of(view.model, INPUTS)[REAL], logits_of(other.model, INPUTS)[REAL])


# --- replace ---------------------------------------------------------------------------------------------------------


class OneForAll(nn.Module):
    """One dense map in the place of all experts."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.map = nn.Linear(96, width)

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.map(hidden) * weights.sum(dim=1, keepdim=True)


def test_another_module_takes_the_place_of_the_experts(qwen: moestro.ExpertView) -> None:
    before, experts = logits_of(qwen.model, INPUTS), qwen.layer(1).experts
    module = OneForAll()
    with qwen.edits(moestro.Replace({1: module})):
        expected = logits_of(qwen.model, INPUTS)
    qwen.replace_experts(1, module)
    assert_close(logits_of(qwen.model, INPUTS), expected, **FP32)
    assert qwen.layer(1).experts is module
    assert qwen.layer(1).num_experts == 8  # to its router
    assert "layer 1" in repr(qwen)
    with qwen.edits(SwitchOff({(1, 0), (2, 0)})):
        (record,) = qwen.observe([INPUTS], [Record()])
    assert (record[1]["indices"] != 0).all()
    with pytest.raises(ValueError, match="layer 1: its experts were replaced by OneForAll"):
        qwen.observe([INPUTS], [SlotStats()])
    with pytest.raises(ValueError, match="layer 1"):
        qwen.keep_experts({1: [0, 1, 2], 2: [0, 1, 2]})
    assert qwen.layer(2).num_experts == 8
    qwen.replace_experts(1, experts)
    assert torch.equal(logits_of(qwen.model, INPUTS), before)


# --- refusals --------------------------------------------------------------------------------------------------------

Request = Callable[[moestro.ExpertView], Any]
ROW = torch.ones(8)

REFUSED: list[tuple[str, Request, str]] = [
    ("qwen3_moe", lambda v: v.keep_experts({2: [0, 1], 0: [1, 2]}), "layer 0 has no experts; MoE layers are .1, 2."),
    ("qwen3_moe", lambda v: v.keep_experts({1: [0, 1], 2: [0, 8]}), r"experts 0\.\.7; there is no expert 8"),
    ("qwen3_moe", lambda v: v.keep_experts({1: [0, 1], 2: [3, -1]}), "there is no expert -1"),
    ("qwen3_moe", lambda v: v.keep_experts({1: [0, 1], 2: [3, 3]}), "expert 3 is named twice"),
    ("qwen3_moe", lambda v: v.keep_experts({1: [0, 1], 2: [3]}), r"keep=1 experts cannot serve top_k=2 in layer 2"),
    ("qwen3_moe", lambda v: v.keep_experts({1: [0, 1], 2: []}), "keep=0"),
    ("deepseek_v3", lambda v: v.keep_experts({1: [0, 1, 4, 5], 2: [0, 1, 2, 4]}), r"asked for \[3, 1\]"),
    ("deepseek_v3", lambda v: v.keep_experts({1: [0, 4]}), r"asked for \[1, 1\]"),
    ("deepseek_v3", lambda v: v.keep_experts({1: [0, 4, 1, 5]}), "ascending"),
    ("deepseek_v4", lambda v: v.keep_experts({1: [0, 1, 2], 0: [0, 1, 2]}), "layer 0: experts cannot be removed"),
    ("qwen3_moe", lambda v: v.set_top_k(9), r"top_k=9 in layer 1, whose router can choose 1 to 8"),
    ("qwen3_moe", lambda v: v.set_top_k(0), "top_k=0"),
    ("deepseek_v3", lambda v: v.set_top_k(5), "can choose 1 to 4"),
    ("phimoe", lambda v: v.set_top_k(3), "top_k cannot be changed|keeps choosing 2"),
    ("deepseek_v4", lambda v: v.set_top_k(1), "layer 0: top_k is fixed"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [1, 2]]}), "expert 1 is in two clusters"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2, 3]], 2: [[0, 1], []]}), "empty cluster"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2, 3]], 2: [[0, 1, 2]]}), "keep=1"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2, 8]]}), "there is no expert 8"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2]]}, {2: ROW}), "weights.*layer 1"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2]]}, {1: ROW[:4]}), r"\(4,\).*8 experts"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2]]}, {1: -ROW}), "negative|non-negative"),
    ("qwen3_moe", lambda v: v.merge_experts({1: [[0, 1], [2]]}, {1: 0 * ROW}), "sum to 0|all zero"),
    ("deepseek_v3", lambda v: v.merge_experts({1: [[0, 1, 4], [2, 3]]}), "same number in each group"),
    ("qwen3_moe", lambda v: v.replace_experts(0, OneForAll()), "layer 0 has no experts"),
    ("qwen3_moe", lambda v: v.replace_experts(1, OneForAll(97)), r"\[N, 96\] into \[N, 96\]; got \(2, 97\)"),
]


@pytest.mark.parametrize(("family", "request_", "message"), REFUSED)
def test_impossible_requests_are_refused_and_change_nothing(family: str, request_: Request, message: str) -> None:
    view = moestro.open(make(family).model)
    before, state, config = logits_of(view.model, INPUTS), tiny.state_of(view.model), view.model.config.to_dict()
    ids = copy.deepcopy(view.original_ids)
    with pytest.raises(ValueError, match=message):
        request_(view)
    assert torch.equal(logits_of(view.model, INPUTS), before)
    assert tiny.same_state(view.model, state)
    assert view.model.config.to_dict() == config
    assert view.original_ids == ids
    with view.edits(SwitchOff({(view.layers[-1].index, 0)})):
        logits_of(view.model, INPUTS)


def test_surgery_waits_until_edits_and_observations_are_over(qwen: moestro.ExpertView) -> None:
    state = tiny.state_of(qwen.model)
    for block in (qwen.edits(SwitchOff({(1, 0)})), qwen.observing(SlotStats())):
        with block:
            for surgery in (
                lambda: qwen.keep_experts({1: [0, 1]}),
                lambda: qwen.merge_experts({1: [[0, 1], [2]]}),
                lambda: qwen.set_top_k(1),
                lambda: qwen.replace_experts(1, OneForAll()),
            ):
                with pytest.raises(RuntimeError, match="end the edits and observations"):
                    surgery()
    assert tiny.same_state(qwen.model, state)


def test_an_interrupted_cut_leaves_all_layers_whole(qwen: moestro.ExpertView, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router of a later layer that does not follow must not leave the earlier layers cut."""
    state, before = tiny.state_of(qwen.model), logits_of(qwen.model, INPUTS)
    router = qwen.layer(2).router
    forward = router.forward

    def wrong(hidden: Tensor) -> Any:
        logits, weights, indices = forward(hidden)
        return (logits if router.weight.shape[0] == 8 else logits.flip(-1)), weights, indices

    router.forward = wrong
    with pytest.raises(RuntimeError, match=r"layer 2 .*other logits"):
        qwen.keep_experts({1: [0, 1, 2], 2: [0, 1, 2]})
    del router.forward
    assert tiny.same_state(qwen.model, state)
    assert [layer.num_experts for layer in qwen.layers] == [8, 8]
    assert torch.equal(logits_of(qwen.model, INPUTS), before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where a shell started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("surgery_", [surgery.keep_experts, surgery.merge_experts])
def test_an_interrupt_waits_until_all_layers_are_cut(
    surgery_: Callable[..., None], qwen: moestro.ExpertView, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, whole = {1: [[0, 2], [3], [5]], 2: [[1], [4], [6]]}, moestro.open(copy.deepcopy(qwen.model))
    if surgery_ is surgery.keep_experts:
        request = {index: [group[0] for group in groups] for index, groups in request.items()}
    surgery_(whole.layers, request)
    cut = PerExpert.slice

    def pressed(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return cut(*args)

    monkeypatch.setattr(PerExpert, "slice", pressed)
    with pytest.raises(KeyboardInterrupt):
        surgery_(qwen.layers, request)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tiny.same_state(qwen.model, tiny.state_of(whole.model))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_view_knows_what_was_cut(qwen: moestro.ExpertView, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = PerExpert.slice
    monkeypatch.setattr(PerExpert, "slice", lambda *args: (signal.raise_signal(signal.SIGINT), cut(*args))[1])
    with pytest.raises(KeyboardInterrupt):
        qwen.keep_experts({1: [0, 3, 5], 2: [1, 4, 6]})
    assert qwen.original_ids == {1: [0, 3, 5], 2: [1, 4, 6]}
    assert qwen.model.config.num_experts == 3
    assert logits_of(qwen.model, INPUTS).isfinite().all()


# --- one number for all layers ---------------------------------------------------------------------------------------


def test_padding_to_one_number_takes_the_next_best(qwen: moestro.ExpertView) -> None:
    scores = {1: torch.tensor([0.0, 5, 1, 4, 0, 0, 0, 0]), 2: torch.tensor([float("nan"), 3, 2, 9, -1, -1, -1, -1])}
    assert pad_to_uniform(qwen.layers, {1: [1], 2: [5, 1, 4]}, scores) == {1: [1, 2, 3], 2: [1, 4, 5]}


def test_padding_fills_each_group_of_a_grouped_router(tmp_path: Path) -> None:
    view = moestro.open(make("deepseek_v3").model)
    scores = {1: torch.tensor([9.0, 8, 7, 6, 1, 2, 3, float("nan")]), 2: torch.arange(8.0)}
    padded = pad_to_uniform(view.layers, {1: [0, 1, 2], 2: [0, 7]}, scores)
    assert padded == {1: [0, 1, 2, 4, 5, 6], 2: [0, 2, 3, 5, 6, 7]}
    view.keep_experts(padded)
    view.save(tmp_path / "saved")
