"""The sparsity score foretells active neurons, its router reads live weights, coverage and reconstruction are F1s."""

import copy

import pytest
import torch
from torch import Tensor

import moestro
from moestro.analyze.feature_coverage import (
    NeuronActivations,
    feature_coverage,
    neuron_activations,
    reconstruction,
)
from moestro.build.upcycle_moe_x import split_neurons, upcycle_to_moe_x
from moestro.evidence.moe_x import agreement, play
from moestro.layers import MoE
from moestro.layers.experts import GatedExperts, UngatedExperts
from moestro.layers.routers.sparsity_aware import (
    SparsityAwareRouter,
    column_statistics,
    expected_active,
    sparsity_scores,
)
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.routing import dense_weights
from moestro.view.edit import SwitchOff


def lm(**changes) -> MoELMForCausalLM:
    options = dict(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        router="sparsity_aware",
        experts={"kind": "ungated", "activation": "relu"},
        router_losses={"load_balance": 0.01},
    )
    torch.manual_seed(0)
    return MoELMForCausalLM(MoELMConfig(**options | changes)).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


def test_the_score_is_the_expected_number_of_active_neurons() -> None:
    up = torch.randn(4, 20000, 8) * torch.rand(4, 1, 8) + 0.5 * torch.randn(4, 1, 8)
    bias = 0.3 + 0.5 * torch.randn(4, 20000)
    hidden = torch.randn(16, 8)
    active = (torch.einsum("nh,eih->nei", hidden, up) + bias > 0).sum(dim=-1).float()
    expected = expected_active(sparsity_scores(hidden, *column_statistics(up, bias)), 20000)
    assert torch.allclose(expected, active, atol=20000 * 0.015)


def test_experts_with_means_of_their_own_are_told_apart() -> None:
    up = torch.randn(8, 256, 64) / 8 + 0.2 * torch.randn(8, 1, 64)
    correlation, excess = agreement(torch.randn(500, 64), up, 2)
    assert correlation > 0.99
    assert excess < 0.02


def test_degenerate_input_gives_finite_scores_and_gradients() -> None:
    up = torch.ones(2, 4, 3, requires_grad=True)  # all rows the same: no deviation
    hidden = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]], requires_grad=True)
    scores = sparsity_scores(hidden, *column_statistics(up))
    assert scores[:, 0].tolist() == [0.0, -1.0, 1.0]
    scores.sum().backward()
    assert torch.isfinite(up.grad).all()
    assert torch.isfinite(hidden.grad).all()


def test_weights_are_the_softmax_of_the_best_scores_and_train_the_experts() -> None:
    layer = MoE(SparsityAwareRouter(16, 6, 2), UngatedExperts(6, 16, 32, activation="relu"))
    assert not list(layer.router.parameters())
    hidden = torch.randn(10, 16)
    routing = layer.router(hidden)
    best = sparsity_scores(hidden, *column_statistics(layer.experts.up_proj)).topk(2)
    assert torch.equal(routing.indices, best.indices)
    assert torch.allclose(routing.weights, best.values.softmax(-1))
    routing.logits.sum().backward()
    assert layer.experts.up_proj.grad.abs().sum() > 0


def test_statistics_follow_the_weights_in_eval_mode_and_in_copies() -> None:
    layer = MoE(SparsityAwareRouter(16, 6, 2), UngatedExperts(6, 16, 32, activation="relu")).eval()
    hidden = torch.randn(10, 16)
    with torch.no_grad():
        before = layer.router(hidden).logits
        assert layer.router.statistics()[0] is layer.router.statistics()[0]
        copied = copy.deepcopy(layer)
        layer.experts.up_proj.mul_(-1)
        assert torch.allclose(layer.router(hidden).logits, -before)
        assert torch.equal(copied.router(hidden).logits, before)
        layer.double()
        assert layer.router(hidden.double()).logits.dtype == torch.float32


@pytest.mark.parametrize("experts", [GatedExperts(4, 8, 8), UngatedExperts(4, 8, 8, activation="gelu")])
def test_experts_without_zeros_are_refused(experts: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="use experts="):
        MoE(SparsityAwareRouter(8, 4, 2), experts)


def test_an_unbound_router_says_so() -> None:
    with pytest.raises(RuntimeError, match="bind"):
        SparsityAwareRouter(8, 4, 2)(torch.zeros(1, 8))


# In a language model


def gradients(model: MoELMForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(2, 12), labels=ids(2, 12), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_it_trains_with_and_without_checkpointing() -> None:
    model = lm().train()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    again = gradients(model)
    for name, grad in plain.items():
        assert torch.allclose(grad, again[name], atol=1e-6), name


def test_it_generates_with_a_cache_what_it_predicts_without(tmp_path) -> None:
    model = lm()
    out = model.generate(ids(2, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model(input_ids=out, use_cache=False).logits[:, 4:-1].argmax(-1), out[:, 5:])
    model.save_pretrained(tmp_path)
    loaded = MoELMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=out).logits, model(input_ids=out).logits)


def test_it_can_be_opened_edited_and_observed() -> None:
    view = moestro.open(lm())
    assert view.layers[0].rule.normalize
    watch = NeuronActivations(view.layers[1])
    with view.edits(SwitchOff([(1, 3)])):
        acts, tokens = view.observe([ids(2, 7), ids(1, 7)], [watch], progress=False)[0]
    assert acts.shape == (21, 8 * 32)
    assert len(tokens) == 21
    assert not acts[:, 3 * 32 : 4 * 32].any()
    assert (acts >= 0).all()


def test_neurons_side_by_side_are_the_layer() -> None:
    experts = UngatedExperts(4, 8, 6, activation="relu")
    torch.nn.init.normal_(experts.up_proj)
    torch.nn.init.normal_(experts.down_proj)
    hidden, weights = torch.randn(5, 8), torch.rand(5, 2)
    indices = torch.rand(5, 4).topk(2).indices
    acts = neuron_activations(experts, hidden, weights, indices)
    wide = experts.down_proj.transpose(0, 1).reshape(8, -1)
    assert torch.allclose(acts @ wide.T, experts(hidden, indices, weights), atol=1e-5)


# Upcycling


def dense(**changes) -> MoELMForCausalLM:
    return lm(
        num_experts=1,
        num_experts_per_tok=1,
        router="top_k",
        experts={"kind": "ungated", "activation": "relu"},
        **changes,
    )


def test_the_first_experts_together_hold_every_neuron_once() -> None:
    up, down = torch.randn(12, 5), torch.randn(5, 12)
    ups, downs = split_neurons(up, down, 5, 4, noise=0.0, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(7, 5)
    parts = torch.einsum("nei,ehi->neh", torch.einsum("nh,eih->nei", hidden, ups).relu(), downs)
    whole = (hidden @ up.T).relu() @ down.T
    assert torch.allclose(parts[:, :3].mean(dim=1), whole, atol=1e-5)
    assert not torch.equal(ups[0], ups[3])


def test_copies_of_the_whole_layer_change_nothing() -> None:
    model = dense()
    made = upcycle_to_moe_x(model, 4, 2, width=32, noise=0.0)
    assert torch.allclose(made(input_ids=ids(2, 9)).logits, model(input_ids=ids(2, 9)).logits, atol=1e-5)


def test_upcycled_experts_are_different_experts() -> None:
    made = upcycle_to_moe_x(dense(), 8, 2)
    assert made.config.num_experts == 8
    assert made.config.moe_intermediate_size == 16
    routing = made.model.layers[0].mlp.router(torch.randn(200, 32))
    load = (dense_weights(routing, 8) > 0).float().mean(dim=0)
    assert (load > 0).sum() >= 6


def test_what_cannot_be_upcycled_is_refused() -> None:
    with pytest.raises(ValueError, match="one ungated expert"):
        upcycle_to_moe_x(lm(), 8, 2)
    with pytest.raises(ValueError, match="does not divide"):
        upcycle_to_moe_x(dense(), 8, 2, width=5)


# Coverage and reconstruction


def test_a_feature_that_is_a_property_covers_it_and_rebuilds_it() -> None:
    labels = torch.rand(400, 3) < 0.4
    acts = torch.cat([labels.float() * (1 + torch.rand(400, 3)), torch.rand(400, 5) - 0.5], dim=1)
    assert feature_coverage(acts, labels).tolist() == [1.0, 1.0, 1.0]
    assert reconstruction(acts[:200], labels[:200], acts[200:], labels[200:]) == 1.0


def test_noise_covers_no_more_than_always_saying_yes() -> None:
    labels = torch.rand(4000, 2) < 0.3
    acts = torch.rand(4000, 4)
    always = 2 * 0.3 / 1.3
    assert feature_coverage(acts, labels).tolist() == pytest.approx([always] * 2, abs=0.04)
    noise = torch.randn(4000, 4)
    empty = float((~labels[2000:]).all(dim=1).float().mean())
    assert reconstruction(noise[:2000], labels[:2000], noise[2000:], labels[2000:]) == pytest.approx(empty, abs=1e-6)


def test_a_feature_may_stand_for_part_of_a_property() -> None:
    labels = torch.zeros(400, 1, dtype=torch.bool)
    labels[::2] = True
    first = torch.zeros(400)
    first[::4] = 1.0
    second = torch.zeros(400)
    second[2::4] = 1.0
    acts = torch.stack([first, second], dim=1)
    assert feature_coverage(acts, labels).tolist() == pytest.approx([2 / 3])
    assert reconstruction(acts[:200], labels[:200], acts[200:], labels[200:]) == 1.0


def test_labels_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="the same for all 4 tokens"):
        feature_coverage(torch.rand(4, 2), torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 rows"):
        feature_coverage(torch.rand(0, 2), torch.ones(0, 1, dtype=torch.bool))


def test_the_games_follow_the_rules() -> None:
    tokens, owners = play(300, seed=0)
    for row, states in zip(tokens.tolist(), owners):
        moves = [t for t in row if 2 <= t <= 10]
        assert len(set(moves)) == len(moves) >= 5
        assert row[len(moves) + 1] in (11, 12, 13)
        last = states[len(moves) - 1]
        assert (last != 0).sum() == len(moves)
        if row[len(moves) + 1] == 11:
            assert len(moves) == 9
        else:
            assert (row[len(moves) + 1] == 12) == (len(moves) % 2 == 1)
