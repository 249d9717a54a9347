"""Segment routing and expert caches, against plain references on the routing itself."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import moestro
import tiny
from moestro.analyze.local_routing import (
    LocalRouting,
    LocalUse,
    best_f1,
    domain_specialization,
    expert_floors,
    expert_segment_routing,
    layer_segment_routing,
    load_spread,
    memoryless,
    segment_routing,
    text_load_spread,
)
from moestro.evidence import local_routing_consistency as experiment
from moestro.view.events import Tokens
from moestro.view.observe import RoutingTrace, SlotStats

LENGTHS = (9, 6, 14, 9)
DATA = tiny.padded(tiny.documents(*LENGTHS), domain=torch.tensor([0, 1, 0, 1]), domains=("a", "b"))


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def view(request: pytest.FixtureRequest):
    return moestro.open(tiny.make(request.param).model)


def rows_of(keep: list[int]) -> dict:
    numbered = DATA | {"sample": torch.arange(len(LENGTHS))}
    return {name: value if name == "domains" else value[keep] for name, value in numbered.items()}


def observe(view, parts, segments=(2, 4)) -> LocalUse:
    observers = [LocalRouting(segments) for _ in parts]
    for observer, part in zip(observers, parts, strict=True):
        view.observe([part], [observer], progress=False)
    for other in observers[1:]:
        observers[0].merge(pickle.loads(pickle.dumps(other)))
    return observers[0].result()


def test_srp_is_the_best_f1_of_any_router_of_whole_segments(view, tmp_path) -> None:
    """Against the definition: every segment of every text, every threshold."""
    use, trace = view.observe([DATA], [LocalRouting((2, 4)), RoutingTrace(tmp_path)], progress=False)
    frame = trace.collect()
    for m in (2, 4):
        pooled: list[tuple[int, int]] = []
        for layer in view.layers:
            uses: dict[int, list[int]] = {e: [] for e in range(layer.num_experts)}
            for text in range(len(LENGTHS)):
                rows = frame.filter((frame["layer"] == layer.index) & (frame["sample"] == text))
                chosen = [set(e) for e in rows["experts"].to_list()]
                for p in range(len(chosen) - m + 1):
                    for e in uses:
                        uses[e].append(sum(e in c for c in chosen[p : p + m]))
            single = expert_segment_routing(use, m)[layer.index]
            for e, f in uses.items():
                assert single[e].item() == pytest.approx(brute_srp(f, m)[0], nan_ok=True)
            all_of_layer = list(itertools.chain(*uses.values()))
            pooled += all_of_layer
            found = layer_segment_routing(use, m)[layer.index]
            assert (found.srp, found.size_ratio) == pytest.approx(brute_srp(all_of_layer, m))
        found = segment_routing(use, m)
        assert (found.srp, found.size_ratio) == pytest.approx(brute_srp(pooled, m))
        assert found.alpha == -(-m * found.srp // 2)  # at the best threshold alpha = ceil(m / 2 * SRP)


def brute_srp(f: list[int], m: int) -> tuple[float, float]:
    total, best = sum(f), (float("nan"), float("nan"))
    for alpha in range(m + 1) if total else ():
        named = [x for x in f if x >= alpha]
        f1 = 2 * sum(named) / (m * len(named) + total)
        if not f1 <= best[0]:
            best = (f1, m * len(named) / total)
    return best


def test_the_floors_of_routers_without_memory() -> None:
    """Against draws, at K / E of 1/4 and 1/8; and the closed form of m = 1, where a segment is a single token."""
    for shares in (torch.full((32,), 1 / 4), torch.full((64,), 1 / 8), torch.linspace(0.01, 0.6, 40)):
        f = torch.distributions.Binomial(16, shares).sample((3000,)).flatten().long()
        drawn = best_f1(f.bincount(minlength=17).double())[0].item()
        assert memoryless(shares, 16) == pytest.approx(drawn, abs=5e-3)
    assert memoryless(torch.full((8,), 0.5), 1) == pytest.approx(1.0)
    unused, used = best_f1(torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))[0]
    assert unused.isnan()
    assert used == 1


def test_constant_and_shuffled_routing_are_the_ends_of_the_scale() -> None:
    """A text that stays with its experts has SRP 1; with its tokens in random order it falls to the shuffled floor."""
    generator = torch.Generator().manual_seed(1)
    texts, length, experts = 40, 64, 8
    home = torch.randint(0, experts, (texts,), generator=generator)
    constant = torch.nn.functional.one_hot(home, experts).bool().repeat_interleave(length, dim=0)
    use = use_of(constant, texts, length)
    found = segment_routing(use, 16)
    assert found.srp == 1
    assert found.size_ratio == 1
    assert found.shuffled < 0.5
    mixed = use_of(constant[torch.randperm(texts * length, generator=generator)], texts, length)
    control = segment_routing(mixed, 16)
    single, floor = expert_segment_routing(mixed, 16)[0], expert_floors(mixed, 16)[0]
    torch.testing.assert_close(single, floor, rtol=0, atol=0.06)
    assert bool((expert_segment_routing(use, 16)[0] > floor + 0.5).all())
    assert control.srp == pytest.approx(found.shuffled, abs=0.02)
    assert control.interval is not None
    assert control.interval.high < found.interval.low


def use_of(used: torch.Tensor, texts: int, length: int, domains=("a",)) -> LocalUse:
    sample = torch.arange(texts).repeat_interleave(length)
    position = torch.arange(length).repeat(texts)
    domain = sample % len(domains)
    sums = LocalRouting((4, 16))
    sums.add(0, Tokens(sample, position, torch.zeros_like(sample), domain, domains), used)
    return sums.result()


def test_parts_of_the_data_merge_to_the_whole(view) -> None:
    whole, merged = observe(view, [DATA]), observe(view, [rows_of([2, 3]), rows_of([0, 1])])
    assert merged.of("a").texts.tolist() == [2]
    for name in ("a", "b"):
        one, other = whole.of(name), merged.of(name)
        assert segment_routing(one, 4) == segment_routing(other, 4)
        assert text_load_spread(one) == pytest.approx(text_load_spread(other))
    assert segment_routing(whole, 2) == segment_routing(merged, 2)


def test_padding_and_chunks_do_not_count(view, monkeypatch) -> None:
    whole = observe(view, [DATA])
    left = observe(view, [tiny.padded(tiny.documents(*LENGTHS), "left", domain=DATA["domain"], domains=("a", "b"))])
    assert segment_routing(left, 4) == segment_routing(whole, 4)
    monkeypatch.setattr("moestro.view.taps.OUTPUT_BYTES", 7 * 4 * 4 * 32)

    class Outputs(SlotStats):
        needs = frozenset({"norms", "outputs"})

    chunked, _ = view.observe([DATA], [LocalRouting((2, 4)), Outputs()], progress=False)
    assert segment_routing(chunked, 4) == segment_routing(whole, 4)


def test_load_spread_and_domain_specialization_by_hand() -> None:
    used = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0]]).bool()
    use = use_of(used, 2, 4, ("a", "b"))
    assert load_spread(use) == pytest.approx({0: 12.5})  # 5/8 and 3/8
    assert text_load_spread(use) == pytest.approx({0: 100 * (0.5 + 0.25) / 2})
    # expert 0: 1 in a, 1/4 in b; expert 1: 0 and 3/4
    torch.testing.assert_close(domain_specialization(use)[0], torch.tensor([0.375 / 0.625, 1.0]).double())


def test_what_cannot_be_measured_is_refused(view) -> None:
    use = observe(view, [DATA], (4, 16))
    with pytest.raises(ValueError, match="m=16 and the longest text has 14"):
        segment_routing(use, 16)
    with pytest.raises(ValueError, match="m=8 were not counted"):
        segment_routing(use, 8)
    with pytest.raises(ValueError, match="layers \\[99\\]"):
        segment_routing(use, 4, layers=[99])
    with pytest.raises(ValueError, match="no text of 'c'"):
        use.of("c")
    with pytest.raises(ValueError, match="two domains"):
        domain_specialization(use.of("a"))
    with pytest.raises(ValueError, match="2 tokens or more"):
        LocalRouting((1,))
    with pytest.raises(ValueError, match="no token was observed"):
        LocalRouting().result()
    with pytest.raises(ValueError, match="must count the same"):
        LocalRouting((4,)).merge(LocalRouting((8,)))


def test_the_experiments_difference_of_rank_correlations_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 5, 40))
    found = experiment._more_than(x, y, z, axis=-1)
    expected = [spearmanr(a, b).statistic - spearmanr(a, c).statistic for a, b, c in zip(x, y, z)]
    np.testing.assert_allclose(found, expected)
