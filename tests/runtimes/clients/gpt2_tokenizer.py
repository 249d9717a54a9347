"""Writes a GPT-2 tokenizer as the hub has it, from the vocabulary that llama.cpp carries for its own tests.

Its converter recognises tokenizers by a hash of what they encode, so tiny models need one that it knows.
"""

import json
import sys
from pathlib import Path

import job

SOURCES = next((Path(sys.prefix) / "sources").glob("*/vendor/llama.cpp"))
sys.path.insert(0, str(SOURCES / "gguf-py"))
GLM = ("[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<|assistant|>")
"""Tokens that the converter looks up in GLM's vocabulary."""


def measure(item):
    import gguf

    reader = gguf.GGUFReader(SOURCES / "models" / "ggml-vocab-gpt-2.gguf")
    text = {key: reader.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges")}
    tokens, merges = ([bytes(f.parts[i]).decode() for i in f.data] for f in text.values())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"<|endoftext|>": tokens.index("<|endoftext|>")}
    added |= {token: len(tokens) + i for i, token in enumerate(GLM)}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **plain} for content, i in added.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 96}
    config |= dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    Path(item["folder"]).mkdir(parents=True, exist_ok=True)
    (Path(item["folder"]) / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (Path(item["folder"]) / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


job.run(measure, ["llama-cpp-python"])
