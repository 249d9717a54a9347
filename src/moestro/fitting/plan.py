"""Decide what to keep: observe calibration data, score the experts, choose under the budget."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.compress.prune.keep import (
    Sizes,
    affordable,
    keep_best,
    measure,
    parse_memory,
    parse_share,
    share_of_experts,
)
from moestro.compress.prune.saliency import SALIENCIES, Scores, random
from moestro.data import TokenBatches
from moestro.fitting.result import Coverage
from moestro.view.observe import SlotStatistics, SlotStats
from moestro.view.surgery import check_own

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
) -> Plan:
    """Observe `calibration` once and choose the experts to keep. Changes nothing.

    work: where a streamed view keeps what an interrupted observation goes on from.

    Raises ValueError for an unknown saliency or a budget that cannot be met, before anything is observed.
    """
    if saliency not in SALIENCIES:
        raise ValueError(f"saliency={saliency!r} is not known; there are {', '.join(SALIENCIES)}")
    request, sizes, count = experts_to_keep(view, memory, experts, format)
    method = SALIENCIES[saliency]
    observers = [SlotStats()]
    if method.observer is not SlotStats:
        observers.append(method.observer())  # type: ignore[arg-type]
    resumable = {} if work is None else {"work": work}
    results = view.observe(calibration, observers, progress=progress, description="calibration", **resumable)
    stats: SlotStatistics = results[0]
    scores = random(stats, seed) if saliency == "random" else method.score(results[-1])
    coverage = _coverage(stats)
    return Plan(
        request=request,
        saliency=saliency,
        seed=seed,
        sizes=sizes,
        count=count,
        keep=keep_best(view.layers, scores, count, protect=protect),
        scores=scores,
        stats=stats,
        coverage=coverage,
        warnings=_warnings(coverage, stats, count),
    )


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
