"""Small language models that differ in their routers alone: plain top-2, similarity-aware (temperature 1, W_s from
I / sqrt(H) on), attention-aware, and, as a control, a router that mixes with all tokens so far alike. 3 layers of 16
experts, 180 steps on the embedded sample, 3 seeds; the same rows in the same order for all.

Routing is traced on 32 held-out rows of 128 tokens, drawn once over all domains:

- *Fluctuation late in training*: share of the tokens whose two experts at 80% of the steps are others than at the end,
  mean over layers.
- *Fluctuation under noise*: the same between the rows and a copy with 5% of the tokens replaced at random; replaced
  tokens are not counted.
- *Held-out loss*, mean over domains.
- *Entropy* of the distribution that experts are chosen from, after the first step and at the end: reported, for mixing
  fixed distributions can only raise its mean.
- *Same experts as the token before*, and the largest share of slots at one expert: what a router that blurs all tokens
  would show.

Not tried: images and their corruptions, adversarial noise, long training. The equations are reconstructed from the
paper's abstract, so a difference from its results may be a difference of method.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from moestro.analyze.fluctuation import routing_fluctuation, top_k
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.evidence.training import packed, train_lm
from moestro.models.lm import MoELMForCausalLM
from moestro.view.observe import RoutingTrace
from moestro.view.open import open as open_model

TITLE = "Improving Routing in Sparse Mixture of Experts with Graph of Tokens"
ARXIV = "2505.00792"
CLAIM = (
    "Routing a token by the experts of tokens that it resembles or attends to makes routing more stable, late in "
    "training and under noise, at no loss of quality."
)
SOURCES = ("layers/routers/token_graph.py", "analyze/fluctuation.py", "evidence/training.py", "evidence/base.py")
QUICK = {"seeds": 1, "steps": 60}
NOT_SHOWN = {
    **dict.fromkeys(
        (
            "attention-aware: fluctuation late in training, as a part of the plain router's",
            "similarity-aware: fluctuation under noise, as a part of the plain router's",
            "attention-aware: fluctuation under noise, as a part of the plain router's",
        ),
        "after so short a training every router is still nearly even (entropy 2.71 to 2.75 of at most 2.77 nats), and "
        "those that average more so: small changes then turn the choice over. Whether related tokens steady a router "
        "that has decided is not seen here",
    ),
    **dict.fromkeys(
        ("similarity-aware: nats lost to the plain router", "attention-aware: nats lost to the plain router"),
        "averaging costs loss after so short a training, and the uniform control loses as much as attention does; why "
        "was not looked into",
    ),
    "attention-aware: fluctuation late in training, as a part of the uniform control's": (
        "level with the control within the spread over seeds: here attention steadies routing no more than the plain "
        "mean of all earlier tokens"
    ),
}

# Thresholds, stated before the first run.
LATE = 0.85  # attention-aware: fluctuation late in training, as a part of plain's, at most this
NATS = 0.03
REPLACED = 0.05  # of the tokens

PLAIN, SIMILARITY, ATTENTION, UNIFORM = "plain", "similarity-aware", "attention-aware", "uniform (control)"
ROUTERS: dict[str, Any] = {
    PLAIN: "top_k",
    SIMILARITY: "similarity_aware",
    ATTENTION: "attention_aware",
    UNIFORM: "uniform_graph",
}
SMALL: dict[str, Any] = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=64,
    num_experts=16,
    num_experts_per_tok=2,
    attn_implementation="eager",  # for all, as the attention-aware router needs its weights
)
PROBE_ROWS = 32
EARLIER = 0.8

FLUCTUATION = "share of the tokens whose experts change from 80% of the training to its end"
NOISE = "share of the tokens whose experts change with 5% of all tokens replaced"
LOSS = "held-out loss, nats per token"
ENTROPY = "entropy of the distribution over experts, nats"
SAME = "share of the tokens with the same two experts as the token before"
LARGEST = "largest share of slots at one expert, mean over layers"


def run(*, seeds: int = 3, steps: int = 180, progress: bool = True) -> Evidence:
    """Train every router from every seed and compare its traces."""
    heldout = packed("heldout").ids
    clean = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))[:PROBE_ROWS]]
    noisy = replaced(clean, REPLACED, seed=1)
    rows = Rows()
    for seed in range(seeds):
        for name in ROUTERS:
            measure(rows, name, seed, steps, clean, noisy, progress)
    return Evidence(rows=list(rows), claims=claims(rows))


def replaced(ids: Tensor, share: float, *, seed: int) -> Tensor:
    """A copy with so many of the tokens in the places of others of the same rows' ids."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(ids.shape, generator=generator) < share
    others = ids.reshape(-1)[torch.randint(ids.numel(), ids.shape, generator=generator)]
    return torch.where(chosen, others, ids)


def measure(rows: Rows, name: str, seed: int, steps: int, clean: Tensor, noisy: Tensor, progress: bool) -> None:
    """One model: trained, and traced at two times and on two inputs."""
    kept: dict[int, dict[str, Tensor]] = {}
    earlier_step = round(EARLIER * steps) - 1

    def on_step(step: int, model: MoELMForCausalLM) -> None:
        if step in (0, earlier_step):
            kept[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    done = train_lm(
        seed=seed,
        steps=steps,
        warmup=20,
        on_step=on_step,
        label=f"{name}, seed {seed}",
        progress=progress,
        router=ROUTERS[name],
        **SMALL,
    )
    past = MoELMForCausalLM(done.model.config)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        end, noise = (
            traced(done.model, ids, Path(folder) / where) for where, ids in (("end", clean), ("noise", noisy))
        )
        past.load_state_dict(kept[0])
        first = traced(past, clean, Path(folder) / "first")
        past.load_state_dict(kept[earlier_step])
        earlier = traced(past, clean, Path(folder) / "earlier")
        untouched = pl.col("id") == pl.col("id_other")
        rows.add(FLUCTUATION, {"router": name}, fmean(routing_fluctuation(earlier, end).values()))
        rows.add(NOISE, {"router": name}, fmean(routing_fluctuation(end, noise, where=untouched).values()))
        rows.add(LOSS, {"router": name}, done.mean_heldout)
        rows.add(ENTROPY, {"router": name, "when": "after the first step"}, entropy(first))
        rows.add(ENTROPY, {"router": name, "when": "at the end"}, entropy(end))
        same, largest = agreement(end)
        rows.add(SAME, {"router": name}, same)
        rows.add(LARGEST, {"router": name}, largest)


def traced(model: Any, ids: Tensor, path: Path) -> pl.LazyFrame:
    return open_model(model.eval()).observe([ids], [RoutingTrace(path)], progress=False)[0]


def entropy(trace: pl.LazyFrame) -> float:
    """Mean over tokens and layers."""
    logits = torch.from_numpy(trace.select("logits").collect()["logits"].to_numpy())
    return float(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean())


def agreement(trace: pl.LazyFrame) -> tuple[float, float]:
    """(share of tokens with the experts of the token before, largest share of slots at one expert)"""
    table = trace.collect()
    experts = top_k(table["experts"].to_numpy(), table["weights"].to_numpy())
    follows = table["position"].to_numpy()[1:] > 0
    same = (experts[1:] == experts[:-1]).all(axis=1)[follows].mean()
    by_layer = [np.bincount(experts[(table["layer"] == i).to_numpy()].ravel()) for i in table["layer"].unique()]
    return float(same), fmean(float(counts.max() / counts.sum()) for counts in by_layer)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def mean(metric: str, router: str) -> float:
        return rows.mean(metric, {"router": router})

    variants = (SIMILARITY, ATTENTION)
    return [
        Claim(
            name=f"{ATTENTION}: fluctuation late in training, as a part of the plain router's",
            measured=ratio(mean(FLUCTUATION, ATTENTION), mean(FLUCTUATION, PLAIN)),
            relation="<=",
            needed=LATE,
        ),
        *(
            Claim(
                name=f"{name}: fluctuation under noise, as a part of the plain router's",
                measured=ratio(mean(NOISE, name), mean(NOISE, PLAIN)),
                relation="<=",
                needed=1,
            )
            for name in variants
        ),
        *(
            Claim(
                name=f"{name}: nats lost to the plain router",
                measured=mean(LOSS, name) - mean(LOSS, PLAIN),
                relation="<=",
                needed=NATS,
            )
            for name in variants
        ),
        *(
            Claim(
                name=f"{name}: fluctuation late in training, as a part of the uniform control's",
                measured=ratio(mean(FLUCTUATION, name), mean(FLUCTUATION, UNIFORM)),
                relation="<",
                needed=1,
            )
            for name in variants
        ),
    ]
