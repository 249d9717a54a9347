"""Online rerouting: each sequence gets the bias that its own text asks for, and nothing of it stays behind."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import moestro
import tiny
from moestro import LogitBias
from moestro.steer.online_rerouting import SELECTIONS, OnlineRerouter, RowBias, context_loss, fit_bias
from tiny import FP32, documents, logits_of, make, padded

pytestmark = pytest.mark.filterwarnings("ignore:row .* too few to adapt to")

INPUTS = padded(documents(12, 5, 9), "left")
REAL = INPUTS["attention_mask"].bool()
GIVEN = (INPUTS["input_ids"], INPUTS["attention_mask"])
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=130)


@pytest.fixture(scope="module")
def view() -> moestro.ExpertView:
    return moestro.open(make("qwen3_moe", norm_topk_prob=False).model)


def losses(view: moestro.ExpertView, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logits = view.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    real = mask[:, 1:].bool() & mask[:, :-1].bool()
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * real).sum(1) / real.sum(1)


# --- the optimisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_loss_of_every_context_falls(family: str) -> None:
    view = moestro.open(make(family).model)
    before = losses(view, *GIVEN)
    rerouter = OnlineRerouter(view, layers="all", steps=8, lr=2e-3)  # so small that no expert is chosen anew
    with rerouter.session(*GIVEN) as adapted:
        after = losses(view, *GIVEN)
    assert_close(adapted.losses[0], before, **FP32)
    assert (after < before).all()
    assert (adapted.losses[-1] < adapted.losses[0]).all()
    assert_close(losses(view, *GIVEN), before, **tiny.EXACT)


def test_a_step_of_sgd_is_the_gradient_of_the_context_loss() -> None:
    view = moestro.open(make("qwen3_moe", norm_topk_prob=False).model)
    bias = {layer.index: torch.zeros(3, 8, requires_grad=True) for layer in view.layers}
    mask = INPUTS["attention_mask"]
    with view.edits(RowBias(bias)):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = view.model(INPUTS["input_ids"], attention_mask=mask, position_ids=position).logits
    for row in range(3):
        z, ids = logits[row][REAL[row]], INPUTS["input_ids"][row][REAL[row]]
        torch.nn.functional.cross_entropy(z[:-1], ids[1:]).backward(retain_graph=True)
    adapted = OnlineRerouter(view, lr=0.7, steps=1, layers="all", optimizer="sgd").adapt(*GIVEN)
    for index, found in adapted.deltas.items():
        assert found.abs().max() > 0
        assert_close(found, -0.7 * bias[index].grad, **FP32)


def test_a_sequence_does_not_depend_on_its_batch(view) -> None:
    rerouter = OnlineRerouter(view, steps=4)
    together = rerouter.adapt(*GIVEN)
    for row in range(3):
        ids = INPUTS["input_ids"][row][REAL[row]][None]
        alone = rerouter.adapt(ids)
        for index, delta in alone.deltas.items():
            assert_close(delta[0], together.deltas[index][row], **FP32)
        assert torch.equal(alone.shares[0], together.shares[row])


def test_every_sequence_starts_from_nothing(view) -> None:
    rerouter = OnlineRerouter(view, steps=3)
    first = rerouter.adapt(*GIVEN)
    rerouter.adapt(*(t[:2, 4:] for t in GIVEN))
    again = rerouter.adapt(*GIVEN)
    assert all(torch.equal(first.deltas[i], again.deltas[i]) for i in first.deltas)


def test_padding_does_not_count(view) -> None:
    rerouter = OnlineRerouter(view, steps=3)
    left, right = rerouter.adapt(*GIVEN), padded(documents(12, 5, 9), "right")
    right = rerouter.adapt(right["input_ids"], right["attention_mask"])
    for index in left.deltas:
        assert_close(left.deltas[index], right.deltas[index], **FP32)


def test_experts_that_were_not_chosen_have_no_gradient_where_weights_are_normalised() -> None:
    view = moestro.open(make("qwen3_moe", norm_topk_prob=True).model)
    (record,) = view.observe([INPUTS], [tiny.Record()], progress=False)
    found = OnlineRerouter(view, steps=1, layers="all").adapt(*GIVEN).deltas
    for index, seen in record.items():
        for row in range(3):
            used = seen["indices"][seen["sample"] == row].unique()
            others = torch.ones(8, dtype=torch.bool).index_fill(0, used, False)
            assert (found[index][row][others] == 0).all()
            assert (found[index][row][used] != 0).any()


@pytest.mark.parametrize("steps", [0, 3])
def test_the_model_is_left_as_it_was(view, steps: int) -> None:
    before, state = logits_of(view.model, INPUTS), tiny.state_of(view.model)
    view.model.lm_head.weight.requires_grad_(False)
    view.model.train()
    with OnlineRerouter(view, steps=steps).session(*GIVEN):
        view.model.eval()
        inside = logits_of(view.model, INPUTS)
        view.model.train()
    assert view.model.training
    view.model.eval()
    assert torch.equal(inside, before) == (steps == 0)
    assert torch.equal(logits_of(view.model, INPUTS), before)
    assert tiny.same_state(view.model, state)
    assert all(p.grad is None for p in view.model.parameters())
    assert [n for n, p in view.model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    view.model.lm_head.weight.requires_grad_(True)
    assert tiny.hooks_on(view.model) == 0


def test_a_row_without_a_finite_loss_is_reset_and_the_others_go_on(view) -> None:
    rerouter = OnlineRerouter(view, steps=2, layers="all")
    with torch.no_grad():
        row = view.model.model.embed_tokens.weight[77].clone()
        view.model.model.embed_tokens.weight[77] = float("nan")
        ids = INPUTS["input_ids"].clone()
        ids[ids == 77], ids[1, -2] = 78, 77
        mask = INPUTS["attention_mask"]
        with pytest.warns(UserWarning, match="row 1: the loss .* set back to 0"):
            adapted = rerouter.adapt(ids, mask)
        alone = rerouter.adapt(ids[[0, 2]], mask[[0, 2]])
        view.model.model.embed_tokens.weight[77] = row
    for index, delta in adapted.deltas.items():
        assert (delta[1] == 0).all()
        assert_close(delta[[0, 2]], alone.deltas[index], **FP32)


# --- which layers ----------------------------------------------------------------------------------------------------


def test_layers_are_selected_by_how_sure_their_router_is(view) -> None:
    (record,) = view.observe([INPUTS], [tiny.Record()], progress=False)
    score = torch.stack(
        [
            torch.stack(
                [-seen["logits"][seen["sample"] == r].softmax(-1).topk(2).values.log().mean() for r in range(3)]
            )
            for seen in record.values()
        ],
        dim=1,
    )
    undecided = torch.nn.functional.one_hot(score.argmax(1), 2).float()

    def shares(layers: str) -> Tensor:
        found = OnlineRerouter(view, steps=2, layers=layers).adapt(*GIVEN)
        moved = torch.stack([(d != 0).any(1) for d in found.deltas.values()], dim=1)
        assert torch.equal(moved, found.shares > 0)
        return found.shares

    assert torch.equal(shares("printed"), undecided)
    assert torch.equal(shares("decisive"), 1 - undecided)
    assert torch.equal(shares("last"), torch.tensor([[0.0, 1.0]] * 3))
    assert (shares("random").sum(1) == 1).all()
    assert_close(shares("soft"), score / score.mean(1, keepdim=True), **FP32)


def test_the_number_of_selected_layers() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    assert SELECTIONS["printed"](scores, 2, torch.Generator()).tolist() == [[1, 0, 0, 1]]
    assert SELECTIONS["decisive"](scores, 3, torch.Generator()).tolist() == [[1, 1, 1, 0]]
    draws = torch.cat([SELECTIONS["random"](scores, 2, torch.Generator().manual_seed(s)) for s in range(200)])
    assert (draws.sum(1) == 2).all()
    assert ((draws.mean(0) - 0.5).abs() < 0.1).all()


# --- generation ------------------------------------------------------------------------------------------------------


def test_generation_alternates_and_rebuilds_the_cache(view) -> None:
    rerouter = OnlineRerouter(view, lr=0.5, steps=2, interval=3)
    found = rerouter.generate(*GIVEN, max_new_tokens=7, min_new_tokens=7, **GREEDY)
    ids, mask = GIVEN
    deltas = None
    for made in range(7):
        if made % 3 == 0:
            deltas = rerouter.adapt(ids, mask, start=deltas).deltas
        with torch.no_grad(), view.edits(RowBias(deltas)):
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = view.model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1]
        logits[:, GREEDY["eos_token_id"]] = float("-inf")
        ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found.sequences, ids)
    assert found.phases == 3
    assert all(torch.equal(found.deltas[i], deltas[i]) for i in deltas)
    plain = view.model.generate(*GIVEN[:1], attention_mask=GIVEN[1], max_new_tokens=7, min_new_tokens=7, **GREEDY)
    assert not torch.equal(found.sequences, plain)


def test_sequences_that_have_ended_stay_so(view) -> None:
    rerouter = OnlineRerouter(view, steps=1, interval=2)
    free = rerouter.generate(*GIVEN, max_new_tokens=6, **{**GREEDY, "eos_token_id": None}).sequences[:, -6:]
    end = int(free[0, 2])  # row 0 ends in its second stretch
    first = [(row == end).nonzero().flatten().tolist() for row in free]
    found = rerouter.generate(*GIVEN, max_new_tokens=6, **{**GREEDY, "eos_token_id": end})
    new = found.sequences[:, INPUTS["input_ids"].shape[1] :]
    for row, places in enumerate(first):
        length = min(places[0] + 1 if places else 6, new.shape[1])
        assert torch.equal(new[row, :length], free[row, :length])
        assert (new[row, length:] == 0).all()
    assert torch.isnan(found.losses[-1][:, 0]).all()


def test_without_steps_generation_is_the_models_own(view) -> None:
    plain = view.model.generate(*GIVEN[:1], attention_mask=GIVEN[1], max_new_tokens=5, **GREEDY)
    with torch.inference_mode():
        found = OnlineRerouter(view, steps=0, interval=2).generate(*GIVEN, max_new_tokens=5, **GREEDY)
    assert torch.equal(found.sequences, plain)


def test_it_works_under_inference_mode_and_samples(view) -> None:
    rerouter = OnlineRerouter(view, steps=2, interval=2)

    def sampled() -> Tensor:
        torch.manual_seed(4)
        return rerouter.generate(*GIVEN, max_new_tokens=4, **{**GREEDY, "do_sample": True, "top_k": 0}).sequences

    with torch.inference_mode():
        inside = sampled()
    assert torch.equal(inside, sampled())


# --- the baseline ----------------------------------------------------------------------------------------------------


def test_a_fitted_bias_is_one_for_all_texts_and_lowers_their_loss(view) -> None:
    data = [padded(documents(12, 5, 9)), padded(documents(11, 8, seed=1))]
    before = [context_loss(view.model, d["input_ids"], d["attention_mask"].bool()).mean().item() for d in data]
    edit = fit_bias(view, data, passes=6, progress=False)
    assert isinstance(edit, LogitBias)
    assert not any(b.requires_grad for b in edit.bias.values())
    with view.edits(edit):
        after = [context_loss(view.model, d["input_ids"], d["attention_mask"].bool()).mean().item() for d in data]
    assert sum(after) < sum(before)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"steps": -1}, {"interval": 0}, {"fraction": 0.0}, {"layers": "first"}, {"optimizer": "lion"}],
)
def test_settings_without_a_meaning_are_refused(view, settings: dict) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}" if not isinstance(value, str) else f"'{value}' is none of"):
        OnlineRerouter(view, **settings)


def test_contexts_that_are_too_short(view) -> None:
    rerouter = OnlineRerouter(view, steps=1)
    ids, mask = torch.tensor([[0, 7], [8, 9]]), torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="row 0 has 1 tokens"):
        rerouter.adapt(ids, mask)
    with pytest.warns(UserWarning, match="row 1 has 5 tokens"):
        rerouter.adapt(*GIVEN)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3}, {"return_dict_in_generate": True}])
def test_options_that_do_not_go_with_it_are_refused(view, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OnlineRerouter(view).generate(*GIVEN, max_new_tokens=2, **GREEDY, **options)


def test_a_router_that_cannot_be_rerun_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be re-run"):
        OnlineRerouter(moestro.open(make("deepseek_v4").model))


def test_a_bias_for_other_rows_is_refused(view) -> None:
    bias = RowBias({1: torch.zeros(7, 8)})
    with pytest.raises(ValueError, match="a bias for 7 rows"), view.edits(bias):
        logits_of(view.model, INPUTS)
    with pytest.raises(ValueError, match="rows of 8 experts"), view.edits(RowBias({1: torch.zeros(3, 4)})):
        pass
