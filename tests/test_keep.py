"""Budgets: what a memory string means, what fits it, and which experts are kept."""

import pytest
import torch

import moestro
from families.tiny import build
from moestro.compress.prune import keep, saliency
from moestro.view.observe import LayerSlots, SlotStatistics


@pytest.fixture
def view() -> moestro.ExpertView:
    return moestro.open(build("qwen3_moe").model)


@pytest.fixture
def grouped() -> moestro.ExpertView:
    return moestro.open(build("deepseek_v3").model)


def test_memory_is_a_size_with_a_unit_or_a_share():
    assert keep.parse_memory("6GB", 10) == 6 * 10**9
    assert keep.parse_memory("1.5 MiB", 10) == 3 * 2**19
    assert keep.parse_memory("25%", 400) == 100


@pytest.mark.parametrize("text", ["50", "0%", "-1GB", "0GB", "101%", "GB", "", "6 apples", "nan%", "1e3GB"])
def test_other_memory_strings_are_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"50%"):
        keep.parse_memory(text, 100)


def test_the_predicted_size_is_the_size_of_the_cut_model(view):
    sizes = keep.measure(view.layers, view.num_bytes)
    assert sizes.with_experts(view.layers[0].num_experts) == view.num_bytes
    view.keep_experts({layer.index: [0, 3, 5] for layer in view.layers})
    assert view.num_bytes == sizes.with_experts(3)


def test_a_budget_buys_as_many_experts_as_fit_and_no_more(view):
    sizes = keep.measure(view.layers, view.num_bytes)
    for count in range(view.layers[0].top_k, view.layers[0].num_experts + 1):
        assert keep.affordable(view.layers, sizes, sizes.with_experts(count)) == count
        if count > view.layers[0].top_k:
            assert keep.affordable(view.layers, sizes, sizes.with_experts(count) - 1) == count - 1


def test_a_budget_below_the_shared_parts_names_the_least_possible(view):
    sizes = keep.measure(view.layers, view.num_bytes)
    least = sizes.with_experts(view.layers[0].top_k)
    with pytest.raises(ValueError, match=f"at least {least:,} bytes"):
        keep.affordable(view.layers, sizes, sizes.shared - 1)
    with pytest.raises(ValueError, match="at least"):
        keep.share_of_experts(view.layers, 0.01)


def test_the_best_are_kept_the_protected_always_and_the_unseen_last(view):
    scores = {layer.index: torch.arange(layer.num_experts, dtype=torch.float64) for layer in view.layers}
    first = view.layers[0].index
    scores[first][7] = float("nan")
    kept = keep.keep_best(view.layers, scores, 3, protect={(first, 0)})
    assert kept[first] == [0, 5, 6]
    assert all(kept[layer.index] == [5, 6, 7] for layer in view.layers[1:])


def test_too_many_protected_experts_are_refused(view):
    scores = {layer.index: torch.zeros(layer.num_experts) for layer in view.layers}
    first = view.layers[0].index
    with pytest.raises(ValueError, match="protected"):
        keep.keep_best(view.layers, scores, 2, protect={(first, e) for e in range(3)})


def test_grouped_routers_keep_as_many_in_every_group(grouped):
    scores = {layer.index: torch.arange(layer.num_experts, dtype=torch.float64) for layer in grouped.layers}
    count = keep.share_of_experts(grouped.layers, 0.5)
    kept = keep.keep_best(grouped.layers, scores, count)
    groups = grouped.layers[0].rule.groups
    size = grouped.layers[0].num_experts // groups
    for ids in kept.values():
        assert [sum(e // size == g for e in ids) for g in range(groups)] == [count // groups] * groups
    grouped.keep_experts(kept)


def test_an_expert_without_tokens_is_unseen_not_zero():
    slots = LayerSlots(*(torch.tensor([[4.0, 0.0, 2.0]], dtype=torch.float64) for _ in range(4)))
    stats = SlotStatistics(("all",), {0: slots}, {"all": 3})
    for score in (saliency.reap, saliency.gating_score):
        assert torch.isnan(score(stats)[0]).tolist() == [False, True, False]
    assert saliency.reap(stats)[0][0] == 1.0
    assert saliency.frequency(stats)[0].tolist() == [4, 0, 2]
