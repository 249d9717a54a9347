"""Trained checkpoints as plain Hugging Face directories, with their measurements and model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from moestro.data import embedded, token_batches
from moestro.formats.companions import write_tokenizer
from moestro.formats.stated_config import stated_config
from moestro.train import checkpoint
from moestro.train.card import model_card
from moestro.train.measure import Measured, measure
from moestro.train.packing import ROW
from moestro.train.pretrain import new_model
from moestro.view.surgery import EXPERT_COUNT, TOP_K


def trained_model(kind: str, work: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, dict]:
    """The bf16 model of the run's checkpoint, and {"step", "seconds", "plan"} of that run."""
    state = checkpoint.read(work / kind)
    if state is None:
        raise FileNotFoundError(f"{work / kind} holds no checkpoint; run the step {kind} first")
    model = fresh_model(kind, tokenizer, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["weights"][name])
    run = {"step": state["step"], "seconds": state["seconds"], "plan": state["settings"]["plan"]}
    return model.bfloat16().eval(), run


def fresh_model(kind: str, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """`new_model` with the vocabulary of `tokenizer`."""
    return new_model(
        kind,
        vocab_size=len(tokenizer),
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        seed=seed,
    )


def export(kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model, generation settings and tokenizer, so that transformers 4 and 5 and other readers take them."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    stated = stated_config(model.config, counts=(EXPERT_COUNT, TOP_K))
    (folder / "config.json").write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)
    (folder / "model.safetensors").chmod(0o644)


def measure_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Measured:
    """`measure` over the held-out part of the embedded sample, documents cut at the training length."""
    return measure(model, token_batches(embedded(split="heldout"), tokenizer, max_length=ROW, batch_size=16))


def export_all(work: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Both models with cards into `folder`; a card compares the two."""
    models, runs, measured = {}, {}, {}
    for kind in ("quartet", "solo"):
        models[kind], runs[kind] = trained_model(kind, work, tokenizer)
        # measured in fp32 from the bf16 weights, so that the numbers do not depend on a machine's bf16 kernels
        measured[kind] = measure_embedded(models[kind].float(), tokenizer)
        models[kind].bfloat16()
    for kind, model in models.items():
        target = folder / kind
        export(kind, model, tokenizer, target)
        size = sum(p.numel() for p in model.parameters())
        (target / "README.md").write_text(model_card(kind, size, runs, measured), encoding="utf-8")
        numbers = {
            "tokens": runs[kind]["step"] * runs[kind]["plan"]["batch_rows"] * ROW,
            "heldout_loss": {domain: round(loss, 4) for domain, loss in measured[kind].losses.items()},
        }
        (target / "measured.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
