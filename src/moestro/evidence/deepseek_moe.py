"""Four small language models (4 layers, experts 64 wide in a stream of 64) with the same number of expert parameters,
total and active, are trained from scratch with the same seeds and rows:

- *A*, the baseline: 16 experts, top-2, weights normalised, as in GShard;
- *B*: 1 shared expert and 15 routed ones, of which 1 is active;
- *C*: experts of half the width, 1 shared, 31 routed, 3 active;
- *D*, the paper's: a quarter of the width, 1 shared, 63 routed, 7 active.

All with the expert-level balance loss at 0.01. Texts: eight domains of the embedded sample. ± is the standard deviation
over seeds.

- *Exact*: parameters of A to D; the losses at even routing, which are their coefficients.
- *Measured* on held-out texts: the loss; the redundancy curve (each token's best experts closed to it) of all four; D
  without its shared expert and with one more routed; D with 3 to 7 routed experts.

Not tried here, for want of scale: the gains in loss and on benchmarks (100 billion tokens in the paper; 0.06 nats), the
models of 16 and 145 billion parameters, throughput by device.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

import moestro.view.open as opening
from moestro.analyze.expert_redundancy import RATIOS, loss_by_top_k, redundancy_curve, without_shared
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.evidence.training import ROW, losses_by_domain, packed, train_lm
from moestro.layers.losses import device_balance, expert_balance
from moestro.models.deepseek_moe import segment
from moestro.routing import Routing, RoutingContext

TITLE = "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models"
ARXIV = "2401.06066"
CLAIM = (
    "Splitting experts into many small ones, of which proportionally more are active, and setting a few aside that are "
    "always on, makes experts more specialised and the model better at the same parameters and cost."
)
SOURCES = (
    "models/deepseek_moe.py",
    "analyze/expert_redundancy.py",
    "evidence/base.py",
    "evidence/training.py",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "steps": 60}
NOT_SHOWN = {
    "nats that D loses more than A with 2/16 of each token's best experts closed": (
        "after 200 steps the scores are nearly even, and D's are not normalised: its 7 of 63 routed experts weigh "
        "little beside the shared one (3 of them do nearly as well), while A's two weigh 1 together"
    ),
    "D: nats lost to A": (
        "the difference is smaller than the spread over A's seeds, of models that are at the start of their training"
    ),
}

DOMAINS = ("arithmetic", "sorting", "code", "docs", "instructions", "science", "ui-de", "ui-ru")
WIDTH = 64
SIZE: dict[str, Any] = dict(hidden_size=64, head_dim=16, intermediate_size=128)
BALANCE, DEVICE_BALANCE = 0.01, 0.05
EVALUATED_ROWS = 4
"""Of each domain, in the analyses of a trained model."""

A, B, C, D = "A: 16, top-2", "B: 1 + 15, top-1", "C: 1 + 31, top-3", "D: 1 + 63, top-7"
SETTINGS: dict[str, dict[str, Any]] = {
    A: segment(16, 2, WIDTH, m=1) | {"norm_topk_prob": True},
    **{name: segment(16, 2, WIDTH, m=m, shared=1) | {"norm_topk_prob": False} for name, m in ((B, 1), (C, 2), (D, 4))},
}
FEWER = (3, 4, 5, 6, 7)

# Thresholds, stated before the first run.
SHARED_MATTERS = 0.2  # nats that D loses without its shared expert
TIE = 0.01  # nats that D may lose to A
CLOSED = 2 / 16  # where the redundancy curves are compared
EXACT = 1e-6  # a loss in fp32

LOSS = "held-out loss, nats per token"
PARAMETERS = "expert parameters of a layer, router apart"
CURVE = "loss increase with a share of each token's best experts closed, nats per token"
ABLATED = "loss of D with its shared expert replaced by one more routed expert, increase, nats per token"
BY_K = "loss of D with fewer routed experts, increase, nats per token"
EVEN = "balance loss at even routing"


def run(*, seeds: int = 3, steps: int = 200, progress: bool = True) -> Evidence:
    """Train A to D with every seed, analyse them, and hold the claims against what was measured."""
    rows = Rows()
    even_losses(rows)
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
                **SIZE,
                **config,
                router_losses={"expert_balance": BALANCE},
            )
            rows.add(LOSS, {"model": name}, trained.mean_heldout)
            if seed == 0:
                parameters(rows, name, trained.model)
            analyse(rows, name, trained.model, heldout)
    return Evidence(rows=list(rows), claims=claims(rows))


def even_losses(rows: Rows) -> None:
    """Both balance losses, times their coefficients, where every expert serves as many tokens with the same scores."""
    experts, slots, groups = 8, 2, [[0, 1, 2], [3, 4], [5, 6, 7]]
    indices = (torch.arange(ROW * slots) % experts).view(ROW, slots)
    scores = torch.full((ROW, experts), 1 / experts)
    routing, context = Routing(scores.log(), scores[:, :slots], indices), RoutingContext((1, ROW))
    rows.add(EVEN, {"loss": "experts, 0.01"}, BALANCE * float(expert_balance(routing, scores, context)))
    found = device_balance(routing, scores, context, groups=groups)
    rows.add(EVEN, {"loss": "devices, 0.05"}, DEVICE_BALANCE * float(found))


def parameters(rows: Rows, name: str, model: Any) -> None:
    """Counted from the model's own tensors."""
    block = model.model.layers[0].mlp
    shared = sum(p.numel() for p in block.shared.parameters()) if hasattr(block, "shared") else 0
    total = sum(p.numel() for p in block.experts.parameters())
    active = total // block.router.num_experts * block.router.top_k
    for kind, count in (("total", total + shared), ("active", active + shared)):
        rows.add(PARAMETERS, {"model": name, "of": kind}, count)


def analyse(rows: Rows, name: str, model: Any, heldout: Any) -> None:
    view = opening.open(model.eval())

    def loss() -> float:
        return fmean(losses_by_domain(model, heldout, EVALUATED_ROWS).values())

    whole = loss()
    for ratio, closed in redundancy_curve(view, loss, RATIOS).items():
        rows.add(CURVE, {"model": name, "closed": f"{round(ratio * 16)}/16"}, closed - whole)
    if name == D:
        with without_shared(view):
            rows.add(ABLATED, {"routed experts": str(view.layers[0].top_k + 1)}, loss() - whole)
        for k, fewer in loss_by_top_k(view, loss, FEWER).items():
            rows.add(BY_K, {"routed experts": str(k)}, fewer - whole)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def spread(kind: str) -> float:
        counts = [rows.mean(PARAMETERS, {"model": name, "of": kind}) for name in SETTINGS]
        return max(counts) - min(counts)

    def curve(name: str) -> float:
        return rows.mean(CURVE, {"model": name, "closed": f"{round(CLOSED * 16)}/16"})

    return [
        Claim(
            name="largest difference between A to D in expert parameters, total and active",
            measured=max(spread("total"), spread("active")),
            relation="<=",
            needed=0,
        ),
        *(
            Claim(
                name=f"balance loss over {over} at even routing: difference from its coefficient {coefficient:g}",
                measured=abs(rows.mean(EVEN, {"loss": f"{over}, {coefficient:g}"}) - coefficient),
                relation="<=",
                needed=EXACT,
            )
            for over, coefficient in (("experts", BALANCE), ("devices", DEVICE_BALANCE))
        ),
        Claim(
            name="D: nats lost where one more routed expert takes the place of the shared one",
            measured=rows.mean(ABLATED, {"routed experts": "8"}),
            relation=">=",
            needed=SHARED_MATTERS,
        ),
        Claim(
            name="nats that D loses more than A with 2/16 of each token's best experts closed",
            measured=curve(D) - curve(A),
            relation=">=",
            needed=0,
        ),
        Claim(
            name="D: nats lost to A",
            measured=rows.mean(LOSS, {"model": D}) - rows.mean(LOSS, {"model": A}),
            relation="<=",
            needed=TIE,
        ),
    ]
