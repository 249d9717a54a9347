"""Experts by token of the vocabulary, against counts token by token."""

from collections import Counter

import pytest
import torch

import moestro
import tiny
from moestro.analyze import vocabulary_use
from moestro.analyze.expert_cache import RoutedTexts
from moestro.analyze.layer_states import LastTokens
from moestro.analyze.local_routing import LocalRouting, segment_routing
from moestro.analyze.vocabulary_use import KINDS, PairCounts, VocabularyUse, vocabulary_specialization
from moestro.view.observe import RoutingTrace

LENGTHS = (9, 6, 14)


def pairs_of(found, kind: str, layer: int) -> dict[tuple[int, int], int]:
    counts = found[kind][layer]
    size = counts.num_experts
    return {(k // size, k % size): c for k, c in zip(counts.key.tolist(), counts.count.tolist())}


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_are_counted_token_by_token(side: str, tmp_path) -> None:
    small = tiny.make("qwen3_moe")
    view, data = moestro.open(small.model), tiny.padded(tiny.documents(*LENGTHS), side)
    found, trace = view.observe([data], [VocabularyUse(), RoutingTrace(tmp_path)], progress=False)
    frame = trace.collect()
    predicted = tiny.logits_of(small, {k: data[k] for k in ("input_ids", "attention_mask")}).argmax(-1)
    real = data["attention_mask"].bool()
    for layer in view.layers:
        expected: dict[str, Counter] = {kind: Counter() for kind in KINDS}
        for text, length in enumerate(LENGTHS):
            rows = frame.filter((frame["layer"] == layer.index) & (frame["sample"] == text))
            ids, next_ids = data["input_ids"][text][real[text]].tolist(), predicted[text][real[text]].tolist()
            for t, (experts, weights) in enumerate(zip(rows["experts"].to_list(), rows["weights"].to_list())):
                expert = experts[weights.index(max(weights))]
                expected["input"][ids[t], expert] += 1
                expected["prediction"][next_ids[t], expert] += 1
                if t + 1 < length:
                    expected["target"][ids[t + 1], expert] += 1
        for kind in KINDS:
            assert pairs_of(found, kind, layer.index) == expected[kind]


def test_parts_merge_to_the_whole_however_often_they_are_counted(monkeypatch) -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    parts = [tiny.padded([doc]) for doc in tiny.documents(*LENGTHS)]
    (whole,) = view.observe(parts, [VocabularyUse()], progress=False)
    monkeypatch.setattr(vocabulary_use, "PENDING", 1)
    observers = [VocabularyUse() for _ in parts]
    for observer, part in zip(observers, parts):
        view.observe([part], [observer], progress=False)
    observers[0].merge(observers[1])
    observers[0].merge(observers[2])
    for kind in KINDS:
        for layer in view.layers:
            assert pairs_of(observers[0].result(), kind, layer.index) == pairs_of(whole, kind, layer.index)


def test_a_streamed_model_hands_layer_by_layer_and_gives_the_same(tmp_path) -> None:
    """Here beside the other observers of local routing, which see the same events."""
    tiny.make("qwen3_moe").model.save_pretrained(tmp_path)
    data = [tiny.padded(docs) for docs in (tiny.documents(9, 6), tiny.documents(14, 5, seed=1))]
    found = []
    for view in (moestro.open(tmp_path), moestro.open(tmp_path, stream=True)):
        observers = [VocabularyUse(), LocalRouting((4,)), RoutedTexts(), LastTokens("mlp_input")]
        found.append(view.observe(data, observers, progress=False))
    (pairs, use, requests, last), streamed = found
    assert segment_routing(use, 4) == segment_routing(streamed[1], 4)
    for layer in last:
        assert all(pairs_of(pairs, kind, layer) == pairs_of(streamed[0], kind, layer) for kind in KINDS)
        assert torch.equal(requests.experts[layer], streamed[2].experts[layer])
        assert torch.equal(last[layer], streamed[3][layer])


def test_specialization_by_hand() -> None:
    """Id 5 goes to expert 1 three times of four, id 7 always to expert 0, id 9 is too rare."""
    counts = {0: PairCounts(torch.tensor([10, 11, 14, 18]), torch.tensor([1, 3, 4, 1]), 2)}
    found = vocabulary_specialization(counts, min_count=2, top=2)[0]
    assert found.tolist() == [(1 + 1 / 4) / 2, (3 / 4 + 0) / 2]
    with pytest.raises(ValueError, match="2 ids occur 2 times or more in layer 0, and the mean is over 3"):
        vocabulary_specialization(counts, min_count=2, top=3)
