"""The seam of attention heads on every family: found, verified, observed, edited in one row, undone; or refused."""

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moestro
from moestro.view.heads import HeadEvent, HeadMask

from . import support, tiny

every_family = pytest.mark.parametrize("family", support.supported())


class Heads:
    """{layer: z [N, A, D], pattern [B, A, T, S] where there is one}"""

    def __init__(self, patterns: bool) -> None:
        self.needs = frozenset({"heads", "patterns"} if patterns else {"heads"})
        self.patterns = patterns
        self.seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    def update_heads(self, event: HeadEvent) -> None:
        self.seen[event.layer] = event.z, event.pattern if self.patterns else None

    def merge(self, other: "Heads") -> None:
        self.seen |= other.seen

    def result(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        return self.seen


def logits_of(small: tiny.TinyModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return small.model(**inputs).logits


@every_family
def test_heads_are_observed_edited_and_left_as_they_were(family: str) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs = small.inputs(B=3, padding="right")
    plain, functions = logits_of(small, inputs), dict(ALL_ATTENTION_FUNCTIONS)
    patterned = not any(layer.no_pattern for layer in view.heads)
    assert patterned == (family not in support.NO_PATTERN)
    with view.observing(heads := Heads(patterned)):
        assert torch.equal(logits_of(small, inputs), plain)
    tokens = int(inputs["attention_mask"].sum())
    for layer in view.heads:
        z, pattern = heads.seen[layer.index]
        assert z.shape == (tokens, layer.num_heads, layer.head_dim)
        if pattern is not None:
            assert pattern.shape[:3] == (3, layer.num_heads, inputs["input_ids"].shape[1])
            assert torch.isfinite(pattern).all()
            assert (pattern[:, :, 0].sum(-1) <= 1 + 1e-4).all()
    every_head = {(layer.index, head) for layer in view.heads for head in range(layer.num_heads)}
    with view.edits(HeadMask(every_head, rows=[1])):
        masked = logits_of(small, inputs)
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(masked[1], plain[1], rtol=1e-3, atol=1e-3)
    with view.edits(HeadMask(every_head)), view.observing(heads := Heads(False)):
        logits_of(small, inputs)
    assert not any(z.any() for z, _ in heads.seen.values())
    assert torch.equal(logits_of(small, inputs), plain)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions


class LastPatterns(Heads):
    """{layer: last pattern [B, A, S]}"""

    def __init__(self) -> None:
        super().__init__(False)
        self.needs = frozenset({"last_patterns"})

    def update_heads(self, event: HeadEvent) -> None:
        self.seen[event.layer] = event.last_pattern, None


@every_family
def test_the_last_pattern_is_a_row_of_the_whole(family: str) -> None:
    if family in support.NO_PATTERN:
        pytest.skip("the family has no pattern")
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs = small.inputs(B=3, padding="right")
    last = inputs["attention_mask"].sum(dim=1) - 1
    with view.observing(whole := Heads(True)):
        logits_of(small, inputs)
    with view.observing(newest := LastPatterns()):
        logits_of(small, inputs)
    for index, (_, pattern) in whole.seen.items():
        expected = pattern[torch.arange(3), :, last]
        torch.testing.assert_close(newest.seen[index][0], expected, rtol=1e-3, atol=1e-4)


@every_family
def test_patterns_are_had_or_refused_with_the_reason(family: str) -> None:
    view = moestro.open(tiny.build(family).model)
    uniform = HeadMask({(view.heads[0].index, 0)}, "uniform")
    if family in support.NO_PATTERN:
        with pytest.raises(ValueError, match=r"layer \d+ \("), view.edits(uniform):
            pass
    else:
        with view.edits(uniform):
            pass
