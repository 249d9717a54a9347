"""Decide what to keep: observe calibration data, score the experts, choose under the budget."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.compress.prune.easy_ep import EasyEPStats
from moestro.compress.prune.keep import Sizes, affordable, measure, parse_memory, parse_share, prune, share_of_experts
from moestro.compress.prune.saliency import SALIENCIES, Scores, random
from moestro.data import TokenBatches
from moestro.fitting.result import Coverage
from moestro.fitting.statistics import Statistics, origin_of
from moestro.recipe import Recipe
from moestro.view.observe import SlotStatistics, SlotStats
from moestro.view.surgery import check_own

OBSERVERS: dict[str, Any] = {"slots": SlotStats, "easy-ep": EasyEPStats}
"""Observers whose results can be kept in files, by the kind that names them there."""

ENOUGH_TOKENS = 100
"""Calibration tokens below which an expert's score is called thin: its mean then has an error of some 10%."""


@dataclass(frozen=True)
class Plan:
    """What a fit will keep, and why."""

    request: str
    saliency: str
    seed: int
    sizes: Sizes
    count: int
    """Experts kept in each layer."""
    keep: dict[int, list[int]]
    scores: Scores
    stats: SlotStatistics
    coverage: Coverage
    warnings: list[str]
    recipe: Recipe
    """What is to be done to the model."""
    statistics: Statistics | None
    """What the calibration found, to be kept; None where nobody asked for it."""
    observed: bool
    """False: saved statistics served, and the model has not been run."""

    @property
    def bytes_after(self) -> int:
        return self.sizes.with_experts(self.count)


def experts_to_keep(view: Any, memory: str | None, experts: str | None, format: str = "hf") -> tuple[str, Sizes, int]:
    """Shares of the size are of the checkpoint that is there; sizes are those of the one to be written, in `format`:
    (the request in words, sizes, experts per layer). Raises ValueError where the budget cannot be met."""
    if memory is not None and experts is not None:
        raise ValueError(f"memory={memory!r} and experts={experts!r}: give one of the two")
    check_own(view.layers)
    sizes = measure(view.layers, view.bytes_in(format, cut=True), view.expert_bytes(format))
    if memory is not None:
        budget = parse_memory(memory, view.num_bytes)
        return f"checkpoint of at most {memory}", sizes, affordable(view.layers, sizes, budget)
    share = parse_share(experts or "50%", "experts")
    return f"{experts or '50%'} of the experts", sizes, share_of_experts(view.layers, share)


def make_plan(
    view: Any,
    calibration: TokenBatches,
    *,
    memory: str | None = None,
    experts: str | None = None,
    format: str = "hf",
    saliency: str = "easy-ep",
    protect: Collection[tuple[int, int]] = (),
    seed: int = 0,
    progress: bool = True,
    work: Path | None = None,
    stats: Path | None = None,
    source: Path | None = None,
    save: bool = False,
) -> Plan:
    """Observe `calibration` once and choose the experts to keep. Changes nothing.

    work: where a streamed view keeps what an interrupted observation goes on from.
    stats: a directory of statistics: those in it are not observed again, those that are observed are put there.
    format: of the checkpoint whose size the budget speaks of.
    source: the checkpoint that the model in memory is, and nothing else.
    save: a checkpoint is to be made: what it could not hold is refused, and the plan gives the statistics back.

    Raises ValueError for an unknown saliency, a budget that cannot be met, a cut or checkpoint that cannot be made, or
    statistics of another model or other data; all before anything is observed.
    """
    if saliency not in SALIENCIES:
        raise ValueError(f"saliency={saliency!r} is not known; there are {', '.join(SALIENCIES)}")
    request, sizes, count = experts_to_keep(view, memory, experts, format)
    none = {layer.index: torch.zeros(layer.num_experts) for layer in view.layers}
    cut = prune(view.layers, none, count, protect=protect)  # any experts: their number matters
    view.check(cut, format if save else None)
    kept = _statistics(view, calibration, stats, source) if stats is not None or save else None
    method = SALIENCIES[saliency]
    found = dict(kept.found) if kept is not None else {}
    wanted = {"slots": SlotStats, _kind(method.observer): method.observer}
    missing = [kind for kind in wanted if kind not in found]
    if missing:
        resumable = {} if work is None else {"work": work}
        observers = [wanted[kind]() for kind in missing]
        results = view.observe(calibration, observers, progress=progress, description="calibration", **resumable)
        found |= dict(zip(missing, results))
    if kept is not None:
        kept.found = {kind: result for kind, result in found.items() if kind in OBSERVERS}
        if missing and stats is not None:
            kept.save(stats)
    seen: SlotStatistics = found["slots"]
    scores = random(seen, seed) if saliency == "random" else method.score(found[_kind(method.observer)])
    coverage = _coverage(seen)
    recipe = prune(view.layers, scores, count, protect=protect)
    (chosen,) = (operation.kept() for operation in recipe.operations)
    return Plan(
        request=request,
        saliency=saliency,
        seed=seed,
        sizes=sizes,
        count=count,
        keep={layer.index: chosen[layer.name] for layer in view.layers},
        scores=scores,
        stats=seen,
        coverage=coverage,
        warnings=_warnings(coverage, seen, count),
        recipe=recipe,
        statistics=kept,
        observed=bool(missing),
    )


def _kind(observer: Any) -> str:
    """By what name statistics know what the observer sees; its own where they do not keep it."""
    return next((kind for kind, known in OBSERVERS.items() if known is observer), f"{observer!r}")


def _statistics(view: Any, calibration: TokenBatches, stats: Path | None, source: Path | None) -> Statistics:
    """Those in `stats`, or none as yet. Raises ValueError where they are of another model or other data."""
    if view.state.taps is not None and view.state.taps.force.edited:
        raise ValueError("statistics under edits are not those of the model: end the edits first")
    origin = origin_of(view, calibration, source)
    found = None if stats is None else Statistics.load(stats)
    if found is None:
        return Statistics(origin)
    if difference := found.origin.difference(origin):
        raise ValueError(f"the statistics in {stats} are {difference}; name another directory, or delete them")
    if wrong := found.damage({layer.index: layer.num_experts for layer in view.layers}):
        raise ValueError(f"the statistics in {stats} are damaged: {wrong}; delete them, or name another directory")
    return found


def _coverage(stats: SlotStatistics) -> Coverage:
    counts = torch.cat([slots.count for slots in stats.layers.values()])
    return Coverage(
        experts=len(counts),
        unseen=int((counts == 0).sum()),
        thin=int((counts < ENOUGH_TOKENS).sum()),
        needed=ENOUGH_TOKENS,
        median_tokens=float(counts.median()),
    )


def _warnings(coverage: Coverage, stats: SlotStatistics, count: int) -> list[str]:
    warnings = []
    if coverage.thin > coverage.experts // 4:
        warnings.append(
            f"{coverage.thin} of {coverage.experts} experts served fewer than {coverage.needed} calibration tokens "
            f"({coverage.unseen} none at all), out of {sum(stats.tokens.values()):,} tokens; their scores are weak. "
            "Add texts, or raise the number of calibration tokens"
        )
    short = [i for i, slots in stats.layers.items() if int((slots.count > 0).sum()) < count]
    if short:
        warnings.append(
            f"in {len(short)} layers (first: layer {short[0]}) fewer experts were seen than are kept, so some are kept "
            "without evidence; a smaller budget would cost nothing on this data"
        )
    return warnings
