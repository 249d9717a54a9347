"""All slices together are the dense model; selections take what they say, and see nothing of the future."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import moestro
from moestro.build.equivalent_split import split_attention, split_ffn, split_language_model
from moestro.layers import MoE, after_step
from moestro.layers.experts import GatedExperts
from moestro.models.lm import MoELMConfig, MoELMForCausalLM
from moestro.models.union_classifier import UnionOfExpertsForSequenceClassification
from moestro.models.union_of_experts import (
    DataSelection,
    ExpertSelection,
    SelectiveAttention,
)
from moestro.routing import RoutingContext, dense_weights
from moestro.view.observe import SlotStats

SIZES: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=64,
)
CHOOSING = dict(block={"kind": "union", "capacity": 0.6}, attention={"kind": "selective", "top_k": 1, "capacity": 0.6})


def lm(**changes: Any) -> MoELMForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16) | CHOOSING | changes
    return bold(MoELMForCausalLM(MoELMConfig(**sizes)).eval())


def bold(model: Any) -> Any:
    """Larger weights than the initial ones, so that differences show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "layers" in name:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("threshold"):
                buffer.fill_(0.7 if len(buffer) == 2 else 0.4)
    return model


def qwen3(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return bold(Qwen3ForCausalLM(Qwen3Config(**SIZES | changes)).eval())


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(1))


# Equivalent decomposition


class TwoLayers(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12, bias=bias), nn.Linear(12, 8, bias=bias)
        self.activation_fn = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_experts", [1, 3, 12])
def test_a_feed_forward_layer_is_the_sum_of_its_slices(bias: bool, num_experts: int) -> None:
    mlp, x = TwoLayers(bias), torch.randn(2, 5, 8)
    assert torch.allclose(split_ffn(mlp, num_experts)(x), mlp(x), atol=1e-6)


def test_a_gated_layer_is_the_sum_of_its_slices() -> None:
    mlp, x = qwen3().model.layers[0].mlp, torch.randn(2, 5, 32)
    assert torch.allclose(split_ffn(mlp, 4)(x), mlp(x), atol=1e-5)


def test_layers_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide the layer's 12"):
        split_ffn(TwoLayers(True), 5)
    odd = TwoLayers(True)
    odd.norm = nn.LayerNorm(12)
    with pytest.raises(ValueError, match="is not a plain or gated"):
        split_ffn(odd, 3)
    across = copy.deepcopy(qwen3().model.layers[0].self_attn)
    across.q_norm = nn.RMSNorm(32)
    with pytest.raises(ValueError, match="across heads"):
        split_attention(across, qwen3().config)
    across.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="sinks"):
        split_attention(across, qwen3().config)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_the_sum_of_its_groups_of_heads(groups: int) -> None:
    model = qwen3(num_key_value_heads=groups)
    x, attention = torch.randn(2, 9, 32), model.model.layers[1].self_attn
    positions = model.model.rotary_emb(x, torch.arange(9)[None])
    causal = torch.ones(9, 9).tril().bool()[None, None].expand(2, 1, 9, 9)
    expected = attention(x, positions, causal)[0]
    assert torch.allclose(split_attention(attention, model.config)(x)[0], expected, atol=1e-5)


def test_a_language_model_is_the_same_model_as_a_union() -> None:
    dense = qwen3()
    union = split_language_model(dense, 4)
    padded = ids(3, 12)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    expected = dense(input_ids=padded, attention_mask=mask).logits
    got = union(input_ids=padded, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-4)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=mask)
    assert torch.equal(union.generate(padded, **options), dense.generate(padded, **options))
    dense.generation_config.eos_token_id = [2, 7]
    assert split_language_model(dense, 4).generation_config.eos_token_id == [2, 7]


def test_another_make_of_model_is_refused() -> None:
    torch.manual_seed(0)
    gemma_like = qwen3()
    gemma_like.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="differ"):
        split_language_model(gemma_like, 4)
    with pytest.raises(ValueError, match="do not divide"):
        split_language_model(qwen3(), 5)


def test_heads_without_norms_split_too() -> None:
    torch.manual_seed(0)
    llama = bold(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    union = split_language_model(llama, 4)
    assert torch.allclose(union(input_ids=ids(2, 9)).logits, llama(input_ids=ids(2, 9)).logits, atol=1e-4)


def test_a_union_can_then_leave_experts_out() -> None:
    dense = qwen3()
    part = split_language_model(dense, 4, block={"top_k": 2}, attention={"top_k": 1})
    assert part.config.num_experts_per_tok == 2
    assert part.model.layers[0].self_attn.gate.top_k == 1
    assert torch.equal(part.lm_head.weight, dense.lm_head.weight)
    assert not torch.allclose(part(input_ids=ids(1, 9)).logits, dense(input_ids=ids(1, 9)).logits, atol=1e-2)


# Selections


def bold_gate(router: Any) -> Any:
    nn.init.normal_(router.weight)
    return router


def taken(router: Any, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, E] gate weights."""
    routing = router(hidden.flatten(0, 1), RoutingContext(shape=hidden.shape[:2], mask=mask))
    return dense_weights(routing, router.num_experts).view(*hidden.shape[:2], -1)


def test_experts_take_their_best_tokens_among_those_that_chose_them() -> None:
    router = bold_gate(DataSelection(8, 4, 2, capacity=0.25, weighting="none"))
    hidden = torch.randn(3, 16, 8)
    chosen = taken(router, hidden)
    p = (hidden @ router.weight.T).softmax(-1)
    kept = p >= p.topk(2, dim=-1).values[..., -1:]
    for b in range(3):
        for e in range(4):
            best = p[b, :, e].masked_fill(~kept[b, :, e], -1).topk(4).indices
            expected = torch.zeros(16).index_fill(0, best, 1.0) * kept[b, :, e]
            assert torch.equal(chosen[b, :, e], expected)


def test_a_sample_is_routed_alike_in_any_batch_and_padding_is_never_taken() -> None:
    router = bold_gate(DataSelection(8, 4, 2, capacity=0.5))
    hidden = torch.randn(3, 16, 8)
    assert torch.equal(taken(router, hidden)[1:2], taken(router, hidden[1:2]))
    mask = torch.arange(16)[None].expand(3, 16) < torch.tensor([16, 9, 1])[:, None]
    chosen = taken(router, hidden, mask)
    assert not chosen[~mask].any()
    assert torch.equal(chosen[1, :9], taken(router, hidden[1:2, :9])[0])


def test_the_literal_batch_rule_warns() -> None:
    with pytest.warns(UserWarning, match="others in its batch"):
        router = bold_gate(DataSelection(8, 4, 2, capacity=0.5, batch_normalised=True))
    hidden = torch.randn(3, 16, 8)
    assert not torch.equal(taken(router, hidden)[1:2], taken(router, hidden[1:2]))


@pytest.mark.parametrize(("weighting", "learns"), [("none", False), ("probability", True), ("straight_through", True)])
def test_the_gate_learns_where_outputs_are_weighted(weighting: str, learns: bool) -> None:
    router = bold_gate(DataSelection(8, 4, 2, weighting=weighting))
    weights = taken(router, torch.randn(2, 6, 8))
    if weighting != "probability":
        assert set(weights.flatten().tolist()) == {0.0, 1.0}
    assert weights.requires_grad == learns
    if learns:
        (weights * torch.rand_like(weights)).sum().backward()
        assert router.weight.grad.abs().sum() > 0


def test_thresholds_come_to_let_the_capacity_through() -> None:
    router = bold_gate(DataSelection(8, 4, 4, select="threshold", capacity=0.25, causal=True)).train()
    for _ in range(60):
        taken(router, torch.randn(8, 32, 8))
        router.after_step(0.0)
    share = (taken(router.eval(), torch.randn(32, 32, 8)) != 0).float().mean(dim=(0, 1))
    assert torch.allclose(share, torch.full((4,), 0.25), atol=0.04)


@pytest.mark.parametrize(("pool", "length"), [("mean", None), ("flatten", 6)])
def test_expert_selection_serves_whole_samples(pool: str, length: int | None) -> None:
    router = bold_gate(ExpertSelection(8, 5, 2, pool=pool, length=length, weighting="none"))
    chosen = taken(router, torch.randn(4, 6, 8))
    assert torch.equal(chosen, chosen[:, :1].expand_as(chosen))
    assert chosen[:, 0].sum(dim=-1).tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSelection(8, 4, 2, causal=True), "later ones"),
        (lambda: DataSelection(8, 4, 5), "between 1 and 4"),
        (lambda: DataSelection(8, 4, 2, capacity=0.0), "share of a sequence"),
        (lambda: DataSelection(8, 4, 2, select="best"), "own, top_c, threshold"),
        (lambda: ExpertSelection(8, 4, 2, causal=True), "whole sample"),
        (lambda: ExpertSelection(8, 4, 2, pool="flatten"), "need a length"),
        (lambda: taken(ExpertSelection(8, 4, 2, pool="flatten", length=5), torch.randn(1, 6, 8)), "reads 5"),
        (lambda: lm(block={"kind": "union", "select": "top_c"}), "later ones"),
        (lambda: lm(attention={"kind": "selective", "select": "top_c"}), "later ones"),
        (lambda: lm(block={"kind": "union", "choose": "expert"}), "whole sample|select"),
        (lambda: lm(sliding_window=4, use_sliding_window=True), "sliding window"),
    ],
)
def test_impossible_selections_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# Selective attention


def test_a_head_sees_its_own_tokens_alone() -> None:
    attention = bold(SelectiveAttention(lm().config, 0, top_k=1, select="own", causal=False))
    nn.init.normal_(attention.gate.weight)
    x = torch.randn(1, 10, 32)
    first = attention.gate.choose(x)[1][0, :, 0] != 0
    changed = x.clone()
    changed[0, ~first] += 0.01 * torch.randn(int((~first).sum()), 32)
    assert torch.equal(attention.gate.choose(changed)[1] != 0, attention.gate.choose(x)[1] != 0)
    assert torch.allclose(attention(changed)[0][0, first], attention(x)[0][0, first], atol=1e-6)
    assert not torch.allclose(attention(changed)[0][0, ~first], attention(x)[0][0, ~first], atol=1e-5)


def test_a_model_that_chooses_sees_no_future() -> None:
    model = lm()
    tokens = ids(1, 12)
    later = tokens.clone()
    later[0, 7:] = ids(1, 5)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens).logits[:, :7], model(input_ids=later).logits[:, :7], atol=1e-5)


def test_it_generates_with_a_cache_what_it_predicts_without(tmp_path: Any) -> None:
    model = lm()
    out = model.generate(ids(2, 5), max_new_tokens=8, do_sample=False, pad_token_id=0)
    whole = model(input_ids=out, use_cache=False).logits
    assert torch.equal(whole[:, 4:-1].argmax(-1), out[:, 5:])
    shares = [
        layer.self_attn.gate.choose(torch.randn(1, 50, 32))[1].ne(0).float().mean() for layer in model.model.layers
    ]
    assert all(0 < share < 0.5 for share in shares)
    model.save_pretrained(tmp_path)
    loaded = MoELMForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=out).logits, whole, atol=1e-6)


def test_padding_on_the_left_changes_nothing() -> None:
    model, tokens = lm(), ids(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
    mask = (padded != 0).long()
    alone = model(input_ids=tokens).logits
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits[:, 4:], alone, atol=1e-4)


def test_it_trains_with_and_without_checkpointing() -> None:
    def gradients(model: MoELMForCausalLM) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids(2, 12), labels=ids(2, 12), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = lm().train()
    plain = gradients(model)
    assert plain["model.layers.0.self_attn.gate.weight"].abs().sum() > 0
    assert plain["model.layers.0.mlp.router.weight"].abs().sum() > 0
    model.gradient_checkpointing_enable()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, plain[name], rtol=1e-3, atol=1e-5), name
    before = model.model.layers[0].self_attn.gate.threshold.clone()
    after_step(model, 1.0)
    assert not torch.equal(model.model.layers[0].self_attn.gate.threshold, before)


def test_it_can_be_opened_and_observed() -> None:
    view = moestro.open(lm())
    assert view.layers[0].rule is None
    slots = view.observe([ids(2, 9)], [SlotStats()], progress=False)[0]
    assert slots is not None


def test_a_classifier_reads_tokens_patches_and_padding() -> None:
    config = lm(experts={"kind": "ungated", "activation": "gelu"}).config
    model = UnionOfExpertsForSequenceClassification(config, classes=3, length=16, features=5).eval()
    x = torch.randn(2, 16, 5)
    assert model(x).shape == (2, 3)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 10:] = False
    changed = x.clone()
    changed[1, 10:] = 7.0
    assert torch.allclose(model(changed, mask), model(x, mask), atol=1e-5)
    by_sample = dict(choose="expert", pool="flatten", length=16)
    tokens = UnionOfExpertsForSequenceClassification(config, classes=3, length=16, block=by_sample)
    tokens(ids(2, 16)).sum().backward()


def test_slices_of_a_trained_layer_work_as_a_mixture() -> None:
    mlp, x = qwen3().model.layers[0].mlp, torch.randn(2, 6, 32)
    union = split_ffn(mlp, 4)
    assert isinstance(union.experts, GatedExperts)
    layer = MoE(DataSelection(32, 4, 4, capacity=1.0), union.experts)
    assert torch.allclose(layer(x), mlp(x), atol=1e-5)
