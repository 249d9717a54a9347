"""A GGUF file holds the checkpoint's own numbers, tokens and merges; what llama.cpp would compute otherwise is refused.

That llama.cpp computes the same logits and ids from it is measured in tests/runtimes (slow).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moestro
from families.tiny import build
from moestro.bundled import bundled_path
from moestro.formats.gguf import split_name, write_gguf

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    view = moestro.open("quartet")
    view.keep_experts({layer.index: range(1, 32, 4) for layer in view.layers})
    return view.save(tmp_path_factory.mktemp("pruned") / "quartet-8")


def field(reader, key: str):
    return reader.fields[key].contents()


def test_the_file_holds_the_weights_and_the_numbers_of_the_checkpoint(pruned: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(pruned, tmp_path / "q.gguf", dtype="f32"))
    stored, weights = {t.name: t for t in reader.tensors}, load_file(pruned / "model.safetensors")
    for layer in range(6):
        for short, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            experts = [weights[f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"].float() for e in range(8)]
            assert np.array_equal(stored[f"blk.{layer}.ffn_{short}_exps.weight"].data, torch.stack(experts).numpy())
    assert np.array_equal(stored["token_embd.weight"].data, weights["model.embed_tokens.weight"].float().numpy())
    assert "output.weight" not in stored  # tied
    assert field(reader, "qwen3moe.expert_count") == 8
    assert field(reader, "qwen3moe.expert_used_count") == 4
    assert field(reader, "qwen3moe.rope.freq_base") == 10_000
    assert not list(tmp_path.glob(".*"))


def test_the_file_holds_the_tokenizer(pruned: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(pruned, tmp_path / "q.gguf"))
    tokenizer = json.loads((pruned / "tokenizer.json").read_text())
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert {token: i for i, token in enumerate(tokens)} == tokenizer["model"]["vocab"]
    assert [t.split(" ") for t in field(reader, "tokenizer.ggml.merges")] == tokenizer["model"]["merges"]
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == list(range(6))
    assert field(reader, "tokenizer.ggml.pre") == "smollm"
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")
    assert [field(reader, f"tokenizer.ggml.{name}") for name in names] == [1, 2, 5, True]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_norms_and_routers_stay_in_f32(dtype: str, pruned: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(pruned, tmp_path / "q.gguf", dtype=dtype))
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    kept = {name for name, kind in types.items() if kind == "F32"}
    assert kept == {name for name in types if "norm" in name or "ffn_gate_inp" in name}
    assert set(types.values()) == {"F32", dtype.upper()}


def test_what_llama_cpp_would_compute_otherwise_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = Path(shutil.copytree(bundled_path("quartet"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    changes = {
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "attention_bias": True,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        "architectures": ["OlmoeForCausalLM"],
    }
    for key, value in changes.items():
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=r"OlmoeForCausalLM.*convert_hf_to_gguf|" + key):
            write_gguf(source, tmp_path / "q.gguf")
        assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_another_way_to_split_text_is_refused() -> None:
    tokenizer = json.loads((Path(bundled_path("solo")) / "tokenizer.json").read_text())
    assert split_name(tokenizer) == "smollm"
    digits, letters = tokenizer["pre_tokenizer"]["pretokenizers"]
    assert split_name(tokenizer | {"pre_tokenizer": letters}) == "gpt-2"
    for other in ([digits], [letters, digits], [digits | {"individual_digits": False}, letters]):
        with pytest.raises(ValueError, match="no name known"):
            split_name(tokenizer | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": other}})
    with pytest.raises(ValueError, match="NFC"):
        split_name(tokenizer | {"normalizer": {"type": "NFC"}})


def test_a_file_is_not_overwritten_unasked(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "q.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        write_gguf(pruned, tmp_path / "q.gguf")
    assert (tmp_path / "q.gguf").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"is a directory; name the file"):
        write_gguf(pruned, tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_gguf(pruned, tmp_path / "nowhere" / "q.gguf")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    build("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True, head_dim=16).model.save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        write_gguf(tmp_path / "bare", tmp_path / "q.gguf")
