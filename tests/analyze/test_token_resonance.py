"""Token resonance: the difference of class means, how sure its ranking is, and what it says of mere noise."""

from typing import Any

import numpy as np
import pytest
import torch

import moestro
import tiny
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.analyze.token_resonance import (
    halves_overlap,
    prompt_maps,
    raw_frequency,
    resonance_bootstrap,
    token_resonance,
)

LABELS = ["refused", "answered", "refused", "answered", "asked back"]


def profiles_of(counts: dict[int, torch.Tensor], tokens: torch.Tensor) -> Profiles:
    size, zeros = len(tokens), {layer: torch.zeros(len(tokens)) for layer in counts}
    domain = torch.zeros(size, dtype=torch.long)
    return Profiles(torch.arange(size), domain, ("all",), tokens, counts, counts, zeros, zeros, zeros)


def by_hand() -> Profiles:
    counts = {
        1: torch.tensor([[8.0, 0, 2], [1, 6, 3], [6, 2, 2], [3, 4, 3], [2, 5, 3]]),
        4: torch.tensor([[5.0, 5], [5, 5], [7, 3], [4, 6], [3, 7]]),
    }
    return profiles_of(counts, torch.full((5,), 10.0))


def implanted(prompts: int, *, seed: int = 0, effect: float = 4.0) -> tuple[Profiles, list[str]]:
    """Poisson counts of 2 layers of 30 experts; half the prompts show the behaviour, and use experts 3 and 7 more."""
    rng = np.random.default_rng(seed)
    rate = np.full((prompts, 60), 5.0)
    rate[: prompts // 2, [3, 37]] += effect
    counts = torch.from_numpy(rng.poisson(rate)).float()
    labels = ["on"] * (prompts // 2) + ["off"] * (prompts - prompts // 2)
    return profiles_of({0: counts[:, :30], 1: counts[:, 30:]}, torch.full((prompts,), 300.0)), labels


def test_distinctiveness_is_the_class_mean_minus_that_of_all_others() -> None:
    found = token_resonance(by_hand(), LABELS, "refused", unit="count")
    # others of layer 1, expert 0: (1 + 3 + 2) / 3 = 2, pooled over prompts, not over classes
    torch.testing.assert_close(found.score[1], torch.tensor([7.0 - 2, 1.0 - 5, 2.0 - 3]))
    torch.testing.assert_close(found.score[4], torch.tensor([2.0, -2.0]))
    assert found.prompts == {"answered": 2, "asked back": 1, "refused": 2}
    assert found.top(2) == [(1, 0), (4, 0)]
    assert found.top(1, skip=1) == [(4, 0)]
    assert found.bottom(1) == [(1, 1)]
    torch.testing.assert_close(found.means["answered"][1], torch.tensor([2.0, 5.0, 3.0]))
    torch.testing.assert_close(raw_frequency(by_hand(), LABELS, "refused")[1], torch.tensor([0.7, 0.1, 0.2]))
    assert set(found.too_few) == set(LABELS)


def test_shares_do_not_depend_on_the_length_of_prompts() -> None:
    plain = by_hand()
    longer = profiles_of(
        {layer: torch.cat([c[:2] * 3, c[2:]]) for layer, c in plain.counts.items()},
        torch.tensor([30.0, 30, 10, 10, 10]),
    )
    for layer in plain.counts:
        a, b = (token_resonance(p, LABELS, "refused").score[layer] for p in (plain, longer))
        torch.testing.assert_close(a, b)
        counted = token_resonance(longer, LABELS, "refused", unit="count").score[layer]
        assert not torch.allclose(counted, 10 * a)


def test_maps_count_the_tokens_of_prompts_and_no_padding() -> None:
    view = moestro.open(tiny.make("deepseek_v3").model)
    docs = tiny.documents(7, 3, 9)
    (profiles,) = view.observe([tiny.padded(docs, "left")], [TextProfiles()], progress=False)
    for layer in view.layers:
        maps = prompt_maps(profiles, "count")[layer.index]
        assert maps.sum(dim=1).tolist() == [len(doc) * layer.top_k for doc in docs]
        torch.testing.assert_close(prompt_maps(profiles)[layer.index], maps / torch.tensor([[7.0], [3], [9]]))


def test_an_implanted_behaviour_is_found_with_certainty_and_noise_is_not() -> None:
    profiles, labels = implanted(60)
    found = token_resonance(profiles, labels, "on", unit="count")
    assert set(found.top(2)) == {(0, 3), (1, 7)}
    sure = resonance_bootstrap(profiles, labels, "on", 2, unit="count", resamples=400)
    for layer, expert in found.top(2):
        assert sure.low[layer][expert] < found.score[layer][expert] < sure.high[layer][expert]
        assert sure.low[layer][expert] > 0
        assert sure.in_top[layer][expert] > 0.99
        assert sure.p[layer][expert] == pytest.approx(1 / 401)
    others = [float(sure.p[layer][e]) for layer in (0, 1) for e in range(30) if (layer, e) not in found.top(2)]
    assert min(others) > 0.05
    assert sum(float(row.sum()) for row in sure.in_top.values()) == pytest.approx(2)
    halves = halves_overlap(profiles, labels, "on", 2, unit="count")
    assert halves.mean > 0.9

    noise, labels = implanted(60, effect=0.0)
    assert min(float(row.min()) for row in resonance_bootstrap(noise, labels, "on", 2, resamples=400).p.values()) > 0.05
    halves = halves_overlap(noise, labels, "on", 6)
    assert halves.mean < 3 * halves.chance
    assert halves.chance == pytest.approx((36 / 60) / (12 - 36 / 60))


def test_the_p_value_holds_for_the_whole_family() -> None:
    """Of 40 sets of noise, about one in twenty has any expert below 0.05."""
    false = 0
    for seed in range(40):
        noise, labels = implanted(24, seed=seed, effect=0.0)
        p = resonance_bootstrap(noise, labels, "on", 1, resamples=99, seed=seed).p
        false += min(float(row.min()) for row in p.values()) <= 0.05
    assert false <= 6


def test_the_interval_covers_the_true_difference() -> None:
    covered = 0
    for seed in range(40):
        profiles, labels = implanted(60, seed=seed)
        sure = resonance_bootstrap(profiles, labels, "on", 1, unit="count", resamples=200, seed=seed)
        covered += bool(sure.low[0][3] <= 4.0 <= sure.high[0][3])
    assert covered >= 34


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        (["a"] * 5, "a", "all prompts are"),
        (["a", "b"], "a", "2 labels for 5 prompts"),
        (LABELS, "silent", "no prompt is labelled 'silent'"),
    ],
)
def test_impossible_labels_are_refused(labels: list[str], target: str, message: str) -> None:
    calls: list[Any] = [
        lambda: token_resonance(by_hand(), labels, target),
        lambda: resonance_bootstrap(by_hand(), labels, target, 1),
        lambda: halves_overlap(by_hand(), labels, target, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_single_prompt_has_no_halves() -> None:
    with pytest.raises(ValueError, match="1 prompts of 'asked back'"):
        halves_overlap(by_hand(), LABELS, "asked back", 1)
