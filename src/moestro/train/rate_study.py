"""How fast fits of a mixture of Gaussian experts near the true one as samples grow.

With as many experts as the truth and a gate whose parameters can be told apart, all errors fall as n^(-1/2). With more,
some true experts are shared by several fitted ones, whose errors cancel in the density to low orders. The density and
all that belongs to experts fitted once still go as n^(-1/2). Where two share an expert evenly, their coefficients, gate
slopes and variances go as n^(-1/4) and their offsets as n^(-1/8), because d^2 N / d offset^2 = 2 dN / d variance. These
are bounds, on errors weighted by gate weight: an extra expert that stays away and loses its weight keeps them as well.

"Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (arXiv:2401.13875).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moestro.train.gaussian_moe import POWERS, GaussianMoE, fit, split, voronoi_cells, voronoi_loss

ERRORS = ("log tau", "gate slope", "experts", "gate function", "density", "voronoi")
SHARED_ERRORS = ("shared gate slope", "shared coefficient", "shared offset", "shared variance", "shared experts")
LESSER = ("lesser experts", "lesser weight")
"""What is measured besides where more experts are fitted than there are."""


@dataclass(frozen=True)
class RateStudy:
    """Absolute errors by name, [sizes, seeds]; NaN where a fit failed or its experts changed places.

    A fitted expert stands for the nearest true one by (a, c, v), and "experts" is the mean over these.
    gate slope, experts: of true experts that one fitted expert stands for; NaN where there is none.
    shared ...: of true experts that several stand for, weighted by these experts' gate weights.
    lesser ...: of the one of these with the smallest gate weight; "weight" is no error, but its part of theirs.
    gate function: of the gate weights, summed by true expert. density: total variation between p(y|x) and the truth's.
    """

    sizes: tuple[int, ...]
    errors: dict[str, np.ndarray]
    unconverged: np.ndarray
    """Starts from which the optimiser did not converge, [sizes, seeds]."""

    @property
    def failed(self) -> list[int]:
        """Fits without a result, by size."""
        return np.isnan(self.errors["log tau"]).sum(axis=1).tolist()

    def median(self, name: str) -> np.ndarray:
        """By size, over the fits that succeeded; NaN where none did."""
        return _median(self.errors[name])

    def slope(self, name: str) -> float:
        """Of log median error over log n: -0.5 is the parametric rate, 0 no gain from more samples."""
        return float(self._slope(self.median(name)))

    def slope_interval(self, name: str, *, level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
        """Percentile interval of the slope, seeds resampled together over the sizes."""
        seeds = self.errors[name].shape[1]
        drawn = np.random.default_rng(0).integers(seeds, size=(resamples, seeds))
        slopes = self._slope(_median(self.errors[name][:, drawn]))
        known = slopes[~np.isnan(slopes)]
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
        return float(low), float(high)

    def _slope(self, medians: np.ndarray) -> np.ndarray:
        log_n = np.log(self.sizes)
        log_n -= log_n.mean()
        return np.asarray(log_n @ np.log(medians) / (log_n @ log_n))


def _median(errors: np.ndarray) -> np.ndarray:
    """Over the last axis, NaN left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.nanmedian(errors, axis=-1)


def rate_study(
    truth: GaussianMoE,
    *,
    sizes: Sequence[int],
    seeds: Sequence[int],
    jitter: float = 0.4,
    copies: Sequence[int] = (),
    starts: int = 1,
    on_fit: Callable[[], None] = lambda: None,
) -> RateStudy:
    """Fit samples of growing size from around the truth, and measure how far from it they end.

    A start is the truth with `copies` of these experts (see `split`; as many experts too many are fitted) + jitter *
    N(0, 1). Of the fits that converge, the one with the best likelihood counts.

    Raises ValueError for a copy of no expert, for more copies than POWERS may do with, or no starts.
    """
    if len(copies) >= max(POWERS):
        raise ValueError(
            f"{len(copies)} experts too many: {len(copies) + 1} may share a true one, and powers are known for up to "
            f"{max(POWERS)}; give {max(POWERS) - 1} copies or fewer"
        )
    if starts < 1:
        raise ValueError(f"starts={starts}: a fit starts from one place or more")
    around = split(truth, copies)
    names = ERRORS + (SHARED_ERRORS + LESSER if copies else ())
    shape = len(sizes), len(seeds)
    errors, unconverged = {name: np.full(shape, np.nan) for name in names}, np.zeros(shape, dtype=int)
    for row, n in enumerate(sizes):
        for column, seed in enumerate(seeds):
            x, y = truth.sample(n, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            converged = []
            for _ in range(starts):
                noise = torch.randn(around.vector().shape, generator=generator, dtype=torch.float64)
                found = fit(x, y, around.at(around.vector() + jitter * noise))
                if found.converged:
                    converged.append(found)
                on_fit()
            unconverged[row, column] = starts - len(converged)
            best = max(converged, key=lambda found: found.log_likelihood, default=None)
            if best is not None and _in_place(best.mixture, truth):
                for name, error in _errors(best.mixture, truth).items():
                    errors[name][row, column] = error
    return RateStudy(tuple(sizes), errors, unconverged)


def _in_place(fitted: GaussianMoE, true: GaussianMoE) -> bool:
    """Whether every true expert has a fitted one, and the last the last: gates can be compared then."""
    cell, last = voronoi_cells(fitted, true), len(true.offset) - 1
    return bool((cell.bincount(minlength=last + 1) > 0).all()) and int(cell[-1]) == last


def _errors(fitted: GaussianMoE, true: GaussianMoE) -> dict[str, float]:
    x, y = true.sample(4000, seed=10_000)
    cell = voronoi_cells(fitted, true)
    alone = cell.bincount()[cell] == 1
    gate, true_gate = fitted.gate(x).exp(), true.gate(x).exp()
    summed = torch.zeros_like(true_gate).index_add(1, cell, gate)
    atoms = (fitted.atoms - true.atoms[cell]).abs()
    slopes = (fitted.gate_parameters()[0] - true.gate_parameters()[0][cell]).abs().mean(dim=1)
    errors = {
        "log tau": float((fitted.log_tau - true.log_tau).abs()),
        "gate slope": float(slopes[:-1][alone[:-1]].mean()),
        "experts": float(atoms[alone].mean()),
        "gate function": float((summed - true_gate).abs().mean()),
        # |p - p*| / 2 integrated over y, as a mean over samples of p*
        "density": float((fitted.log_prob(x, y) - true.log_prob(x, y)).expm1().abs().mean() / 2),
        "voronoi": voronoi_loss(fitted, true),
    }
    if not alone.all():
        weight = gate.mean(dim=0)[~alone]
        weight = weight / weight.sum()
        shared = weight @ atoms[~alone]
        lesser = weight.argmin()
        values = [weight @ slopes[~alone], shared[:-2].mean(), shared[-2], shared[-1], shared.mean()]
        values += [atoms[~alone][lesser].mean(), weight[lesser]]
        errors.update(zip(SHARED_ERRORS + LESSER, map(float, values), strict=True))
    return errors
