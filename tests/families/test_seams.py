"""Every seam of moestro on every family: open, observe, edit, undo, cut, save, reload.

What must hold for a family is stated once; what one cannot do is listed in `support.py`, and then moestro must refuse
it clearly. Tolerances are for fp32 unless a name says bf16.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.view.edit import LogitBias, SwitchOff
from moestro.view.events import MoEEvent
from moestro.view.layers import decoder_layer
from moestro.view.observe import LayerOutputs, SlotStats

from . import support, tiny

SUPPORTED = support.supported()
CUTTABLE = [family for family in SUPPORTED if family not in support.NO_SURGERY]
WITH_TOWERS = [f"{family}+towers" for family in tiny.families_with_towers() if family in CUTTABLE]
RELOAD = Path(__file__).parent / "reload.py"

every_family = pytest.mark.parametrize("family", SUPPORTED)
every_cuttable_family = pytest.mark.parametrize("family", CUTTABLE)


def logits_of(small: tiny.TinyModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return small.model(**inputs).logits


def half_of(view: moestro.ExpertView) -> dict[int, list[int]]:
    """Every other expert of each layer, the phase by layer, so that layers differ and groups stay equal."""
    return {layer.index: [e for e in range(layer.num_experts) if e % 2 == layer.index % 2] for layer in view.layers}


def all_but(view: moestro.ExpertView, keep: dict[int, list[int]]) -> SwitchOff:
    return SwitchOff(
        {(layer.index, e) for layer in view.layers for e in set(range(layer.num_experts)) - set(keep[layer.index])}
    )


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def watching_experts(view: moestro.ExpertView) -> Iterator[dict[int, list[tuple[Tensor, ...]]]]:
    """{layer: [(hidden, indices, weights) of each call]}, seen by plain hooks that know nothing of moestro."""
    calls: dict[int, list[tuple[Tensor, ...]]] = {layer.index: [] for layer in view.layers}
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args, seen=calls[layer.index]: seen.append(args))
        for layer in view.layers
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@every_family
def test_slot_statistics_are_what_plain_hooks_count(family: str) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs = small.inputs(B=3, padding="right")
    with watching_experts(view) as calls:
        logits_of(small, inputs)
    (stats,) = view.observe([inputs], [SlotStats()])
    real = inputs["attention_mask"].flatten().bool()
    assert sum(stats.tokens.values()) == int(real.sum())
    assert calls
    for layer in view.layers:
        ((hidden, indices, weights),) = calls[layer.index]
        hidden, indices, weights = hidden[real], indices[real], weights[real]
        norms = slot_norms(layer.experts, hidden, indices)
        seen = stats.layers[layer.index]
        used = (weights != 0).double()
        for found, value in (
            (seen.count, used),
            (seen.gate_sum, weights),
            (seen.norm_sum, norms * used),
            (seen.gated_norm_sum, norms * weights),
        ):
            expected = torch.bincount(indices.flatten(), value.double().flatten(), minlength=layer.num_experts)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def slot_norms(experts: nn.Module, hidden: Tensor, indices: Tensor) -> Tensor:
    """[N, K]: norm of each slot's output, by asking transformers' own eager code for one slot at a time."""
    one = hidden.new_ones(len(hidden), 1)
    with torch.no_grad():
        outputs = [type(experts).forward.__wrapped__(experts, hidden, i[:, None], one) for i in indices.T]
    return torch.stack([o.norm(dim=-1) for o in outputs], dim=1)


class Residuals:
    """{layer: the residual stream [N, H] of one batch}"""

    needs = frozenset({"residual"})

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def update(self, event: MoEEvent) -> None:
        self.seen[event.layer] = event.residual.clone()

    def merge(self, other: "Residuals") -> None:
        self.seen |= other.seen

    def result(self) -> dict[int, Tensor]:
        return self.seen


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_residual_is_what_the_layer_adds_to_or_is_refused(family: str, dtype: torch.dtype) -> None:
    small = tiny.build(family, dtype=dtype)
    view = moestro.open(small.model)
    inputs = {name: small.inputs()[name] for name in ("input_ids", "attention_mask")}
    if family in support.NO_RESIDUAL:
        with pytest.raises(ValueError, match=r"layer \d+ \(.*\): the residual stream could not be found.*'reap'"):
            view.observe([inputs], [Residuals()])
        return
    (seen,) = view.observe([inputs], [Residuals()])
    for index, terms in summands(view, inputs).items():
        stream = seen[index].float()
        assert any(t.shape == stream.shape and torch.allclose(t, stream, rtol=1e-2, atol=1e-3) for t in terms)


def summands(view: moestro.ExpertView, inputs: dict[str, Tensor]) -> dict[int, list[Tensor]]:
    """{layer: the tensors [N, H] in it to which its output is proportional, channel by channel}.

    By gradients; the layer's parts are cut off, but for those that do nothing but scale the residual stream.
    """
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in view.layers}
    hooks: list[Any] = []
    for layer in view.layers:
        owner, inside = decoder_layer(view.stack, layer), []

        def enter(part: nn.Module, args: Any, kwargs: Any, inside: list[Tensor] = inside) -> Any:
            inside += [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
            if "residual" in type(part).__name__.lower():
                return args, kwargs
            cut = [t.detach() if isinstance(t, Tensor) else t for t in (*args, *kwargs.values())]
            return tuple(cut[: len(args)]), dict(zip(kwargs, cut[len(args) :]))

        def leave(
            _: nn.Module, args: Any, out: Any, inside: list[Tensor] = inside, terms: list[Tensor] = found[layer.index]
        ) -> None:
            out = out[0] if isinstance(out, tuple) else out
            direction = 1 + torch.rand(out.shape).to(out)
            for tensor, gradient in zip(
                inside, torch.autograd.grad(out, inside, direction, retain_graph=True, allow_unused=True)
            ):
                if gradient is not None and gradient.shape == out.shape:
                    factor = (gradient / direction).flatten(0, -2)
                    if factor.any() and torch.allclose(factor, factor[:1].expand_as(factor), rtol=2e-2):
                        terms.append(tensor.detach().flatten(0, -2).float())

        hooks += [part.register_forward_pre_hook(enter, with_kwargs=True) for part in owner.children()]
        hooks.append(owner.register_forward_hook(leave))
    try:
        view.stack(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_not_observed_and_changes_no_token(family: str, padding: str) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs = small.inputs(B=3, T=8, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    (padded,) = view.observe([{"input_ids": ids, "attention_mask": mask.long()}], [LayerOutputs()])
    (alone,) = view.observe([ids[row, mask[row]][None] for row in range(3)], [LayerOutputs()])
    for layer in view.layers:
        (outputs, tokens), (_, expected) = padded[layer.index], alone[layer.index]
        assert len(outputs) == int(mask.sum())
        for field in ("sample", "position", "id"):
            assert torch.equal(getattr(tokens, field), getattr(expected, field))
    honoured = padding == "right" or family not in support.LEFT_PADDING
    assert transformers_honours(small, view.stack, ids, mask) == honoured
    if honoured:
        for layer in view.layers:
            torch.testing.assert_close(padded[layer.index][0], alone[layer.index][0], rtol=1e-2, atol=2e-3)


def transformers_honours(small: tiny.TinyModel, stack: nn.Module, ids: Tensor, mask: Tensor) -> bool:
    """Whether the family, without moestro, gives padded tokens the hidden states they have alone."""
    with torch.no_grad():
        padded = stack(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
        alone = [stack(input_ids=ids[r, mask[r]][None], use_cache=False)[0][0] for r in range(len(ids))]
    return torch.allclose(padded[mask], torch.cat(alone), rtol=1e-3, atol=1e-4)


@every_family
def test_an_edit_acts_and_leaves_no_trace(family: str) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs, before, hooks = small.inputs(), logits_of(small, small.inputs()), hooks_on(small.model)
    state = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    off = switch_off_most_used(view, inputs)

    with view.edits(off), watching_experts(view) as calls:
        edited = logits_of(small, inputs)
    for layer in view.layers:
        closed = [e for at, e in off.experts if at == layer.index]
        for _, indices, weights in calls[layer.index]:
            assert not (torch.isin(indices, torch.tensor(closed, dtype=torch.long)) & (weights != 0)).any()
    assert not torch.allclose(edited, before, atol=1e-3)

    with pytest.raises(KeyboardInterrupt):
        run_into_an_interrupt(view, off, small)
    assert torch.equal(logits_of(small, inputs), before)
    assert hooks_on(small.model) == hooks
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def run_into_an_interrupt(view: moestro.ExpertView, edit: moestro.Edit, small: tiny.TinyModel) -> None:
    with view.edits(edit):
        logits_of(small, small.inputs())
        raise KeyboardInterrupt


def switch_off_most_used(view: moestro.ExpertView, inputs: dict[str, Tensor]) -> SwitchOff:
    (stats,) = view.observe([inputs], [SlotStats()])
    learned = [layer for layer in view.layers if layer.rule is not None]
    return SwitchOff([(layer.index, int(stats.layers[layer.index].count.argmax())) for layer in learned])


@every_family
def test_an_edit_by_nothing_changes_nothing(family: str) -> None:
    """The derived rule, applied to the router's own logits, gives the router's own weights."""
    small = tiny.build(family)
    view = moestro.open(small.model)
    inputs = small.inputs(B=4, T=16)
    nothing = LogitBias({layer.index: torch.zeros(layer.num_experts) for layer in view.layers if layer.rule})
    before = logits_of(small, inputs)
    with view.edits(nothing):
        torch.testing.assert_close(logits_of(small, inputs), before, rtol=1e-4, atol=1e-4)


@every_family
def test_the_moestro_backend_agrees_with_eager(family: str) -> None:
    small = tiny.build(family)
    inputs = small.inputs(B=3)
    results = []
    for implementation in ("eager", "moestro"):
        small.model.set_experts_implementation(implementation)
        small.model.zero_grad()
        logits = small.model(**inputs).logits
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in small.model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (eager, eager_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert our_gradients.keys() == eager_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = eager_gradients[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(gradient / scale, eager_gradients[name] / scale, rtol=0, atol=2e-3, msg=name)


@every_cuttable_family
def test_keeping_all_experts_changes_no_logit(family: str) -> None:
    small = tiny.build(family)
    before = logits_of(small, small.inputs())
    view = moestro.open(small.model)
    view.keep_experts({layer.index: list(range(layer.num_experts)) for layer in view.layers})
    assert torch.equal(logits_of(small, small.inputs()), before)


@every_cuttable_family
def test_keeping_half_is_switching_the_others_off(family: str) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    keep, inputs = half_of(view), small.inputs()
    with view.edits(all_but(view, keep)):
        switched = logits_of(small, inputs)
    view.keep_experts(keep)
    assert [layer.num_experts for layer in view.layers] == [tiny.E // 2] * len(view.layers)
    torch.testing.assert_close(logits_of(small, inputs), switched, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{model: "" or what went wrong} of keep half, save, and reload in a process that never imports moestro."""
    root = tmp_path_factory.mktemp("halves")
    outcome = {}
    for name in [*CUTTABLE, *WITH_TOWERS]:
        try:
            small = tiny.build(name.removesuffix("+towers"), towers=name.endswith("+towers"))
            view = moestro.open(small.model)
            view.keep_experts(half_of(view))
            torch.save({"inputs": small.inputs(), "logits": logits_of(small, small.inputs())}, root / f"{name}.pt")
            view.save(root / name)
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
    saved = [name for name in [*CUTTABLE, *WITH_TOWERS] if name not in outcome]
    answer = subprocess.run(
        [sys.executable, str(RELOAD), str(root), *saved],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return outcome | json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.timeout(1200)  # the first of these tests waits for all models, also on a busy machine
@pytest.mark.parametrize("name", [*CUTTABLE, *WITH_TOWERS])
def test_half_the_experts_reload_in_plain_transformers(name: str, reloaded: dict[str, str]) -> None:
    assert reloaded[name] == ""


@pytest.mark.parametrize("family", [family for family in CUTTABLE if family not in support.FIXED_TOP_K])
def test_another_top_k_reloads(family: str, tmp_path: Path) -> None:
    small = tiny.build(family)
    view = moestro.open(small.model)
    view.set_top_k(1)
    inputs = small.inputs()
    with watching_experts(view) as calls:
        expected = logits_of(small, inputs)
    assert all(indices.shape[1] == 1 for seen in calls.values() for _, indices, _ in seen)
    with view.edits(LogitBias({layer.index: torch.zeros(layer.num_experts) for layer in view.layers})):
        torch.testing.assert_close(logits_of(small, inputs), expected, rtol=1e-4, atol=1e-4)
    view.save(tmp_path / "saved")
    small.model = type(small.model).from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits_of(small, inputs), expected, rtol=1e-4, atol=1e-4)


@every_cuttable_family
def test_counts_that_differ_by_layer_are_not_saved_as_something_else(family: str, tmp_path: Path) -> None:
    view = moestro.open(tiny.build(family).model)
    last = view.layers[-1].index
    view.keep_experts({last: half_of(view)[last]})
    with pytest.raises(ValueError, match="one number of experts for all layers"):
        view.save(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_counts_that_differ_by_layer_are_saved_where_the_family_honours_them(tmp_path: Path) -> None:
    """The vision tower of dots3.note is the only stack in transformers 5.23 whose config states a count per layer."""
    small = tiny.build("dots3_note", towers=True)
    view = moestro.open(small.model, part="vision_tower")
    assert [layer.num_experts for layer in view.layers] == [6, 8]
    view.keep_experts({1: [0, 2, 5], 2: [7, 1, 3, 4, 0]})
    view.save(tmp_path / "saved")
    again = type(small.model).from_pretrained(tmp_path / "saved")
    assert [layer.num_experts for layer in moestro.open(again, part="vision_tower").layers] == [3, 5]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, small.model.state_dict()[name]), name


def test_both_parts_of_ernie_cut_alike_can_be_saved(tmp_path: Path) -> None:
    small = tiny.build("ernie4_5_vl_moe")
    for part in ("text_moe", "vision_moe"):
        view = moestro.open(small.model, part=part)
        view.keep_experts(half_of(view))
    expected = logits_of(small, small.inputs())
    view.save(tmp_path / "saved")
    small.model = type(small.model).from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits_of(small, small.inputs()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", support.UNSUPPORTED)
def test_what_is_not_understood_is_refused_on_opening(family: str) -> None:
    with pytest.raises(ValueError, match=r"layer 0 .*no known routing rule reproduces .*differs"):
        moestro.open(tiny.build(family).model)


@pytest.mark.parametrize("family", support.NO_SURGERY)
def test_what_cannot_be_cut_is_refused_and_stays_whole(family: str, tmp_path: Path) -> None:
    small = tiny.build(family)
    before = logits_of(small, small.inputs())
    view = moestro.open(small.model)
    try:
        view.keep_experts(half_of(view))
    except ValueError as refusal:
        cut = refusal
        assert torch.equal(logits_of(small, small.inputs()), before)
        assert [layer.num_experts for layer in view.layers] == [tiny.E] * len(view.layers)
    else:
        with pytest.raises(ValueError, match=r"no plain|one number of experts") as caught:
            view.save(tmp_path / "saved")
        cut = caught.value
        assert not any(tmp_path.iterdir())
    assert "layer" in str(cut)


@pytest.mark.parametrize("family", support.FIXED_TOP_K)
def test_a_top_k_that_cannot_be_is_refused_and_the_old_one_stays(family: str) -> None:
    small = tiny.build(family)
    before = logits_of(small, small.inputs())
    view = moestro.open(small.model)
    with pytest.raises(ValueError, match=r"layer \d+: top_k cannot be changed to"):
        view.set_top_k(3 - view.layers[0].top_k)
    assert torch.equal(logits_of(small, small.inputs()), before)


def test_the_page_on_families_is_current() -> None:
    assert support.DOCS.read_text() == support.markdown(), "run: python -m tests.families.support"


@every_family
def test_bf16(family: str) -> None:
    small = tiny.build(family, dtype=torch.bfloat16)
    view = moestro.open(small.model)
    inputs = small.inputs()
    small.model.set_experts_implementation("eager")
    before = logits_of(small, inputs)
    with watching_experts(view) as calls:
        assert logits_of(small, inputs).isfinite().all()
    for layer in view.layers:  # layer by layer: over a whole model, a rounding may turn a token to another expert
        (args,) = calls[layer.index]
        with torch.no_grad():
            small.model.set_experts_implementation("eager")
            eager = layer.experts(*args).float()
            small.model.set_experts_implementation("moestro")
            ours = layer.experts(*args).float()
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())
    small.model.set_experts_implementation("eager")
    (stats,) = view.observe([inputs], [SlotStats()])
    assert sum(stats.tokens.values()) == inputs["input_ids"].numel()
    with view.edits(switch_off_most_used(view, inputs)):
        assert logits_of(small, inputs).isfinite().all()
    assert torch.equal(logits_of(small, inputs), before)


@every_family
def test_generate_under_an_edit_is_the_same_with_and_without_cache(family: str) -> None:
    small = tiny.build(family)
    if not small.generates or family in support.NO_GREEDY_GENERATE:
        pytest.skip("no token-by-token generation")
    view = moestro.open(small.model)
    inputs = small.inputs(B=2, T=6)
    off = switch_off_most_used(view, inputs)
    observer, new = SlotStats(), 3

    def generate(use_cache: bool) -> Tensor:
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return small.model.generate(**inputs, use_cache=use_cache, **options)

    plain = generate(True)
    plain_agrees = torch.equal(plain, generate(False))
    with view.edits(off):
        with view.observing(observer):
            cached = generate(True)
        stats = observer.result()
        uncached = generate(False)
    assert sum(stats.tokens.values()) == 2 * (6 + new - 1)
    for layer, expert in off.experts:
        assert stats.layers[layer].count[expert] == 0
    if plain_agrees:
        assert torch.equal(cached, uncached)
    assert torch.equal(generate(True), plain)


class Holder(nn.Module):
    """A model of one's own with a transformers model somewhere inside."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.parts = nn.ModuleDict({"language": model})

    def forward(self, **inputs: Tensor) -> object:
        return self.parts["language"](**inputs)


@every_family
def test_a_model_inside_a_larger_one(family: str) -> None:
    small = tiny.build(family)
    inputs = small.inputs()
    before = logits_of(small, inputs)
    (alone,) = moestro.open(small.model).observe([inputs], [SlotStats()])
    small.model = Holder(small.model)
    view = moestro.open(small.model)
    (inside,) = view.observe([inputs], [SlotStats()])
    for layer in view.layers:
        assert torch.equal(inside.layers[layer.index].count, alone.layers[layer.index].count)
    with view.edits(switch_off_most_used(view, inputs)):
        assert not torch.allclose(logits_of(small, inputs), before, atol=1e-3)
    assert torch.equal(logits_of(small, inputs), before)


def test_a_larger_model_is_saved_by_its_part(tmp_path: Path) -> None:
    view = moestro.open(Holder(tiny.build("qwen3_moe").model))
    with pytest.raises(ValueError, match=r"moestro.open\(model.parts.language\)"):
        view.save(tmp_path / "saved")
    moestro.open(view.model.parts.language).save(tmp_path / "saved")
