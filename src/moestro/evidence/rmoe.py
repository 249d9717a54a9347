"""Language models of 8 layers with 16 experts, 2 a token, trained from scratch on three domains of the embedded sample:
three seeds, the same rows in the same order for all. They differ in their routers alone:

- *linear*: the usual one.
- *bottleneck*: G tanh(A u), as wide as it must be to have as many parameters as the recurrent routers.
- *recurrent*: projector of each layer, one GRU of 32 numbers for all layers.
- *detached*, *zeroed*: the same without the gradient from the layers above, and without the state.
- *previous logits*: linear routers that add half of the layer below's own logits to theirs. In the paper this is a
  control (r-0.5) on top of *zeroed* (NP there); its test loss with 12 to 32 layers lies between linear and recurrent.

Measured on held-out text: the loss; how much the first expert of one layer tells about that of the next (normalised
mutual information, mean over the seven pairs of layers); how alike the weights of a layer's experts are. And, with the
stream between the layers cut, so that the routing state is the only way: the gradient that the first layer's projector
gets from the last layer's logits.

The paper reports a gain that grows with depth and is near nothing at 6 layers (enwik8: 0.001 bits per character), so a
lower loss is not claimed here. What previous logits lose to linear is less than the spread over seeds. Not tried, for
want of scale: 24 layers, models of a billion parameters, speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moestro.view.open as opening
from moestro.analyze.cross_layer import FirstChoice, cross_layer_mi
from moestro.analyze.expert_similarity import expert_weight_similarity
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.evidence.training import Packed, packed, train_lm
from moestro.layers.routers.base import Router
from moestro.models.lm import MoELMForCausalLM
from moestro.routing import RoutingContext
from moestro.view.observe import progress_bar

TITLE = "Layerwise Recurrent Router for Mixture-of-Experts"
ARXIV = "2408.06793"
CLAIM = (
    "Routers that pass a recurrent state from layer to layer choose experts with regard to the choices below, train "
    "through an extra gradient path, and make deeper models better, for hardly any parameters."
)
SOURCES = (
    "layers/routers/recurrent.py",
    "layers/routers/previous_logits.py",
    "analyze/cross_layer.py",
    "analyze/expert_similarity.py",
    "evidence/training.py",
    "evidence/base.py",
    "data/sample/*.jsonl.gz",
)
QUICK = {"seeds": 1, "steps": 30, "observed_rows": 16}
NOT_SHOWN = {
    "mutual information of consecutive layers: recurrent as a multiple of linear": (
        "after so short a training, a stream that has changed little from layer to layer makes even linear routers "
        "choose alike. The recurrent routers depend on each other more than the bottleneck of equal size does, but the "
        "same routers without any state do as well, so the difference is not the state's"
    ),
    "similarity of the experts' weights: recurrent minus linear": (
        "experts that were drawn independently have moved too little: all are within 0.02 of no similarity, and the "
        "difference is less than the spread over seeds"
    ),
}

DOMAINS = ("arithmetic", "code", "ui-ru")
STATE = 32
SIZE: dict[str, Any] = dict(
    num_hidden_layers=8,
    hidden_size=64,
    head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=48,
    num_experts=16,
    num_experts_per_tok=2,
)
LINEAR, BOTTLENECK, RECURRENT, DETACHED, ZEROED = "linear", "bottleneck", "recurrent", "detached", "zeroed"
PREVIOUS = "previous logits"

# Thresholds, stated before the first run.
MORE_INFORMATION = 1.1  # times the linear routers' mutual information
LOSS_LOST = 0.02  # nats that the recurrent routers may lose to the linear ones
PREVIOUS_LOST = 0.0  # nats that previous logits lose to the recurrent routers at least

LOSS = "held-out loss, nats per token"
DIFFERENCE = "held-out loss minus that of the linear routers with the same seed, nats per token"
INFORMATION = "normalised mutual information of consecutive layers' first experts"
ALIKE = "similarity of the weights of a layer's experts"
GRADIENT = "norm of the first projector's gradient from the last layer's logits, through the state alone"
PARAMETERS = "parameters of the routers, thousands"


def routers() -> dict[str, Any]:
    """The router of each setting; the bottleneck's width gives it the number of parameters nearest to the recurrent."""
    layers, hidden, experts = (SIZE[n] for n in ("num_hidden_layers", "hidden_size", "num_experts"))
    cell = 6 * STATE * STATE + 6 * STATE
    wide = round(STATE + cell / (layers * (hidden + experts)))
    recurrent = {"kind": "recurrent", "state_size": STATE}
    return {
        LINEAR: "top_k",
        BOTTLENECK: {"kind": "bottleneck", "state_size": wide},
        RECURRENT: recurrent,
        DETACHED: recurrent | {"history": "detached"},
        ZEROED: recurrent | {"history": "zeroed"},
        PREVIOUS: {"kind": "previous_logits", "ratio": 0.5},
    }


def run(*, seeds: int = 3, steps: int = 110, observed_rows: int = 192, progress: bool = True) -> Evidence:
    """Train the models and measure them."""
    rows = Rows()
    data, heldout = packed("calibration", DOMAINS), packed("heldout", DOMAINS)
    spread = torch.linspace(0, len(heldout.ids) - 1, observed_rows).long()
    runs = [(seed, name, router) for seed in range(seeds) for name, router in routers().items()]
    with progress_bar(progress) as bar:
        for seed, name, router in bar.track(runs, description="training"):
            trained = train_lm(
                seed=seed,
                steps=steps,
                batch_rows=6,
                warmup=20,
                data=data,
                heldout=heldout,
                progress=False,
                router=router,
                **SIZE,
            )
            rows.add(LOSS, {"router": name}, trained.mean_heldout)
            if name != LINEAR:
                rows.add(DIFFERENCE, {"router": name}, trained.mean_heldout - rows.values(LOSS, {"router": LINEAR})[-1])
            measure(rows, name, trained.model.eval(), heldout, spread)
    return Evidence(rows=list(rows), claims=claims(rows))


def measure(rows: Rows, name: str, model: MoELMForCausalLM, heldout: Packed, chosen: Tensor) -> None:
    """What a trained model's routers and experts look like."""
    view = opening.open(model)
    (first,) = view.observe(list(heldout.ids[chosen].split(16)), [FirstChoice()], progress=False)
    rows.add(INFORMATION, {"router": name}, float(cross_layer_mi(first).mean()))
    rows.add(ALIKE, {"router": name}, float(expert_weight_similarity(view.layers).mean()))
    if name in (RECURRENT, DETACHED, ZEROED):
        rows.add(GRADIENT, {"router": name}, gradient_through_state(model, heldout.ids[chosen[:4]]))
    if PARAMETERS not in {row.metric for row in rows if row.setting == {"router": name}}:
        parameters = {p for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
        rows.add(PARAMETERS, {"router": name}, sum(p.numel() for p in parameters) / 1000)


def gradient_through_state(model: MoELMForCausalLM, ids: Tensor) -> float:
    """|d sum(z_L^2) / d A_1| with every layer's hidden states held fixed."""
    chain: list[Any] = [module for module in model.modules() if isinstance(module, Router)]
    seen: list[Tensor] = []
    hooks = [router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for router in chain]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    context = RoutingContext(shape=(ids.shape[0], ids.shape[1]))
    logits = [router(hidden, context).logits for router, hidden in zip(chain, seen, strict=True)]
    logits[-1].square().sum().backward()
    gradient = chain[0].projector.weight.grad
    return 0.0 if gradient is None else float(gradient.norm())


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def mean(metric: str, router: str) -> float:
        return rows.mean(metric, {"router": router})

    return [
        Claim(
            name="mutual information of consecutive layers: recurrent as a multiple of linear",
            measured=ratio(mean(INFORMATION, RECURRENT), mean(INFORMATION, LINEAR)),
            relation=">=",
            needed=MORE_INFORMATION,
        ),
        Claim(
            name="nats of held-out loss that recurrent loses to linear",
            measured=mean(DIFFERENCE, RECURRENT),
            relation="<=",
            needed=LOSS_LOST,
        ),
        Claim(
            name="gradient through the state of recurrent, the least of all seeds",
            measured=min(rows.values(GRADIENT, {"router": RECURRENT})),
            relation=">",
            needed=0,
        ),
        Claim(
            name="gradient through the state of detached and zeroed, the largest of all seeds",
            measured=max(v for name in (DETACHED, ZEROED) for v in rows.values(GRADIENT, {"router": name})),
            relation="<=",
            needed=0,
        ),
        Claim(
            name="similarity of the experts' weights: recurrent minus linear",
            measured=mean(ALIKE, RECURRENT) - mean(ALIKE, LINEAR),
            relation="<",
            needed=0,
        ),
        Claim(
            name="nats of held-out loss that previous logits lose to recurrent",
            measured=mean(DIFFERENCE, PREVIOUS) - mean(DIFFERENCE, RECURRENT),
            relation=">=",
            needed=PREVIOUS_LOST,
        ),
    ]
