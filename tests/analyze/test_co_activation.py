"""Pairs of experts against plain counting, and planted pairs beside chance."""

import itertools

import pytest
import torch

import moestro
import tiny
from moestro.analyze.co_activation import (
    GROUPS,
    CoActivation,
    expected_together,
    independent_together,
    strongest_pairs,
)
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.routing import Routing
from moestro.view.events import MoEEvent, Tokens

EXPERTS = 6


def event(indices, sample, *, weights=None, layer=0, experts=EXPERTS) -> MoEEvent:
    count = len(indices)
    zeros = torch.zeros(count, dtype=torch.long)
    tokens = Tokens(sample, torch.arange(count), zeros, zeros, ("all",))
    weights = torch.ones(indices.shape) if weights is None else weights
    hidden = torch.zeros(count, 2)
    routing = Routing(torch.zeros(count, experts), weights, indices)
    return MoEEvent(layer, experts, tokens, None, hidden=hidden, routing=routing, combined=hidden)


def profiles_of(indices, sample, domain=None, names=("all",)) -> Profiles:
    texts = int(sample.max()) + 1
    counts = torch.zeros(texts, EXPERTS, dtype=torch.float64)
    counts.index_put_((sample[:, None].expand_as(indices), indices), torch.ones(()).double(), accumulate=True)
    of = torch.zeros(texts, dtype=torch.long) if domain is None else domain
    tokens = sample.bincount(minlength=texts).double()
    return Profiles(torch.arange(texts), of, names, tokens, {0: counts}, {0: counts}, *[{0: tokens}] * 3)


def test_counts_are_those_of_a_plain_loop() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    record, together = view.observe(
        [tiny.padded(tiny.documents(9, 6, 20))], [tiny.Record(), CoActivation()], progress=False
    )
    for layer, seen in record.items():
        wanted = torch.zeros_like(together[layer])
        for sample, row in zip(seen["sample"].tolist(), seen["indices"].tolist()):
            for i, j in itertools.combinations(sorted(row), 2):
                wanted[sample % GROUPS, i, j] += 1
        assert torch.equal(together[layer], wanted)


def test_unused_slots_are_no_pairs_and_parts_merge_to_the_whole() -> None:
    indices = torch.tensor([[0, 1, 2], [3, 1, EXPERTS], [4, 5, 0]])
    weights = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 1, 1]])
    sample = torch.tensor([0, 1, 1 + GROUPS])
    whole, one, other = CoActivation(), CoActivation(), CoActivation()
    whole.update(event(indices, sample, weights=weights))
    one.update(event(indices[:1], sample[:1], weights=weights[:1]))
    other.update(event(indices[1:], sample[1:], weights=weights[1:]))
    one.merge(other)
    found = whole.result()[0]
    assert torch.equal(one.result()[0], found)
    assert {tuple(p) for p in found.nonzero().tolist()} == {(0, 0, 1), (1, 1, 3), (1, 0, 4), (1, 0, 5), (1, 4, 5)}


def chosen(tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(tokens, EXPERTS, generator=generator).topk(2, dim=1).indices


def test_expectations_sum_to_the_pairs_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    indices, sample = chosen(600, generator), torch.arange(600) // 20
    observer = CoActivation()
    observer.update(event(indices, sample))
    together = observer.result()[0]
    profiles = profiles_of(indices, sample)
    assert float(expected_together(profiles, 0, together).sum()) == pytest.approx(600)
    torch.testing.assert_close(
        expected_together(profiles, 0, together).sum(dim=0), independent_together(profiles, 0, together)
    )


def test_a_planted_pair_is_the_strongest_and_chance_gives_none() -> None:
    generator = torch.Generator().manual_seed(2)
    sample = torch.arange(4000) // 20
    for planted in (True, False):
        indices = chosen(4000, generator)
        if planted:
            indices[::5] = torch.tensor([4, 1])
        observer = CoActivation()
        observer.update(event(indices, sample))
        pairs = strongest_pairs(profiles_of(indices, sample), observer.result(), 3)
        certain = [(p.first, p.second) for p in pairs if p.lift.low > 1.2]
        assert certain == ([(1, 4)] if planted else [])


def test_a_shared_domain_alone_makes_no_pair() -> None:
    """Experts 0, 1, 2 serve one domain, 3, 4, 5 the other: pairs by domain, none beyond it."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.arange(4000) // 20
    domain = torch.arange(200) % 2
    indices = torch.rand(4000, 3, generator=generator).topk(2, dim=1).indices + 3 * domain[sample][:, None]
    observer = CoActivation()
    observer.update(event(indices, sample))
    together = observer.result()
    profiles = profiles_of(indices, sample, domain, ("a", "b"))
    apart = independent_together(profiles, 0, together[0])
    assert float(together[0].sum(dim=0)[0, 1] / apart[0, 1]) > 1.5
    assert all(p.lift.low < 1.15 for p in strongest_pairs(profiles, together, 6))


def test_no_text_in_a_half_gives_no_pair() -> None:
    indices, sample = torch.tensor([[0, 1]] * 50), torch.zeros(50, dtype=torch.long)
    observer = CoActivation()
    observer.update(event(indices, sample))
    assert strongest_pairs(profiles_of(indices, sample), observer.result()) == []


def test_pairs_of_a_model_agree_with_its_profiles() -> None:
    view = moestro.open(tiny.make("deepseek_v3").model)
    data = [tiny.padded(tiny.documents(40, 33, 25))]
    profiles, together = view.observe(data, [TextProfiles(), CoActivation()], progress=False)
    for layer in view.layers:
        pairs = together[layer.index].sum(dim=0)
        both = (pairs + pairs.T).sum(dim=1).double()
        torch.testing.assert_close(both, profiles.counts[layer.index].sum(dim=0) * (layer.top_k - 1))
