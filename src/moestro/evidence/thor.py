"""A classifier of handwritten digits (scikit-learn's, 300 of them to train on) with three residual expert layers is
trained by Adam for 1500 steps of 64 images, and tested on the other 1497: one dense expert; four with Switch routing
(balance loss 0.01); four stochastic experts with a consistency loss of weight 0, 1 and 5. Stochastic experts see each
batch twice, as the method has it, the others once. No label smoothing, so that the likelihoods compare.

- *Measured*: accuracy and negative log-likelihood on the test images, with experts drawn anew for each image; the
  symmetric divergence of two such draws, and the share of images they classify differently. ± is the standard
  deviation over seeds, which also draw the training images.
- *Gate against random*, the paper's motive: small language models trained from scratch with a learned top-1 gate
  (Switch), with an expert drawn for each token, and with one drawn for each batch, as stochastic experts are without
  the consistency loss; sequences of generated and real texts. And `quartet`, which was trained with its gate, routed at
  random: what a gate is worth to a model that has learned to rely on it, which is another question.

Not tried here: translation. The paper's gains are on translation benchmarks with encoder-decoder models.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import moestro.view.open as opening
from moestro.data import embedded, embedded_domains, limit_tokens, token_batches
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.evidence.training import packed, train_lm
from moestro.fitting.evaluate import HeldoutLoss, batch_tokens
from moestro.layers import MoE, gather_losses
from moestro.layers.experts import GatedExperts
from moestro.layers.routers.stochastic import StochasticRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.train.consistency import consistency_step, dispatch_agreement
from moestro.view.edit import Reselect
from moestro.view.observe import progress_bar

TITLE = "Taming Sparsely Activated Transformer with Stochastic Experts"
ARXIV = "2110.04260"
CLAIM = (
    "Learned gates route no better than chance; experts drawn at random and trained to agree with each other do better "
    "than a gate, need no balancing, and predict nearly alike whichever is drawn."
)
SOURCES = (
    "layers/routers/stochastic.py",
    "train/consistency.py",
    "evidence/base.py",
    "evidence/training.py",
    "bundled/quartet/model.safetensors",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "steps": 400, "lm_seeds": 1, "lm_steps": 40, "heldout_tokens": 128}
NOT_SHOWN = {
    "language models trained either way: nats that a learned gate gains on random routing by token": (
        "here the gate is worth more than the seeds differ by. The four kinds of text are easily told apart, which may "
        "be what it learns; the paper's finding is on translation"
    ),
}

HIDDEN, WIDTH, LAYERS, EXPERTS, PIXELS, CLASSES = 64, 64, 3, 4, 64, 10
TRAINED_ON, BATCH, RATE = 300, 64, 1e-3
DENSE, SWITCH = "dense, one expert", "Switch, 4 experts"
THOR = {f"stochastic, 4 experts, alpha {alpha:g}": alpha for alpha in (0.0, 1.0, 5.0)}
LOOSE, _, TIGHT = THOR
DRAWS = 4
"""Of the experts, in testing."""

LM_DOMAINS = ("arithmetic", "sorting", "code", "ui-de")
LM_SIZE: dict[str, Any] = dict(
    hidden_size=64, head_dim=16, intermediate_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=1
)
GATE, BY_TOKEN, BY_BATCH = "learned gate", "random by token", "random by batch"
LM_ROUTERS: dict[str, dict[str, Any]] = {
    GATE: dict(router="switch", router_losses={"load_balance": 0.01}),
    BY_TOKEN: dict(router="random", router_losses=None),
    BY_BATCH: dict(router={"kind": "stochastic", "level": "sentence"}, router_losses=None),
}

# Thresholds, stated before the first run.
CLOSER = 0.6  # of the divergence without the consistency loss
NO_BETTER = 0.03  # nats that a learned gate may gain on random routing, in models trained either way

ACCURACY = "digits: accuracy"
NLL = "digits: negative log-likelihood, nats"
KL = "digits: symmetric divergence of two draws, nats"
DIFFER = "digits: share of images that two draws classify differently"
LM_LOSS = "language model trained so: held-out loss, nats per token"
QUARTET = "quartet: held-out loss, nats per token"


class Net(nn.Module):
    """Pixels to classes through residual expert layers."""

    def __init__(self, name: str):
        super().__init__()
        self.inner = nn.Linear(PIXELS, HIDDEN)
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(LAYERS)])
        self.layers = nn.ModuleList([_layer(name) for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        for norm, layer in zip(self.norms, self.layers):
            hidden = hidden + layer(norm(hidden))
        return self.head(hidden)


def _layer(name: str) -> MoE:
    count = 1 if name == DENSE else EXPERTS
    experts = GatedExperts(count, HIDDEN, WIDTH)
    experts.reset_parameters(HIDDEN**-0.5)
    if name == SWITCH:
        return MoE(TopKRouter(HIDDEN, count, 1, normalize=False), experts, losses={"load_balance": 0.01})
    return MoE(StochasticRouter(HIDDEN, count, level="token"), experts)


def run(
    *,
    model: str = "quartet",
    seeds: int = 4,
    steps: int = 1500,
    lm_seeds: int = 3,
    lm_steps: int = 150,
    heldout_tokens: int = 512,
    progress: bool = True,
) -> Evidence:
    """Train the classifiers and the language models, and hold the claims against what was measured."""
    rows = Rows()
    names = [DENSE, SWITCH, *THOR]
    with progress_bar(progress) as bar:
        task = bar.add_task("digits", total=seeds * len(names))
        for seed in range(seeds):
            for name in names:
                classify(rows, name, seed, steps)
                bar.advance(task)
    data, heldout = packed("calibration", LM_DOMAINS), packed("heldout", LM_DOMAINS)
    for seed in range(lm_seeds):
        for name, config in LM_ROUTERS.items():
            trained = train_lm(
                seed=seed, steps=lm_steps, data=data, heldout=heldout, label=name, progress=progress, **LM_SIZE | config
            )
            rows.add(LM_LOSS, {"routing": name}, trained.mean_heldout)
    ungated(rows, model, heldout_tokens)
    return Evidence(rows=list(rows), claims=claims(rows))


def classify(rows: Rows, name: str, seed: int, steps: int) -> None:
    """Train and test one classifier."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw)
    shown, hidden = order[:TRAINED_ON], order[TRAINED_ON:]
    torch.manual_seed(seed)
    net = Net(name)
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    net.train()
    for _ in range(steps):
        chosen = shown[torch.randint(TRAINED_ON, (BATCH,), generator=draw)]
        if name in THOR:
            step = consistency_step(
                net, images[chosen], labels[chosen], alpha=THOR[name], label_smoothing=0.0, reduction="mean"
            )
            loss = step["loss"]
        else:
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            loss = loss + sum(gather_losses(net).values())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    measure(rows, name, net.eval(), images[hidden], labels[hidden])


@torch.no_grad()
def measure(rows: Rows, name: str, net: Net, images: Tensor, labels: Tensor) -> None:
    """Means over draws of the experts."""
    setting = {"model": name}
    logits = []
    for seed in range(DRAWS):
        for layer in net.layers:
            if isinstance(layer.router, StochasticRouter):
                layer.router.dispatch(seed=seed)
        logits.append(net(images))
    rows.add(ACCURACY, setting, fmean(float((z.argmax(dim=-1) == labels).float().mean()) for z in logits))
    rows.add(NLL, setting, fmean(float(F.cross_entropy(z, labels)) for z in logits))
    if name in THOR:
        agreement = dispatch_agreement(net, [images], DRAWS)
        rows.add(KL, setting, agreement["sym_kl"])
        rows.add(DIFFER, setting, agreement["disagreement"])


def ungated(rows: Rows, model: str, heldout_tokens: int) -> None:
    """The loss of a model trained with a gate whose logits are replaced by noise."""
    view = opening.open(model)
    texts = token_batches(
        embedded(embedded_domains(), "heldout"),
        view.tokenizer,
        max_length=128,
        max_tokens_per_batch=batch_tokens(view.model.config),
    )
    data = limit_tokens(texts, heldout_tokens)
    noise = torch.Generator().manual_seed(0)
    edit = Reselect(lambda layer, logits: torch.randn(logits.shape, generator=noise).to(logits))
    for name, edits in {"its own gate": [], "random": [edit]}.items():
        with view.edits(*edits):
            (losses,) = view.observe(data, [HeldoutLoss()], progress=False)
        rows.add(QUARTET, {"routing": name}, fmean(loss for loss, _ in losses.values()))


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def mean(metric: str, name: str) -> float:
        return rows.mean(metric, {"model": name})

    def lm(name: str) -> float:
        return rows.mean(LM_LOSS, {"routing": name})

    return [
        Claim(
            name="digits: divergence of two draws at alpha 5, as a part of that at alpha 0",
            measured=ratio(mean(KL, TIGHT), mean(KL, LOOSE)),
            relation="<=",
            needed=CLOSER,
        ),
        Claim(
            name="digits: nats of likelihood gained by alpha 5 on alpha 0",
            measured=mean(NLL, LOOSE) - mean(NLL, TIGHT),
            relation=">=",
            needed=0,
        ),
        Claim(
            name="digits: accuracy of stochastic experts at alpha 5 above Switch",
            measured=mean(ACCURACY, TIGHT) - mean(ACCURACY, SWITCH),
            relation=">=",
            needed=0,
        ),
        Claim(
            name="language models trained either way: nats that a learned gate gains on random routing by token",
            measured=lm(BY_TOKEN) - lm(GATE),
            relation="<=",
            needed=NO_BETTER,
        ),
    ]
