"""The model cards of quartet and solo, written from what was measured."""

from __future__ import annotations

import numpy as np

from moestro.train.corpus import HELD_OUT_SHARE, HELD_OUT_STRINGS, WEIGHTS
from moestro.train.measure import Measured, mutual_information
from moestro.train.packing import ROW
from moestro.train.plan import Plan
from moestro.train.pretrain import BALANCE
from moestro.train.sources import LANGUAGES, credits

WHAT = {
    "quartet": "a small mixture-of-experts language model (Qwen3-MoE architecture: 6 layers, 32 experts of width 96, "
    "top-4 with normalised gate weights)",
    "solo": "the dense twin of quartet (Qwen3 architecture: 6 layers, FFN width 384 = quartet's four active experts)",
}


def model_card(kind: str, parameters: int, runs: dict[str, dict], measured: dict[str, Measured]) -> str:
    """README.md of one bundled model."""
    plan = Plan(**runs[kind]["plan"])
    tokens = runs[kind]["step"] * plan.batch_rows * ROW
    parts = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {kind}\n\n`{kind}` is {WHAT[kind]}. {parameters / 1e6:.2f}M parameters, hidden size 192, 6 attention heads "
        f"(2 key-value), context {ROW}, byte-level BPE with 6144 tokens, tied embeddings, bf16. It was trained from "
        "scratch with `python -m moestro.train.recipe` (`make models`).",
        "## Intended use\n\nA really trained model that is small enough to analyse, prune, steer and fine-tune on a "
        "laptop in seconds; quartet and solo saw the same tokens in the same order, so they can be compared. It is "
        "not an assistant: it knows no facts, its translations and its prose are imitations, and nothing was done "
        "about safety, bias or the privacy of names that stand in the sources.",
        training(plan, tokens, runs[kind]["seconds"]),
        losses(measured),
    ]
    if measured[kind].counts.size:
        parts.append(specialisation(measured[kind]))
    parts += [data(), limits()]
    return "\n\n".join(parts) + "\n"


def training(plan: Plan, tokens: int, seconds: float) -> str:
    """How it was trained."""
    return (
        f"## Training\n\n{tokens / 1e6:.2f}M tokens ({tokens // (plan.batch_rows * ROW):,} steps of "
        f"{plan.batch_rows} rows x {ROW} tokens; a row holds one domain, a batch mixes domains). AdamW, betas "
        f"{plan.betas}, weight decay {plan.weight_decay}, clipping {plan.clip}, peak rate {plan.peak_rate} with "
        f"{plan.warmup_steps} warm-up steps, constant, then linear decay to zero over the last "
        f"{plan.decay_share:.0%}. bf16 compute, fp32 master weights. Load balancing (quartet): Switch loss over the "
        f"whole mixed batch, {BALANCE} per layer. CPU, {seconds / 60:.0f} minutes beside other work on two "
        "shared cores, resumed from checkpoints (quartet: once onto another experts kernel), so a new run agrees up "
        f"to rounding, not bit for bit. Seed {plan.seed}."
    )


def losses(measured: dict[str, Measured]) -> str:
    """Held-out losses of both models side by side."""
    quartet, solo = measured["quartet"], measured["solo"]
    lines = ["| domain | tokens | quartet | solo | solo - quartet |", "|---|---:|---:|---:|---:|"]
    for domain, loss in quartet.losses.items():
        other = solo.losses[domain]
        lines.append(f"| {domain} | {quartet.tokens[domain]:,} | {loss:.3f} | {other:.3f} | {other - loss:+.3f} |")
    lines.append(
        f"| **mean over domains** | {sum(quartet.tokens.values()):,} | {quartet.mean_loss:.3f} | "
        f"{solo.mean_loss:.3f} | {solo.mean_loss - quartet.mean_loss:+.3f} |"
    )
    note = (
        "Nats per predicted token on the held-out part of the embedded sample (never trained on), each document "
        f"from its start in windows of {ROW} tokens, fp32."
    )
    return "## Held-out loss\n\n" + note + "\n\n" + "\n".join(lines)


def specialisation(measured: Measured) -> str:
    """Mutual information between domain and expert per layer, beside the shuffled-label control."""
    top = np.log2(measured.counts.shape[1])
    lines = ["| layer | I(domain; expert), bits | domain labels shuffled |", "|---|---:|---:|"]
    for layer, (counts, shuffled) in enumerate(zip(measured.counts, measured.shuffled, strict=True)):
        lines.append(f"| {layer} | {mutual_information(counts):.3f} | {mutual_information(shuffled):.4f} |")
    note = (
        "Same held-out tokens, every domain weighted equally, all four slots of a token counted; the most it could "
        f"be is {top:.2f} bits (the number of domains)."
    )
    return "## Specialisation\n\n" + note + "\n\n" + "\n".join(lines)


def data() -> str:
    """What it was trained on, with licences."""
    shares = ", ".join(f"{name} {share / sum(WEIGHTS.values()):.1%}" for name, share in WEIGHTS.items())
    rows = ["| package | version | licence | use |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in credits()]
    return (
        "## Data\n\n"
        f"Shares of training tokens: {shares}. User-interface strings are in English and {', '.join(LANGUAGES)}; "
        "arithmetic, sorting, retrieval and instructions are generated (`moestro.data.tasks`). Held out by a hash of "
        f"the file or the prompt ({HELD_OUT_SHARE:.0%}) or of the English string ({HELD_OUT_STRINGS:.0%}), before "
        "anything was trained, the tokenizer included. Sources:\n\n" + "\n".join(rows)
    )


def limits() -> str:
    """Known limits."""
    return (
        "## Limits\n\nTrained on few tokens: compare models and methods with it, not languages or tasks. Domains are "
        "narrow (interface strings, reference prose, library code). Strings that only differ in punctuation or number "
        "can stand on both sides of the split. Texts longer than the context were never seen. Chat follows one short "
        "template with single-turn generated instructions."
    )
