"""A mixture of Gaussian regression experts under a softmax gate with temperature: simulated and fitted.

    p(y | x) = sum_e softmax_e((sigma(b1_e . x) + b0_e) / tau) * N(y | a_e . x + c_e, v_e)

sigma is the identity (the plain gate) or an activation. The last expert's b1 and b0 are 0, without which a shift of all
would be the same density. What can still be told apart is a matter of sigma: with the identity, or any sigma with
sigma(cz) = c^p sigma(z), scaling (b1, b0, tau) together changes nothing, and the Fisher information is singular.

"Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (arXiv:2401.13875).
Shapes: N samples, D dimensions of x, E experts, G = E - 1, P parameters. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
VARIANCE_FLOOR = 1e-3
"""Added to every variance: the likelihood is unbounded where an expert collapses onto one sample."""
INDEPENDENT = 1e-6
"""Smallest singular value of columns of length 1 from which they count as independent."""
POWERS = {2: 4, 3: 6}
"""r by the number of atoms in a cell: an expert fitted by 2 or 3 atoms has its offset at rate n^(-1/2r)."""


def identity(z: Tensor) -> Tensor:
    """The plain gate."""
    return z


@dataclass(frozen=True)
class GaussianMoE:
    """The parameters of one mixture. `slope` and `intercept` (of the gate) leave the last expert out: its are 0."""

    slope: Float[Tensor, "g d"]
    intercept: Float[Tensor, " g"]
    log_tau: Float[Tensor, ""]
    coefficient: Float[Tensor, "e d"]
    offset: Float[Tensor, " e"]
    log_variance: Float[Tensor, " e"]
    """log(v - VARIANCE_FLOOR)"""
    activation: Activation = identity

    @classmethod
    def of(
        cls,
        *,
        slope: Sequence[Sequence[float]],
        intercept: Sequence[float],
        tau: float,
        coefficient: Sequence[Sequence[float]],
        offset: Sequence[float],
        sd: Sequence[float],
        activation: Activation = identity,
    ) -> GaussianMoE:
        """From plain numbers. Raises ValueError for a temperature or sd that is too small, or sizes that disagree."""
        if tau <= 0:
            raise ValueError(f"tau={tau}: a temperature is positive")
        if min(sd) ** 2 <= VARIANCE_FLOOR:
            raise ValueError(f"sd={min(sd)}: above {VARIANCE_FLOOR**0.5:.3g}, the root of the variance floor")
        experts = {len(slope) + 1, len(intercept) + 1, len(coefficient), len(offset), len(sd)}
        if len(experts) > 1:
            raise ValueError(f"parameters are for {sorted(experts)} experts; slope and intercept leave the last out")
        values = [torch.tensor(v, dtype=torch.float64) for v in (slope, intercept, tau, coefficient, offset, sd)]
        b1, b0, t, a, c, s = values
        return cls(b1, b0, t.log(), a, c, (s.square() - VARIANCE_FLOOR).log(), activation)

    @property
    def tau(self) -> Float[Tensor, ""]:
        return self.log_tau.exp()

    @property
    def variance(self) -> Float[Tensor, " e"]:
        return VARIANCE_FLOOR + self.log_variance.exp()

    @property
    def atoms(self) -> Float[Tensor, "e p"]:
        """(a, c, v) of each expert."""
        return torch.cat([self.coefficient, self.offset[:, None], self.variance[:, None]], dim=1)

    def vector(self) -> Float[Tensor, " p"]:
        """All parameters in a row."""
        return torch.cat([getattr(self, name).reshape(-1) for name in PARAMETERS])

    def at(self, vector: Float[Tensor, " p"]) -> GaussianMoE:
        """The mixture of the same sizes with other parameters: the inverse of `vector`."""
        sizes = [getattr(self, name).numel() for name in PARAMETERS]
        parts = vector.split(sizes)
        shaped = {name: part.view(getattr(self, name).shape) for name, part in zip(PARAMETERS, parts)}
        return replace(self, **shaped)

    def gate_parameters(self) -> tuple[Float[Tensor, "e d"], Float[Tensor, " e"]]:
        """Slopes and intercepts of the gate, those of the last expert included."""
        slope, intercept = self.slope, self.intercept
        return torch.cat([slope, slope.new_zeros(1, slope.shape[1])]), torch.cat([intercept, intercept.new_zeros(1)])

    def gate(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Log gate weights."""
        slope, intercept = self.gate_parameters()
        return ((self.activation(x @ slope.T) + intercept) / self.tau).log_softmax(dim=-1)

    def joint(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """log of gate weight times density, expert by expert."""
        residual = y[:, None] - x @ self.coefficient.T - self.offset
        density = -0.5 * (residual.square() / self.variance + self.variance.log() + np.log(2 * np.pi))
        return self.gate(x) + density

    def log_prob(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.joint(x, y).logsumexp(dim=-1)

    def sample(self, n: int, *, seed: int, spread: float = 1.5) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """x ~ N(0, spread^2), and y given x."""
        generator = torch.Generator().manual_seed(seed)
        x = spread * torch.randn(n, self.coefficient.shape[1], generator=generator, dtype=torch.float64)
        expert = torch.multinomial(self.gate(x).exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        mean = (x * self.coefficient[expert]).sum(dim=1) + self.offset[expert]
        return x, mean + self.variance[expert].sqrt() * noise


PARAMETERS = tuple(f.name for f in fields(GaussianMoE) if f.name != "activation")


@dataclass(frozen=True)
class Fit:
    """`converged` is False where the optimiser gave up or an expert's variance fell to the floor."""

    mixture: GaussianMoE
    log_likelihood: float
    """Mean over samples."""
    converged: bool


def fit(x: Float[Tensor, "n d"], y: Float[Tensor, " n"], start: GaussianMoE, *, steps: int = 500) -> Fit:
    """Maximum likelihood by BFGS from `start`."""

    def loss(mixture: GaussianMoE) -> Tensor:
        return -mixture.log_prob(x, y).mean()

    mixture, _ = _minimize(loss, start, steps)
    return _judged(mixture, x, y)


def fit_em(x: Float[Tensor, "n d"], y: Float[Tensor, " n"], start: GaussianMoE, *, rounds: int = 200) -> Fit:
    """Maximum likelihood by EM: experts by weighted least squares, the gate by a few steps of BFGS a round."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    mixture = start
    for _ in range(rounds):
        share = mixture.joint(x, y).softmax(dim=-1)
        weighted = share.T[:, :, None] * design  # [E, N, D + 1]
        moments = design.T @ weighted + 1e-9 * torch.eye(design.shape[1], dtype=x.dtype)
        solved = torch.linalg.solve(moments, weighted.transpose(1, 2) @ y)
        residual = y[:, None] - design @ solved.T
        variance = (share * residual.square()).sum(dim=0) / share.sum(dim=0).clamp_min(1e-12)
        mixture = replace(
            mixture,
            coefficient=solved[:, :-1],
            offset=solved[:, -1],
            log_variance=(variance - VARIANCE_FLOOR).clamp_min(1e-9).log(),
        )

        def expected(m: GaussianMoE, share: Tensor = share, fixed: GaussianMoE = mixture) -> Tensor:
            gate = replace(fixed, slope=m.slope, intercept=m.intercept, log_tau=m.log_tau).gate(x)
            return -(share * gate).sum(dim=1).mean()

        mixture, _ = _minimize(expected, mixture, steps=5)
    return _judged(mixture, x, y)


def _minimize(loss: Callable[[GaussianMoE], Tensor], start: GaussianMoE, steps: int) -> tuple[GaussianMoE, float]:
    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        vector = torch.from_numpy(flat).requires_grad_()
        value = loss(start.at(vector))
        (gradient,) = torch.autograd.grad(value, vector)
        return value.item(), gradient.numpy()

    options = {"maxiter": steps, "gtol": 1e-7}
    found = minimize(value_and_gradient, start.vector().numpy(), jac=True, method="BFGS", options=options)
    return start.at(torch.from_numpy(found.x)), float(found.fun)


GRADIENT = 1e-3
"""Largest entry of the mean log-likelihood's gradient at which a fit counts as converged."""


def _judged(mixture: GaussianMoE, x: Tensor, y: Tensor) -> Fit:
    vector = mixture.vector().requires_grad_()
    value = mixture.at(vector).log_prob(x, y).mean()
    (gradient,) = torch.autograd.grad(value, vector)
    collapsed = bool((mixture.variance < 2 * VARIANCE_FLOOR).any())
    return Fit(mixture, value.item(), bool(gradient.abs().max() < GRADIENT) and not collapsed)


def fisher_spectrum(mixture: GaussianMoE, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
    """Eigenvalues of the mean outer product of the scores at (x, y), ascending.

    Where the samples come from the mixture this is its Fisher information; an eigenvalue of 0 is a direction in which
    the parameters change and the density does not.
    """

    def one(vector: Tensor, x_n: Tensor, y_n: Tensor) -> Tensor:
        return mixture.at(vector).log_prob(x_n[None], y_n[None])[0]

    scores = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(mixture.vector(), x, y)
    return torch.linalg.eigvalsh(scores.T @ scores / len(x))


def split(mixture: GaussianMoE, which: Sequence[int]) -> GaussianMoE:
    """The same density with a copy of each expert in `which`; an expert and its copies share its gate mass evenly.

    Copies stand before the last expert, which stays the last. Raises ValueError for an expert that is not there.
    """
    last = len(mixture.offset) - 1
    if strange := [e for e in which if not 0 <= e <= last]:
        raise ValueError(f"expert {strange[0]} cannot be copied: there are 0 to {last}")
    order = torch.tensor([*range(last), *which, last])
    slope, intercept = mixture.gate_parameters()
    shared = intercept - mixture.tau * order.bincount().to(intercept).log()
    return replace(
        mixture,
        slope=slope[order[:-1]],
        intercept=shared[order[:-1]] - shared[last],
        coefficient=mixture.coefficient[order],
        offset=mixture.offset[order],
        log_variance=mixture.log_variance[order],
    )


def voronoi_loss(fitted: GaussianMoE, true: GaussianMoE) -> float:
    """Distance of a fit with as many or more experts from the true mixture: 0 when equal.

    Each fitted atom belongs to the nearest true one, by (a, c, v). Summed over the cells:
        |sum over atoms of m - exp(b0* / tau*)|
        + sum over atoms of m * (|b1 - b1*|^s + |a - a*|^s + |c - c*|^r + |v - v*|^(r/2)) + |tau - tau*|
    with m = exp(b0 / tau), divided by what the cell of the last true expert holds of it: the pin, which makes one
    fitted atom's m be 1, says nothing of the others in its cell. s = r = r/2 = 1 in a cell of one atom, and s = 2,
    r = POWERS[atoms] in one of several. The exact form for temperature gates is reconstructed from the theory of
    softmax gates without one.

    Raises ValueError for fewer atoms than true ones, or more in a cell than POWERS knows.
    """
    if len(fitted.offset) < len(true.offset):
        raise ValueError(f"{len(fitted.offset)} fitted experts for {len(true.offset)} true ones: fit as many or more")
    (slope, intercept), (true_slope, true_intercept) = fitted.gate_parameters(), true.gate_parameters()
    mass, true_mass = (intercept / fitted.tau).exp(), (true_intercept / true.tau).exp()
    cell = voronoi_cells(fitted, true)
    pinned = mass[cell == len(true_mass) - 1].sum()
    mass = mass / pinned if pinned > 0 else mass
    total = (fitted.tau - true.tau).abs()
    for j in range(len(true_mass)):
        atoms = (cell == j).nonzero()[:, 0]
        if len(atoms) > max(POWERS):
            raise ValueError(f"{len(atoms)} fitted experts share a true one; powers are known for up to {max(POWERS)}")
        total = total + (mass[atoms].sum() - true_mass[j]).abs()
        s, r, half = (1, 1, 1) if len(atoms) < 2 else (2, POWERS[len(atoms)], POWERS[len(atoms)] // 2)
        for i in atoms:
            gap = (slope[i] - true_slope[j]).norm() ** s + (fitted.coefficient[i] - true.coefficient[j]).norm() ** s
            gap = gap + (fitted.offset[i] - true.offset[j]).abs() ** r
            total = total + mass[i] * (gap + (fitted.variance[i] - true.variance[j]).abs() ** half)
    return float(total)


def voronoi_cells(fitted: GaussianMoE, true: GaussianMoE) -> Int[Tensor, " e"]:
    """The true expert nearest to each fitted one, by (a, c, v)."""
    return torch.cdist(fitted.atoms, true.atoms).argmin(dim=1)


def check_activation(activation: Activation, *, order: int = 1) -> bool:
    """Whether 1, sigma(bx) and x sigma'(bx), for two b, are linearly independent; for order=2, x^2 sigma''(bx) as well.

    Order 1 is what a gate needs with the right number of experts, order 2 with too many. Every homogeneous sigma fails:
    the identity, ReLU, leaky ReLU, powers. Numeric, on a grid: a verdict, not a proof.

    Raises ValueError for another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}: there are 1 and 2")
    derivatives = [activation, torch.func.grad(activation)]
    if order == 2:
        derivatives.append(torch.func.grad(derivatives[1]))
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)
    columns = [torch.ones_like(x)]
    for b in (0.7, 1.6):
        columns += [x**power * torch.func.vmap(d)(b * x) for power, d in enumerate(derivatives)]
    table = torch.stack(columns)
    lengths = table.norm(dim=1, keepdim=True)
    return bool((lengths > 0).all() and torch.linalg.svdvals(table / lengths)[-1] > INDEPENDENT)
