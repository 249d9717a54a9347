"""What is measured on a trained model: loss, balance, specialisation, cost.

    violation   max_e slots_e / mean_e slots_e - 1: how far the busiest expert is above the mean ("Auxiliary-Loss-Free
                Load Balancing", arXiv:2408.15664); 0 when even
    entropy     of the shares of slots, over log E: 1 when even
    information bits that a token's domain tells about the expert of its slots (`moestro.train.measure`)

each the mean over the model's routers, on held-out rows. Shapes: R rows, T tokens of a row, N tokens, K slots, E
experts, D domains.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from moestro.evidence.league.tasks import Task
from moestro.layers.routers import Router
from moestro.models.lm import MoELMForCausalLM
from moestro.train.measure import mutual_information

BATCH = 8
"""Rows of one forward pass."""
TIMED = 7
"""Forward passes that are timed; the median counts."""


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, and how many a token passes."""

    total: int
    embedding: int
    """Token embeddings, the same in every entry."""
    router: int
    active: float
    """Without embeddings and routers: what entries must have in common."""
    slot: float
    """What one more slot in every sparse layer adds."""
    top_k: int
    """Slots of a token that are counted as active."""


def gates_of(model: nn.Module) -> list[nn.Module]:
    """What routes: modules that are routers, or stand as `router` in their block; not those that they are made of."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, Router) or name == "router":
                found.append(child)
            else:
                walk(child)

    walk(model)
    return list(dict.fromkeys(found))


def routers_of(model: nn.Module) -> list[Router]:
    """Those that give the router triple."""
    return [gate for gate in gates_of(model) if isinstance(gate, Router)]


def parameters(model: MoELMForCausalLM) -> Parameters:
    """Count. Of a layer's experts, a token passes as many as the config says; of every other module, everything.

    A block in which this is not so has `active_parameters() -> float`, its own number, routers left out.
    """
    top_k = int(model.config.num_experts_per_tok)
    embedding = model.model.embed_tokens.weight.numel()
    seen: set[int] = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    routers = {id(p): p.numel() for gate in gates_of(model) for p in gate.parameters()}
    slots: list[float] = []

    def own(module: nn.Module) -> list[nn.Parameter]:
        fresh = [p for p in module.parameters() if id(p) not in seen and id(p) not in routers]
        seen.update(map(id, fresh))
        return fresh

    def walk(module: nn.Module) -> float:
        if callable(number := getattr(module, "active_parameters", None)):
            own(module)
            return float(number())
        router, experts = getattr(module, "router", None), getattr(module, "experts", None)
        count = 0.0
        if isinstance(router, Router) and isinstance(experts, nn.Module):
            stacked = [p for p in experts.parameters() if p.dim() and p.shape[0] == router.num_experts]
            slots.append(sum(p.numel() for p in stacked) / router.num_experts)  # also where layers share them
            of_slots = {id(p) for p in stacked}
            count += slots[-1] * top_k + sum(p.numel() for p in own(experts) if id(p) not in of_slots)
        for child in module.children():
            count += walk(child)
        direct = [p for p in module.parameters(recurse=False) if id(p) not in seen and id(p) not in routers]
        seen.update(map(id, direct))
        return count + sum(p.numel() for p in direct)

    active = walk(model)
    total = sum(p.numel() for p in model.parameters())
    return Parameters(total, embedding, sum(routers.values()), active, sum(slots), top_k)


@torch.no_grad()
def heldout_loss(model: MoELMForCausalLM, task: Task) -> dict[str, float]:
    """Mean loss of the scored tokens by domain, in nats."""
    model.eval()
    summed = torch.zeros(len(task.heldout.domains), dtype=torch.double)
    counted = torch.zeros_like(summed)
    for rows in torch.arange(len(task.heldout.ids)).split(BATCH):
        ids, scored = task.heldout.ids[rows], task.scored[rows, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(scored.shape)
        summed.index_add_(0, task.heldout.domain[rows], (each * scored).double().sum(dim=1))
        counted.index_add_(0, task.heldout.domain[rows], scored.double().sum(dim=1))
    means = (summed / counted).tolist()
    return dict(zip(task.heldout.domains, means, strict=True))


@torch.no_grad()
def slots_by_domain(model: MoELMForCausalLM, task: Task) -> tuple[list[Float[np.ndarray, "d e"]], int]:
    """(for every router the slots that each domain's tokens used at each expert, number of tokens)."""
    model.eval()
    routers = routers_of(model)
    domains = len(task.heldout.domains)
    counts = [torch.zeros(domains, router.num_experts + 1) for router in routers]
    label = torch.empty(0, dtype=torch.long)

    def count(number: int, routing: Any) -> None:
        used = routing.indices.masked_fill(routing.weights == 0, routers[number].num_experts)
        where = label[:, None] * counts[number].shape[1] + used
        counts[number] += torch.bincount(where.flatten(), minlength=counts[number].numel()).view_as(counts[number])

    hooks = [r.register_forward_hook(lambda _m, _i, out, n=n: count(n, out)) for n, r in enumerate(routers)]
    try:
        for rows in torch.arange(len(task.heldout.ids)).split(BATCH):
            label = task.heldout.domain[rows].repeat_interleave(task.heldout.ids.shape[1])
            model(input_ids=task.heldout.ids[rows], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [c[:, :-1].double().numpy() for c in counts], task.heldout.ids.numel()


@contextmanager
def counted(modules: list[Router]) -> Iterator[list[float]]:
    """Used slots per token of each call of the routers in training mode."""
    slots: list[float] = []

    def count(module: nn.Module, _: Any, routing: Any) -> None:
        if module.training:
            slots.append(float((routing.weights != 0).sum()) / len(routing.weights))

    hooks = [module.register_forward_hook(count) for module in modules]
    try:
        yield slots
    finally:
        for hook in hooks:
            hook.remove()


def balance(counts: list[np.ndarray], tokens: int) -> dict[str, float | None]:
    """Violation, entropy, information and slots per token, mean over routers; None where there are none."""
    if not counts:
        return dict(violation=None, entropy=None, information=None, slots=None)
    loads = [c.sum(axis=0) for c in counts]
    shares = [load / load.sum() for load in loads]
    return dict(
        violation=statistics.fmean(float(load.max() / load.mean() - 1) for load in loads),
        entropy=statistics.fmean(float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(len(p))) for p in shares),
        information=statistics.fmean(mutual_information(c) for c in counts),
        slots=statistics.fmean(float(load.sum()) / tokens for load in loads),
    )


@torch.no_grad()
def speed(model: MoELMForCausalLM, task: Task) -> dict[str, float | None]:
    """Tokens per second of a forward pass, and the share of its time that is spent in routers."""
    model.eval()
    ids = task.heldout.ids[:BATCH]
    whole, routing = [], []
    for n in range(TIMED + 2):  # the first two warm up
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        seconds = time.perf_counter() - start
        with timed(gates_of(model)) as spent:
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seen = time.perf_counter() - start
        if n >= 2:
            whole.append(seconds)
            routing.append(sum(spent) / seen)
    share = statistics.median(routing) if gates_of(model) else None
    return dict(inference_rate=ids.numel() / statistics.median(whole), router_share=share)


@contextmanager
def timed(modules: list[nn.Module]) -> Iterator[list[float]]:
    """Seconds that each call of the modules took."""
    spent: list[float] = []
    started: list[float] = []
    hooks = [m.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started.pop())) for m in modules]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
