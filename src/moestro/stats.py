"""The one statistics room: intervals, tests and their correction, so that no finding stands without them.

Everything takes numbers per unit of sampling (a prompt, a sentence, a seed), not per token: tokens of one text are not
independent. scipy does the work; what is here fixes the choices, so that all of moestro reports alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000

Statistic = Callable[..., float | NDArray]
"""Of one or several samples; must take `axis`."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bootstrap interval around it."""

    estimate: float
    low: float
    high: float
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    values: ArrayLike,
    *others: ArrayLike,
    statistic: Statistic = np.mean,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic` over units; several samples of one length are resampled together (paired).

    Raises ValueError for fewer than two units, samples of different lengths, or values that are not finite.
    """
    samples = _finite(values, *others)
    if len({len(s) for s in samples}) > 1:
        raise ValueError(f"paired samples of lengths {[len(s) for s in samples]}; they must be the same units")
    if len(samples[0]) < 2:
        raise ValueError(f"an interval needs two units or more; there is {len(samples[0])}")
    estimate = float(statistic(*samples, axis=-1))
    if all(np.ptp(s) == 0 for s in samples):
        return Interval(estimate, estimate, estimate, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, 2**24 // len(samples[0])),
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return Interval(estimate, float(found.confidence_interval.low), float(found.confidence_interval.high), level)


def bootstrap_totals(
    table: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray],
    *,
    groups: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Percentile intervals of functions of the column sums of `table` [units, columns].

    `statistic` takes sums [R, columns] to [R, M], of which each column gets an interval. With `groups` [units] every
    group of units is resampled on its own, so that none can vanish. Raises ValueError for fewer than two units.
    """
    rows = np.asarray(table, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"an interval needs a table of two units or more; this one is {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(rows))} of {rows.size} values are not finite")
    rng = np.random.default_rng(seed)
    members = np.zeros(len(rows)) if groups is None else np.asarray(groups)
    weights = np.zeros((resamples, len(rows)))
    for group in np.unique(members):
        units = np.flatnonzero(members == group)
        weights[:, units] = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), resamples)
    estimate = statistic(rows.sum(axis=0)[None])[0]
    low, high = np.quantile(statistic(weights @ rows), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(e), float(a), float(b), level) for e, a, b in zip(estimate, low, high, strict=True)]


def difference(
    treated: ArrayLike,
    control: ArrayLike,
    *,
    paired: bool = True,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of treated - control with its bootstrap interval: over the same units, or (`paired=False`) over others."""
    a, b = _finite(treated, control)
    if paired:
        if len(a) != len(b):
            raise ValueError(f"{len(a)} treated and {len(b)} control values; a paired difference needs the same units")
        return bootstrap(a - b, level=level, resamples=resamples, seed=seed)
    values = np.concatenate([a, b])
    treated_units = np.arange(len(values)) < len(a)
    table = np.stack([values * treated_units, values * ~treated_units], axis=1)
    (found,) = bootstrap_totals(
        table,
        lambda sums: (sums[:, 0] / len(a) - sums[:, 1] / len(b))[:, None],
        groups=treated_units,
        level=level,
        resamples=resamples,
        seed=seed,
    )
    return found


def proportion(count: int, units: int, *, level: float = LEVEL) -> Interval:
    """Share of the units and its Wilson interval, which has a width also where none or all are counted.

    Raises ValueError unless 0 <= count <= units and there are units.
    """
    if not 0 <= count <= units or not units:
        raise ValueError(f"{count} of {units} units is no share; count from 0 to all of one unit or more")
    found = stats.binomtest(count, units).proportion_ci(level, method="wilson")
    return Interval(count / units, float(found.low), float(found.high), level)


def permutation_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    statistic: Literal["mean", "pearson", "spearman"] = "mean",
    paired: bool = False,
    alternative: Literal["two-sided", "less", "greater"] = "two-sided",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """p-value. "mean": first - second, exchanging labels, or within pairs; correlations: exchanging partners."""
    a, b = _finite(first, second)
    if (paired or statistic != "mean") and len(a) != len(b):
        raise ValueError(f"samples of lengths {len(a)} and {len(b)}; they must be the same units")
    of: Callable[..., float | NDArray]
    if statistic == "mean":
        kind, of, data = ("samples" if paired else "independent"), _mean_difference, [a, b]
    else:
        if statistic == "spearman":
            a, b = stats.rankdata(a), stats.rankdata(b)
        kind, of, data = "pairings", lambda x, axis: _pearson(x, b, axis), [a]
    return float(
        stats.permutation_test(
            data,
            of,
            permutation_type=kind,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, 2**24 // (len(a) + len(b))),
            alternative=alternative,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def rank_correlation(
    first: ArrayLike, second: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, float]:
    """(Spearman's correlation over units with its bootstrap interval, two-sided permutation p-value).

    Raises ValueError where one of them is the same for all units.
    """
    a, b = _finite(first, second)
    for values in (a, b):
        if np.ptp(values) == 0:
            raise ValueError(f"all {len(values)} values are {values[0]}: nothing can be correlated with them")

    def spearman(x: NDArray, y: NDArray, axis: int) -> Any:
        x, y = (stats.rankdata(v, axis=axis) for v in (x, y))
        return _pearson(x, y, axis)

    interval = bootstrap(a, b, statistic=spearman, level=level, resamples=resamples, seed=seed)
    return interval, permutation_test(a, b, statistic="spearman", resamples=resamples, seed=seed)


def largest_difference_test(
    first: ArrayLike, second: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """One-sided p-values that the mean of column m is larger in `first` [n, M] than in `second` [k, M], all at once.

    The family-wise error over the M columns is controlled, whatever their dependence: each difference is held against
    the largest of all columns under exchanged labels (maxT, Westfall and Young 1993).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"tables of shapes {a.shape} and {b.shape}; give [n, M] and [k, M]")
    both, rng = np.concatenate([a, b]), np.random.default_rng(seed)
    _finite(both)
    labels = np.tile(np.arange(len(both)) < len(a), (resamples, 1))
    labels = rng.permuted(labels, axis=1)
    weights = np.where(labels, 1 / len(a), -1 / len(b))
    null = (weights @ both).max(axis=1)
    measured = a.mean(axis=0) - b.mean(axis=0)
    return (1 + (null[:, None] >= measured).sum(axis=0)) / (1 + resamples)


def exceeds(measured: float, null: ArrayLike) -> float:
    """One-sided p-value of a measured number among draws of its control: (1 + draws as large) / (1 + draws)."""
    (draws,) = _finite(null)
    return float((1 + np.count_nonzero(draws >= measured)) / (1 + len(draws)))


def corrected(p_values: Sequence[float], method: Literal["fdr", "holm"] = "fdr") -> NDArray[np.float64]:
    """p-values adjusted for their number: Benjamini-Hochberg's false discovery rate, or Holm's family-wise error."""
    p = np.asarray(p_values, dtype=float)
    if not len(p):
        return p
    if method == "fdr":
        return stats.false_discovery_control(p, method="bh")
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _finite(*samples: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = tuple(np.asarray(s, dtype=np.float64).ravel() for s in samples)
    for array in arrays:
        if not len(array):
            raise ValueError("an empty sample: there is nothing to compare")
        if not np.isfinite(array).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(array))} of {len(array)} values are not finite")
    return arrays


def _mean_difference(x: NDArray, y: NDArray, axis: int) -> Any:
    return np.mean(x, axis=axis) - np.mean(y, axis=axis)


def _pearson(x: NDArray, y: NDArray, axis: int) -> Any:
    x = x - x.mean(axis=axis, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(x, axis=axis) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=axis) / np.maximum(norms, 1e-300)
