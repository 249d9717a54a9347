"""The seam of attention heads, against plain hooks on the families' own modules. Models are tiny and fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moestro
from moestro import ForceOn
from moestro.view.heads import ForcePattern, HeadEvent, HeadGain, HeadMask, HeadMeans, HeadPatch
from tiny import make

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]  # grouped queries; sinks and windows, eager; latent attention
IDS = torch.randint(2, 131, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0  # left padding
NEAR = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=FAMILIES)
def view(request: pytest.FixtureRequest):
    return moestro.open(make(request.param).model)


def logits(view, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    with torch.no_grad():
        return view.model(input_ids=ids, attention_mask=mask).logits


def projections(view) -> dict[int, nn.Module]:
    return {layer.index: layer.module.o_proj for layer in view.heads}


def projected(view, edit=lambda index, z: None) -> dict[int, Tensor]:
    """{layer: input of the output projection [B, T, A * D]} of one pass; `edit` may return another one."""
    seen: dict[int, Tensor] = {}

    def hook(index: int, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen[index] = args[0].clone()
        new = edit(index, args[0])
        return None if new is None else (new,)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, index=index: hook(index, args))
        for index, module in projections(view).items()
    ]
    seen[-1] = logits(view)
    for h in hooks:
        h.remove()
    return seen


class Kept:
    """{layer: [events]}"""

    needs = frozenset({"patterns"})

    def __init__(self) -> None:
        self.events: dict[int, list[HeadEvent]] = {}

    def update_heads(self, event: HeadEvent) -> None:
        self.events.setdefault(event.layer, []).append(event)

    def merge(self, other: "Kept") -> None:
        raise NotImplementedError

    def result(self) -> dict[int, list[HeadEvent]]:
        return self.events


def test_z_is_what_the_output_projection_reads(view) -> None:
    expected = projected(view)
    (seen,) = view.observe([{"input_ids": IDS, "attention_mask": MASK}], [Kept()], progress=False)
    assert [*seen] == [layer.index for layer in view.heads] == [0, 1, 2]
    for layer in view.heads:
        (event,) = seen[layer.index]
        assert torch.equal(event.z.flatten(1), expected[layer.index][MASK.bool()])
        assert event.tokens.position.tolist() == [*range(9), *range(5), *range(9)]
        rows = event.pattern.sum(dim=-1)
        assert (rows[:, :, 4:] <= 1 + 1e-4).all()
        values = event.value.repeat_interleave(layer.num_heads // layer.kv_heads, dim=1)
        product = (event.pattern @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(product[MASK.bool()], expected[layer.index][MASK.bool()], **NEAR)


def test_edits_leave_nothing_behind(view) -> None:
    names, plain = [*ALL_ATTENTION_FUNCTIONS], logits(view)
    functions = [ALL_ATTENTION_FUNCTIONS[name] for name in names]
    with pytest.raises(IndexError), view.edits(HeadMask({(1, 2)}), HeadGain({(0, 1): 2.0})):
        logits(view, IDS + 131)
    with view.edits(HeadMask({(1, 2)}), HeadGain({(0, 1): 2.0})):
        assert not torch.equal(logits(view), plain)
    assert [*ALL_ATTENTION_FUNCTIONS] == names
    assert [ALL_ATTENTION_FUNCTIONS[name] for name in names] == functions
    assert torch.equal(logits(view), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


def test_observing_changes_nothing(view) -> None:
    plain = logits(view)
    with view.observing(Kept()):
        assert torch.equal(logits(view), plain)


def test_zero_mean_and_gain_are_what_the_projection_then_reads(view) -> None:
    (means,) = view.observe([{"input_ids": IDS, "attention_mask": MASK}], [HeadMeans()], progress=False)
    heads = {(0, 1), (1, 0), (1, 5)}
    widths = {layer.index: layer.head_dim for layer in view.heads}

    def by_hand(change):
        def edit(index: int, z: Tensor) -> Tensor:
            z = z.unflatten(2, (-1, widths[index])).clone()
            for layer, head in heads:
                if layer == index:
                    z[:, :, head] = change(index, head, z[:, :, head])
            return z.flatten(2)

        return projected(view, edit)[-1]

    for edit, change in (
        (HeadMask(heads), lambda index, head, z: torch.zeros_like(z)),
        (HeadMask(heads, "mean", means), lambda index, head, z: means[index][head].expand_as(z)),
        (HeadGain(dict.fromkeys(heads, 2.5)), lambda index, head, z: 2.5 * z),
    ):
        with view.edits(edit):
            edited = logits(view)
        torch.testing.assert_close(edited, by_hand(change), **NEAR)


def test_uniform_attention_is_the_mean_of_the_allowed_values() -> None:
    view = moestro.open(make("qwen3_moe").model)
    with view.observing(kept := Kept()), view.edits(HeadMask({(1, 2)}, "uniform")):
        logits(view)
    (event,) = kept.events[1]
    values = event.value[:, 1]  # heads 2 and 3 of 6 read key-value head 1 of 3
    real = MASK.bool()
    for row in range(3):
        for t in range(9):
            if real[row, t]:
                seen = values[row, : t + 1][real[row, : t + 1]]
                torch.testing.assert_close(event.z_grid[row, t, 2], seen.mean(dim=0), **NEAR)


def test_rows_are_edited_apart(view) -> None:
    plain = logits(view)
    with view.edits(HeadMask({(0, 0), (1, 3)})):
        whole = logits(view)
    with view.edits(HeadMask({(0, 0), (1, 3)}, rows=[2])):
        some = logits(view)
    torch.testing.assert_close(some[0], plain[0], **NEAR)  # expert products of other rows round otherwise
    torch.testing.assert_close(some[2], whole[2], **NEAR)
    assert not torch.allclose(some[2], plain[2])


@pytest.mark.parametrize("part", ["q", "k", "v", "z"])
def test_a_patch_of_everything_carries_one_run_into_another(view, part: str) -> None:
    """With every layer's q, k and v (or z) of another text's positions, attention gives what it gave there."""
    other = IDS.flip(0)
    with view.observing(kept := Kept()):
        logits(view, other, torch.ones_like(other))
    source = {index: events[0] for index, events in kept.events.items()}
    at = torch.arange(9).expand(3, 9)

    def values(name: str) -> dict[tuple[int, int], Tensor]:
        found = {}
        for layer in view.heads:
            event = source[layer.index]
            grid = {"q": event.query, "k": event.key, "v": event.value, "z": event.z_grid.transpose(1, 2)}[name]
            for head in range(layer.num_heads):
                found[layer.index, head] = grid[:, head if name in "qz" else layer.group_of(head)]
        return found

    parts = [part] if part == "z" else ["q", "k", "v"]
    with view.observing(again := Kept()), view.edits(*(HeadPatch(values(p), p, at) for p in parts)):
        logits(view, IDS, torch.ones_like(IDS))
    for index, events in again.events.items():
        torch.testing.assert_close(events[0].z_grid, source[index].z_grid, **NEAR)


def test_a_patch_touches_its_own_place_alone() -> None:
    view = moestro.open(make("qwen3_moe").model)
    new = torch.randn(3, 16)
    with view.observing(before := Kept()):
        logits(view)
    with view.observing(after := Kept()), view.edits(HeadPatch({(0, 2): new}, "z", "last")):
        logits(view)
    changed = (before.events[0][0].z_grid != after.events[0][0].z_grid).any(dim=-1)
    assert changed.nonzero().tolist() == [[row, 8, 2] for row in range(3)]
    assert torch.equal(after.events[0][0].z_grid[:, 8, 2], new)
    # position 2 of row 1, whose text starts at column 4
    with view.observing(after := Kept()), view.edits(HeadPatch({(0, 2): new}, "z", torch.tensor([[-1], [2], [-1]]))):
        logits(view)
    changed = (before.events[0][0].z_grid != after.events[0][0].z_grid).any(dim=-1)
    assert changed.nonzero().tolist() == [[1, 6, 2]]


def test_forced_patterns_read_the_named_keys_alone() -> None:
    view = moestro.open(make("qwen3_moe").model)
    keys = torch.tensor([[1, 3], [0, 2], [4, -1]])
    with view.observing(kept := Kept()), view.edits(ForcePattern({(1, 4)}, keys)):
        logits(view)
    (event,) = kept.events[1]
    columns = [[1, 3], [4, 6], [4]]
    for row, wanted in enumerate(columns):
        expected = event.value[row, 2, wanted].mean(dim=0)
        torch.testing.assert_close(event.z_grid[row, 8, 4], expected, **NEAR)
        assert event.pattern[row, 4, 8].nonzero().flatten().tolist() == wanted


EDITS = {
    "zero": lambda: HeadMask({(0, 1), (2, 3)}),
    "uniform": lambda: HeadMask({(0, 1), (2, 3)}, "uniform"),
    "gain": lambda: HeadGain({(1, 1): 3.0}),
    "key": lambda: HeadPatch({(1, 1): torch.full((16,), 0.3)}, "v", torch.tensor([[2], [2], [2]])),
    "with experts": lambda: HeadMask({(1, 1)}),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_is_generation_without_one(name: str, attention: str) -> None:
    view = moestro.open(make("qwen3_moe").model)
    view.model.set_attn_implementation(attention)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    more = [ForceOn({(1, 3)})] if name == "with experts" else []

    def generate(use_cache: bool) -> Tensor:
        return view.model.generate(IDS, attention_mask=MASK, generation_config=settings, use_cache=use_cache)

    plain = generate(True)
    with view.edits(EDITS[name](), *more):
        cached = generate(True)
        assert torch.equal(cached, generate(False))
    assert torch.equal(generate(True), plain)
    assert not torch.equal(cached, plain)


def test_sliding_windows_and_beams_keep_their_positions() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    view = moestro.open(make("gpt_oss", sliding_window=4, layer_types=kinds).model)
    keys = torch.tensor([[8], [4], [8]])
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)

    class Last(Kept):
        def update_heads(self, event: HeadEvent) -> None:
            if event.pattern.shape[2] == 1 and event.layer == 0:
                assert event.call.key_position.shape[1] == event.pattern.shape[3]
                found = (event.call.key_position == torch.tensor([8, 8, 4, 4, 8, 8])[:, None]).float()
                torch.testing.assert_close(event.pattern[:, 2, 0], found)
                self.events.setdefault(0, []).append(event)

    with view.observing(kept := Last()), view.edits(ForcePattern({(0, 2)}, keys, "all")):
        view.model.generate(IDS, attention_mask=MASK, generation_config=settings)
    assert len(kept.events[0]) == 2


def test_gradients_reach_a_gain_and_the_model_below() -> None:
    view = moestro.open(make("qwen3_moe").model)
    value = torch.randn(16, requires_grad=True)
    with view.edits(HeadPatch({(0, 2): value}, "z", "last")):
        view.model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
    assert value.grad is not None
    assert value.grad.abs().sum() > 0


def test_dense_models_open_for_their_heads() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=131, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match=r"dense model.*experts=False"):
        moestro.open(model)
    view = moestro.open(model, experts=False)
    assert view.num_heads == {0: 4, 1: 4}
    plain = logits(view)
    with view.edits(HeadMask({(0, h) for h in range(4)} | {(1, h) for h in range(4)})):
        masked = logits(view)
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        for block in model.transformer.h
    ]
    expected = logits(view)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(masked, expected, **NEAR)
    assert not torch.allclose(plain, masked)


def test_bad_edits_are_refused_before_anything_runs(view) -> None:
    for edit, message in (
        (HeadMask({(0, 6)}), "layer 0 has heads 0..5; there is no head 6"),
        (HeadMask({(7, 0)}), "decoder layer 7 has no heads"),
        (HeadMask({(0, 0)}, "mean"), "as HeadMeans collects them"),
        (HeadMask({(0, 0)}, rows=[-1]), "there is no row -1"),
        (HeadPatch({(0, 0): torch.zeros(1, 2, 3, 4)}), r"give \[D\], \[B, D\] or \[B, P, D\]"),
    ):
        with pytest.raises(ValueError, match=message), view.edits(edit):
            raise AssertionError("entered")


class Newest(Kept):
    needs = frozenset({"last_patterns"})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_pattern_is_the_last_row_of_the_pattern(view, attention: str, padding: str) -> None:
    if attention == "sdpa" and not view.model._supports_sdpa:
        pytest.skip("the family has no sdpa attention")
    view.model.set_attn_implementation(attention)
    mask = MASK if padding == "left" else MASK.flip(1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    for given in (mask, torch.ones_like(MASK), None):
        at = last if given is mask else torch.full((3,), 8)
        with view.observing(whole := Kept()):
            logits(view, IDS, given)
        with view.observing(newest := Newest()):
            logits(view, IDS, given)
        for index, (event,) in whole.events.items():
            found = newest.events[index][0].last_pattern
            torch.testing.assert_close(found, event.pattern[torch.arange(3), :, at], **NEAR)
        with view.observing(both := Newest()), view.edits(ForcePattern({(1, 2)}, torch.tensor([[0]] * 3))):
            logits(view, IDS, given)
        assert (both.events[1][0].last_pattern[:, 2].amax(dim=-1) == 1).all()


def test_a_pattern_that_nobody_asked_for_is_refused(view) -> None:
    class Careless(Kept):
        needs = frozenset({"heads"})

        def update_heads(self, event: HeadEvent) -> None:
            event.pattern  # noqa: B018

    with pytest.raises(ValueError, match='"patterns"'), view.observing(Careless()):
        logits(view)
    with view.observing(kept := Kept()):
        logits(view)
    with pytest.raises(ValueError, match='"last_patterns"'):
        _ = kept.events[1][0].last_pattern


def test_models_without_the_interface_are_refused() -> None:
    class Own(nn.Module):
        """Attends by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(131, 8)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
            h = self.embed(input_ids)
            return (F.scaled_dot_product_attention(h, h, h, is_causal=True),)

    view = moestro.open(Own(), experts=False)
    with pytest.raises(ValueError, match="does not use transformers' attention interface"):
        _ = view.heads
