"""The statistics room, and sets with their controls."""

import numpy as np
import pytest
import torch

from moestro import sets, stats


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [(i := stats.bootstrap(rng.normal(1.0, 2.0, 60), resamples=500)).low <= 1.0 <= i.high for _ in range(200)]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_paired_difference_sees_what_the_spread_of_units_hides() -> None:
    rng = np.random.default_rng(1)
    units = rng.normal(0, 10, 50)
    found = stats.difference(units + 0.5 + rng.normal(0, 0.1, 50), units)
    assert found.excludes_zero
    assert found.estimate == pytest.approx(0.5, abs=0.1)


def test_constant_samples_have_an_interval_of_no_width() -> None:
    assert stats.bootstrap([2.0, 2.0]) == stats.Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_samples_that_say_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError):
        stats.bootstrap(values)


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 treated and 2 control"):
        stats.difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="same units"):
        stats.permutation_test([1, 2, 3], [1, 2], statistic="pearson")


def test_permutation_p_values_are_uniform_without_an_effect_and_small_with_one() -> None:
    rng = np.random.default_rng(2)
    null = [stats.permutation_test(rng.normal(size=12), rng.normal(size=12), resamples=199) for _ in range(100)]
    assert 0.4 < np.mean(null) < 0.6
    x = rng.normal(size=30)
    assert stats.permutation_test(x, x + rng.normal(0, 0.3, 30), statistic="spearman") < 0.01
    assert stats.permutation_test(x + 1, x, paired=True) < 0.01
    assert stats.permutation_test(x + 3, x) < 0.01


def test_a_rank_correlation_is_spearmans_with_an_interval_that_covers_it() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(3)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    interval, p = stats.rank_correlation(x, y)
    assert interval.estimate == pytest.approx(spearmanr(x, y).statistic)
    assert 0 < interval.low < interval.estimate < interval.high < 1
    assert p < 0.01
    assert stats.rank_correlation(x, rng.normal(size=40))[1] > 0.05
    with pytest.raises(ValueError, match=r"all 40 values are 1\.0"):
        stats.rank_correlation(x, np.ones(40))


def test_exceeds_counts_the_measured_draw_itself() -> None:
    assert stats.exceeds(5.0, [1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert stats.exceeds(2.5, [1, 2, 3, 4]) == pytest.approx(3 / 5)


def test_the_difference_of_other_units_has_the_interval_of_two_means() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(1.0, 1.0, 400), rng.normal(0.0, 2.0, 100)
    found = stats.difference(a, b, paired=False)
    assert found.estimate == pytest.approx(a.mean() - b.mean())
    spread = np.sqrt(a.var() / 400 + b.var() / 100)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_the_largest_of_many_differences_is_held_against_the_largest_by_chance() -> None:
    rng = np.random.default_rng(4)
    smallest = []
    for _ in range(100):
        smallest.append(stats.largest_difference_test(rng.normal(size=(10, 30)), rng.normal(size=(8, 30))).min())
    assert 0.4 < np.mean(smallest) < 0.6  # the best of 30 columns of noise: uniform, not near 0
    first, second = rng.normal(size=(20, 30)), rng.normal(size=(20, 30))
    first[:, 7] += 3
    p = stats.largest_difference_test(first, second)
    assert p[7] < 0.01
    assert (np.delete(p, 7) > 0.01).all()
    with pytest.raises(ValueError, match=r"give \[n, M\] and \[k, M\]"):
        stats.largest_difference_test(first, second[:, :3])


def test_corrections_of_many_tests() -> None:
    assert stats.corrected([0.01, 0.04, 0.03], "holm") == pytest.approx([0.03, 0.06, 0.06])
    assert stats.corrected([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert len(stats.corrected([])) == 0


def test_sets_are_chosen_by_score() -> None:
    scores = {0: torch.tensor([0.1, 0.9, float("nan")]), 2: torch.tensor([0.9, 0.3, 0.2])}
    assert sets.top(scores, 3) == [(0, 1), (2, 0), (2, 1)]
    assert sets.top(scores, 1, layers=[2]) == [(2, 0)]
    assert sets.above(scores, 0.25) == {(0, 1), (2, 0), (2, 1)}
    assert sets.from_layers({"0": [1], "2": [1, 0]}) == sets.above(scores, 0.25)
    assert sets.by_layer({(2, 1), (0, 1), (2, 0)}) == {0: [1], 2: [0, 1]}
    assert sets.overlap({(0, 1), (2, 0)}, {(0, 1)}) == 0.5
    with pytest.raises(ValueError, match="choose 1 to 5"):
        sets.top(scores, 6)


def test_layer_matched_controls_are_others_in_the_same_numbers() -> None:
    chosen = {(0, 1), (0, 2), (3, 7)}
    for control in sets.layer_matched(chosen, {0: 8, 1: 8, 3: 8}, 20, avoid={(3, 0)}):
        assert {layer: len(n) for layer, n in sets.by_layer(control).items()} == {0: 2, 3: 1}
        assert not control & (chosen | {(3, 0)})
    crowded = next(sets.layer_matched({(0, 0), (0, 1), (0, 2)}, {0: 4}, 1))
    assert len(crowded) == 3
    assert (0, 3) in crowded
    with pytest.raises(ValueError, match="no number 9"):
        next(sets.layer_matched({(0, 9)}, {0: 8}, 1))


def test_random_sets_of_all_layers_repeat_by_seed() -> None:
    sizes = {0: 4, 1: 4}
    assert list(sets.anywhere(3, sizes, 5, seed=1)) == list(sets.anywhere(3, sizes, 5, seed=1))
    assert {len(s) for s in sets.anywhere(3, sizes, 5)} == {3}


def test_totals_have_the_interval_of_the_mean_they_sum_to() -> None:
    values = np.random.default_rng(5).normal(3.0, 1.0, 60)
    table = np.stack([values, np.ones(60)], axis=1)
    (found,) = stats.bootstrap_totals(table, lambda s: s[:, :1] / s[:, 1:], seed=1)
    wanted = stats.bootstrap(values, seed=2)
    assert found.estimate == pytest.approx(wanted.estimate)
    assert found.low == pytest.approx(wanted.low, abs=0.05)
    assert found.high == pytest.approx(wanted.high, abs=0.05)


def test_groups_are_resampled_on_their_own() -> None:
    table = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for interval in stats.bootstrap_totals(table, lambda s: s, groups=["a", "a", "b"]):
        assert interval.low == interval.high == interval.estimate
    assert stats.bootstrap_totals(table, lambda s: s)[1].low == 0


@pytest.mark.parametrize(("table", "words"), [([[1.0]], "two units"), ([[1.0], [float("nan")]], "1 of 2 values")])
def test_totals_of_bad_tables_are_refused(table, words) -> None:
    with pytest.raises(ValueError, match=words):
        stats.bootstrap_totals(table, lambda s: s)


def test_a_share_of_none_or_all_has_an_interval_of_some_width() -> None:
    assert stats.proportion(0, 10).low == 0 < 0.2 < stats.proportion(0, 10).high < 0.4
    half = stats.proportion(50, 100)
    assert (half.estimate, half.low) == (0.5, pytest.approx(0.404, abs=1e-3))  # Wilson's, by hand
    for count, units in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"{count} of {units}"):
            stats.proportion(count, units)
