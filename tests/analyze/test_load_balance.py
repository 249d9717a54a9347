"""Measures of how even a load is, at their ends and by definition."""

import pytest
import torch

from moestro.analyze.load_balance import evenness, gini


def test_even_and_single_loads_are_the_ends() -> None:
    loads = torch.tensor([[3.0, 3, 3, 3], [9, 0, 0, 0], [0, 0, 0, 0]])
    assert evenness(loads).tolist() == pytest.approx([1, 0, 0])
    assert gini(loads).tolist() == pytest.approx([0, 0.75, 0])


def test_gini_is_half_the_relative_mean_difference() -> None:
    load = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = (load[:, None] - load[None]).abs().mean() / (2 * load.mean())
    assert float(gini(load)) == pytest.approx(float(wanted))


def test_evenness_is_the_entropy_of_the_shares() -> None:
    assert float(evenness(torch.tensor([1.0, 1, 2]))) == pytest.approx(1.0397207 / 1.0986123, rel=1e-5)
