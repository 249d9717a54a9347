"""Better answers at test time from the pathways of similar questions that the model gets right.

    references = collect(view, prompts, answers)                 those that the model answers, with their pathways
    near = nearest(references, questions)                        k neighbours by embedding, weighted by a kernel
    found = neighbourhood_descent(view, references, questions, near)
    ids = generate(view, found, max_new_tokens=32)

A pathway omega says how the router weighs the experts at the last prompt token (see `pathway_edit`). Only the critical
layers (the last third) are changed, and in them the core experts, those that omega weighs most. No weight changes. A
question x has no known answer, so its pathway is judged on its neighbours (see `pathway_references`):

    L(omega) = sum_i K(x_i, x) CE(f(x_i, omega), y_i) / sum_i K(x_i, x)

and found in one of three ways: `neighbourhood_descent` follows the gradient of L; `kernel_regression` mixes omega with
the neighbours' own, sum_i K omega_i / sum_i K, by the share that makes L least; `mode_finding` moves it to where the
references' pathways are dense. `oracle` follows the loss on the known answer: the most that routing could give.

"C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert Re-Mixing"
(arXiv:2504.07964). Not told there, and ours: the bandwidth, the projection on the simplex, and that all core experts
are at work while the gradient is followed. Shapes: S prompts, M references, K neighbours, E experts, C core experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.steer.answers import BATCH, Answered, Prompt, frozen, padded, pairs, token_ids
from moestro.steer.pathway_edit import Pathways, Scope, edit_of, read, rules_of
from moestro.steer.pathway_references import NEIGHBOURS, Neighbours, References, median_distance
from moestro.view.observe import progress_bar

STEPS = 10
RATES = (1e-2, 1e-5)
"""Of Adam: the first step's and the last's, on half a cosine."""
CRITICAL = 5 / 16
"""Part of the MoE layers, the last ones: 5 of OLMoE's 16."""
CORE = 2.5
"""Core experts for each of the top k: 20 of OLMoE, whose k is 8."""
MIXES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Omega = Mapping[int, Tensor]
Loss = Callable[[Omega, Omega | None], Tensor]
"""Of {layer: pathways [S, E]} and {layer: core experts [S, C]}, all of them at work; None: those the rule chooses."""


def neighbourhood_descent(
    view: Any,
    references: References,
    prompts: Sequence[Prompt],
    near: Neighbours,
    *,
    layers: Collection[int] | None = None,
    core_experts: int | None = None,
    steps: int = STEPS,
    rates: tuple[float, float] = RATES,
    scope: Scope = "decode",
    batch_size: int = BATCH,
    progress: bool = True,
) -> Pathways:
    """Follow the gradient of L: the neighbours are run with the prompt's omega, and their answers are known.

    `layers`: the critical ones; `core_experts`: how many in each. Raises ValueError, before anything runs, for
    references of another model and for neighbours that do not fit the prompts or the references.
    """
    found, core = _start(view, references, prompts, near, layers, core_experts, scope, batch_size)

    def loss(rows: slice) -> Loss:
        return _surrogate(view, references, near[rows], scope)

    return _descend(view, found, core, loss, steps, rates, batch_size, progress)


def oracle(
    view: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Prompt],
    *,
    layers: Collection[int] | None = None,
    core_experts: int | None = None,
    steps: int = STEPS,
    rates: tuple[float, float] = RATES,
    scope: Scope = "decode",
    batch_size: int = BATCH,
    progress: bool = True,
) -> Pathways:
    """Follow the gradient of the loss on the known answers.

    `found.judge` beside `answers.judge` of the model as it is: the oracle gap, what better routing could give.
    """
    asked, known = pairs(view, prompts, answers)
    found, core = _own(view, asked, layers, core_experts, scope, batch_size)

    def loss(rows: slice) -> Loss:
        answered = Answered(view, asked[rows], known[rows])
        return lambda omega, core: answered.losses(edit_of(view, omega, answered.lengths, scope, core))[0]

    return _descend(view, found, core, loss, steps, rates, batch_size, progress)


@torch.no_grad()
def kernel_regression(
    view: Any,
    references: References,
    prompts: Sequence[Prompt],
    near: Neighbours,
    *,
    layers: Collection[int] | None = None,
    core_experts: int | None = None,
    mixes: Sequence[float] = MIXES,
    scope: Scope = "decode",
    batch_size: int = BATCH,
    progress: bool = True,
) -> Pathways:
    """omega <- a omega + (1 - a) sum_i K omega_i / sum_i K, with the `a` of `mixes` that makes L least."""
    if not mixes or any(not 0 <= a <= 1 for a in mixes):
        raise ValueError(f"mixes={tuple(mixes)}; they are shares from 0 to 1, at least one")
    found, core = _start(view, references, prompts, near, layers, core_experts, scope, batch_size)
    mixed: dict[int, Tensor] = {}  # [mixes, S, E]
    for layer, own in found.initial.items():
        mean = (references.omega[layer][near.indices] * near.weights[..., None]).sum(dim=1)
        each = [_on_simplex(a * own + (1 - a) * mean, own, core[layer]) for a in mixes]
        mixed[layer] = torch.stack(each)
    parts = []
    with progress_bar(progress) as bar:
        task = bar.add_task("mixes", total=len(found.prompts))
        for start in range(0, len(found.prompts), batch_size):
            rows = slice(start, start + batch_size)
            loss = _surrogate(view, references, near[rows], scope)
            tried = [loss({layer: m[i, rows] for layer, m in mixed.items()}, None) for i in range(len(mixes))]
            parts.append(torch.stack(tried, dim=1))
            bar.advance(task, len(parts[-1]))
    found.losses = torch.cat(parts)
    best, every = found.losses.argmin(dim=1), torch.arange(len(found.prompts))
    found.omega = {layer: m[best, every] for layer, m in mixed.items()}
    return found


@torch.no_grad()
def mode_finding(
    view: Any,
    references: References,
    prompts: Sequence[Prompt],
    *,
    k: int = NEIGHBOURS,
    layers: Collection[int] | None = None,
    core_experts: int | None = None,
    alpha: float = 0.5,
    steps: int = STEPS,
    bandwidth: float | None = None,
    scope: Scope = "decode",
    batch_size: int = BATCH,
) -> Pathways:
    """Mean shift among pathways: omega <- alpha omega + (1 - alpha) sum_i K(omega_i, omega) omega_i / sum_i K.

    K is Gaussian, over the k references nearest in pathway space; a prompt that stands among the references is not its
    own neighbour. `bandwidth`: by default the median distance of a reference's pathway to its k nearest.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it is the share of the old pathway, from 0 to 1")
    references.check(view)
    found, core = _own(view, token_ids(view, prompts), layers, core_experts, scope, batch_size)
    theirs = torch.cat([references.omega[layer] for layer in found.omega], dim=1)
    itself = torch.tensor([[p == r for r in references.prompts] for p in found.prompts])
    fewest = int((~itself).sum(dim=1).min())
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k} neighbours, and a prompt has {fewest} references beside itself; give 1 to {fewest}")
    width = median_distance(torch.cdist(theirs, theirs), k) if bandwidth is None else bandwidth
    sizes = [omega.shape[1] for omega in found.omega.values()]
    for _ in range(steps):
        omega = torch.cat([*found.omega.values()], dim=1)
        distance, indices = torch.cdist(omega, theirs).masked_fill(itself, math.inf).topk(k, dim=1, largest=False)
        weights = (-(distance / width).square() / 2).softmax(dim=1)
        mean = (theirs[indices] * weights[..., None]).sum(dim=1)
        moved = (alpha * omega + (1 - alpha) * mean).split(sizes, dim=1)
        found.omega = {
            layer: _on_simplex(new, found.initial[layer], core[layer])
            for layer, new in zip(found.omega, moved, strict=True)
        }
    return found


@torch.no_grad()
def generate(view: Any, found: Pathways, **options: Any) -> Int[Tensor, "b t"]:
    """The prompts' continuations (`options` go to the model's `generate`), without the prompts.

    Beams and several sampled answers of a prompt share its pathway.
    """
    ids, mask = (t.to(view.device) for t in padded(found.prompts, "left"))
    with view.edits(found.edit()):
        out = view.model.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False, **options})
    return out[:, ids.shape[1] :]


def critical_layers(view: Any) -> list[int]:
    """The last third, or so, of the layers that can be given a pathway."""
    layers = sorted(rules_of(view))
    return layers[-max(1, round(CRITICAL * len(layers))) :]


def _start(
    view: Any,
    references: References,
    prompts: Sequence[Prompt],
    near: Neighbours,
    layers: Collection[int] | None,
    core_experts: int | None,
    scope: Scope,
    batch_size: int,
) -> tuple[Pathways, dict[int, Tensor]]:
    references.check(view)
    ids = token_ids(view, prompts)
    if len(near.indices) != len(ids):
        raise ValueError(f"neighbours of {len(near.indices)} prompts, and {len(ids)} prompts are given")
    if not near.indices.numel():
        raise ValueError("an empty set of neighbours: there is nothing to judge a pathway by")
    if int(near.indices.max()) >= len(references):
        raise ValueError(f"neighbour {int(near.indices.max())} of {len(references)} references: they are of others")
    return _own(view, ids, layers, core_experts, scope, batch_size)


def _own(
    view: Any,
    ids: list[list[int]],
    layers: Collection[int] | None,
    core_experts: int | None,
    scope: Scope,
    batch_size: int,
) -> tuple[Pathways, dict[int, Tensor]]:
    """The prompts' own pathways in the critical layers, and {layer: core experts [S, C]}."""
    rules = rules_of(view, critical_layers(view) if layers is None else layers)
    for layer, rule in rules.items():
        most = view.layer(layer).num_experts
        if core_experts is not None and not rule.top_k <= core_experts <= most:
            raise ValueError(
                f"core_experts={core_experts} in layer {layer}, where tokens use {rule.top_k} of {most} experts; give "
                f"{rule.top_k} to {most}"
            )
    omega = {layer: o for layer, o in read(view, ids, batch_size=batch_size, progress=False).items() if layer in rules}
    core = {}
    for layer, values in omega.items():
        experts = view.layer(layer).num_experts
        count = min(math.ceil(CORE * rules[layer].top_k), experts) if core_experts is None else core_experts
        core[layer] = values[:, :experts].topk(count, dim=1).indices
    return Pathways(ids, omega, dict(omega), scope, rules, torch.zeros(len(ids), 0)), core


def _descend(
    view: Any,
    found: Pathways,
    core: dict[int, Tensor],
    loss_of: Callable[[slice], Loss],
    steps: int,
    rates: tuple[float, float],
    batch_size: int,
    progress: bool,
) -> Pathways:
    """Adam on the core experts' omega, put back on the simplex after every step; prompts do not touch each other."""
    if steps < 1:
        raise ValueError(f"steps={steps}: nothing would be optimised; give at least 1")
    parts, series = [], []
    with frozen(view.model), progress_bar(progress) as bar:
        task = bar.add_task("pathways found", total=len(found.prompts))
        for start in range(0, len(found.prompts), batch_size):
            rows = slice(start, start + batch_size)
            own_core = {layer: c[rows] for layer, c in core.items()}
            first = {layer: o[rows] for layer, o in found.initial.items()}
            omega, curve = _follow(loss_of(rows), first, own_core, steps, rates)
            parts.append(omega)
            series.append(curve)
            bar.advance(task, len(curve))
    found.omega = {layer: torch.cat([o[layer] for o in parts]) for layer in found.omega}
    found.losses = torch.cat(series)
    return found


def _follow(
    loss: Loss, initial: Omega, core: Omega, steps: int, rates: tuple[float, float]
) -> tuple[dict[int, Tensor], Float[Tensor, "s t"]]:
    """(pathways, the loss before the first step and after each)"""
    omega = {layer: o.clone().requires_grad_() for layer, o in initial.items()}
    adam = torch.optim.Adam(omega.values(), lr=rates[0])
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps - 1, 1), rates[1])
    curve = []
    for _ in range(steps):
        losses = loss(omega, core)
        curve.append(losses.detach())
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
        rate.step()
        with torch.no_grad():
            for layer, values in omega.items():
                values.copy_(_on_simplex(values, initial[layer], core[layer]))
    omega = {layer: o.detach() for layer, o in omega.items()}
    with torch.no_grad():
        curve.append(loss(omega, core))
    return omega, torch.stack(curve, dim=1)


def _surrogate(view: Any, references: References, near: Neighbours, scope: Scope) -> Loss:
    """L of each prompt."""
    chosen = near.indices.flatten().tolist()
    answered = Answered(view, [references.prompts[i] for i in chosen], [references.answers[i] for i in chosen])

    def loss(omega: Omega, core: Omega | None) -> Tensor:
        losses, _ = answered.losses(edit_of(view, omega, answered.lengths, scope, core))
        return (losses.view(near.weights.shape) * near.weights).sum(dim=1)

    return loss


def _on_simplex(omega: Tensor, initial: Tensor, core: Tensor) -> Tensor:
    """Core experts none below 0 and in sum as at first, the others as at first."""
    inside = omega.gather(1, core).clamp_min(0)
    total = initial.gather(1, core).sum(dim=1, keepdim=True)
    return initial.scatter(1, core, inside * total / inside.sum(dim=1, keepdim=True).clamp_min(1e-12))
