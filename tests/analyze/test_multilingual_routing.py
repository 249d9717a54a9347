"""Divergence of routing between languages: its equations by hand, its bounds, what is found and what is refused."""

import itertools
import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import pearsonr

import moestro
import tiny
from moestro.analyze import multilingual_routing as routing
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.data.parallel import parallel_strings
from moestro.view.observe import RoutingTrace

LANGUAGES = ("en", "de", "ru", "ja", "fr", "es")
STRINGS = [s for s in parallel_strings(LANGUAGES) if len(s["en"].split()) > 2][:6]
TEXTS = {language: [s[language] for s in STRINGS] for language in LANGUAGES}


@pytest.fixture(scope="module")
def view():
    return moestro.open("quartet", dtype=torch.float32)


@pytest.fixture(scope="module")
def profiles(view) -> Profiles:
    return routing.language_profiles(view, TEXTS, progress=False)


def distributions(seed: int, rows: int = 40, experts: int = 8, sharpness: float = 3.0) -> torch.Tensor:
    z = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z * sharpness).softmax(dim=1)


def test_divergence_is_scipys_over_the_most_it_could_be() -> None:
    p, q = distributions(0), distributions(1)
    js = torch.from_numpy(jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2)
    entropies = [-(d * d.log()).sum(1) for d in (p, q)]
    torch.testing.assert_close(routing.js_divergence(p, q), js)
    torch.testing.assert_close(routing.normalised_js(p, q), js / (math.log(8) - sum(entropies) / 2))


def test_divergence_is_0_for_equals_and_at_most_1() -> None:
    p = distributions(0)
    halves = torch.eye(2, dtype=torch.float64).repeat_interleave(4, dim=1) / 4
    assert routing.normalised_js(p, p).abs().max() < 1e-9
    assert routing.normalised_js(halves[:1], halves[1:]).item() == pytest.approx(1)  # half the experts each
    sharp = [distributions(s, sharpness=x) for s, x in itertools.product((2, 3), (0.01, 30.0))]
    for one, other in itertools.combinations(sharp, 2):
        found = routing.normalised_js(one, other)
        assert ((found >= 0) & (found <= 1)).all()
    flat = torch.full((3, 8), 1 / 8)
    single = torch.ones(3, 1)
    assert routing.normalised_js(flat, flat).tolist() == routing.normalised_js(single, single).tolist() == [0, 0, 0]


def test_sentences_are_compared_with_their_own_translations(view, profiles) -> None:
    assert profiles.domains == tuple(sorted(LANGUAGES))
    found = routing.sentence_divergence(profiles, "en")
    assert sorted(found) == sorted(set(LANGUAGES) - {"en"})
    mean = routing.language_divergence(profiles, "en")
    for language, number in (("de", 0), ("ja", 4)):
        q = {}
        for name in ("en", language):
            ids = torch.tensor([view.tokenizer(TEXTS[name][number])["input_ids"]])
            (alone,) = view.observe([ids], [TextProfiles(skip=[1])], progress=False)
            assert alone.tokens.item() == ids.shape[1] - 1, "the opening token does not count"
            q[name] = alone.importance
        for layer, values in found[language].items():
            by_hand = routing.normalised_js(q["en"][layer], q[language][layer])
            torch.testing.assert_close(values[number], by_hand[0], rtol=1e-4, atol=1e-6)
            assert mean[language][layer] == pytest.approx(values.mean().item())
    plain = routing.language_divergence(profiles, "en", measure=routing.js_divergence)
    assert all(plain[name][layer] < d for name, table in mean.items() for layer, d in table.items())


def test_the_order_of_the_texts_and_the_batches_do_not_matter(view, profiles, monkeypatch) -> None:
    order = [3, 0, 5, 1, 4, 2]
    monkeypatch.setattr(routing, "BATCH_TOKENS", 160)
    shuffled = {name: [texts[i] for i in order] for name, texts in reversed(TEXTS.items())}
    again = routing.language_divergence(routing.language_profiles(view, shuffled, progress=False), "en")
    for name, table in routing.language_divergence(profiles, "en").items():
        assert again[name] == pytest.approx(table, rel=1e-4)


def test_middle_layers_lie_around_the_least_divergence() -> None:
    u = {"de": dict(enumerate([9.0, 5, 2, 1, 2, 8])), "fr": dict(enumerate([7.0, 3, 2, 1, 4, 8]))}
    assert routing.middle_layers(u) == [2, 3, 4]
    assert routing.middle_layers(u, quantile=0) == [3]
    assert routing.middle_layers(u, quantile=1) == [0, 1, 2, 3, 4, 5]
    two_dips = {"de": {1: 1.0, 2: 5.0, 3: 1.5, 4: 5.0}}
    assert routing.middle_layers(two_dips) == [1], "not across the hill between"
    with pytest.raises(ValueError, match=r"quantile=1\.5"):
        routing.middle_layers(u, quantile=1.5)
    with pytest.raises(ValueError, match="no language"):
        routing.middle_layers({})


def test_overlap_of_all_pairs_is_that_of_the_trace(view, tmp_path) -> None:
    ids = torch.randint(6, 6000, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[0, 2] = 1  # left out
    data = {"input_ids": ids, "attention_mask": mask, "sample": torch.arange(3)}
    pairs, trace = view.observe([data], [routing.AllPairs(skip=[1]), RoutingTrace(tmp_path)], progress=False)
    frame = trace.collect()
    for layer, text in itertools.product(pairs, range(3)):
        own = frame.filter((frame["layer"] == layer) & (frame["sample"] == text) & (frame["id"] != 1))
        chosen = [set(experts) for experts in own["experts"].to_list()]
        overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(chosen, 2)]
        assert len(overlaps) == (21, 10, 28)[text]
        assert pairs[layer][text].item() == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)
    parts = [routing.AllPairs(skip=[1]) for _ in range(2)]
    for observer, rows in zip(parts, ([2, 0], [1]), strict=True):
        view.observe([{name: values[rows] for name, values in data.items()}], [observer], progress=False)
    parts[0].merge(parts[1])
    for layer, values in parts[0].result().items():
        torch.testing.assert_close(values, pairs[layer], rtol=1e-5, atol=1e-6)


def test_means_by_language_are_over_its_texts(profiles) -> None:
    entropy = routing.language_means(profiles, profiles.entropy)
    consistency = routing.language_means(profiles, profiles.consistency)
    for language in LANGUAGES:
        own = profiles.of(language)
        for layer in own.importance:
            assert entropy[language][layer] == pytest.approx(own.entropy[layer].mean().item())
            assert 0 < entropy[language][layer] < math.log(32)
            assert consistency[language][layer] == pytest.approx(own.consistency[layer].mean().item())
            assert 0 < consistency[language][layer] < 1


def test_correlation_with_scores_is_pearsons_with_a_p_value() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"l{i}" for i in range(9)]
    loss = dict(zip(names, torch.randn(9, generator=generator).tolist(), strict=True))
    noise = torch.randn(9, generator=generator).tolist()
    tables = {name: {2: 3 * loss[name] + 0.1 * n, 5: n} for name, n in zip(names, noise, strict=True)}
    found = routing.divergence_correlation(tables, loss)
    for layer in (2, 5):
        r = pearsonr([t[layer] for t in tables.values()], list(loss.values())).statistic
        assert found[layer].r.estimate == pytest.approx(r)
        assert found[layer].r.low <= r <= found[layer].r.high
        assert found[layer].p <= found[layer].adjusted
    assert found[2].r.low > 0.9
    assert found[2].adjusted < 0.05 < found[5].p
    with pytest.raises(ValueError, match="'l3' has no score"):
        routing.divergence_correlation(tables, {k: v for k, v in loss.items() if k != "l3"})
    with pytest.raises(ValueError, match=r"3 languages; .* needs 4"):
        routing.divergence_correlation({name: tables[name] for name in names[:3]}, loss)


def test_delta_is_the_mean_share_of_tokens_that_texts_have_served(view) -> None:
    texts = {"task": ["three plus four is 7", "12 + 30 = 42", "1 + 1 ="], "other": TEXTS["en"]}
    found = routing.text_profiles(view, texts, progress=False)
    delta = routing.activation_delta(found.of("task"), found.of("other"))
    for layer, row in delta.items():
        shares = []
        for name in ("task", "other"):
            own = found.of(name)
            assert torch.equal(own.counts[layer].sum(1), 4 * own.tokens)
            shares.append(torch.stack([c / n for c, n in zip(own.counts[layer], own.tokens, strict=True)]).mean(0))
        torch.testing.assert_close(row, shares[0] - shares[1])
        assert row.sum().abs() < 1e-9
        assert ((row >= -1) & (row <= 1)).all()
    threshold = float(torch.cat(list(delta.values())).quantile(0.9))
    chosen = routing.task_experts(delta, threshold)
    assert chosen == {(layer, e) for layer, row in delta.items() for e in range(32) if row[e] > threshold}
    assert routing.task_experts(delta, threshold, layers=[1, 4]) == {m for m in chosen if m[0] in (1, 4)}


def test_language_experts_are_those_of_any_language(profiles) -> None:
    single = [
        routing.task_experts(routing.activation_delta(profiles.of(name), profiles.of("en")), 0.2)
        for name in LANGUAGES[1:]
    ]
    both = routing.language_experts(profiles, "en", 0.2)
    assert both == frozenset().union(*single)
    assert all(part < both for part in single)


def test_what_cannot_be_compared_is_refused(view, profiles) -> None:
    with pytest.raises(ValueError, match=r"parallel texts differ in number: \{'en': 2, 'de': 1\}"):
        routing.language_profiles(view, {"en": ["a b", "c d"], "de": ["e f"]})
    with pytest.raises(ValueError, match="no text of 'xx' was observed"):
        routing.sentence_divergence(profiles, "xx")
    with pytest.raises(ValueError, match="only the pivot 'en'"):
        routing.sentence_divergence(routing.text_profiles(view, {"en": ["a b"]}, progress=False), "en")
    uneven = routing.text_profiles(view, {"en": ["a b", "c d"], "de": ["e f"]}, progress=False)
    with pytest.raises(ValueError, match="differ in number"):
        routing.language_divergence(uneven, "en")
    with pytest.raises(ValueError, match="'baseline' holds no text"):
        routing.text_profiles(view, {"task": ["a b"], "baseline": []})
    with pytest.raises(ValueError, match="no texts to profile"):
        routing.text_profiles(view, {})
    with pytest.raises(ValueError, match="text 1 of 'en' is blank"):
        routing.text_profiles(view, {"en": ["a b", " "]})
    with pytest.raises(ValueError, match="special tokens alone"):
        routing.text_profiles(view, {"en": ["a b", "<|end|>"]}, progress=False)
    none = profiles[torch.zeros(0, dtype=torch.long)]
    with pytest.raises(ValueError, match="the baseline has no text"):
        routing.activation_delta(profiles, none)
    with pytest.raises(ValueError, match="the target has no text"):
        routing.activation_delta(none, profiles)
    small = moestro.open(tiny.make("qwen3_moe").model)
    (other,) = small.observe([tiny.padded(tiny.documents(5))], [TextProfiles()], progress=False)
    with pytest.raises(ValueError, match="of two models"):
        routing.activation_delta(profiles, other)
    delta = routing.activation_delta(profiles.of("de"), profiles.of("en"))
    for threshold in (0.0, -0.1):
        with pytest.raises(ValueError, match=f"threshold={threshold}"):
            routing.task_experts(delta, threshold)
    with pytest.raises(ValueError, match="layer 6 has no router"):
        routing.task_experts(delta, 0.1, layers=[5, 6])
