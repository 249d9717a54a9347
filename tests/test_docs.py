"""The code in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moestro
from moestro.view.experts import FusedExperts

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def view() -> moestro.ExpertView:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        moe_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return moestro.open(Qwen3MoeForCausalLM(config).eval())


def test_the_examples_of_the_seams_page_run(view):
    ids = torch.randint(0, 97, (4, 32))
    names = {"view": view, "batches": [ids[:2], ids[2:]], "inputs": {"input_ids": ids}}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "seams.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "seams.md", "exec"), names)
    assert names["entropy"].keys() == {0, 1}
    with torch.no_grad():
        assert not torch.equal(names["sharp"], view.model(ids).logits)
        assert not torch.equal(names["without"], view.model(ids).logits)
    assert [layer.num_experts for layer in view.layers] == [4, 4]
    own = names["ScaledExperts"](8, 8, 8)
    assert {part.name for part in FusedExperts(own).per_expert()} == {"gate_up_proj", "down_proj"}


def test_the_look_and_steer_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "view.edits" in block]
    exec(compile(example.replace("max_length=512", "max_length=64"), "README.md", "exec"), {})
    assert [layer.num_experts for layer in moestro.open("smaller").layers] == [16] * 6


def test_the_example_of_the_steering_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "steering.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "steering.md", "exec"), {})
    assert (tmp_path / "steering.json").exists()


def test_what_the_steering_page_names_is_there():
    page = (DOCS / "steering.md").read_text()
    package = Path(moestro.__file__).parent
    found = re.findall(r"`(analyze|steer|tune)\.(\w+)`((?:, `\w+`)*)", page)
    assert len(found) > 12
    for room, module, more in found:
        for name in [module, *re.findall(r"`(\w+)`", more)]:
            assert (package / room / f"{name}.py").exists(), f"{room}/{name}.py"
