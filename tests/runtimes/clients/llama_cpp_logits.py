"""Logits of llama.cpp: the checkpoint through its own converter, in each of the item's variants.

A file of that variant that is there already is taken as it is. Keys and values are cached in f32, so that only the
variant's own precision shows.
"""

import subprocess
import sys
from pathlib import Path

import job
import llama_cpp
import numpy

SOURCES = next((Path(sys.prefix) / "sources").glob("*/vendor/llama.cpp"))
QUANTISED = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def convert(path, variant):
    """The checkpoint as a GGUF file of `variant`, beside it."""
    target = Path(f"{path}.{variant}.gguf")
    if variant in QUANTISED:
        quantise(convert(path, "f32"), target, QUANTISED[variant])
        return target
    if not target.exists():
        command = [sys.executable, SOURCES / "convert_hf_to_gguf.py", path, "--outtype", variant, "--outfile", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return target


def quantise(source, target, file_type):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama_model_quantize ended with {code}")


def logits_of(file, ids):
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, type_k=f32, type_v=f32, n_threads=1)
    rows = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        rows.append(model.scores[: len(row)].copy())
    return numpy.stack(rows), model


def measure(item):
    file = convert(item["path"], item["variant"])
    logits, model = logits_of(file, job.load_ids(item))
    job.save_logits(item, logits)
    tokens = [model.tokenize(text.encode(), special=True) for text in item.get("texts", [])]
    return {"bytes": file.stat().st_size, "tokens": tokens}


job.run(measure, ["llama-cpp-python"])
