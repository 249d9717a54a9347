"""The tree gate beside a top-2 softmax gate, and the local search on a gate whose experts are in the wrong places, both
on generated data; then a dense model distilled into a sparse one under the tree gate and others.

- *Gate*: 5000 samples (and 2000 held-out ones) of 8 Gaussian clusters in 8 dimensions, each with its own linear map,
  noise 0.1. A layer of 8 linear experts learns the maps: 1500 Adam steps of 256 samples at a learning rate of 0.01,
  with the same experts, samples and seeds under every gate, 5 seeds. COMET has 2 trees and gamma 1; every gate sees the
  inputs through a layer norm. Error: mean squared, as a part of the variance of the outputs.
- *Cardinality*: the same gates with every node rounded (`harden`), which guarantees at most 2 experts. The ramp raises
  lambda linearly over the training in place of holding it.
- *Local search*: 16 clusters with frozen experts that are right, tokens hashed to them by a scrambled map; nothing but
  the permutation is learned. 500 Adam steps at a learning rate of 5e-4 (within the paper's range), 5 seeds: the
  released schedule (tau from 1e-3 to 1e-7), a warmer one (1e-1 to 1e-3), and no search, on the same maps.

- *Distillation* (as MoEBERT, arXiv:2204.07675, with the gate changed): a BERT of 3 layers, 128 wide, 384 neurons a
  layer, learns in 1500 steps which of 8 domains an excerpt of 8 to 16 tokens is from (code, documentation, science,
  user interfaces in English, Spanish, Portuguese, Russian, Ukrainian; 21,374 excerpts of the embedded sample, 2400 of
  its held-out documents). Its feed-forward layers are split by importance into 4 experts of 96 neurons, of which the 64
  most important are in every expert (MoEBERT's proportions). Students train for 250 Adam steps of 32 excerpts on the
  task's loss plus the distance of every layer's hidden states and the divergence of the predictions: under the tree
  gate (1 tree, no node bias), the same with a local search in the first third of the steps, a top-1 softmax gate with a
  balance loss, and random hashing (MoEBERT's gate); further a dense student of the 96 most important neurons, and the
  tree gate without the layer-wise loss. 3 seeds, each with its own teacher; students of a teacher see the same batches.
  Gates are compared with nodes rounded, where a token has one expert under each. Both the tree gate and the softmax
  gate had their coefficients chosen among four settings on a further seed and part of the calibration documents, and
  there the teacher's steps were raised from 600 to 1500, since its loss still fell.

How far the claims about distillation carry: students differ in accuracy by no more than the spread over 3 seeds, and
the needed 0 is no margin. The tree gate is above hashing, the top-1 gate and the narrow dense student in 2 seeds of 3;
its held-out loss is below theirs in all 3, by 0.005 to 0.027 nats. The local search is level with hashing, and below
the tree gate without it. Two thirds of an expert being shared, little is left for a gate to decide. The margin to the
teacher says little: the teacher is not trained to the end, and students, which train on, pass it. The tree gate's
student stays further from the teacher's predictions than those of the other gates. The layer-wise loss cuts that
distance by two fifths, and lowers the held-out loss in 2 seeds of 3.

Not tried: the paper's recommender and vision data (MovieLens and the others are not part of the package), its tuning
protocol of 500 trials a gate, and BERT itself on GLUE and SQuAD; the percentages that it reports need these.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.evidence import comet_distillation
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.layers import after_step, gather_losses
from moestro.layers.routers.base import Router
from moestro.layers.routers.baselines import HashRouter
from moestro.layers.routers.comet import CometRouter
from moestro.layers.routers.permutation import RELEASED_TAU, WARM_TAU, PermutationSearch, PermutedRouter
from moestro.layers.routers.top_k import TopKRouter
from moestro.routing import RoutingContext, dense_weights
from moestro.view.observe import progress_bar

TITLE = "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search"
ARXIV = "2306.02824"
CLAIM = (
    "A differentiable gate of K binary trees, dense at first and driven to at most K experts by an entropy loss, "
    "learns better than top-k; a learned permutation of the experts repairs gates that are stuck. BERT distilled into "
    "experts under this gate does better than under hash routing."
)
SOURCES = (
    "layers/moe.py",
    "layers/losses.py",
    "layers/routers/comet.py",
    "layers/routers/permutation.py",
    "layers/routers/top_k.py",
    "layers/routers/baselines.py",
    "build/equivalent_split.py",
    "build/in_place.py",
    "build/moebert.py",
    "train/consistency.py",
    "train/distillation.py",
    "evidence/base.py",
    "evidence/comet_distillation.py",
    "bundled/quartet/tokenizer.json",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 2, "steps": 500, "teachers": 1, "teacher_steps": 200, "student_steps": 60}
NOT_SHOWN = {
    "error after rounding as a part of that before, with the ramp": (
        "samples near a node's boundary stay undecided: at the end of 1500 steps some still use 5 or 6 experts, and "
        "rounding moves all of these at once. A gate that must keep to 2 experts wants further steps after `harden`"
    ),
}

# Thresholds, stated before the first run.
PART_OF_TOP_2 = 0.9  # of top-2's error
MEAN_ACTIVE = 3.0  # experts a token, before rounding
HARDENING = 1.1  # error after rounding as a part of that before, with the ramp
RECOVERED = 0.95
GAIN_OF_SEARCH = 5.0

EXPERTS, SIZE, K = 8, 8, 2
TRAIN, HELDOUT, BATCH, RATE = 5000, 2000, 256, 1e-2
BUCKETS, SEARCH_STEPS, SEARCH_RATE = 16, 500, 5e-4

TOP_2, RAMP = "top-2", "lambda 0 to 1"
LAMBDAS = {"lambda 0": 0.0, "lambda 0.01": 0.01, "lambda 0.1": 0.1, "lambda 1": 1.0}
CHOSEN = "lambda 0.1"  # the router's default

ERROR = "held-out error, as a part of the outputs' variance"
ACTIVE = "experts a token uses on average"
MOST = "experts that any token uses at most"
ENTROPY = "leaf entropy of a tree, nats"
USED = "experts that serve at least 1% of the held-out samples"
FOUND = "share of the map that is recovered"
MAP_ERROR = "error after the search, as a part of the outputs' variance"

Gate = Callable[[], Router]


def gates() -> dict[str, Gate]:
    def comet(coefficient: float, ramp: float = 0.0) -> Gate:
        return lambda: CometRouter(SIZE, EXPERTS, K, gamma=1.0, entropy_coef=coefficient, ramp=ramp)

    trees = {name: comet(coefficient) for name, coefficient in LAMBDAS.items()}
    return {TOP_2: lambda: TopKRouter(SIZE, EXPERTS, K), **trees, RAMP: comet(1.0, ramp=1.0)}


class LinearMoE(nn.Module):
    """Experts y = A x + c under a gate that sees the normed input."""

    def __init__(self, router: Router):
        super().__init__()
        self.router = router
        self.maps = nn.Parameter(torch.randn(EXPERTS, SIZE, SIZE) * SIZE**-0.5)
        self.offsets = nn.Parameter(torch.zeros(EXPERTS, SIZE))

    def gate(self, x: Tensor, progress: float = 1.0) -> Tensor:
        """Gate weights [N, E]."""
        context = RoutingContext((1, len(x)), progress=progress)
        return dense_weights(self.router(F.layer_norm(x, (SIZE,)), context), EXPERTS)

    def forward(self, x: Tensor, progress: float = 1.0) -> Tensor:
        outputs = torch.einsum("eoh,nh->neo", self.maps, x) + self.offsets
        return torch.einsum("ne,neo->no", self.gate(x, progress), outputs)


def clusters(seed: int, count: int, samples: int, centres: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples [N, H], their cluster [N], outputs [N, H], and the clusters' maps; means 2 apart from 0 a dimension."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(centres, SIZE, generator=generator)
    maps = torch.randn(centres, SIZE, SIZE, generator=generator) * SIZE**-0.5
    cluster = torch.randint(centres, (samples + count,), generator=generator)
    x = means[cluster] + torch.randn(len(cluster), SIZE, generator=generator)
    y = torch.einsum("noh,nh->no", maps[cluster], x)
    return x, cluster, y + 0.1 * torch.randn(y.shape, generator=generator), maps


def run(
    *,
    seeds: int = 5,
    steps: int = 1500,
    teachers: int = 3,
    teacher_steps: int = 1500,
    student_steps: int = 250,
    progress: bool = True,
) -> Evidence:
    """Train every gate and run every search from every seed; then distil every student from each of the teachers."""
    rows = Rows()
    with progress_bar(progress) as bar:
        total = seeds * (len(gates()) + 3) + teachers * comet_distillation.TRAININGS
        task = bar.add_task("comet", total=total)
        for seed in range(seeds):
            for name, gate in gates().items():
                measure_gate(rows, name, gate, seed, steps)
                bar.advance(task)
            for name, tau in {"none": None, "released": RELEASED_TAU, "warm": WARM_TAU}.items():
                found, error = search(seed, tau)
                rows.add(FOUND, {"search": name}, found)
                rows.add(MAP_ERROR, {"search": name}, error)
                bar.advance(task)
        for seed in range(teachers):
            comet_distillation.measure_students(
                rows, seed, teacher_steps, student_steps, on_done=lambda: bar.advance(task)
            )
    return Evidence(rows=list(rows), claims=claims(rows))


def measure_gate(rows: Rows, name: str, gate: Gate, seed: int, steps: int) -> None:
    """Train one gate and measure it, as it is and rounded."""
    x, _, y, _ = clusters(seed, HELDOUT, TRAIN, EXPERTS)
    torch.manual_seed(seed)
    model = LinearMoE(TopKRouter(SIZE, EXPERTS, K))  # experts are drawn first, alike for every gate
    model.router = gate()
    train(model, x[:TRAIN], y[:TRAIN], seed, steps)
    x, y = x[TRAIN:], y[TRAIN:]
    _measure(rows, {"gate": name, "nodes": "as trained"}, model, x, y)
    if isinstance(model.router, CometRouter):
        with torch.no_grad():
            p = model.router.leaves(F.layer_norm(x, (SIZE,)))
        rows.add(ENTROPY, {"gate": name}, float(torch.special.entr(p).sum(dim=2).mean()))
        model.router.harden()
        _measure(rows, {"gate": name, "nodes": "rounded"}, model, x, y)


def train(model: LinearMoE, x: Tensor, y: Tensor, seed: int, steps: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=order)
        loss = F.mse_loss(model(x[chosen], step / steps), y[chosen]) + sum(gather_losses(model).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


@torch.no_grad()
def _measure(rows: Rows, setting: dict[str, str], model: LinearMoE, x: Tensor, y: Tensor) -> None:
    weights = model.gate(x)
    rows.add(ERROR, setting, float(F.mse_loss(model(x), y) / y.var()))
    rows.add(ACTIVE, setting, float((weights > 0).sum(dim=1).float().mean()))
    rows.add(MOST, setting, float((weights > 0).sum(dim=1).max()))
    rows.add(USED, setting, float(((weights > 0).float().mean(dim=0) >= 0.01).sum()))


def search(seed: int, tau: tuple[float, float] | None) -> tuple[float, float]:
    """(share of the buckets that reach their own expert, error) after a search; tau None: without one.

    Bucket b is served by expert b of the gate; its right expert is another one, drawn by seed.
    """
    x, bucket, y, maps = clusters(seed, 0, TRAIN, BUCKETS)
    order = torch.Generator().manual_seed(seed)
    right = torch.randperm(BUCKETS, generator=order)
    experts = torch.empty_like(maps)
    experts[right] = maps
    inner = HashRouter(SIZE, BUCKETS, 1, vocab_size=BUCKETS)
    inner.table.copy_(torch.arange(BUCKETS)[:, None])
    torch.manual_seed(seed)
    router: Router = inner
    if tau is not None:
        router = PermutedRouter(inner, PermutationSearch(BUCKETS, SEARCH_STEPS, tau=tau))
        optimiser = torch.optim.Adam(router.parameters(), lr=SEARCH_RATE)
        router.train()
        for _ in range(SEARCH_STEPS):
            chosen = torch.randint(len(x), (BATCH,), generator=order)
            out = _served(router, experts, x[chosen], bucket[chosen])
            loss = F.mse_loss(out, y[chosen]) + sum(gather_losses(router).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            after_step(router, 1.0)
    router.eval()
    with torch.no_grad():
        reached = router(x[:BUCKETS], RoutingContext((1, BUCKETS), input_ids=torch.arange(BUCKETS)[None])).indices[:, 0]
        error = F.mse_loss(_served(router, experts, x, bucket), y) / y.var()
    return float((reached == right).float().mean()), float(error)


def _served(router: Router, experts: Tensor, x: Tensor, bucket: Tensor) -> Tensor:
    weights = dense_weights(router(x, RoutingContext((1, len(x)), input_ids=bucket[None])), BUCKETS)
    return torch.einsum("ne,neo->no", weights, torch.einsum("eoh,nh->neo", experts, x))


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def trained(metric: str, gate: str, nodes: str = "as trained") -> float:
        return rows.mean(metric, {"gate": gate, "nodes": nodes})

    entropies = [rows.mean(ENTROPY, {"gate": name}) for name in LAMBDAS]
    rounded = [n for gate in (*LAMBDAS, RAMP) for n in rows.values(MOST, {"gate": gate, "nodes": "rounded"})]
    return [
        Claim(
            name="error of the tree gate at lambda 0.1 as a part of top-2's",
            measured=ratio(trained(ERROR, CHOSEN), trained(ERROR, TOP_2)),
            relation="<=",
            needed=PART_OF_TOP_2,
        ),
        Claim(
            name="experts a token uses there, before rounding",
            measured=trained(ACTIVE, CHOSEN),
            relation="<=",
            needed=MEAN_ACTIVE,
        ),
        Claim(
            name="least fall of the leaf entropy from one lambda to the next higher",
            measured=min(low - high for low, high in pairwise(entropies)),
            relation=">",
            needed=0,
        ),
        Claim(name="experts that any token uses after rounding", measured=max(rounded), relation="<=", needed=K),
        Claim(
            name="error after rounding as a part of that before, with the ramp",
            measured=ratio(trained(ERROR, RAMP, "rounded"), trained(ERROR, RAMP)),
            relation="<=",
            needed=HARDENING,
        ),
        Claim(
            name="share of a scrambled map that the warm search recovers",
            measured=fmean(rows.values(FOUND, {"search": "warm"})),
            relation=">=",
            needed=RECOVERED,
        ),
        Claim(
            name="error without a search as a multiple of that after the warm one",
            measured=ratio(rows.mean(MAP_ERROR, {"search": "none"}), rows.mean(MAP_ERROR, {"search": "warm"})),
            relation=">=",
            needed=GAIN_OF_SEARCH,
        ),
        *comet_distillation.claims(rows),
    ]
