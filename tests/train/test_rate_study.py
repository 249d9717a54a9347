"""Rates at which fits near the truth, with as many experts as it has and with more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moestro.train import rate_study as module
from moestro.train.gaussian_moe import Fit, GaussianMoE, split
from moestro.train.rate_study import ERRORS, LESSER, SHARED_ERRORS, RateStudy, rate_study

TWO: dict[str, Any] = dict(
    slope=[[1.5]], intercept=[0.3], tau=0.7, coefficient=[[1.0], [-1.0]], offset=[1.0, -0.5], sd=[0.5, 0.5]
)
THREE: dict[str, Any] = dict(
    slope=[[1.5], [-0.5]],
    intercept=[0.3, 0.1],
    tau=0.7,
    coefficient=[[1.0], [-1.0], [0.2]],
    offset=[1.0, -0.5, 3.0],
    sd=[0.5, 0.6, 0.4],
)


def mixture(plain: dict[str, Any] = TWO, **changes: Any) -> GaussianMoE:
    return GaussianMoE.of(**(plain | changes), activation=torch.tanh)


def fits(monkeypatch: pytest.MonkeyPatch, *found: Fit) -> None:
    """The study's next fits end at these."""
    ends = iter(found)
    monkeypatch.setattr(module, "fit", lambda x, y, start: next(ends))


def stay(monkeypatch: pytest.MonkeyPatch) -> list[GaussianMoE]:
    """The study's fits end where they start; returns the starts as they come."""
    starts: list[GaussianMoE] = []

    def fit(x: torch.Tensor, y: torch.Tensor, start: GaussianMoE) -> Fit:
        starts.append(start)
        return Fit(start, 0.0, True)

    monkeypatch.setattr(module, "fit", fit)
    return starts


def study_of(monkeypatch: pytest.MonkeyPatch, truth: GaussianMoE, end: GaussianMoE) -> RateStudy:
    """One fit, which ends there."""
    fits(monkeypatch, Fit(end, 0.0, True))
    return rate_study(truth, sizes=[20], seeds=[0], copies=[0] * (len(end.offset) - len(truth.offset)))


def error(study: RateStudy, name: str) -> float:
    return float(study.errors[name][0, 0])


def test_with_as_many_experts_errors_fall_and_failures_are_reported() -> None:
    study = rate_study(mixture(), sizes=(200, 800), seeds=range(3))
    assert tuple(study.errors) == ERRORS
    for name in ("gate function", "density"):
        assert study.median(name)[1] < study.median(name)[0]
        assert study.slope(name) < 0
    assert all(0 <= failed <= 3 for failed in study.failed)


def test_with_more_experts_the_density_is_still_learned() -> None:
    ticks: list[bool] = []
    study = rate_study(
        mixture(), sizes=(200, 1600), seeds=range(3), copies=[1], starts=2, on_fit=lambda: ticks.append(True)
    )
    assert len(ticks) == 2 * 3 * 2
    assert set(study.errors) == {*ERRORS, *SHARED_ERRORS, *LESSER}
    assert study.unconverged.shape == (2, 3)
    assert study.median("density")[1] < study.median("density")[0] < 0.2
    assert np.isfinite(study.median("shared experts")).all()


@pytest.mark.parametrize("copies", [[0], [1], [1, 0], [1, 1]])
def test_starts_without_jitter_are_the_truth_with_experts_split(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, starts = mixture(), stay(monkeypatch)
    study = rate_study(truth, sizes=[20], seeds=[0], jitter=0.0, copies=copies, starts=2)
    assert len(starts) == 2
    assert all(torch.equal(start.vector(), split(truth, copies).vector()) for start in starts)
    measured = ("density", "voronoi", "shared gate slope", "shared experts")
    assert all(error(study, name) == pytest.approx(0, abs=1e-12) for name in measured)


def test_every_start_has_its_own_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, starts = mixture(), stay(monkeypatch)
    rate_study(truth, sizes=[20], seeds=range(20), jitter=0.4, copies=[1], starts=2)
    jitter = torch.stack([start.vector() for start in starts]) - split(truth, [1]).vector()
    assert jitter.std(dim=0).mean() == pytest.approx(0.4, rel=0.1)
    assert len(jitter.unique(dim=0)) == 40


def test_the_most_likely_of_the_starts_that_converge_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [split(mixture(tau=tau), [1]) for tau in (2.0, 1.0, 3.0)]
    fits(monkeypatch, Fit(ends[0], -1.0, True), Fit(ends[1], -0.5, True), Fit(ends[2], 9.0, False))
    study = rate_study(mixture(), sizes=[20], seeds=[0], copies=[1], starts=3)
    assert error(study, "log tau") == pytest.approx(np.log(1 / 0.7))
    assert study.unconverged.tolist() == [[1]]
    assert study.failed == [0]


def test_without_a_start_that_converges_there_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, *[Fit(split(mixture(), [0]), 0.0, False)] * 2)
    study = rate_study(mixture(), sizes=[20], seeds=[0], copies=[0], starts=2)
    assert study.failed == [1]
    assert study.unconverged.tolist() == [[2]]
    assert all(np.isnan(values).all() for values in study.errors.values())


def test_errors_of_an_expert_fitted_twice_are_weighted_by_its_gate_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    flat: dict[str, Any] = dict(slope=[[0.0]], tau=1.0)
    truth = mixture(**flat, intercept=[0.0])
    fitted = mixture(
        slope=[[0.2], [0.4]],
        intercept=[0.0, 0.3],
        tau=1.0,
        coefficient=[[1.1], [-1.2], [-0.8]],
        offset=[1.0, -0.1, -0.5],
        sd=[0.5, 0.5, 0.6],
    )
    study = study_of(monkeypatch, truth, fitted)
    assert error(study, "gate slope") == pytest.approx(0.2)
    assert error(study, "experts") == pytest.approx(0.1 / 3)
    x, _ = truth.sample(4000, seed=10_000)
    mass = torch.stack([(0.2 * x[:, 0]).tanh(), (0.4 * x[:, 0]).tanh() + 0.3, torch.zeros(len(x))]).softmax(dim=0)
    a = float(mass[1].mean() / mass[1:].mean(dim=1).sum())  # the first's share of what stands for the second expert
    coefficient, offset, variance = 0.2, 0.4 * a, (0.6**2 - 0.5**2) * (1 - a)
    assert error(study, "shared gate slope") == pytest.approx(0.4 * a)
    assert error(study, "shared coefficient") == pytest.approx(coefficient)
    assert error(study, "shared offset") == pytest.approx(offset)
    assert error(study, "shared variance") == pytest.approx(variance)
    assert error(study, "shared experts") == pytest.approx((coefficient + offset + variance) / 3)
    assert error(study, "lesser weight") == pytest.approx(min(a, 1 - a))
    assert error(study, "lesser experts") == pytest.approx((0.2 + 0.6**2 - 0.5**2) / 3)  # the last
    assert error(study, "gate function") == pytest.approx(float((mass[0] - 0.5).abs().mean()))


def test_the_density_error_is_the_total_variation(monkeypatch: pytest.MonkeyPatch) -> None:
    one: dict[str, Any] = dict(coefficient=[[0.0], [0.0]], sd=[1.0, 1.0])
    truth, moved = mixture(**one, offset=[0.0, 100.0]), mixture(**one, offset=[0.2, 100.2])
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = float(2 * normal.cdf(torch.tensor(0.1)) - 1)  # of normals 0.2 apart
    assert error(study_of(monkeypatch, truth, moved), "density") == pytest.approx(expected, rel=0.05)


def permuted(order: Sequence[int]) -> GaussianMoE:
    """THREE with its experts in another order; an expert that is pinned in the place of the last keeps no slope."""
    names = ("coefficient", "offset", "sd")
    gate = {"slope": [*THREE["slope"], [0.0]], "intercept": [*THREE["intercept"], 0.0]}
    moved = {name: [THREE[name][e] for e in order] for name in names}
    return mixture(THREE, **moved, **{name: [values[e] for e in order[:-1]] for name, values in gate.items()})


def test_labels_do_not_matter_but_for_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = study_of(monkeypatch, mixture(THREE), permuted([1, 0, 2]))
    assert all(error(swapped, name) == pytest.approx(0, abs=1e-12) for name in ERRORS)
    assert study_of(monkeypatch, mixture(THREE), permuted([0, 2, 1])).failed == [1]


def test_a_true_expert_without_a_fitted_one_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    on_one = mixture(THREE, coefficient=[[1.0], [1.0], [0.2]], offset=[1.0, 1.1, 3.0])
    assert study_of(monkeypatch, mixture(THREE), on_one).failed == [1]


def test_slopes_and_their_interval() -> None:
    sizes, rng = (100, 1000, 10_000), np.random.default_rng(0)
    clean = np.array(sizes)[:, None] ** -0.25 * np.ones(8)
    noisy = clean * np.exp(0.3 * rng.standard_normal(clean.shape))
    noisy[0, 0] = np.nan
    study = RateStudy(sizes, {"log tau": noisy, "experts": clean}, np.zeros((3, 8)))
    assert study.failed == [1, 0, 0]
    assert study.slope("experts") == pytest.approx(-0.25)
    assert study.slope_interval("experts") == pytest.approx((-0.25, -0.25))
    low, high = study.slope_interval("log tau")
    assert low < study.slope("log tau") < high
    assert low < -0.25 < high
    assert high - low > 0.02
    none = RateStudy(sizes, {"gate slope": np.full((3, 8), np.nan)}, np.zeros((3, 8)))
    assert np.isnan([none.slope("gate slope"), *none.slope_interval("gate slope")]).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(copies=[2]), r"expert 2 cannot be copied: there are 0 to 1"),
        (dict(copies=[0, 1, 0]), r"3 experts too many: 4 may share a true one, .* up to 3; give 2 copies or fewer"),
        (dict(starts=0), r"starts=0"),
    ],
)
def test_studies_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rate_study(mixture(), sizes=[100], seeds=[0], **wrong)
