"""Keys hidden from heads, against models that never had them. fp32."""

import pytest
import torch
from torch import Tensor

import moestro
from moestro.steer.attention_patterns import HideKeys, KeepRecent, hide
from tiny import make

IDS = torch.randint(2, 131, (2, 9), generator=torch.Generator().manual_seed(3))
NEAR = dict(rtol=1e-4, atol=1e-5)
BY_DIFFERENCE = dict(rtol=1e-3, atol=2e-4)  # a sink's share is what is left of 1


def logits(view, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return view.model(input_ids=ids, attention_mask=mask).logits


def every_head(view) -> set[tuple[int, int]]:
    return {(layer, h) for layer, count in view.num_heads.items() for h in range(count)}


@pytest.mark.parametrize("window", [1, 4, 20])
def test_a_window_is_that_of_a_sliding_layer(window: int) -> None:
    """gpt-oss has sinks, so that a row's attention does not sum to 1."""
    whole = moestro.open(make("gpt_oss", layer_types=["full_attention"] * 3).model)
    sliding = moestro.open(make("gpt_oss", layer_types=["sliding_attention"] * 3, sliding_window=window).model)
    sliding.model.load_state_dict(whole.model.state_dict())
    with whole.edits(KeepRecent(every_head(whole), window, first=0)):
        torch.testing.assert_close(logits(whole), logits(sliding), **BY_DIFFERENCE)
    assert torch.allclose(logits(whole), logits(sliding), **BY_DIFFERENCE) == (window > 8)


def test_the_first_tokens_stay_in_sight() -> None:
    view = moestro.open(make("qwen3_moe").model)
    plain = logits(view)
    with view.edits(KeepRecent(every_head(view), 2, first=7)):
        torch.testing.assert_close(logits(view), plain, **NEAR)
    with view.edits(KeepRecent(every_head(view), 2, first=6)):
        edited = logits(view)
    torch.testing.assert_close(edited[:, :8], plain[:, :8], **NEAR)  # the ninth alone is two away from the seventh
    assert not torch.allclose(edited[:, 8], plain[:, 8], **NEAR)


def test_hidden_keys_are_as_padding() -> None:
    view = moestro.open(make("qwen3_moe").model)
    keys = torch.tensor([[2, 5], [3, -1]])
    mask = torch.ones_like(IDS)
    mask[0, [2, 5]] = mask[1, 3] = 0
    with torch.no_grad():  # the positions of the other tokens stay as they are
        position = torch.arange(9).expand(2, 9)
        expected = view.model(input_ids=IDS, attention_mask=mask, position_ids=position).logits
    with view.edits(HideKeys(every_head(view), keys)):
        found = logits(view)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **NEAR)
    plain = logits(view)
    with view.edits(HideKeys({(0, 1)}, keys, at="last")):
        last = logits(view)
    torch.testing.assert_close(last[:, :-1], plain[:, :-1], **NEAR)
    assert not torch.allclose(last[:, -1], plain[:, -1], **NEAR)
    with view.edits(HideKeys({(0, 1)}, torch.full((1, 1), -1))):
        torch.testing.assert_close(logits(view), plain, **NEAR)


def test_generation_with_a_cache_is_generation_without_one() -> None:
    view = moestro.open(make("qwen3_moe").model)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = view.model.generate(IDS, use_cache=True, **settings)
    for edit in (KeepRecent(every_head(view), 3), HideKeys(every_head(view), torch.tensor([[1, 4], [0, 8]]))):
        with view.edits(edit):
            cached = view.model.generate(IDS, use_cache=True, **settings)
            assert torch.equal(cached, view.model.generate(IDS, use_cache=False, **settings))
        assert not torch.equal(cached, plain)


def test_what_is_hidden_is_shared_out() -> None:
    pattern = torch.tensor([[[[0.5, 0.25, 0.25]]], [[[0.5, 0.25, 0.05]]], [[[1.0, 0.0, 0.0]]]])
    hidden = torch.tensor([True, False, False]).expand(3, 1, 1, 3)
    expected = torch.tensor([[0, 0.5, 0.5], [0, 0.5, 0.1], [0, 0, 0]])  # the second leaves 0.2 to a sink
    torch.testing.assert_close(hide(pattern, hidden)[:, 0, 0], expected)


def test_bad_edits_are_refused() -> None:
    view = moestro.open(make("qwen3_moe").model)
    for edit, message in (
        (KeepRecent({(0, 0)}, 0), "window >= 1"),
        (KeepRecent({(0, 6)}, 3), "heads 0..5; there is no head 6"),
    ):
        with pytest.raises(ValueError, match=message), view.edits(edit):
            raise AssertionError("entered")
    edit = HideKeys({(0, 0)}, torch.zeros(3, 1, dtype=torch.long))
    with view.edits(edit), pytest.raises(ValueError, match="keys of 3 rows, and the batch has 2"):
        logits(view)
