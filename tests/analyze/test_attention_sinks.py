"""Attention to the sink, against transformers' own attention maps, and its decay by hand."""

from typing import Any

import pytest
import torch

import moestro
import tiny
from moestro.analyze.attention_sinks import SinkDecay, SinkShares, attention_sink_decay
from tiny import FP32, documents, padded

DOCS = documents(7, 3, 9, 5)


@pytest.fixture(scope="module")
def view() -> moestro.ExpertView:
    return moestro.open(tiny.make("qwen3_moe").model)


def by_transformers(view: Any, ids: torch.Tensor, sink: tuple[int, ...]) -> list[torch.Tensor]:
    """[A] of every layer: the model's own eager attention of one text."""
    implementation = view.model.config._attn_implementation
    view.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = view.model(ids[None], output_attentions=True).attentions
    view.model.set_attn_implementation(implementation)
    return [m[0, :, max(sink) + 1 :, list(sink)].sum(-1).mean(-1) for m in maps]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sink", [(0,), (0, 1)])
def test_shares_are_those_of_the_models_own_maps(view: moestro.ExpertView, side: str, sink: tuple[int, ...]) -> None:
    (shares,) = view.observe([padded(DOCS, side)], [SinkShares(sink=sink)], progress=False)
    for row, doc in enumerate(DOCS):
        for layer, expected in enumerate(by_transformers(view, doc, sink)):
            torch.testing.assert_close(shares[layer][row].float(), expected, **FP32)


def test_parts_of_the_data_merge_to_the_whole(view: moestro.ExpertView) -> None:
    def observed(*docs: int) -> SinkShares:
        shares = SinkShares()
        batch = padded([DOCS[d] for d in docs], sample=torch.tensor(docs))
        view.observe([batch], [shares], progress=False)
        return shares

    part, whole = observed(3, 1), observed(0, 1, 2, 3).result()
    part.merge(observed(2, 0))
    for layer, share in part.result().items():
        torch.testing.assert_close(share, whole[layer], **FP32)


def test_decay_is_one_minus_the_mean_ratio_of_heads() -> None:
    before = torch.tensor([[0.8, 0.4], [0.5, 0.0]], dtype=torch.float64)
    after = torch.tensor([[0.2, 0.4], [0.25, 0.3]], dtype=torch.float64)
    decay = SinkDecay(before, after)
    assert decay.decay.tolist() == [1 - (0.25 + 1) / 2, 0.5]  # the head without a sink is left out
    assert decay.mean.estimate == pytest.approx((0.375 + 0.5) / 2)
    assert SinkDecay(before[:1], before[:1] * 2).decay.tolist() == [-1.0]


def test_ablation_changes_the_layers_behind_it_alone(view: moestro.ExpertView) -> None:
    batch, hooks = padded(DOCS), tiny.hooks_on(view.model)
    found = attention_sink_decay(view, (b for b in [batch]), {(1, e) for e in range(7)}, progress=False)
    assert found.keys() == {0, 1, 2}
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].decay, torch.zeros(len(DOCS), dtype=torch.float64), **FP32)
    assert found[2].decay.abs().max() > 1e-4
    assert tiny.hooks_on(view.model) == hooks


def test_impossible_sinks_are_refused() -> None:
    for sink in ((), (-1,)):
        with pytest.raises(ValueError, match="name at least one position"):
            SinkShares(sink=sink)
