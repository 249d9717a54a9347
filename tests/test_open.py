"""Opening: a model either works or is refused with the layer and the reason; nothing is guessed."""

from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import moestro
import tiny
from moestro import LogitBias, SwitchOff
from moestro.view.observe import SlotStats
from tiny import FP32, documents, logits_of, make, padded

INPUTS = padded(documents(7, 3, 9), "right")
REAL = INPUTS["attention_mask"].bool()


@pytest.mark.parametrize(
    ("family", "indices", "rule"),
    [
        ("qwen3_moe", [1, 2], "top-2 of softmax, normalised"),
        ("deepseek_v3", [1, 2], "top-2 of sigmoid, correction bias, best 1 of 2 groups by top2, normalised, times 1.7"),
        ("gpt_oss", [0, 1, 2], "top-2 of softmax, normalised"),
        ("phimoe", [0, 1, 2], "top-2 of SparseMixer"),
    ],
)
def test_layers_and_rules_are_found(family: str, indices: list[int], rule: str) -> None:
    small = make(family)
    state = tiny.state_of(small.model)
    view = moestro.open(small.model)
    assert [layer.index for layer in view.layers] == indices
    for layer in view.layers:
        assert (layer.num_experts, layer.top_k) == (8, 2)
        assert layer.rule.describe() == rule
        assert small.model.get_submodule(layer.name) is layer.block
        assert (layer.shared is not None) == (family == "deepseek_v3")
        assert view.layer(layer.index) is layer
    assert rule in repr(view)
    assert tiny.same_state(small.model, state)
    assert tiny.hooks_on(small.model) == 0
    with pytest.raises(ValueError, match="layer 7 has no experts"):
        view.layer(7)


def test_a_rule_that_ignores_normalisation_is_not_confused_with_one_that_does() -> None:
    for normalised in (True, False):
        view = moestro.open(make("qwen3_moe", norm_topk_prob=normalised).model)
        assert all(layer.rule.normalize == normalised for layer in view.layers)


def test_an_unlearned_router_is_told() -> None:
    view = moestro.open(make("deepseek_v4").model)
    assert view.layer(0).rule is None
    assert "token id" in view.layer(0).no_rule
    assert view.layer(0).top_k == 2
    assert all(layer.rule is not None for layer in view.layers[1:])


def test_opening_again_gives_the_same() -> None:
    small = make("deepseek_v3")
    first, second = moestro.open(small.model), moestro.open(small.model)
    assert repr(first) == repr(second)


def test_a_correction_bias_of_zeros_is_found() -> None:
    """Fresh checkpoints hold zeros there; once training changes it, the rule must follow."""
    small = make("deepseek_v3")
    routers = [layer.mlp.gate for layer in small.model.model.layers[1:]]
    for router in routers:
        router.e_score_correction_bias.zero_()
    view = moestro.open(small.model)
    assert all("correction bias" in layer.rule.describe() for layer in view.layers)
    generator = torch.Generator().manual_seed(1)
    for router in routers:
        router.e_score_correction_bias.normal_(generator=generator)
    before = logits_of(small, INPUTS)
    with view.edits(LogitBias({1: torch.zeros(8), 2: torch.zeros(8)})):
        assert_close(logits_of(small, INPUTS)[REAL], before[REAL], **FP32)


# --- routers that no rule reproduces ---------------------------------------------------------------------------------


def sharper(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that are the softmax of twice the scores."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, indices = (2 * logits.softmax(dim=-1)).softmax(dim=-1).topk(self.top_k, dim=-1)
    return logits, weights, indices


def lowest(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the experts with the smallest logits."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    indices = (-logits).topk(self.top_k, dim=-1).indices
    return logits, logits.softmax(dim=-1).gather(1, indices), indices


@pytest.mark.parametrize("wrong", [sharper, lowest])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_rule_is_refused_with_the_layer_and_the_difference(wrong: Any, dtype: torch.dtype) -> None:
    small = tiny.build("qwen3_moe", dtype=dtype, num_hidden_layers=3)
    router = small.model.model.layers[2].mlp.gate  # the layer before routes as usual
    router.forward = MethodType(wrong, router)
    with pytest.raises(ValueError, match=r"layer 2 \(model\.layers\.2\.mlp\.gate\).*differs in gate weights by") as e:
        moestro.open(small.model)
    difference = float(str(e.value).split("differs in gate weights by ")[1].split()[0])
    assert difference > 0.01


def test_a_router_that_returns_something_else_is_refused() -> None:
    small = make("qwen3_moe")
    router = small.model.model.layers[1].mlp.gate
    router.forward = lambda hidden: F.linear(hidden, router.weight)
    with pytest.raises(ValueError, match=r"layer 1 \(model\.layers\.1\.mlp\): no router.*gate: .*not \(logits"):
        moestro.open(small.model)


# --- models that have nothing to open --------------------------------------------------------------------------------


def dense() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


class RemoteBlock(nn.Module):
    """How remote code writes a mixture of experts: a list of modules, and no experts interface."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


class RemoteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RemoteBlock()])


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        moestro.open(dense())
    dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        moestro.open(tmp_path)


def test_a_model_that_keeps_its_experts_to_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not use transformers' experts interface.*layers\.0\.experts"):
        moestro.open(RemoteModel())


def test_unusable_arguments_are_refused(tmp_path: Path) -> None:
    model = make("qwen3_moe").model
    with pytest.raises(TypeError, match=r"dtype.*loaded already"):
        moestro.open(model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="in memory already"):
        moestro.open(model, stream=True)
    with pytest.raises((OSError, ValueError)):
        moestro.open(tmp_path / "nowhere")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        moestro.open(empty)
    with pytest.raises(ValueError, match="meta device"):
        moestro.open(accelerate.cpu_offload(model))


# --- models within models --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.extra = nn.Linear(2, 2)
        self.parts = nn.ModuleDict({"text": inside})

    def forward(self, **inputs: Tensor) -> Any:
        return self.parts["text"](**inputs)


def test_a_wrapped_model_is_opened_and_edited() -> None:
    small = make("qwen3_moe")
    off = SwitchOff({(1, 0), (2, 3)})
    plain = moestro.open(small.model)
    with plain.edits(off):
        expected = logits_of(small, INPUTS)
    (alone,) = plain.observe([INPUTS], [SlotStats()])
    view = moestro.open(Holder(small.model))
    assert [layer.name for layer in view.layers] == ["parts.text.model.layers.1.mlp", "parts.text.model.layers.2.mlp"]
    with view.edits(off):
        assert torch.equal(view.model(**INPUTS).logits, expected)
    (inside,) = view.observe([INPUTS], [SlotStats()])
    for index in (1, 2):
        assert torch.equal(inside.layers[index].count, alone.layers[index].count)
    view.keep_experts({1: [0, 1, 2], 2: [0, 1, 2]})
    assert small.model.config.num_experts == 3
    assert view.num_bytes > 0


def test_part_chooses_among_several_stacks() -> None:
    small = tiny.build("ernie4_5_vl_moe")
    first = moestro.open(small.model)
    names = {name.rpartition(".")[2] for name in (layer.name for layer in first.layers)}
    assert names == {"text_moe"}
    vision = moestro.open(small.model, part="vision_moe")
    assert {layer.name.rpartition(".")[2] for layer in vision.layers} == {"vision_moe"}
    for part, count in (("moe", 2), ("audio", 0)):
        with pytest.raises(ValueError, match=rf"part='{part}' matches {count} of .*text_moe.*vision_moe"):
            moestro.open(small.model, part=part)


def test_load_options_reach_from_pretrained(tmp_path: Path) -> None:
    make("qwen3_moe").model.save_pretrained(tmp_path)
    view = moestro.open(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert view.model.dtype == torch.bfloat16
    assert not view.model.training
    assert view.tokenizer is None
    view.observe([INPUTS], [SlotStats()])
