"""Quantised checkpoints: read right, cut, saved plain or in their own format, from memory as streamed."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import moestro
import moestro.fitting.memory as memory
import quantised
from moestro.formats.quantised import fp8_decode, fp8_encode, mxfp4_decode, mxfp4_encode
from quantised import WEIGHTS, edit, fp8_values, gpt_oss, mxfp4_values, qwen3_moe, to_fp8, to_mxfp4
from tiny import logits_of, make

IDS = {"input_ids": torch.arange(5, 29)[None]}
KEEP = [0, 3, 5, 6]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    fp8 = to_fp8(qwen3_moe(root / "fp8"))
    return {"fp8": fp8, "mxfp4": to_mxfp4(gpt_oss(root / "mxfp4"))}


BOTH = pytest.mark.parametrize("method", ["fp8", "mxfp4"])
EITHER = pytest.mark.parametrize("streamed", [False, True], ids=["memory", "streamed"])


def half(path: Path, streamed: bool = False) -> Any:
    view = moestro.open(path, stream=streamed)
    view.keep_experts({layer.index: KEEP for layer in view.layers})
    return view


def plain_logits(path: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return logits_of(model, IDS)


def test_fp8_opens_as_what_its_blocks_mean(sources: dict[str, Path]) -> None:
    """Also where the last block is cut off, which transformers 5.23 refuses or, worse, takes for smaller blocks."""
    held, model = load_file(sources["fp8"] / WEIGHTS), moestro.open(sources["fp8"]).model
    assert model.dtype == torch.bfloat16
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        assert torch.equal(model.state_dict()[name], fp8_values(held, name).bfloat16())
    experts = model.model.layers[1].mlp.experts
    for e in (0, 7):
        gate, up, down = (f"model.layers.1.mlp.experts.{e}.{n}_proj.weight" for n in ("gate", "up", "down"))
        joined = torch.cat([fp8_values(held, gate), fp8_values(held, up)]).bfloat16()
        assert torch.equal(experts.gate_up_proj[e], joined)
        assert torch.equal(experts.down_proj[e], fp8_values(held, down).bfloat16())


def test_mxfp4_opens_as_in_plain_transformers(sources: dict[str, Path]) -> None:
    held, model = load_file(sources["mxfp4"] / WEIGHTS), moestro.open(sources["mxfp4"]).model
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        assert torch.equal(model.state_dict()[name], mxfp4_values(held, name).bfloat16())
    assert torch.equal(logits_of(model, IDS), plain_logits(sources["mxfp4"]))


@BOTH
@EITHER
def test_saved_plain_it_is_the_same_model_in_plain_transformers(
    method: str, streamed: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    half(sources[method], streamed).save(tmp_path / "out")
    assert torch.equal(plain_logits(tmp_path / "out"), logits_of(half(sources[method]).model, IDS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


@BOTH
@EITHER
def test_saved_as_its_source_kept_experts_keep_their_bytes(
    method: str, streamed: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    view = half(sources[method], streamed)
    view.save(tmp_path / "out", format="source")
    before, after = load_file(sources[method] / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in after.items():
        if ".experts." in name and method == "fp8":
            number = int(name.split(".experts.")[1].split(".")[0])
            expected = before[name.replace(f".experts.{number}.", f".experts.{KEEP[number]}.")]
        else:
            expected = before[name]
            expected = expected[KEEP] if expected.shape != tensor.shape else expected
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
    stated = [json.loads((p / "config.json").read_text()) for p in (sources[method], tmp_path / "out")]
    assert stated[0]["quantization_config"] == stated[1]["quantization_config"]
    again = moestro.open(tmp_path / "out")
    assert torch.equal(logits_of(again.model, IDS), logits_of(half(sources[method]).model, IDS))


@BOTH
@pytest.mark.parametrize("format", ["hf", "source"])
def test_streamed_files_are_those_from_memory(
    method: str, format: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    for streamed in (False, True):
        half(sources[method], streamed).save(tmp_path / str(streamed), format=format)
    files = [{p.name: p.read_bytes() for p in (tmp_path / str(s)).iterdir()} for s in (False, True)]
    assert files[0] == files[1]


@BOTH
def test_a_second_cut_of_what_was_saved_as_its_source(method: str, sources: dict[str, Path], tmp_path: Path) -> None:
    half(sources[method]).save(tmp_path / "once", format="source")
    twice = moestro.open(tmp_path / "once", stream=True)
    twice.keep_experts({layer.index: [1, 2] for layer in twice.layers})
    twice.save(tmp_path / "twice", format="source")
    at_once = moestro.open(sources[method])
    at_once.keep_experts({layer.index: [KEEP[1], KEEP[2]] for layer in at_once.layers})
    at_once.save(tmp_path / "at once", format="source")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("twice", "at once"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in ours)


@BOTH
@EITHER
def test_merged_experts_are_quantised_again_the_others_not(
    method: str, streamed: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    clusters = [[0, 4], [1], [7], [2]]
    view, merged = (moestro.open(sources[method], stream=s) for s in (streamed, False))
    for each in (view, merged):
        each.merge_experts({layer.index: clusters for layer in each.layers})
    view.save(tmp_path / "out", format="source")
    again = moestro.open(tmp_path / "out").model.state_dict()
    for name, tensor in merged.model.state_dict().items():
        if ".experts." in name and tensor.dim() == 3:
            assert torch.equal(again[name][1:], tensor[1:]), name
            error = (again[name][0] - tensor[0]).float().abs()
            step = 1 / 16 if method == "fp8" else 1 / 3  # of the value; half a step of the largest code is a sixth
            floor = tensor[0].float().abs().max() / 100 if method == "fp8" else tensor[0].float().abs().max() / 6
            assert bool((error <= step * tensor[0].float().abs() + floor).all()), name
            assert float(error.max()) > 0, name
        else:
            assert torch.equal(again[name], tensor), name


def test_sizes_are_of_the_file_there_is_and_the_file_there_will_be(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, path in sources.items():
        stored = sum(t.nbytes for t in load_file(path / WEIGHTS).values())
        for streamed in (False, True):
            view = moestro.open(path, stream=streamed)
            assert view.num_bytes == stored == view.bytes_in("source")
            whole, one = view.bytes_in("source"), view.expert_bytes("source")
            plain = view.bytes_in("hf")
            view.keep_experts({layer.index: KEEP for layer in view.layers})
            assert view.num_bytes == whole - 4 * sum(one.values())
            for format in ("hf", "source"):
                out = view.save(tmp_path / f"{method}-{streamed}-{format}", format=format)
                assert view.bytes_in(format) == sum(t.nbytes for t in load_file(out / WEIGHTS).values())
        monkeypatch.setattr(memory, "available_bytes", lambda size=(stored + plain) // 2: size)
        with pytest.raises(ValueError, match="once they are dequantised"):
            memory.check_fits(path)


def test_a_model_that_transformers_dequantised_is_saved_from_memory(sources: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sources["mxfp4"], dtype="auto")
    view = moestro.open(model)
    view.keep_experts({layer.index: KEEP for layer in view.layers})
    assert torch.equal(plain_logits(view.save(tmp_path / "hf")), logits_of(view.model, IDS))
    view.save(tmp_path / "source", format="source")
    assert torch.equal(logits_of(moestro.open(tmp_path / "source").model, IDS), logits_of(view.model, IDS))


def test_formats_that_cannot_be_are_refused_before_anything_is_written(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    view = half(sources["fp8"])
    with pytest.raises(ValueError, match=r"format='gguf' is not known; there are hf .*; source "):
        view.save(tmp_path / "out", format="gguf")
    from_nothing = moestro.open(make("qwen3_moe").model)
    with pytest.raises(ValueError, match="came from no checkpoint directory"):
        from_nothing.save(tmp_path / "out", format="source")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "fp_quant"])
@EITHER
def test_other_methods_are_refused_before_loading(
    method: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edit(qwen3_moe(tmp_path / "q"), quantization_config={"quant_method": method})
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=f"quantised with {method}; moestro reads fp8 and mxfp4"):
        moestro.open(path, stream=streamed)


@EITHER
def test_scales_that_are_missing_or_of_another_shape_are_named(streamed: bool, tmp_path: Path) -> None:
    source = to_fp8(qwen3_moe(tmp_path / "fp8"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def lose(held: dict[str, Tensor]) -> None:
        del held[f"{name}_scale_inv"]

    lacking = edit(quantised.copy(source, tmp_path / "lacking"), tensors=lose)
    with pytest.raises(ValueError, match=rf"{name} is stored in torch.float8_e4m3fn, and neither"):
        moestro.open(lacking, stream=streamed)

    def other(held: dict[str, Tensor]) -> None:
        held[f"{name}_scale_inv"] = torch.ones(3, 3)

    odd = edit(quantised.copy(source, tmp_path / "odd"), tensors=other)
    with pytest.raises(ValueError, match=r"has scales of \(3, 3\), which its weight_block_size=\[128, 128\] does not"):
        moestro.open(odd, stream=streamed)


def test_a_checkpoint_that_misses_weights_is_refused(tmp_path: Path) -> None:
    path, name = qwen3_moe(tmp_path / "plain"), "model.layers.1.mlp.gate.weight"
    edit(path, tensors=lambda held: {key: tensor for key, tensor in held.items() if key != name})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for streamed in (False, True):
            with pytest.raises(ValueError, match=rf"lacks 1 .*{name}"):
                moestro.open(path, stream=streamed)


def test_mxfp4_says_its_own_values_exactly_and_others_as_well_as_it_can() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (50, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(3, 250, (50, 4), dtype=torch.uint8, generator=generator)
    values = mxfp4_decode(blocks, scales)
    assert torch.equal(mxfp4_decode(*mxfp4_encode(values)), values)
    assert torch.equal(mxfp4_decode(*mxfp4_encode(torch.zeros(2, 32))), torch.zeros(2, 32))
    weights = torch.randn(64, 96, generator=generator)
    around = (mxfp4_decode(*mxfp4_encode(weights)) - weights).view(64, 3, 32).abs().amax(-1)
    largest = weights.view(64, 3, 32).abs().amax(-1)
    assert bool((around <= largest / 5 + 1e-6).all())  # the middle between 4 and 6, in a block whose largest is 5


@pytest.mark.parametrize(
    ("dtype", "power_of_two"), [(torch.float32, False), (torch.float32, True), (torch.uint8, True)]
)
def test_fp8_blocks_are_within_a_sixteenth(dtype: torch.dtype, power_of_two: bool) -> None:
    weights = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weights[:128, :128] = 0
    q, scale = fp8_encode(weights, (128, 128), torch.float8_e4m3fn, dtype, power_of_two=power_of_two)
    assert (q.shape, scale.shape, scale.dtype) == ((200, 300), (2, 3), dtype)
    error = (fp8_decode(q, scale, (128, 128)) - weights).abs()
    assert bool((error <= weights.abs() / 16 + 1e-4).all())
    if dtype == torch.float32 and power_of_two:
        assert torch.equal(scale.log2(), scale.log2().round())
