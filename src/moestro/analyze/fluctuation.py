"""How often tokens change expert: between two checkpoints, or between a clean and a corrupted input.

    fluctuation of a layer = share of the tokens whose experts differ between two routing traces

After "Improving Routing in Sparse Mixture of Experts with Graph of Tokens" (arXiv:2505.00792); the measure also appears
in "StableMoE" (arXiv:2204.08396).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

Chosen = Callable[[np.ndarray, np.ndarray], np.ndarray]
PLACE = ["layer", "sample", "position"]


def top_1(experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The expert with the largest weight [N, 1], from slots [N, K]."""
    return np.take_along_axis(experts, weights.argmax(axis=1)[:, None], axis=1)


def top_k(experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The set of experts with a weight: sorted, unused slots (-1) first."""
    return np.sort(np.where(weights != 0, experts, -1), axis=1)


CHOSEN: dict[str, Chosen] = {"topk": top_k, "top1": top_1}


def routing_fluctuation(
    one: pl.LazyFrame, other: pl.LazyFrame, *, by: str = "topk", where: pl.Expr | None = None
) -> dict[int, float]:
    """{layer: share of its tokens whose experts differ}, from the results of two RoutingTraces of the same data.

    `by`: "topk" compares sets of experts, "top1" the expert with the largest weight. `where` chooses tokens; columns of
    the other trace end in _other, so `pl.col("id") == pl.col("id_other")` leaves replaced tokens out.

    Raises ValueError for an unknown `by`, or traces that hold different tokens or none.
    """
    if by not in CHOSEN:
        raise ValueError(f"by={by!r} is not known; there are {', '.join(CHOSEN)}")
    columns = [*PLACE, "id", "experts", "weights"]
    a, b = (frame.select(columns).collect() for frame in (one, other))
    both = a.join(b, on=PLACE, how="inner", suffix="_other", validate="1:1")
    if not len(a) == len(b) == len(both) or not len(a):
        rows = f"{len(a)} and {len(b)} rows"
        raise ValueError(f"traces of {rows} have {len(both)} tokens and layers in common: trace the same data twice")
    both = both if where is None else both.filter(where)
    found = [CHOSEN[by](both[f"experts{end}"].to_numpy(), both[f"weights{end}"].to_numpy()) for end in ("", "_other")]
    slots = max(f.shape[1] for f in found)
    padded = [np.pad(f, ((0, 0), (slots - f.shape[1], 0)), constant_values=-1) for f in found]
    differs = pl.Series("differs", (padded[0] != padded[1]).any(axis=1))
    shares = both.select("layer").with_columns(differs).group_by("layer").agg(pl.col("differs").mean())
    return {int(layer): float(share) for layer, share in sorted(shares.rows())}
