"""Specialisation against counts made by hand, and its control against texts without domains."""

import numpy as np
import pytest
import torch

from moestro.analyze.profiles import Profiles
from moestro.analyze.specialisation import domain_counts, information, specialisation, specialists
from moestro.report.figures import mutual_information

TOKENS, EXPERTS = 40.0, 8


def texts(preference: float, *, domains: int = 3, each: int = 12, seed: int = 0) -> Profiles:
    """Texts of one layer with one expert a token; domain d prefers expert d by `preference` logits."""
    rng = np.random.default_rng(seed)
    counts = []
    for d in range(domains):
        for _ in range(each):
            logits = rng.normal(size=EXPERTS) * 0.5
            logits[d] += preference
            counts.append(rng.multinomial(int(TOKENS), np.exp(logits) / np.exp(logits).sum()))
    samples = domains * each
    table = torch.tensor(np.array(counts), dtype=torch.float64)
    return Profiles(
        torch.arange(samples),
        torch.arange(domains).repeat_interleave(each),
        tuple("abcdefgh"[:domains]),
        torch.full((samples,), TOKENS, dtype=torch.float64),
        {0: table, 2: table[:, :4].contiguous()},
        {0: table, 2: table[:, :4].contiguous()},
        *({layer: torch.zeros(samples, dtype=torch.float64) for layer in (0, 2)} for _ in range(3)),
    )


def test_bits_are_those_of_the_definition() -> None:
    assert information(torch.tensor([[7.0, 0], [0, 3]])) == pytest.approx(1)
    assert information(torch.tensor([[5.0, 5], [50, 50]])) == pytest.approx(0)
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (5, 9))).double()
    assert information(counts) == pytest.approx(mutual_information(counts.long().tolist()))


def test_shares_and_log_ratios_by_hand() -> None:
    profiles = texts(2.0)
    found = specialisation(profiles, permutations=2)
    for layer, counts in domain_counts(profiles).items():
        shares = counts / (12 * TOKENS)
        torch.testing.assert_close(found.shares[layer], shares)
        others = (shares[1] + shares[2]) / 2
        wanted = ((shares[0] + 0.5 / (12 * TOKENS)) / (others + 0.5 / (12 * TOKENS))).log2()
        torch.testing.assert_close(found.log_ratios[layer][0], wanted)


def test_a_preferred_expert_is_found_and_is_beyond_its_control() -> None:
    profiles = texts(2.0)
    found = specialisation(profiles)
    assert found.information_p()[0] < 0.02
    for d, domain in enumerate(found.domains):
        best = specialists(profiles, found, domain, count=3)
        assert (best[0].layer, best[0].expert) in {(0, d), (2, d)}
        assert best[0].p < 0.02
        assert best[0].difference.low > 0
        assert best[0].difference.estimate == pytest.approx(best[0].share - best[0].elsewhere)
        assert best[0].difference.low < best[0].difference.estimate < best[0].difference.high


def test_texts_without_domains_stay_within_their_control() -> None:
    """Texts differ a lot, domains do not: tokens as units would call this significant nearly always."""
    called = 0
    for seed in range(20):
        profiles = texts(0.0, seed=seed)
        found = specialisation(profiles, permutations=60, seed=seed)
        called += min(found.information_p().values()) <= 0.05
        called += specialists(profiles, found, "a", count=1)[0].p <= 0.05
    assert called <= 6  # 2 expected of 40; 7 or more have probability 0.003


def test_one_domain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all texts are of \['a'\]"):
        specialisation(texts(1.0, domains=1))
