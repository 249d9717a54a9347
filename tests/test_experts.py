"""What experts offer, whoever made them; and what is recognised before it can go wrong: adapters, packed tensors,
offloaded layers, families that no interface reaches."""

import copy
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import moestro
import tiny
from moestro.layers.experts import GatedExperts
from moestro.view.experts import FusedExperts, PerExpert, num_experts_of
from moestro.view.observe import ExpertCounts, SlotStats
from moestro.view.router_axes import router_tensors
from tiny import FP32, documents, logits_of, make, padded

INPUTS = padded(documents(7, 3, 9), "right")
REAL = INPUTS["attention_mask"].bool()
HALF = [1, 3, 4, 6]


def cut_to_half(view: moestro.ExpertView) -> None:
    view.keep_experts({layer.index: HALF for layer in view.layers})


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # concatenated, interleaved and transposed with biases
def test_neurons_that_stay_compute_what_they_did(family: str) -> None:
    small = make(family)
    experts = moestro.open(small.model).layers[0].experts
    hidden, indices = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)), torch.arange(9)[:, None] % 8
    weights = torch.ones(9, 1)
    off = copy.deepcopy(experts)
    down = off.down_proj.data if off.is_transposed else off.down_proj.data.transpose(1, 2)  # [E, I, H]
    width = down.shape[1]
    ids = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(e))[:8] for e in range(8)])
    for e in range(8):
        down[e, [i for i in range(width) if i not in ids[e].tolist()]] = 0
    with torch.no_grad():
        expected, before = off(hidden, indices, weights), experts(hidden, indices, weights)
        undo = FusedExperts(experts).slice_neurons(ids)
        assert_close(experts(hidden, indices, weights), expected, **FP32)
        undo()
        assert torch.equal(experts(hidden, indices, weights), before)
    with pytest.raises(ValueError, match=r"6 neurons make rows of 24 bytes.*8 say"):
        FusedExperts(experts).slice_neurons(ids[:, :6])


def test_slots_give_what_the_experts_add_up() -> None:
    experts = moestro.open(make("gpt_oss").model).layers[0].experts
    hidden, indices = torch.randn(5, 96), torch.tensor([[0, 7], [1, 8], [2, 2], [8, 8], [3, 4]])
    weights = torch.rand(5, 2)
    with torch.no_grad():
        outputs = FusedExperts(experts).outputs(hidden, indices, weights)
        experts.config._experts_implementation = "moestro"
        assert_close((outputs * weights[..., None]).sum(1), experts(hidden, indices, weights), **FP32)
    assert not outputs[3].any()


def test_bytes_of_some_experts_are_their_share() -> None:
    experts = FusedExperts(moestro.open(make("gpt_oss").model).layers[0].experts)
    assert experts.nbytes() == sum(p.nbytes for p in experts.module.parameters())
    assert experts.nbytes([0, 5]) * 4 == experts.nbytes()


class Foreign(nn.Module):
    """Experts of another make: a list of modules, which offers the contract itself."""

    def __init__(self, fused: Any):
        super().__init__()
        self.ups = nn.ParameterList([nn.Parameter(u.clone()) for u in fused.gate_up_proj.data])
        self.downs = nn.ParameterList([nn.Parameter(d.clone()) for d in fused.down_proj.data])
        self.act = nn.SiLU()

    @property
    def num_experts(self) -> int:
        return len(self.ups)

    def nbytes(self, ids: Any = None) -> int:
        return sum(self.ups[e].nbytes + self.downs[e].nbytes for e in (range(len(self.ups)) if ids is None else ids))

    def slice(self, ids: Any) -> Any:
        old = self.ups, self.downs
        self.ups, self.downs = (nn.ParameterList([tensors[e] for e in ids]) for tensors in old)

        def undo() -> None:
            self.ups, self.downs = old

        return undo

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(self.num_experts):
            token, slot = (indices == e).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ self.ups[e].T).chunk(2, dim=-1)
            out.index_add_(0, token, (self.act(gate) * up) @ self.downs[e].T * weights[token, slot, None])
        return out


def test_a_foreign_module_that_offers_the_contract_is_observed_and_cut() -> None:
    small = make("qwen3_moe")
    plain = moestro.open(copy.deepcopy(small.model))
    for layer in moestro.open(small.model).layers:
        layer.block.experts = Foreign(layer.experts)
    view = moestro.open(small.model)
    assert [layer.num_experts for layer in view.layers] == [8, 8]
    assert_close(logits_of(view.model, INPUTS)[REAL], logits_of(plain.model, INPUTS)[REAL], **FP32)
    (counts,), (expected,) = (v.observe([INPUTS], [ExpertCounts()]) for v in (view, plain))
    assert all(torch.equal(counts[i], expected[i]) for i in (1, 2))
    with pytest.raises(ValueError, match="Foreign does not go through transformers' experts interface"):
        view.observe([INPUTS], [SlotStats()])
    with pytest.raises(ValueError, match="Foreign offers no average"):
        view.merge_experts({1: [[0, 1], [2, 3]]})
    for v in (view, plain):
        cut_to_half(v)
    assert view.layers[0].num_experts == 4
    assert_close(logits_of(view.model, INPUTS)[REAL], logits_of(plain.model, INPUTS)[REAL], **FP32)


def test_as_many_experts_as_channels_are_told_apart_by_what_tensors_do() -> None:
    """gemma4's router has a scale per channel and one per expert: vectors of one size when there are H experts."""
    small = tiny.build("gemma4", num_hidden_layers=2, num_experts=96)
    view = moestro.open(small.model)
    names = {part.name for part in router_tensors(view.layers[0])}
    assert names == {"weight", "per_expert_scale"}
    ids = list(range(0, 96, 2))
    with view.edits(moestro.SwitchOff({(layer.index, e) for layer in view.layers for e in range(1, 96, 2)})):
        expected = logits_of(small, INPUTS)
    view.keep_experts({layer.index: ids for layer in view.layers})
    assert_close(logits_of(small, INPUTS)[REAL], expected[REAL], **FP32)


def test_what_nothing_tells_apart_is_refused() -> None:
    experts = GatedExperts(8, 16, 8)
    assert {part.name for part in FusedExperts(experts).per_expert()} == {"gate_up_proj", "down_proj"}
    experts.register_buffer("scale", torch.ones(8))  # of 8 experts, or of 8 neurons?
    assert {part.name for part in FusedExperts(experts).per_expert()} == {"gate_up_proj", "down_proj"}  # it declares
    qwen = moestro.open(tiny.build("qwen3_moe", num_experts=24, num_hidden_layers=2).model).layers[0].experts
    qwen.register_buffer("scale", torch.ones(24))
    with pytest.raises(
        ValueError, match=r"scale of shape \(24,\) may have an entry for each of 24 experts or .* expert_axes"
    ):
        FusedExperts(qwen).per_expert()


def test_a_failure_among_the_experts_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    view = moestro.open(make("gpt_oss").model)
    before, state = logits_of(view.model, INPUTS), tiny.state_of(view.model)
    cut, calls = PerExpert.slice, []

    def fails(self: PerExpert, ids: Any) -> Any:
        calls.append(self.name)
        if len(calls) == 12:  # routers first: two tensors in each of three layers
            raise MemoryError("no room")
        return cut(self, ids)

    monkeypatch.setattr(PerExpert, "slice", fails)
    with pytest.raises(MemoryError):
        cut_to_half(view)
    calls.clear()
    with pytest.raises(MemoryError):
        view.merge_experts({layer.index: [[0, 1], [2, 3, 4], [5]] for layer in view.layers})
    assert calls[-1] in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert tiny.same_state(view.model, state)
    assert torch.equal(logits_of(view.model, INPUTS), before)
    assert view.original_ids == {i: list(range(8)) for i in range(3)}
    assert view.state.recipe == []


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 20), (torch.float32, 18)])
def test_rows_that_stop_the_default_backend_are_told(dtype: torch.dtype, width: int) -> None:
    small = tiny.build("qwen3_moe", dtype=dtype, num_hidden_layers=2, moe_intermediate_size=width)
    small.model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        logits_of(small, INPUTS)
    with pytest.warns(UserWarning, match=rf"layer 1: .* rows of {width} x .*set_experts_implementation\('moestro'\)"):
        moestro.open(small.model)
    small.model.set_experts_implementation("moestro")
    assert logits_of(small, INPUTS)[REAL].isfinite().all()


# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(**where: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, init_lora_weights=False, **where)  # as many ranks as experts
    return peft.get_peft_model(make("qwen3_moe").model, config).eval()


@pytest.mark.parametrize(
    "parameters", [["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]]
)
def test_an_adapter_on_experts_is_named_and_merging_is_the_way_out(parameters: list[str]) -> None:
    model = adapted(target_modules=[], target_parameters=parameters)
    expected = logits_of(model, INPUTS)
    for opened in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"PEFT adapter \(ParamWrapper at .*hides its experts; merge it"):
            moestro.open(opened)
    merged = moestro.open(model.merge_and_unload())
    assert_close(logits_of(merged.model, INPUTS), expected, **FP32)
    cut_to_half(merged)


def test_a_router_with_an_adapter_is_observed_and_not_cut(tmp_path: Any) -> None:
    model = adapted(target_modules=[], target_parameters=["mlp.gate.weight"])
    view = moestro.open(model)
    (stats,) = view.observe([INPUTS], [SlotStats()])
    (expected,) = moestro.open(copy.deepcopy(model).merge_and_unload()).observe([INPUTS], [SlotStats()])
    assert torch.equal(stats.layers[1].count, expected.layers[1].count)
    before = logits_of(model, INPUTS)
    for refused in (lambda: cut_to_half(view), lambda: view.set_top_k(1), lambda: view.check(moestro.recipe.Recipe())):
        with pytest.raises(ValueError, match=r"PEFT adapter .*merge_and_unload\(\)"):
            refused()
    assert torch.equal(logits_of(model, INPUTS), before)
    with pytest.raises(ValueError, match="no place for"):
        view.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_attention_stays_out_of_the_way_of_a_cut_but_not_of_a_checkpoint(tmp_path: Any) -> None:
    model = adapted(target_modules=["q_proj", "v_proj"])
    other = moestro.open(copy.deepcopy(model).merge_and_unload())
    view = moestro.open(model)
    for v in (view, other):
        cut_to_half(v)
    assert_close(logits_of(model, INPUTS)[REAL], logits_of(other.model, INPUTS)[REAL], **FP32)
    for carrier in (view, moestro.open(model.get_base_model())):
        with pytest.raises(ValueError, match=r"q_proj carries a PEFT adapter .*merge_and_unload"):
            carrier.save(tmp_path / "out")
    moestro.open(model.merge_and_unload()).save(tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(logits_of(plain, INPUTS)[REAL], logits_of(other.model, INPUTS)[REAL], **FP32)


# --- packed, offloaded, absent ---------------------------------------------------------------------------------------


def test_quantised_experts_are_named_and_left_whole() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    small = make("qwen3_moe")
    small.model.set_experts_implementation("eager")
    only = {r"re:.*layers\.2\.mlp\.experts\.down_proj": quantization.Int8WeightOnlyConfig()}
    quantization.quantize_(small.model, quantization.FqnToConfig(only), filter_fn=None)
    view = moestro.open(small.model)
    before = logits_of(small, INPUTS)
    for refused in (
        lambda: cut_to_half(view),
        lambda: view.merge_experts({1: [[0, 1], [2, 3]], 2: [[0, 1], [2, 3]]}),
    ):
        with pytest.raises(
            ValueError, match=r"layers\.2\.mlp\.experts\.down_proj is quantised \(torchao, Int8Tensor\)"
        ):
            refused()
    assert [layer.num_experts for layer in view.layers] == [8, 8]
    assert torch.equal(logits_of(small, INPUTS), before)
    view.observe([INPUTS], [ExpertCounts()])
    with pytest.raises(ValueError, match=r"layer 2: down_proj is quantised .* routing alone can"):
        view.observe([INPUTS], [SlotStats()])
    module = small.model.model.layers[2].mlp.experts  # the way out that the error names
    module.down_proj = nn.Parameter(module.down_proj.dequantize())
    cut_to_half(view)
    assert logits_of(small, INPUTS)[REAL].isfinite().all()


def test_packed_experts_are_named() -> None:
    small = make("qwen3_moe")
    view = moestro.open(small.model)
    experts = view.layers[1].experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\.down_proj is packed \(float8_e4m3fn\)"):
        cut_to_half(view)
    assert view.layers[0].num_experts == 8


def test_offloaded_experts_are_observed_and_not_cut() -> None:
    small = make("qwen3_moe")
    (expected,) = moestro.open(small.model).observe([INPUTS], [SlotStats()])
    for layer in moestro.open(small.model).layers:
        accelerate.cpu_offload(layer.experts, execution_device=torch.device("cpu"))
    view = moestro.open(small.model)
    (stats,) = view.observe([INPUTS], [SlotStats()])
    assert torch.equal(stats.layers[1].norm_sum, expected.layers[1].norm_sum)
    for refused in (cut_to_half, lambda v: v.check(moestro.recipe.Recipe((moestro.recipe.keep({1: HALF}),)))):
        with pytest.raises(ValueError, match=r"offloaded by accelerate .*stream=True"):
            refused(view)
    assert view.layers[0].router.weight.shape[0] == 8
    with pytest.raises(ValueError, match="meta device, offloaded by accelerate"):
        moestro.open(accelerate.cpu_offload(make("qwen3_moe").model, execution_device=torch.device("cpu")))


# --- families that no interface reaches ------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(vocab_size=131, hidden_size=32, num_hidden_layers=2)


def switch() -> Any:
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=131,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_experts=4,
            num_sparse_encoder_layers=1,
        )
    )


def nllb() -> Any:
    sides: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 4), ("sparse_step", 1))
    }
    return transformers.NllbMoeForConditionalGeneration(
        transformers.NllbMoeConfig(vocab_size=131, d_model=32, num_experts=4, **sides)
    ).eval()


def llama4() -> Any:
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SMALL, **heads, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=4, pad_token_id=0
        )
    )


def jetmoe() -> Any:
    return transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(
            **SMALL, num_key_value_heads=2, kv_channels=8, intermediate_size=32, num_local_experts=4
        )
    )


def doge() -> Any:
    return transformers.DogeForCausalLM(
        transformers.DogeConfig(
            **SMALL, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, is_moe=True, num_experts=16,
            num_experts_per_tok=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (switch, r"encoder\.block\.1\.layer\.1\.mlp\.experts"),
        (nllb, r"model\.encoder\.layers\.0\.ffn\.experts"),
        (llama4, r"model\.layers\.0\.feed_forward\.experts"),
        (jetmoe, r"model\.layers\.0"),
        (doge, r"model\.layers\.0\.mlp"),
    ],
)
def test_mixtures_without_the_interface_are_named_as_what_they_are(build: Any, where: str) -> None:
    with pytest.raises(
        ValueError, match=rf"is a mixture of experts that does not use .*\(it keeps its experts in {where}"
    ):
        moestro.open(build())


def test_the_reason_against_nllb_is_true() -> None:
    model = nllb()
    with pytest.raises(ValueError, match="experts 0 and 1 for all tokens"):
        moestro.open(model)
    ran: set[str] = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, name=name: ran.add(name.rpartition(".")[2]))
    block = model.model.encoder.layers[0].ffn
    hidden = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block(hidden)
        chosen = block.router(hidden.view(-1, 32))[0].sum(0)
    assert (chosen > 0).all()
    assert ran == {"expert_0", "expert_1"}


def test_moe_classes_without_an_expert_are_dense() -> None:
    model = tiny.build("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0, 1]).model
    with pytest.raises(ValueError, match="is a dense model"):
        moestro.open(model)


def test_experts_count_themselves() -> None:
    assert num_experts_of(GatedExperts(5, 16, 8)) == 5
