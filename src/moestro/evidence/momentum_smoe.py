"""*Stability*, exactly: one coordinate, linear blocks v = -sigma x, 400 layers in fp64. The factor by which a layer
shrinks or grows the state, below 1 where the stack is stable, for products gamma * sigma on both sides of plain
descent's limit 2 and heavy ball's 2 (1 + mu); and the limit itself, found by bisection, for four values of mu.

*Language models*: 8 layers of 16 experts, 2 a token, trained from scratch on three domains of the embedded sample;
three seeds, the same rows in the same order for all. Beside the plain residual stands a plain one whose blocks count
1 / (1 - mu) times as much, which is the size that momentum gives a constant v: it tells momentum from a larger step.
Adam's step in the first layer is tried as published (1) and at a tenth, for the stream of a pre-norm model is small
there. Sensitivity to mu: one seed. All models have one residual connection around each block and the norm before it;
the paper's have two, and the norm behind.

*Word swap*: a share of the input tokens is replaced by random ones; the loss is taken on the true next tokens. The same
swaps for every model.

Not tried here, for want of scale: images, and the perplexity of models that are trained to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moestro.view.open as opening
from moestro.evidence.base import Claim, Evidence, Rows
from moestro.evidence.training import Packed, packed, train_lm
from moestro.layers.momentum import MOMENTUM, HeavyBall, stability_limit
from moestro.models.lm import MoELMForCausalLM
from moestro.view.observe import ExpertCounts, progress_bar

TITLE = "MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts"
ARXIV = "2410.14574"
CLAIM = (
    "Momentum from one mixture-of-experts layer to the next makes deep sparse models stable over a wider range, more "
    "robust to corrupted input, and somewhat better, at almost no cost."
)
SOURCES = ("layers/momentum.py", "evidence/training.py", "evidence/base.py", "data/sample/*.jsonl.gz")
QUICK = {"seeds": 1, "steps": 25, "heldout_rows": 4}
NOT_SHOWN = dict.fromkeys(
    (
        "heavy ball, 2.5% of the tokens swapped: nats by which its loss grows more than plain's",
        "heavy ball, 10.0% of the tokens swapped: nats by which its loss grows more than plain's",
    ),
    "all models but the plain one have a lower loss here and lose more under attack, the plain one with larger steps "
    "as much as heavy ball: after so short a training, the plain model hardly uses the tokens before, so there is less "
    "to spoil. Larger steps alone also have most of heavy ball's gain in loss",
)

MU = 0.7
DOMAINS = ("arithmetic", "code", "ui-ru")
PRODUCTS = (1.9, 2.1, 2.5, 3.3, 3.5)
GRID = (0.3, 0.5, 0.9)
SWAPS = (0.025, 0.1)
SIZE: dict[str, Any] = dict(
    num_hidden_layers=8,
    hidden_size=64,
    head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=48,
    num_experts=16,
    num_experts_per_tok=2,
)
PLAIN, LARGER, HEAVY = "plain", "plain, larger step", "heavy ball"
RULES: dict[str, Any] = {
    PLAIN: "plain",
    LARGER: {"kind": "heavy_ball", "mu": 0.0, "gamma": 1 / (1 - MU)},
    HEAVY: {"kind": "heavy_ball", "mu": MU},
    "Adam first": {"kind": "adam_first", "mu": MU},
    "Adam first, small step": {"kind": "adam_first", "mu": MU, "first": 0.1},
    "robust": {"kind": "robust_momentum", "k": 100.0, "p": 0.9, "lipschitz": 1.9},  # gamma 1, mu 0.74
}

# Thresholds, stated before the first run.
LIMIT_ERROR = 0.01
CLEAN_LOSS = 0.02  # nats that heavy ball may lose to the plain residual
GAP = 0.01  # nats by which its loss under attack may grow more

FACTOR = "factor by which one layer changes the state; below 1: stable"
LIMIT = "largest stable gamma * sigma"
LOSS = "held-out loss, nats per token"
ATTACKED = "increase of the held-out loss under word swap, nats per token"
TRAINING = "mean training loss over all steps, nats per token"
LOAD = "coefficient of variation of the experts' loads"
BY_MU = "held-out loss by mu, nats per token (one seed)"


def run(*, seeds: int = 3, steps: int = 110, heldout_rows: int = 16, progress: bool = True) -> Evidence:
    """Measure the stability of the rules, then train and attack the models."""
    rows = Rows()
    stability(rows)
    data, heldout = packed("calibration", DOMAINS), few_rows(packed("heldout", DOMAINS), heldout_rows)
    settings: dict[str, Any] = dict(steps=steps, batch_rows=6, warmup=20, data=data, heldout=heldout, **SIZE)
    runs = [(seed, name, rule) for seed in range(seeds) for name, rule in RULES.items()]
    runs += [(0, f"mu {mu:g}", {"kind": "heavy_ball", "mu": mu}) for mu in GRID]
    with progress_bar(progress) as bar:
        for seed, name, rule in bar.track(runs, description="training"):
            trained = train_lm(seed=seed, residual=rule, progress=False, **settings)
            if name not in RULES:
                rows.add(BY_MU, {"mu": name.removeprefix("mu ")}, trained.mean_heldout)
                continue
            rows.add(LOSS, {"rule": name}, trained.mean_heldout)
            rows.add(TRAINING, {"rule": name}, fmean(trained.losses))
            rows.add(LOAD, {"rule": name}, uneven(trained.model, heldout))
            clean = attacked_loss(trained.model, heldout, 0.0)
            for share in SWAPS:
                gap = attacked_loss(trained.model, heldout, share) - clean
                rows.add(ATTACKED, {"tokens swapped": f"{share:.1%}", "rule": name}, gap)
    first = {mu: rows.values(LOSS, {"rule": name})[0] for mu, name in ((0.0, PLAIN), (MU, HEAVY))}
    for mu, loss in first.items():
        rows.add(BY_MU, {"mu": f"{mu:g}"}, loss)
    return Evidence(rows=list(rows), claims=claims(rows))


def stability(rows: Rows) -> None:
    """The factors and limits of linear stacks."""
    for product in PRODUCTS:
        for name, mu in ((PLAIN, 0.0), (HEAVY, MU)):
            rows.add(FACTOR, {"gamma * sigma": f"{product:g}", "rule": name}, factor(HeavyBall(mu), product))
    for mu in (0.0, 0.3, 0.5, MU, 0.9):
        rows.add(LIMIT, {"": "found", "mu": f"{mu:g}"}, limit(mu))
        rows.add(LIMIT, {"": "2 (1 + mu)", "mu": f"{mu:g}"}, stability_limit(mu))


def factor(rule: HeavyBall, sigma: float, layers: int = 400) -> float:
    """Geometric mean, over the second half of the layers, of the growth of sqrt(x^2 + m^2) where v = -sigma x."""
    x = torch.ones(1, dtype=torch.float64)
    memory: dict[str, Tensor] = {}
    sizes = []
    for _ in range(layers):
        x, memory = rule.step(x, -sigma * x, memory)
        sizes.append(float(torch.hypot(x, memory[MOMENTUM])))
    return (sizes[-1] / sizes[layers // 2 - 1]) ** (1 / (layers - layers // 2))


def limit(mu: float) -> float:
    """Where the factor crosses 1."""
    low, high = 0.1, 6.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if factor(HeavyBall(mu), middle) < 1 else (low, middle)
    return low


def few_rows(data: Packed, rows: int) -> Packed:
    """The first rows of every domain."""
    chosen = torch.cat([(data.domain == number).nonzero()[:rows, 0] for number in range(len(data.domains))])
    return replace(data, ids=data.ids[chosen], domain=data.domain[chosen])


@torch.no_grad()
def attacked_loss(model: MoELMForCausalLM, data: Packed, share: float) -> float:
    """Mean loss per token where a `share` of the input tokens is replaced; the targets are the true tokens."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for ids in data.ids.split(16):
        swap = torch.rand(ids.shape, generator=generator) < share
        inputs = torch.where(swap, random_tokens(ids, model.config.vocab_size, generator), ids)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())) * len(ids)
    return total / len(data.ids)


def random_tokens(ids: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, ids.shape, generator=generator)


def uneven(model: MoELMForCausalLM, data: Packed) -> float:
    """Standard deviation of the experts' loads over their mean, averaged over layers."""
    (counts,) = opening.open(model.eval()).observe(list(data.ids.split(16)), [ExpertCounts()], progress=False)
    loads: Sequence[Tensor] = [table.sum(dim=0) for table in counts.values()]
    return fmean(float(load.std(correction=0) / load.mean()) for load in loads)


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def per_layer(product: float, rule: str) -> float:
        return rows.mean(FACTOR, {"gamma * sigma": f"{product:g}", "rule": rule})

    def gap(share: float, rule: str) -> float:
        return rows.mean(ATTACKED, {"tokens swapped": f"{share:.1%}", "rule": rule})

    between = [product for product in PRODUCTS if 2 < product < stability_limit(MU)]
    error = max(abs(limit(mu) / stability_limit(mu) - 1) for mu in (0.0, *GRID, MU))
    return [
        Claim(
            name="gamma * sigma of 2.1 to 3.3: the least factor of plain descent, which diverges",
            measured=min(per_layer(product, PLAIN) for product in between),
            relation=">",
            needed=1,
        ),
        Claim(
            name="gamma * sigma of 2.1 to 3.3: the largest factor of heavy ball, which converges",
            measured=max(per_layer(product, HEAVY) for product in between),
            relation="<",
            needed=1,
        ),
        Claim(
            name="gamma * sigma of 3.5: the factor of heavy ball, which diverges too",
            measured=per_layer(3.5, HEAVY),
            relation=">",
            needed=1,
        ),
        Claim(
            name="largest relative error of the limit 2 (1 + mu)",
            measured=error,
            relation="<=",
            needed=LIMIT_ERROR,
        ),
        Claim(
            name="heavy ball: nats of held-out loss lost to the plain residual",
            measured=rows.mean(LOSS, {"rule": HEAVY}) - rows.mean(LOSS, {"rule": PLAIN}),
            relation="<=",
            needed=CLEAN_LOSS,
        ),
        *(
            Claim(
                name=f"heavy ball, {share:.1%} of the tokens swapped: nats by which its loss grows more than plain's",
                measured=gap(share, HEAVY) - gap(share, PLAIN),
                relation="<=",
                needed=GAP,
            )
            for share in SWAPS
        ),
    ]
