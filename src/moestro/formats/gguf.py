"""GGUF files for llama.cpp, from Qwen3 and Qwen3-MoE checkpoints with a byte-level BPE tokenizer of their own.

llama.cpp brings a converter for the hub's families. It knows byte-level tokenizers by a hash of the ids that each gives
to one fixed text, so it refuses every tokenizer that was trained for a new model, as those of the bundled models and of
`moestro train` are. This writer reads how the tokenizer splits text from tokenizer.json instead, and takes the name
under which llama.cpp splits alike; the vocabulary and the merges are the file's own. Checkpoints of other families go
through `convert_hf_to_gguf.py`; `llama-quantize` makes any quantised type of the result.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.formats.tensors import check_complete, weight_files

ARCHITECTURES = {"Qwen3MoeForCausalLM": "qwen3moe", "Qwen3ForCausalLM": "qwen3"}
"""{class in config.json: architecture in the file}"""
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLITS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "gpt-2": [_BYTES],
}
"""{llama.cpp's name of a way to split text before the merges: the same as tokenizer.json states it}"""

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def write_gguf(checkpoint: str | Path, path: str | Path, *, dtype: str = "f16", overwrite: bool = False) -> Path:
    """Write a saved checkpoint as one GGUF file of `dtype` ("f32", "f16" or "bf16"). Returns its path.

    Norms and routers stay in f32, as in llama.cpp's own files. Needs the package `gguf`.

    Raises:
        ValueError: llama.cpp would compute something else than the checkpoint, or cannot hold it; says what.
        FileNotFoundError: the checkpoint is not whole, or has no tokenizer.json.
        FileExistsError: the file is there and `overwrite` is off.
        ImportError: the package `gguf` is not installed.
    """
    checkpoint, path = Path(checkpoint), Path(path)
    if dtype not in TYPES:
        raise ValueError(
            f"dtype={dtype!r} is not written; choose one of {', '.join(TYPES)} and run llama-quantize on it"
        )
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; name the file to write in it, {path / 'model.gguf'} say")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another file or pass overwrite (--overwrite)")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory; make it first")
    check_complete(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    check_config(config)
    if not (checkpoint / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{checkpoint} has no tokenizer.json, from which vocabulary and merges are read")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    split_as = split_name(tokenizer)
    try:
        import gguf
    except ImportError as e:
        raise ImportError("GGUF files are written with the package gguf: pip install 'moestro[gguf]'") from e
    half = path.with_name(f".{path.name}.half")
    writer = gguf.GGUFWriter(half, ARCHITECTURES[config["architectures"][0]], use_temp_file=True)
    try:
        _write_numbers(writer, config, checkpoint.name, dtype)
        _write_tokenizer(writer, checkpoint, config, tokenizer, split_as)
        names = gguf.get_tensor_name_map(_architecture(writer.arch), config["num_hidden_layers"])
        for name, tensor in _tensors(checkpoint, config):
            new = names.get_name(name, try_suffixes=(".weight",))
            if new is None:
                raise ValueError(f"{checkpoint}: {name} has no place in a GGUF file of {writer.arch}")
            plain = tensor.dim() == 1 or "ffn_gate_inp" in new
            _add(writer, new, tensor, "f32" if plain else dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)
    return path


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError where llama.cpp has no code for what the config states, or code that computes something else."""
    (name, *_) = config.get("architectures") or ["none"]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{name} is not written as GGUF here, only {' and '.join(ARCHITECTURES)}; llama.cpp's own "
            "convert_hf_to_gguf.py reads the checkpoints of other families as they are"
        )
    wrong = {
        "norm_topk_prob": name == "Qwen3MoeForCausalLM" and not config.get("norm_topk_prob"),
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        "attention_bias": bool(config.get("attention_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "rope_parameters": _rope(config).get("rope_type", "default") != "default",
        "quantization_config": bool(config.get("quantization_config")),
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{key}={config.get(key)} in config.json: {ARCHITECTURES[name]} in llama.cpp does not compute that: a "
                "GGUF file would be another model"
            )


def split_name(tokenizer: Mapping[str, Any]) -> str:
    """Name in llama.cpp of how a tokenizer.json splits text. Raises ValueError, saying what is stated, for no name."""
    model, stated = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    plain = {"byte_fallback": False, "ignore_merges": False, "continuing_subword_prefix": None}
    odd = {key: model.get(key) for key, value in plain.items() if (model.get(key) or value) != value}
    if model.get("type") != "BPE" or odd or tokenizer.get("normalizer") is not None:
        raise ValueError(
            f"a tokenizer of type {model.get('type')} with normalizer {tokenizer.get('normalizer')} {odd or ''} is not "
            "written as GGUF here, only byte-level BPE; llama.cpp's own convert_hf_to_gguf.py knows those of the hub"
        )
    parts = stated.get("pretokenizers", [stated])
    for name, wanted in SPLITS.items():
        if len(parts) == len(wanted) and all(p.items() >= w.items() for p, w in zip(parts, wanted)):
            return name
    raise ValueError(f"llama.cpp has no name known here for the tokenizer's way to split text: {json.dumps(stated)}")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, from transformers 5's names or the older ones."""
    older = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    return {**older, **(config.get("rope_parameters") or {})}


def _architecture(name: str) -> Any:
    import gguf

    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _write_numbers(writer: Any, config: Mapping[str, Any], name: str, dtype: str) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if writer.arch == "qwen3moe":
        writer.add_expert_count(_experts(config))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _experts(config: Mapping[str, Any]) -> int:
    return int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"])


def _write_tokenizer(
    writer: Any, checkpoint: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any], split_as: str
) -> None:
    import gguf

    size = config["vocab_size"]
    tokens = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise ValueError(f"token {max(tokens)} of the tokenizer has no row in an embedding of {size} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_as)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(size)])
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates for pairs of texts, unused here
    special = gguf.SpecialVocab(checkpoint, load_merges=True, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
    ends = _ends(checkpoint) - {special.special_token_ids.get("eos")}
    if len(ends) == 1:
        writer.add_eot_token_id(ends.pop())


def _ends(checkpoint: Path) -> set[int]:
    """Tokens at which generation stops."""
    file = checkpoint / "generation_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return set(stated) if isinstance(stated, list) else set() if stated is None else {stated}


def _tensors(checkpoint: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name; the experts of a layer as one [E, ...] as soon as its last one is read."""
    waiting: dict[str, dict[int, Tensor]] = {}
    for file in weight_files(checkpoint):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if config.get("tie_word_embeddings") and name == "lm_head.weight":
                    continue
                found = EXPERT.fullmatch(name)
                if found is None:
                    yield name, tensors.get_tensor(name)
                    continue
                merged = f"{found[1]}.{found[3]}.weight"
                experts = waiting.setdefault(merged, {})
                experts[int(found[2])] = tensors.get_tensor(name)
                if len(experts) == _experts(config):
                    yield merged, torch.stack([experts[e] for e in range(len(experts))])
                    del waiting[merged]
    if waiting:
        name, experts = next(iter(waiting.items()))
        raise ValueError(f"{checkpoint}: {name} has {len(experts)} experts of {_experts(config)}")


def _add(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    import gguf

    tensor = tensor.to(TYPES[dtype]).contiguous()
    if dtype == "bf16":  # numpy has no such type: its bytes, said to be bf16
        raw, kind = tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, raw, raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())
