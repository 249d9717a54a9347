"""Small language models (4 layers, 16 experts) are trained from scratch with the same seeds and rows: top-2 routing,
and top-p routing at the paper's p = 0.4 without the entropy loss, with the paper's coefficient 1e-4, and with 1e-2,
since a short run needs a stronger pull. All have the balance loss at 1e-2. The texts are four domains of the embedded
sample that differ in difficulty: generated sums, generated sorting, source code, German interface texts.

- *Measured* on held-out texts: the loss, the mean and the 95th percentile of the experts that tokens use, their number
  by layer and by domain, and its rank correlation with the loss of predicting the next token. ± is the standard
  deviation over seeds.
- *An honest baseline* that is not the paper's method: `quartet`, trained with top-4, has its routing alone switched to
  top-p; its loss on held-out texts of all domains for p from 0.1 to 1, beside its own top-4.

The column with the entropy loss at 1e-1 was added after the first run, to look into the claims that do not hold;
claims, thresholds and the other settings stayed as they were. The domains differ in their number of experts by about as
much as seeds do, so that the claim about them is weakly shown at best.

Not tried here, for want of scale: downstream questions, the harder tasks of BIG-Bench, training until the mean number
of experts falls of itself (the paper's takes 60 billion tokens).
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

import moestro.view.open as opening
from moestro.analyze.active_experts import ActiveExperts, Difficulty
from moestro.data import embedded, embedded_domains, limit_tokens, token_batches
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.evidence.training import Packed, packed, train_lm
from moestro.fitting.evaluate import HeldoutLoss, batch_tokens
from moestro.steer.reroute import top_k, top_p
from moestro.view.observe import progress_bar

TITLE = "Harder Tasks Need More Experts: Dynamic Routing in MoE Models"
ARXIV = "2403.07652"
CLAIM = (
    "A router that takes experts until their probabilities reach p gives hard tokens more experts than easy ones, and "
    "does as well as top-2 with fewer experts on average; an entropy loss keeps it from buying more."
)
SOURCES = (
    *(f"evidence/{name}.py" for name in ("base", "training")),
    "layers/routers/top_p.py",
    "analyze/active_experts.py",
    "steer/reroute.py",
    "bundled/quartet/model.safetensors",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "steps": 60, "heldout_tokens": 128}
NOT_SHOWN = {
    "experts per token with entropy loss 1e-2, as a part of those without it": (
        "after 200 steps the routers' probabilities are still nearly even (even ones take 7), where the entropy's "
        "gradient vanishes; at 1e-1 it does what it is for: see the tables"
    ),
    "top-p with entropy loss 1e-2: nats lost to top-2": (
        "the difference is smaller than the spread over seeds, of models that are at the start of their training"
    ),
    "top-p with entropy loss 1e-2: experts per token": (
        "as above: the routers have not left even probabilities. At 1e-1 tokens use 1.5 experts, with a loss above "
        "that of top-2"
    ),
    "top-p with entropy loss 1e-2: rank correlation of experts and difficulty": (
        "its sign changes from seed to seed: in so short a run the routers do not learn which tokens are hard"
    ),
    "quartet, top-p at inference alone: largest rise of the loss from one p to the next, nats": (
        "the loss is least at p = 0.6, which gives the 4 experts a token that quartet was trained with, and rises "
        "beyond: it has not learned to use more"
    ),
}

DOMAINS = ("arithmetic", "sorting", "code", "ui-de")
SIZE: dict[str, Any] = dict(hidden_size=64, head_dim=16, intermediate_size=128, moe_intermediate_size=64)
HELDOUT_ROWS = 16
"""Of each domain, for the statistics of the trained models."""
BALANCE = 1e-2

TOP_2, FREE, PAPER, STRONG = "top-2", "top-p, no entropy loss", "top-p, entropy 1e-4", "top-p, entropy 1e-2"
STRONGER = "top-p, entropy 1e-1"
SETTINGS: dict[str, dict[str, Any]] = {
    TOP_2: dict(router="top_k", num_experts_per_tok=2, router_losses={"load_balance": BALANCE}),
    **{
        name: dict(router={"kind": "top_p", "p": 0.4}, router_losses={"top_p_balance": BALANCE, "router_entropy": pull})
        for name, pull in ((FREE, 0.0), (PAPER, 1e-4), (STRONG, 1e-2), (STRONGER, 1e-1))
    },
}
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Thresholds, stated before the first run.
FEWER = 0.8  # of the experts used without the entropy loss
TIE = 0.03  # nats that top-p may lose to top-2
AT_MOST = 1.8  # experts a token, where it ties
DOMAIN_RANGE = 0.1  # experts between the domains that use most and least
STEP = 0.01  # nats by which the loss of the sweep may rise from one p to the next

LOSS = "held-out loss, nats per token"
ACTIVE = "experts per token, mean over layers"
P95 = "experts per token, 95th percentile, mean over layers"
BY_LAYER = "experts per token by layer"
BY_DOMAIN = "experts per token by domain"
RANK = "rank correlation of a token's experts and the loss of predicting the next"
SWEPT = "quartet, top-p at inference alone: held-out loss, nats per token"
SWEPT_ACTIVE = "quartet, top-p at inference alone: experts per token"


def run(
    *, model: str = "quartet", seeds: int = 3, steps: int = 200, heldout_tokens: int = 512, progress: bool = True
) -> Evidence:
    """Train every setting with every seed, sweep p on `model`, and hold the claims against both."""
    rows = Rows()
    data, heldout = packed("calibration", DOMAINS), packed("heldout", DOMAINS)
    for seed in range(seeds):
        for name, config in SETTINGS.items():
            trained = train_lm(
                seed=seed,
                steps=steps,
                data=data,
                heldout=heldout,
                label=f"{name}, seed {seed}",
                progress=progress,
                **{**SIZE, **config},
            )
            rows.add(LOSS, {"router": name}, trained.mean_heldout)
            measure(rows, name, trained.model, heldout)
    sweep(rows, model, heldout_tokens, progress)
    return Evidence(rows=list(rows), claims=claims(rows))


def measure(rows: Rows, name: str, model: Any, heldout: Packed) -> None:
    """How many experts the tokens of held-out rows use."""
    chosen = torch.cat([(heldout.domain == d).nonzero()[:HELDOUT_ROWS, 0] for d in range(len(heldout.domains))])
    batches = [
        {"input_ids": heldout.ids[part], "domain": heldout.domain[part], "domains": heldout.domains}
        for part in chosen.split(8)
    ]
    view = opening.open(model.eval())
    active, found = view.observe(batches, [ActiveExperts(), Difficulty()], progress=False)
    rows.add(ACTIVE, {"router": name}, active.mean())
    rows.add(P95, {"router": name}, fmean(active.quantile(0.95).values()))
    if name != TOP_2:
        for layer, mean in active.by_layer().items():
            rows.add(BY_LAYER, {"router": name, "layer": str(layer)}, mean)
        for domain, mean in active.by_domain().items():
            rows.add(BY_DOMAIN, {"router": name, "domain": domain}, mean)
        rows.add(RANK, {"router": name}, found.correlation)


def sweep(rows: Rows, model: str, heldout_tokens: int, progress: bool) -> None:
    """The loss of a model trained with top-k while its routing alone is top-p."""
    view = opening.open(model)
    tokens = batch_tokens(view.model.config)
    texts = token_batches(
        embedded(embedded_domains(), "heldout"), view.tokenizer, max_length=128, max_tokens_per_batch=tokens
    )
    data = limit_tokens(texts, heldout_tokens)
    everything = max(layer.num_experts for layer in view.layers)
    edits = {f"{p:g}": top_p(view, p) for p in SWEEP} | {"all": top_k(view, everything)}
    with progress_bar(progress) as bar:
        task = bar.add_task("sweep of p", total=len(edits) + 1)
        for name, edit in {"its own": None, **edits}.items():
            with view.edits(*([] if edit is None else [edit])):
                losses, active = view.observe(data, [HeldoutLoss(), ActiveExperts()], progress=False)
            rows.add(SWEPT, {"p": name}, fmean(loss for loss, _ in losses.values()))
            rows.add(SWEPT_ACTIVE, {"p": name}, active.mean())
            bar.advance(task)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def mean(metric: str, name: str) -> float:
        return rows.mean(metric, {"router": name})

    by_domain = [rows.mean(BY_DOMAIN, {"router": STRONG, "domain": domain}) for domain in DOMAINS]
    swept = [rows.mean(SWEPT, {"p": f"{p:g}"}) for p in SWEEP]
    return [
        Claim(
            name="experts per token with entropy loss 1e-2, as a part of those without it",
            measured=ratio(mean(ACTIVE, STRONG), mean(ACTIVE, FREE)),
            relation="<=",
            needed=FEWER,
        ),
        Claim(
            name="top-p with entropy loss 1e-2: nats lost to top-2",
            measured=mean(LOSS, STRONG) - mean(LOSS, TOP_2),
            relation="<=",
            needed=TIE,
        ),
        Claim(
            name="top-p with entropy loss 1e-2: experts per token",
            measured=mean(ACTIVE, STRONG),
            relation="<=",
            needed=AT_MOST,
        ),
        Claim(
            name="top-p with entropy loss 1e-2: rank correlation of experts and difficulty",
            measured=mean(RANK, STRONG),
            relation=">",
            needed=0,
        ),
        Claim(
            name="top-p with entropy loss 1e-2: experts per token between the domains that use most and least",
            measured=max(by_domain) - min(by_domain),
            relation=">=",
            needed=DOMAIN_RANGE,
        ),
        Claim(
            name="quartet, top-p at inference alone: largest rise of the loss from one p to the next, nats",
            measured=max(after - before for before, after in pairwise(swept)),
            relation="<=",
            needed=STEP,
        ),
        Claim(
            name="quartet at p = 1: difference from the loss with all experts, nats",
            measured=abs(swept[-1] - rows.mean(SWEPT, {"p": "all"})),
            relation="<=",
            needed=1e-3,
        ),
    ]
