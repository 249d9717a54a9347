"""Trained checkpoints as plain Hugging Face directories, with their measurements and model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from moestro.data import embedded, token_batches
from moestro.train.card import model_card
from moestro.train.measure import Measured, measure
from moestro.train.packing import ROW
from moestro.train.pretrain import Plan, new_model


def trained_model(kind: str, work: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, dict]:
    """The bf16 model of the run's checkpoint, and {"step", "seconds", "plan"} of that run."""
    state = torch.load(work / kind / "checkpoint.pt", weights_only=True)
    model = fresh_model(kind, tokenizer, seed=0)
    with torch.no_grad():
        for parameter, master in zip(model.parameters(), state["master"], strict=True):
            parameter.copy_(master)
    return model.bfloat16().eval(), {name: state[name] for name in ("step", "seconds", "plan")}


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
    """Save model, generation settings and tokenizer; every part is plain transformers."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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
            "tokens": runs[kind]["step"] * Plan(**runs[kind]["plan"]).batch_rows * ROW,
            "heldout_loss": {domain: round(loss, 4) for domain, loss in measured[kind].losses.items()},
        }
        (target / "measured.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
