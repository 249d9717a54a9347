"""Tiny random models: one for every family in the installed transformers that has a mixture of experts.

`families()` finds them by scanning transformers' modelling files, so a new release is noticed at once. `build` derives
small sizes from the fields of the family's own configuration class by the rules of `SIZES`; what cannot be derived
(a pattern of layers, sizes that must fit each other) stands in `OVERRIDES`.

Sizes of different things differ (hidden 96, 8 experts, expert width 24, 6 heads, top-2, 131 tokens), so that nothing
found by its shape can be confused; rows of expert matrices are whole multiples of 16 bytes in bf16, which CPU kernels
want. Everything that changes routing (correction biases, per-expert scales, groups, hash tables) has random values, so
that ignoring it shows.
"""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

H, E, K, I, A, D, L, V = 96, 8, 2, 24, 6, 16, 4, 131

# The first pattern that matches the whole name of a text model's configuration field gives its value.
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input", V),
    (r"hidden_size", H),
    (r"moe_hidden_size|moe_latent_size", 56),
    (r"hidden_size_per_layer_input", 6),
    (r"num_hidden_layers|max_window_layers", L),
    (r"num_attention_heads|swa_num_attention_heads", A),
    (r"num_key_value_heads|swa_num_key_value_heads", 3),
    (r"head_dim|swa_head_dim", D),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", E),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", K),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"routed_scaling_factor|route_scale|router_scaling_factor|moe_routed_scaling_factor", 1.7),
    (r"moe_intermediate_size", I),
    (r"intermediate_size|dense_intermediate_size|prefix_dense_intermediate_size", 40),
    (r".*shared.*intermediate_size", 28),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"mlp_only_layers", [0]),
    (r"max_position_embeddings", 96),
    (r"sliding_window|sliding_window_size", 64),
    # latent attention
    (r"q_lora_rank", 22),
    (r"kv_lora_rank", 18),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim", 12),
    (r"v_head_dim", 14),
    (r"o_lora_rank", 10),
    (r"o_groups", 2),
    # indexers of sparse attention: more tokens are kept than the tests have, so that batching changes nothing
    (r"index_topk|index_topk_blocks", 64),
    (r"index_n_heads", 2),
    (r"index_head_dim", 16),
    (r"index_block_size", 4),
    # state spaces and linear attention
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_.*head_dim", 16),
    (r"mamba_d_state|ssm_state_size", 10),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_head_dim", 12),
    (r"(mamba_)?chunk_size|block_size|mamba_chunk_size", 8),
    (r"n_groups", 2),
    (r"hc_mult|hc_count", 2),
    (r"hc_sinkhorn_iters", 3),
]

# Towers that a text-only input never enters: small, and the same for every family.
TOWER_SIZES: list[tuple[str, Any]] = [
    (r"out_hidden_size|output_dim|projector_hidden_size", H),
    (r"text_hidden_size|adapter_out_dim", H),
    (r"adapter_in_dim|adapter_input_size", 32),
    (r"moe_intermediate_size", I),
    (r"num_local_experts", E),
    (r".*hidden_size|d_model|embed_dim|hidden_dim", 32),
    (r".*intermediate_size|ffn_dim|encoder_ffn_dim", 36),
    (r"depth|num_hidden_layers|encoder_layers|num_layers", 1),
    (r".*num_heads|num_attention_heads|encoder_attention_heads|num_key_value_heads", 2),
    (r"head_dim", 16),
    (r"image_size", 28),
    (r"vocab_size", V),
    (r"patch_sizes", [4]),
    (r"hidden_sizes", [16]),
    (r"(position_embedding|num_position_embedding)s?_?(size)?", 64),
    (r"downsample_channels", [12, 10]),
    (r"output_channels", 8),
    (r"mlp_dim", 36),
    (r"depths", [1]),
]

# A multimodal model's own fields, beside its sub-configurations.
TOP_SIZES = {"projector_hidden_size": H, "out_hidden_size": H, "canvas_length": 5}
TOP_EXTRAS: dict[str, dict[str, Any]] = {"Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 30}}

MROPE = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING = ["linear_attention", "full_attention"] * (L // 2)
FIRST_DENSE = ["dense"] + ["sparse"] * (L - 1)

# The one tower that has experts, and a different number of them in each layer.
TOWER_OVERRIDES = {"Dots3NoteVisionConfig": {"num_hidden_layers": 3, "pyramid_num_routed": [-1, 6, 8]}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": FIRST_DENSE},
    "deepseek_ocr2": {"mlp_layer_types": FIRST_DENSE, "topk_method": "group_limited_greedy"},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [I, 16], "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "diffusion_gemma": {"global_head_dim": 2 * D},
    "dots3_note": {
        "swa_num_attention_heads": A,
        "swa_num_key_value_heads": A,
        "swa_q_lora_rank": 22,
        "swa_kv_lora_rank": 18,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 14,
    },
    "gemma4": {"enable_moe_block": True, "global_head_dim": 2 * D},
    "glm4v_moe": {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": FIRST_DENSE, "index_kpool": 4},
    "granitemoehybrid": {"layer_types": ALTERNATING},
    "inkling": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (L // 2)},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 10,
    },
    "unlimited_ocr": {"mlp_layer_types": FIRST_DENSE, "topk_method": "group_limited_greedy"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 26},
}


@dataclass
class TinyModel:
    """A tiny random model in eval mode, and what is needed to call it."""

    family: str
    model: nn.Module
    config: transformers.PreTrainedConfig
    text_config: transformers.PreTrainedConfig
    vocab_size: int
    generates: bool

    def inputs(self, B: int = 2, T: int = 9, seed: int = 0, *, padding: str = "none") -> dict[str, torch.Tensor]:
        """Text-only keyword arguments for `model(...)`; padded rows hold 1, 2, ... padding tokens at one side."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(FIRST_WORD, self.vocab_size, (B, T), generator=generator)
        mask = torch.ones_like(ids)
        if padding != "none":
            for row in range(B):
                pad = slice(0, row + 1) if padding == "left" else slice(T - row - 1, T)
                ids[row, pad], mask[row, pad] = 0, 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if canvas := getattr(self.config, "canvas_length", 0):
            words = torch.randint(FIRST_WORD, self.vocab_size, (B, canvas), generator=generator)
            inputs["decoder_input_ids"] = words
            inputs["decoder_attention_mask"] = torch.cat([mask, torch.ones_like(words)], dim=1)
        return inputs


FIRST_WORD = 40
"""Token ids below this one are special (padding, image placeholders, ...); `inputs` draws from the others."""


@cache
def families() -> list[str]:
    """Every model folder of the installed transformers that has an experts class."""
    models = Path(transformers.__file__).parent / "models"
    found = {file.parent.name for file in models.glob("*/modeling_*.py") if EXPERTS_DECORATOR in file.read_text()}
    return sorted(found)


EXPERTS_DECORATOR = "use_experts_implementation"
CLASSES = {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")


def modelling_module(family: str) -> Any:
    """The Python module of transformers that holds the family's experts class."""
    folder = Path(transformers.__file__).parent / "models" / family
    (file,) = (file for file in sorted(folder.glob("modeling_*.py")) if EXPERTS_DECORATOR in file.read_text())
    return importlib.import_module(f"transformers.models.{family}.{file.stem}")


def experts_classes(family: str) -> list[str]:
    """Names of the experts classes in the family's modelling file."""
    source = Path(modelling_module(family).__file__).read_text()
    return re.findall(rf"^@{EXPERTS_DECORATOR}(?:\([^)]*\))?\n(?:@.*\n)*class (\w+)", source, flags=re.M)


def model_class(family: str, *, towers: bool = False) -> type:
    """The class to build: a causal language model where there is one and no `towers` are asked for."""
    module = modelling_module(family)
    if family in CLASSES:
        return getattr(module, CLASSES[family])
    names = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for head in HEADS[1:] if towers else HEADS:
        for name in names:
            if name.endswith(head):
                return getattr(module, name)
    raise LookupError(f"{family}: no class in {module.__name__} ends with one of {HEADS}")


@cache
def families_with_towers() -> list[str]:
    """Families that `build` makes as a language model, and with `towers=True` as the whole multimodal model."""
    language = [family for family in families() if model_class(family).__name__.endswith(HEADS[0])]
    return [family for family in language if any(n.endswith(HEADS[1]) for n in vars(modelling_module(family)))]


def build(
    family: str, *, towers: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> TinyModel:
    """A tiny random model of `family`; `overrides` are fields of its text configuration."""
    cls = model_class(family, towers=towers)
    config = tiny_config(cls.config_class, {**OVERRIDES.get(family, {}), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).eval()
        randomise(model)
    cast(model, dtype)
    text_config = config.get_text_config()
    return TinyModel(
        family=family,
        model=model,
        config=config,
        text_config=text_config,
        vocab_size=text_config.vocab_size,
        generates=model.can_generate(),
    )


def tiny_config(cls: type, overrides: dict[str, Any], *, tower: bool = False) -> transformers.PreTrainedConfig:
    """A small instance of a configuration class: sizes by `SIZES`, sub-configurations in the same way."""
    default = cls()
    sub_names = [name for name in cls.sub_configs if getattr(default, name, None) is not None]
    if sub_names:
        subs = {
            name: tiny_config(type(getattr(default, name)), overrides, tower=not _is_text(name)) for name in sub_names
        }
        own = {name: value for name, value in TOP_SIZES.items() if hasattr(default, name)}
        return cls(**subs, **own, **_special_ids(cls), **TOP_EXTRAS.get(cls.__name__, {}))
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    sizes = TOWER_SIZES if tower else SIZES
    values = {
        name: value
        for name, default_value in fields.items()
        for value in [_first_match(sizes, name)]
        if value is not None and not isinstance(default_value, (dict, str))
    }
    if tower:
        values |= TOWER_OVERRIDES.get(cls.__name__, {})
    else:
        values |= overrides
        if "qk_rope_head_dim" in fields:  # latent attention: heads of keys are heads of queries
            values["num_key_value_heads"] = values["num_attention_heads"]
            if "head_dim" in fields:
                values["head_dim"] = values["qk_rope_head_dim"]
    return cls(**(values | _special_ids(cls)))


def _is_text(name: str) -> bool:
    return name in ("text_config", "thinker_config", "talker_config")


def _first_match(sizes: list[tuple[str, Any]], name: str) -> Any:
    return next((value for pattern, value in sizes if re.fullmatch(pattern, name)), None)


def _special_ids(cls: type) -> dict[str, int]:
    """Distinct small ids for the special tokens: 0 pads, 1 begins, 2 ends, and every placeholder its own."""
    names = [f.name for f in dataclasses.fields(cls) if re.fullmatch(r".*token_(id|index)", f.name)]
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    others = (name for name in names if name not in fixed)
    return {name: fixed[name] for name in names if name in fixed} | {name: 3 + i for i, name in enumerate(others)}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Fills weights so that routing is decisive and nothing is neutral: no zero bias, no unit scale, no empty table."""
    for name, tensor in _named_state(model):
        leaf = name.rpartition(".")[2]
        if not tensor.is_floating_point():
            if tensor.dim() == 2:  # a hash router's table: distinct experts in each row
                tensor.copy_(torch.rand(tensor.shape[0], E).argsort(dim=1)[:, : tensor.shape[1]])
        elif tensor.dim() >= 2 and tensor.numel() > 0 and not re.search(r"A_log|inv_freq|pos", leaf):
            fan_in = max(tensor.shape[-1], 4)
            tensor.normal_(std=(2.5 if tensor.shape[0] in (E, E + 1) else 1.0) / fan_in**0.5)
        elif tensor.numel() in (E, E + 1) and "bias" in leaf:
            # Positive: a negative score would tie with the 0 that AXK2 gives closed groups. The last of E + 1 is that
            # of "no expert", which Zaya resets whenever it loads.
            tensor[:E].normal_(std=0.1).abs_()
        elif ("bias" in leaf and "dt_bias" not in leaf) or (tensor.numel() > 1 and (tensor == 0).all()):
            tensor.normal_(std=0.1)
        elif tensor.numel() > 1 and (tensor == tensor[0]).all():
            tensor.mul_(0.6 + 0.8 * torch.rand_like(tensor))


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What `from_pretrained(dtype=...)` does: what is saved becomes `dtype`, but for what the family keeps in fp32."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = any(re.search(pattern, name) for pattern in model._keep_in_fp32_modules_strict)
        if tensor.is_floating_point() and not kept:
            tensor.data = tensor.data.to(dtype)


def _named_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each once."""
    state = model.state_dict()
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            yield name, tensor
