"""The checkpoints that clients load: sources as the hub has them, saved by moestro whole and with half the experts.

A source is a tiny random model of a family in fp32 (or `quartet`, really trained, in bf16), its configuration under the
names of the hub's files. The reference of each checkpoint are the logits of the model in memory, in transformers'
own fp32 code, taken before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moestro
from families.tiny import TinyModel, build, model_class
from moestro.bundled import bundled_path
from moestro.data.embedded_sample import embedded, embedded_domains

V = 50_304
"""Vocabulary of the tiny models: GPT-2's 50,257 tokens, one of GLM's, and padding."""
WORDS = (100, 50_000)

# Rows of every matrix are whole blocks of 32, which q8_0 wants; vLLM's attention wants heads of 32 at least.
HEAD = 32
SIZES = dict(vocab_size=V, hidden_size=128, moe_intermediate_size=64, intermediate_size=96, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=96, shared_expert_intermediate_size=64)
# The two widths of latent attention that kernels are made for.
LATENT = dict(q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32)


@dataclass(frozen=True)
class Family:
    """A tiny model of `family` and what the hub's configuration of it states beside transformers 5's."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=dict)
    change: Callable[[nn.Module], None] | None = None
    mtp: bool = False


@torch.no_grad()
def _negative_biases(model: nn.Module) -> None:
    for name, bias in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            bias.sub_(2.0)


DEEPSEEK = Family(
    "deepseek_v3",
    LATENT | {"first_k_dense_replace": 1},
    stated={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
)
FAMILIES = {
    "qwen3_moe": Family(
        "qwen3_moe",
        {"norm_topk_prob": True, "head_dim": HEAD, "mlp_only_layers": []},
        {"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": Family("qwen2_moe", {"mlp_only_layers": []}),
    "olmoe": Family("olmoe", {"num_key_value_heads": 4}),
    "mixtral": Family("mixtral"),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3, biases below 0": dataclasses.replace(DEEPSEEK, change=_negative_biases),
    "deepseek_v3 with MTP": dataclasses.replace(DEEPSEEK, mtp=True),
    "glm4_moe": Family("glm4_moe", {"n_group": 1, "topk_group": 1, "head_dim": HEAD}, stated={"use_qk_norm": False}),
    "gpt_oss": Family("gpt_oss", {"max_position_embeddings": 131_072}),
    "gpt_oss, truncated YaRN": Family("gpt_oss", {"max_position_embeddings": 131_072}, rope={"truncate": True}),
    "phimoe": Family(
        "phimoe",
        {"sliding_window": None, "attention_bias": True, "lm_head_bias": True},
        stated={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 96},
    ),
    "granitemoe": Family("granitemoe"),
    "minimax_m2": Family(
        "minimax_m2",
        stated={"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}
        | {"rotary_dim": HEAD, "shared_intermediate_size": 0, "num_mtp_modules": 0},
    ),
    "ernie4_5_moe": Family("ernie4_5_moe"),
    "dots1": Family("dots1", {"n_group": 1, "topk_group": 1}, stated={"scoring_func": "noaux_tc"}),
}
QUARTET = "quartet"


@dataclass(frozen=True)
class Checkpoint:
    """A directory that moestro saved, token ids [B, T] and reference logits [B, T, V] as .npy files."""

    family: str
    kind: str
    """original or pruned"""
    path: Path
    ids: Path
    reference: Path

    def item(self, client: str, **more: Any) -> dict[str, Any]:
        """The item of a client's job for this checkpoint."""
        logits = self.path.with_name(f"{self.path.name}.{client}.npy")
        return {"path": str(self.path), "ids": str(self.ids), "logits": str(logits), **more}


def make(family: str, folder: Path, tokenizer: Path | None = None) -> list[Checkpoint]:
    """Both checkpoints of a family, or of `quartet`, saved by moestro into `folder`; or found there, where whole."""
    made = [
        Checkpoint(family, kind, folder / kind, folder / "ids.npy", folder / f"{kind}.npy")
        for kind in ("original", "pruned")
    ]
    if all(checkpoint.path.is_dir() for checkpoint in made):
        return made
    folder.mkdir(parents=True)
    if family == QUARTET:
        source, ids = bundled_path(QUARTET), quartet_ids()
        assert source is not None
    else:
        small = tiny(FAMILIES[family])
        source, ids = write_source(FAMILIES[family], small, folder / "source", tokenizer), random_ids()
        before = logits_of(small.model, ids)
    numpy.save(folder / "ids.npy", ids.numpy())
    for checkpoint in made:
        # quartet is measured in fp32 and saved from the bf16 that it is stored in
        saved, measured = (moestro.open(source), moestro.open(source, dtype=torch.float32))
        if checkpoint.kind == "pruned":
            for view in (saved, measured):
                view.keep_experts({layer.index: range(0, layer.num_experts, 2) for layer in view.layers})
        elif family != QUARTET:
            torch.testing.assert_close(logits_of(measured.model, ids), before, rtol=0, atol=1e-4)
        numpy.save(checkpoint.reference, logits_of(measured.model, ids).numpy())
        saved.save(checkpoint.path)
    shutil.rmtree(folder / "source", ignore_errors=True)
    return made


def tiny(family: Family) -> TinyModel:
    """A tiny random model in fp32, with sizes that every client can take."""
    fields = {f.name for f in dataclasses.fields(model_class(family.family).config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in fields and name not in family.overrides}
    if "moe_intermediate_size" not in fields:  # there the plain width is the experts'
        sizes["intermediate_size"] = SIZES["moe_intermediate_size"]
    default = model_class(family.family).config_class().rope_parameters
    rope = dict(
        default, rope_theta=30_000.0, **family.rope
    )  # no client's default, so that it shows where it is not read
    small = build(family.family, rope_parameters=rope, **sizes, **family.overrides)
    if family.change:
        family.change(small.model)
    return small


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def random_ids(B: int = 2, T: int = 24) -> Tensor:
    return torch.randint(*WORDS, (B, T), generator=torch.Generator().manual_seed(1))


def quartet_ids(T: int = 128) -> Tensor:
    """The first T tokens of the held-out text of each domain of the embedded sample that has so many: [domains, T]"""
    tokenizer = moestro.open(QUARTET).tokenizer
    rows = []
    for domain in embedded_domains():
        text = "\n".join(document.text for document in embedded(domain, "heldout"))
        if len(ids := tokenizer(text, verbose=False).input_ids) >= T:
            rows.append(ids[:T])
    return torch.tensor(rows)


def write_source(family: Family, small: TinyModel, path: Path, tokenizer: Path | None) -> Path:
    """The model as the hub would have it: names of transformers 4 in its configuration, MTP layer, tokenizer."""
    small.model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config |= {new: config.pop(old) for old, new in family.renamed.items()} | family.stated
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = int(family.mtp)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if family.mtp:
        _add_mtp(path, config["num_hidden_layers"], config["hidden_size"])
    if tokenizer:
        shutil.copytree(tokenizer, path, dirs_exist_ok=True)
    return path


def _add_mtp(path: Path, layers: int, hidden: int) -> None:
    """One next-token-prediction layer behind the last, as DeepSeek-V3 has it."""
    tensors = load_file(path / "model.safetensors")
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    tensors |= {name.replace(last, new): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    generator = torch.Generator().manual_seed(2)
    tensors[f"{new}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) / hidden**0.5
    tensors |= {f"{new}{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
