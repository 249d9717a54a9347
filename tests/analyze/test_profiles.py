"""Routing profiles of texts, against the routing itself."""

import itertools

import pytest
import torch

import moestro
import tiny
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.routing import SCORES
from moestro.view.observe import RoutingTrace

IDS = torch.randint(0, 131, (4, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
DATA = {"input_ids": IDS, "attention_mask": MASK, "domain": torch.tensor([0, 1, 0, 1]), "domains": ("a", "b")}


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def view(request: pytest.FixtureRequest):
    return moestro.open(tiny.make(request.param).model)


def observe(view, parts) -> Profiles:
    observers = [TextProfiles({layer.index: layer.rule for layer in view.layers}) for _ in parts]
    for observer, part in zip(observers, parts, strict=True):
        view.observe([part], [observer], progress=False)
    for other in observers[1:]:
        observers[0].merge(other)
    return observers[0].result()


def test_profiles_are_means_of_the_texts_own_tokens(view, tmp_path) -> None:
    rules = {layer.index: layer.rule for layer in view.layers}
    profiles, trace = view.observe([DATA], [TextProfiles(rules), RoutingTrace(tmp_path)], progress=False)
    frame = trace.collect()
    assert profiles.tokens.tolist() == [9, 6, 9, 9]
    for layer in view.layers:
        for text in range(4):
            rows = frame.filter((frame["layer"] == layer.index) & (frame["sample"] == text))
            scores = SCORES[layer.rule.score](torch.from_numpy(rows["logits"].to_numpy()))
            q = (scores / scores.sum(1, keepdim=True)).mean(0)
            torch.testing.assert_close(profiles.importance[layer.index][text].float(), q, rtol=1e-4, atol=1e-6)
            used = torch.from_numpy(rows["experts"].to_numpy()).long()
            counts = torch.bincount(used.flatten(), minlength=layer.num_experts)
            assert profiles.counts[layer.index][text].tolist() == counts.tolist()
            chosen = [set(row) for row in used.tolist()]
            jaccard = [len(a & b) / len(a | b) for a, b in itertools.pairwise(chosen)]
            assert profiles.consistency[layer.index][text].item() == pytest.approx(sum(jaccard) / len(jaccard))


def test_parts_of_the_data_merge_to_the_whole(view) -> None:
    whole = observe(view, [DATA])
    numbered = DATA | {"sample": torch.arange(4)}
    rows = lambda keep: {k: v if k == "domains" else v[keep] for k, v in numbered.items()}  # noqa: E731
    merged = observe(view, [rows(torch.tensor([2, 3])), rows(torch.tensor([0, 1]))])
    for layer, q in whole.importance.items():
        torch.testing.assert_close(merged.importance[layer], q)
    assert merged.of("b").samples.tolist() == [1, 3]
    with pytest.raises(ValueError, match="no text of 'c'"):
        merged.of("c")


def test_skipped_tokens_are_read_and_not_counted(view) -> None:
    ids = IDS.clone()
    ids[:, 0], ids[:, 4] = 7, 9
    ids[2] = 9
    data = DATA | {"input_ids": ids}
    rules = {layer.index: layer.rule for layer in view.layers}
    whole, without = view.observe([data], [TextProfiles(rules), TextProfiles(rules, skip=[7, 9])], progress=False)
    only = torch.tensor([0, 1, 3])  # of text 2 nothing is left
    assert without.samples.tolist() == only.tolist()
    left = (MASK.bool() & (ids != 7) & (ids != 9)).sum(1)[only]
    assert without.tokens.tolist() == left.tolist()
    for layer in view.layers:
        assert (without.counts[layer.index].sum(1) == left * layer.top_k).all()
        assert (without.counts[layer.index] <= whole.counts[layer.index][only]).all()
        assert ((without.pairs[layer.index] < left) & (left < whole.tokens[only])).all()
        assert (whole.pairs[layer.index] == whole.tokens - 1).all()


def test_entropy_is_that_of_the_tokens_and_below_that_of_their_mean(view) -> None:
    profiles = observe(view, [DATA])
    for layer, q in profiles.importance.items():
        assert (profiles.entropy[layer] <= torch.special.entr(q).sum(1) + 1e-9).all()
    one = {k: v if k == "domains" else v[:1, :1] if v.dim() == 2 else v[:1] for k, v in DATA.items()}
    single = observe(view, [one])
    for layer, q in single.importance.items():
        torch.testing.assert_close(single.entropy[layer], torch.special.entr(q).sum(1), rtol=1e-5, atol=1e-6)
        assert single.consistency[layer].isnan().all()
