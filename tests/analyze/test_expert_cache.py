"""Expert caches against a cache of one size that is simulated expert by expert, and the optimum against all choices."""

import itertools

import pytest
import torch
from torch import Tensor

import moestro
import tiny
from moestro.analyze.expert_cache import (
    POLICIES,
    CacheCurve,
    Requests,
    RoutedTexts,
    knee,
    layer_caches,
    local_use,
    model_cache,
    share_slots,
    slots_for,
    stack_depths,
)
from moestro.analyze.local_routing import LocalRouting, segment_routing
from moestro.view.events import Tokens

EVICTING = POLICIES[:4]


def texts(count: int, length: int, experts: int, slots: int, seed: int = 0) -> Tensor:
    """Routing with some memory: [S, T, K], each token's experts distinct."""
    generator = torch.Generator().manual_seed(seed)
    taste = torch.randn(count, 1, experts, generator=generator) + torch.randn(
        count, length, experts, generator=generator
    )
    return taste.topk(slots, dim=2).indices


def requests_of(routed: Tensor, experts: int, layers: int = 1) -> Requests:
    count, length, _ = routed.shape
    sample = torch.arange(count).repeat_interleave(length)
    tokens = Tokens(sample, torch.arange(length).repeat(count), sample, sample % 2, ("a", "b"))
    flat = {i: ((routed + i) % experts).flatten(0, 1).short() for i in range(layers)}
    return Requests(tokens, flat, dict.fromkeys(flat, experts))


def reference(text: list[list[int]], capacity: int, policy: str, m: int, pinned: bool) -> int:
    """Hits of one cache, one request after the other."""
    flat = [(t, e) for t, experts in enumerate(text) for e in experts]
    cache: list[int] = []
    uses: dict[int, int] = {}
    last: dict[int, int] = {}
    hits = served = 0
    for t, experts in enumerate(text):
        new = [e for e in experts if e not in last]
        hits += sum(e in cache or (e in new and len(last) + new.index(e) < capacity) for e in experts)
        for e in experts:
            served += 1
            uses[e], last[e] = uses.get(e, 0) + 1, served
            if e in cache:
                continue
            if len(cache) == capacity:
                ahead = flat[served - 1 :] if policy == "belady" else [r for r in flat[served - 1 :] if r[0] < t + m]
                later = [x for _, x in ahead]

                def priority(x: int, later: list[int] = later) -> tuple:
                    held = pinned and x in experts  # noqa: B023
                    if policy == "lru":
                        return held, last[x]
                    if policy == "lfu":
                        return held, uses[x], last[x]
                    if policy == "segment":
                        return held, later.count(x), last[x]
                    return held, -later.index(x) if x in later else -(10**6) - x

                cache.remove(min(cache, key=priority))
            cache.append(e)
    return hits


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("policy", EVICTING)
def test_every_size_at_once_gives_the_hits_of_each_size_alone(policy: str, pinned: bool) -> None:
    routed = texts(4, 24, 7, 2)
    routed[1, 15:] = -1  # a shorter text
    routed[2, ::3, 1] = -1  # unused slots
    need, _ = stack_depths(routed, 7, policy, m=4, pinned=pinned)
    for s, text in enumerate(routed.tolist()):
        asked = [[e for e in token if e >= 0] for token in text]
        for capacity in range(2, 8):
            hits = ((need[s] > 0) & (need[s] <= capacity)).sum()
            assert hits == reference(asked, capacity, policy, 4, pinned), (policy, s, capacity)


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_best_of_all_possible_caches(seed: int) -> None:
    """One expert a token: every choice of whom to evict is tried."""
    text = texts(1, 9, 4, 1, seed)
    for capacity in (1, 2, 3):
        best, states = 0, {(frozenset[int](), 0)}
        for (e,) in text[0].tolist():
            following = set()
            for cache, hits in states:
                if e in cache:
                    following.add((cache, hits + 1))
                elif len(cache) < capacity:
                    following.add((cache | {e}, hits))
                else:
                    following |= {(cache - {out} | {e}, hits) for out in cache}
            states = following
        best = max(hits for _, hits in states)
        need, first = stack_depths(text, 4, "belady")
        assert int(((need <= capacity) & ~first).sum()) == best


def test_no_policy_beats_belady_and_looking_ahead_beats_lru() -> None:
    requests = requests_of(texts(30, 60, 16, 2), 16)
    rates = {policy: layer_caches(requests, policy, m=16)[0].rates("miss") for policy in POLICIES}
    for policy in EVICTING:
        assert bool((rates[policy] <= rates["belady"] + 1e-12)[1:].all())
    assert rates["segment"][3] > rates["lru"][3]
    assert rates["segment"][-1] == rates["lru"][-1]  # nothing is ever evicted


def test_the_fixed_set_is_the_most_used_experts() -> None:
    routed = torch.tensor([[[0], [0], [1], [2]], [[0], [2], [2], [0]]])
    curve = layer_caches(requests_of(routed, 3), "fixed", m=1)[0]
    assert curve.rates().tolist() == pytest.approx([4 / 8, 7 / 8, 1])
    assert curve.hits()[:, 0].tolist() == [2, 2]


def test_a_first_use_is_a_hit_only_where_it_is_said_to_be_free() -> None:
    curve = layer_caches(requests_of(torch.tensor([[[0], [1], [0], [2]]]), 3), "lru", m=1)[0]
    assert curve.rates("free").tolist() == [1 / 4, 3 / 4, 1]
    assert curve.rates("miss").tolist() == [0, 1 / 4, 1 / 4]


def test_one_cache_for_all_layers_is_a_layer_with_all_their_experts() -> None:
    requests = requests_of(texts(3, 12, 6, 2), 6, layers=2)
    joined = torch.cat([requests.experts[0], requests.experts[1] + 6], dim=1).view(3, 12, 4).long()
    for policy in POLICIES:
        expected = layer_caches(requests_of(joined, 12), policy, m=4)[0]
        found = model_cache(requests, policy, m=4)
        assert found.top_k == 4
        torch.testing.assert_close(found.hits(), expected.hits())


def test_slots_are_shared_out_for_the_most_hits() -> None:
    requests = requests_of(texts(6, 20, 6, 2), 6, layers=3)
    curves = layer_caches(requests, "lru", m=4)
    uneven = {0: curves[0], 1: layer_caches(requests_of(texts(6, 20, 6, 2)[:, :1].expand(-1, 20, -1), 6), "lru")[0]}
    for table, slots in ((curves, 9), (curves, 13), (uneven, 7)):
        shared = share_slots(table, slots)
        assert sum(shared.values()) == slots
        hits = lambda choice, t=table: sum(float(t[i].hits().sum(0)[c - 1]) for i, c in choice.items())  # noqa: E731
        every = [c for c in itertools.product(range(2, 7), repeat=len(table)) if sum(c) == slots]
        assert hits(shared) == pytest.approx(max(hits(dict(zip(table, c))) for c in every))


def test_the_least_slots_for_a_hit_rate_and_the_knee() -> None:
    curve = CacheCurve(
        "lru", 1, torch.tensor([[2.0, 5.0, 1.0, 1.0]]), torch.zeros(1, 4), torch.tensor([10.0])
    )  # rates 0.2, 0.7, 0.8, 0.9
    assert slots_for({3: curve}, 0.7) == {3: 2}
    assert slots_for({3: curve}, 0.71) == {3: 3}
    assert knee(curve) == 2
    with pytest.raises(ValueError, match=r"hit_rate=0.95 in layer 3.* is 0.900"):
        slots_for({3: curve}, 0.95)


def test_observed_texts_are_the_routing_itself_and_merge() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    data = tiny.padded(tiny.documents(9, 6, 14), domain=torch.tensor([0, 1, 0]), domains=("a", "b"))
    numbered = data | {"sample": torch.arange(3)}
    parts = [{k: v if k == "domains" else v[rows] for k, v in numbered.items()} for rows in ([1, 2], [0])]
    whole, record = view.observe([data], [RoutedTexts(), tiny.Record()], progress=False)
    kept = [RoutedTexts(), RoutedTexts()]
    for observer, part in zip(kept, parts):
        view.observe([part], [observer], progress=False)
    kept[0].merge(kept[1])
    merged = kept[0].result()
    for layer in view.layers:
        assert torch.equal(whole.experts[layer.index].long(), record[layer.index]["indices"])
        assert torch.equal(whole.experts[layer.index], merged.experts[layer.index])
    assert merged.of("b").tokens.sample.unique().tolist() == [1]
    (half,) = view.observe([data], [RoutedTexts(every=2)], progress=False)
    assert half.tokens.sample.unique().tolist() == [0, 2]
    (streamed,) = view.observe([data], [LocalRouting((4,))], progress=False)
    assert segment_routing(local_use(whole, (4,)), 4) == segment_routing(streamed, 4)
    shuffled = whole.shuffled(seed=1)
    for layer in view.layers:
        rows = [sorted(map(tuple, r.experts[layer.index].tolist())) for r in (whole, shuffled)]
        assert rows[0] == rows[1]
        assert not torch.equal(whole.experts[layer.index], shuffled.experts[layer.index])


def test_sizes_outside_what_a_layer_has_are_refused() -> None:
    requests = requests_of(texts(3, 12, 6, 2), 6, layers=2)
    curves = layer_caches(requests, "lru", m=4)
    for slots in (1, 7):
        with pytest.raises(ValueError, match="give 2 to 6"):
            curves[0].hit_rate(slots)
        with pytest.raises(ValueError, match="give 2 to 6"):
            curves[0].interval(slots)
    with pytest.raises(ValueError, match=r"ratio=0.5"):
        curves[0].slots(0.5)
    assert [curves[0].slots(r) for r in (1, 1.2, 2, 9)] == [2, 3, 4, 6]
    for slots in (3, 13):
        with pytest.raises(ValueError, match="give 4 to 12"):
            share_slots(curves, slots)
    with pytest.raises(ValueError, match="m=13 and the longest text has 12"):
        layer_caches(requests, "segment", m=13)
    assert layer_caches(requests, "lru", m=13)[0].top_k == 2  # which looks at no segment
    with pytest.raises(ValueError, match="policy='mru'"):
        model_cache(requests, "mru")
    with pytest.raises(ValueError, match="first_use='no'"):
        curves[0].rates("no")
    with pytest.raises(ValueError, match="no text of 'c'"):
        requests.of("c")
    with pytest.raises(ValueError, match="every=0"):
        RoutedTexts(every=0)
    with pytest.raises(ValueError, match="no text was kept"):
        RoutedTexts().result()
