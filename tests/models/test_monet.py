"""Monet's fast sums are the sums over all its experts; its experts can be counted, assigned and removed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro.analyze.self_explanation import expert_embedding, explain
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.models.monet import (
    HorizontalExperts,
    MonetRouter,
    Pairs,
    Parts,
    VerticalExperts,
    ambiguity,
    freeze_routers,
    uniformity,
)
from moestro.routing import RoutingContext
from moestro.steer.expert_masking import assign_experts, expert_mass, mask_experts, score_correlation

H, S, M, R, N = 12, 6, 4, 3, 20


def lm(**options: Any) -> MoELMForCausalLM:
    torch.manual_seed(0)
    block = dict(kind="monet", parts=8, heads=2, width=4, top_k=3, group=2) | options
    model = MoELMForCausalLM(
        MoELMConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
            block=block,
        )
    )
    with torch.no_grad():  # the initial weights are so small that hardly anything would show in the logits
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def gates(top_k: int = 2) -> tuple[Tensor, Parts]:
    hidden = torch.randn(N, H)
    router = MonetRouter(H, S, R, top_k)
    return hidden, router(hidden)


def drawn(experts: torch.nn.Module) -> torch.nn.Module:
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def explicit(experts: Any, hidden: Tensor, weights: Tensor) -> Tensor:
    """Every expert by itself: sum over i, j of weights[n, i, j] * E_ij(hidden[n])."""
    out = torch.zeros_like(hidden)
    for i in range(S):
        for j in range(S):
            if isinstance(experts, HorizontalExperts):
                rows = slice(i * M, (i + 1) * M)
                a = (hidden @ experts.up.weight[rows].T + experts.up.bias[rows]).relu().square()
                y = a @ experts.down.weight[:, j * M : (j + 1) * M].T + experts.down_bias[j]
            else:
                half = M // 2
                mine, its = slice(i * half, (i + 1) * half), slice(j * half, (j + 1) * half)
                a = (hidden @ experts.up_left.weight[mine].T + experts.up_left.bias[mine]).relu().square()
                c = (hidden @ experts.up_right.weight[its].T + experts.up_right.bias[its]).relu().square()
                v11, v12 = experts.down_left.weight.split(S * half, dim=1)
                v21, v22 = experts.down_right.weight.split(S * half, dim=1)
                top = a @ v11[:, mine].T + c @ v12[:, mine].T + experts.bias_left[i]
                bottom = a @ v21[:, its].T + c @ v22[:, its].T + experts.bias_right[j]
                y = torch.cat([top, bottom], dim=1)
            out = out + weights[:, i, j, None] * y
    return out


@pytest.mark.parametrize("kind", [HorizontalExperts, VerticalExperts])
@pytest.mark.parametrize("removing", [False, True])
@torch.no_grad()
def test_the_fast_sum_is_the_sum_over_all_experts(kind: type, removing: bool) -> None:
    hidden, parts = gates()
    experts = drawn(kind(H, S, M))
    removed = torch.rand(S, S) < 0.3 if removing else None
    weights = torch.einsum("nri,nrj->nij", parts.left, parts.right)
    if removed is not None:
        weights = weights.masked_fill(removed, 0.0)
    fast = experts(hidden, Pairs(parts._replace(removed=removed), torch.float32))
    assert torch.allclose(fast, explicit(experts, hidden, weights), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_about_top_k_parts_are_kept_and_never_none() -> None:
    router = MonetRouter(32, 256, 2, 16)
    hidden = torch.randn(512, 32)
    router(hidden)
    kept = (router(hidden).left > 0).sum(dim=-1).float()
    assert kept.mean() == pytest.approx(16, rel=0.1)
    flat = MonetRouter(32, 256, 2, 1).eval()  # statistics of nothing yet: no score reaches the quantile
    assert ((flat(hidden * 1e-3).right > 0).sum(dim=-1) >= 1).all()


def test_gates_are_the_softmax_of_the_kept_scores() -> None:
    hidden, parts = gates()
    assert torch.allclose(parts.left.sum(dim=-1), torch.ones(N, R))
    assert parts.left.dtype == torch.float32
    router = MonetRouter(H, S, R, 2)
    g = router(hidden).left
    z = (hidden @ router.left.weight.T).unflatten(1, (R, S))
    one, other = (g[0, 0] > 0).nonzero().flatten()[:1], g[0, 0].argmax()
    assert torch.allclose(g[0, 0, one] / g[0, 0, other], (z[0, 0, one] - z[0, 0, other]).exp(), rtol=1e-4)


def test_padding_changes_neither_statistics_nor_losses() -> None:
    hidden = torch.randn(10, H)
    padded = torch.cat([hidden, 100 * torch.randn(4, H)])
    mask = torch.tensor([[True] * 10 + [False] * 4])
    alone, beside = MonetRouter(H, S, R, 2), MonetRouter(H, S, R, 2)
    beside.load_state_dict(alone.state_dict())
    a = alone(hidden, RoutingContext(shape=(1, 10)))
    b = beside(padded, RoutingContext(shape=(1, 14), mask=mask))
    assert torch.allclose(a.left, b.left[:10], atol=1e-6)
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, beside.state_dict()[name]), name
    for name, loss in alone.losses.items():
        assert torch.allclose(loss, beside.losses[name]), name


def test_the_losses_are_least_where_they_should_be() -> None:
    even = torch.full((N, R, S), 1 / S)
    sure = torch.nn.functional.one_hot(torch.arange(N)[:, None] % S, S).float().expand(N, R, S)
    assert float(uniformity(Parts(even, even))) == pytest.approx(math.log(S))
    assert float(ambiguity(Parts(sure, sure))) == 0
    assert float(ambiguity(Parts(even, even))) == pytest.approx(1 - 1 / S)
    assert uniformity(Parts(sure[:1], sure[:1])) > uniformity(Parts(sure, sure))
    assert torch.isfinite(uniformity(Parts(sure[:1], sure[:1])))


def test_four_times_the_experts_cost_twice_the_parameters() -> None:
    def count(parts: int) -> int:
        return sum(p.numel() for p in VerticalExperts(64, parts, 8).parameters())

    assert count(64) == 2 * count(32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=3), "even"),
        (dict(top_k=8), "between 1 and 7"),
        (dict(decompose="diagonal"), "horizontal, vertical"),
        (dict(group=0), "at least its own"),
        (dict(heads=0), "at least one"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm(**options)


# In a language model


def test_layers_of_a_group_share_one_router() -> None:
    model = lm()
    assert [hasattr(layer.mlp, "router") for layer in model.model.layers] == [True, False, True, False]


@pytest.mark.parametrize("decompose", ["horizontal", "vertical"])
def test_it_trains_with_and_without_checkpointing(decompose: str) -> None:
    def gradients(model: MoELMForCausalLM) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids(2, 12), labels=ids(2, 12), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    model = lm(decompose=decompose).train()
    plain = gradients(model)
    assert all(g.abs().sum() > 0 for g in plain.values())
    model.gradient_checkpointing_enable()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, plain[name], rtol=1e-3, atol=1e-5), name


def test_it_generates_with_a_cache_what_it_predicts_without(tmp_path) -> None:
    model = lm()
    out = model.generate(ids(2, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model(input_ids=out, use_cache=False).logits[:, 4:-1].argmax(-1), out[:, 5:])
    model.save_pretrained(tmp_path)
    loaded = MoELMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=out).logits, model(input_ids=out).logits, atol=1e-6)


def test_frozen_routers_neither_learn_nor_count() -> None:
    model = lm().train()
    freeze_routers(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    loss = model(input_ids=ids(2, 9), labels=ids(2, 9)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".router." in name), name
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_opening_it_says_where_its_experts_are() -> None:
    with pytest.raises(ValueError, match="expert_masking"):
        moestro.open(lm())


# Mass, assignment, removal


def logits(model: MoELMForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(2, 9)).logits


def test_removing_nothing_changes_nothing_and_leaves_no_trace() -> None:
    model = lm()
    plain = logits(model)
    none, some = torch.zeros(2, 8, 8, dtype=torch.bool), torch.rand(2, 8, 8) < 0.5
    with mask_experts(model, none):
        assert torch.allclose(logits(model), plain, atol=1e-4)
        with mask_experts(model, some):
            assert not torch.allclose(logits(model), plain, atol=1e-2)
    assert torch.equal(logits(model), plain)


def test_removal_reaches_the_layers_of_its_group_alone_and_generate(monkeypatch) -> None:
    model = lm()
    removed = torch.zeros(2, 8, 8, dtype=torch.bool)
    removed[0] = True
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append(float(out.abs().max())))
    with mask_experts(model, removed):
        model.generate(ids(1, 4), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert [value == 0 for value in seen] == [True, True, False, False] * 2


def test_blocks_of_tokens_change_nothing(monkeypatch) -> None:
    model, removed = lm(), torch.rand(2, 8, 8) < 0.5
    with mask_experts(model, removed):
        whole = logits(model)
        monkeypatch.setattr("moestro.models.monet.REMOVED_ELEMENTS", 5 * 64)
        assert torch.allclose(logits(model), whole, atol=1e-4)


def test_mass_is_a_mean_over_real_tokens() -> None:
    model = lm()
    one, two = ids(2, 7), ids(1, 7, seed=2)
    mass = expert_mass(model, {"a": [one], "b": [two], "both": [one, two]})
    assert mass.shape == (2, 8, 8, 3)
    assert torch.allclose(mass.sum(dim=(1, 2)), torch.full((2, 3), 2.0, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(mass[..., 2], (2 * mass[..., 0] + mass[..., 1]) / 3, atol=1e-6)
    padded = {"input_ids": torch.nn.functional.pad(two, (0, 3)), "attention_mask": torch.tensor([[1] * 7 + [0] * 3])}
    assert torch.allclose(expert_mass(model, {"p": [padded], "b": [two]})[..., 0], mass[..., 1], atol=1e-5)


def test_experts_belong_to_the_domain_with_twice_the_mass() -> None:
    mass = torch.tensor([[[[0.4, 0.1, 0.2], [0.3, 0.2, 0.1]], [[0.0, 0.0, 0.0], [0.0, 0.1, 0.3]]]])
    owned = assign_experts(mass)
    assert owned[:, 0].tolist() == [
        [[True, False], [False, False]],
        [[False, False], [False, False]],
        [[False, False], [False, True]],
    ]
    assert owned.sum(dim=0).max() == 1


def test_mass_that_follows_a_score_is_found() -> None:
    model = lm()
    texts = ids(6, 10)
    mass = torch.stack([expert_mass(model, {"": [text[None]]})[..., 0] for text in texts])
    best = mass.var(dim=0).argmax()
    scores = mass.flatten(1)[:, best]
    found = score_correlation(model, [texts[:4], texts[4:]], scores.float())
    assert found.flatten()[best] == pytest.approx(1, abs=1e-3)
    assert (found.abs() <= 1 + 1e-6).all()


def test_requests_that_mean_nothing_are_refused() -> None:
    model = lm()
    with pytest.raises(ValueError, match="no token"):
        expert_mass(model, {"a": []})
    with pytest.raises(ValueError, match="1 or more"):
        assign_experts(torch.rand(1, 2, 2, 2), ratio=0.5)
    with pytest.raises(ValueError, match="two or more"):
        assign_experts(torch.rand(1, 2, 2, 1))
    with pytest.raises(ValueError, match="the model's is"), mask_experts(model, torch.zeros(1, 8, 8, dtype=torch.bool)):
        pass
    with pytest.raises(ValueError, match="give one for each"):
        score_correlation(model, [ids(2, 5)], torch.rand(3))


# Self-explanation


class Words:
    """Token ids as words: "7 8" is [7, 8]."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Tensor, **options: Any) -> str:
        return " ".join(map(str, ids.tolist()))


def test_an_expert_that_one_token_activates_is_that_token() -> None:
    model = lm()
    vector = expert_embedding(model, [torch.full((1, 4), 7)], _used(model))
    assert torch.allclose(vector, model.model.embed_tokens.weight[7], atol=1e-5)
    said = explain(model, Words(), vector, template="3 {} 5", max_new_tokens=4)
    asked = model.generate(torch.tensor([[3, 7, 5]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said == Words().decode(asked[0, 3:])


def test_padding_and_other_tokens_have_no_say() -> None:
    model, expert = lm(), _used(lm())
    batch = {"input_ids": torch.tensor([[7, 7, 9]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.allclose(expert_embedding(model, [batch], expert), model.model.embed_tokens.weight[7], atol=1e-5)


def test_experts_and_templates_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups of 8 x 8"):
        expert_embedding(lm(), [ids(1, 4)], (0, 8, 0))
    with pytest.raises(ValueError, match="places for the word"):
        explain(lm(), Words(), torch.zeros(32), template="3 5")


def _used(model: MoELMForCausalLM) -> tuple[int, int, int]:
    """An expert of the first group that token 7 activates at the start of a text."""
    mass = expert_mass(model, {"": [torch.full((1, 1), 7)]})[0, ..., 0]
    return (0, *divmod(int(mass.argmax()), 8))
