"""What a checkpoint states for readers other than transformers 5, also where transformers 5 wrote the source itself."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import moestro
from families.tiny import build
from moestro.bundled import bundled_path
from moestro.formats.companions import write_tokenizer


def saved_config(source: Path, target: Path) -> dict:
    view = moestro.open(source, dtype=torch.float32)
    view.keep_experts({layer.index: range(0, layer.num_experts, 2) for layer in view.layers})
    return json.loads((view.save(target) / "config.json").read_text())


def test_names_that_transformers_5_left_out_of_the_source_are_stated(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 30_000.0}
    build("qwen3_moe", rope_parameters=rope).model.save_pretrained(tmp_path / "source")
    source = json.loads((tmp_path / "source" / "config.json").read_text())
    assert "num_experts" not in source
    assert "rope_theta" not in source
    config = saved_config(tmp_path / "source", tmp_path / "saved")
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["rope_theta"] == 30_000.0
    assert config["rope_scaling"] is None


def test_the_hubs_name_of_a_class_is_kept_with_everything_else_that_is_stated(tmp_path: Path) -> None:
    build("phimoe").model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    rope = {"rope_theta": 30_000.0, "rope_scaling": None}
    hub = json.loads(file.read_text()) | {"architectures": ["PhiMoEForCausalLM"]} | rope
    del hub["rope_parameters"]
    file.write_text(json.dumps(hub))
    config = saved_config(tmp_path / "source", tmp_path / "saved")
    assert config["architectures"] == ["PhiMoEForCausalLM"]
    assert {key: config[key] for key in rope} == rope
    assert len(moestro.open(tmp_path / "saved").layers) == 4


def test_a_tokenizer_is_written_under_the_names_that_transformers_4_knows_too(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_path("quartet"))
    write_tokenizer(tokenizer, tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert stated["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert stated["additional_special_tokens"] == ["<|user|>", "<|assistant|>", "<|end|>"]
    assert not {"extra_special_tokens", "backend", "is_local"} & stated.keys()
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "<|user|>Was ist 12 + 30?<|end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
