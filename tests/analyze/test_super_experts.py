"""Super experts: planted ones are found, and nothing else; what their absence does; attention sinks.

Models are fp32. Peaks are held against plain hooks and the families' own code.
"""

from typing import Any

import numpy as np
import pytest
import torch

import moestro
import tiny
from moestro import SwitchOff
from moestro.analyze.massive_activations import ResidualPeak, ResidualPeaks, forming_layers
from moestro.analyze.output_peaks import OutputPeaks, Peaks
from moestro.analyze.super_experts import (
    OutputProfile,
    SinkScoreMeans,
    ablated,
    ablation_effect,
    down_projection_input,
    profile_outputs,
    super_experts,
)
from moestro.compress.prune.keep import keep_best
from moestro.evidence.planted import BOS, CHANNEL, FAMILIES, MAGNITUDE, PLANTED, planted_model
from moestro.evidence.super_experts import LETTERS, TRIGGERS, sequences
from tiny import FP32, documents, padded, slot_outputs, watching_experts

DOCS = documents(7, 3, 9, 5)


def texts(seed: int, rows: int = 6, length: int = 40) -> torch.Tensor:
    """Rows of random ids that open with BOS."""
    ids = torch.randint(6, 6144, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


@pytest.fixture(scope="module", params=list(FAMILIES))
def planted(request: pytest.FixtureRequest) -> Any:
    return planted_model(request.param, seed=0)


def same_peaks(one: Peaks, other: Peaks) -> None:
    for name in ("channel", "token", "sample", "position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.value, other.value, **FP32)
    torch.testing.assert_close(one.hidden, other.hidden, **FP32)


# --- the profile -----------------------------------------------------------------------------------------------------


def test_planted_experts_are_found_and_no_others(planted: Any) -> None:
    for seed in (1, 2):
        profile = profile_outputs(planted, [texts(seed)], progress=False)
        for layers in (0.75, "massive", 1.0):
            assert super_experts(profile, layers=layers).experts == PLANTED
        for layer, expert in PLANTED:
            peaks = profile.routed[layer]
            assert (peaks.position[expert], peaks.token[expert], peaks.channel[expert]) == (0, BOS, CHANNEL)
            assert float(peaks.value[expert]) == pytest.approx(MAGNITUDE, rel=1e-3)
            sinks = profile.sinks[layer]
            assert sinks.sink[expert] > 1.4 * sinks.others.max()
            assert sinks.sink.argmax() == expert
        assert profile.residual is not None
        assert forming_layers(profile.residual) == (1, 2, 3)
        massive = [layer for layer, peak in profile.residual.items() if peak.is_massive]
        assert massive == [2, 3, 4, 5]
        assert all(profile.residual[layer].channel[0] == CHANNEL for layer in massive)


@pytest.mark.parametrize("family", tiny.LEARNED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_peaks_are_what_plain_hooks_see(family: str, side: str) -> None:
    view = moestro.open(tiny.make(family).model)
    inputs = padded(DOCS, side)
    real = inputs["attention_mask"].flatten().bool()
    streams, shared = {}, {}
    hooks = []
    for layer in view.layers:
        norm = view.stack.layers[layer.index].post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda _, a, i=layer.index: streams.__setitem__(i, a[0])))
        if layer.shared is not None:
            hooks.append(layer.shared.register_forward_hook(lambda _, a, o, i=layer.index: shared.__setitem__(i, o)))
    with watching_experts(view) as calls:
        tiny.logits_of(view.model, inputs)
    for hook in hooks:
        hook.remove()
    profile = profile_outputs(view, [inputs], progress=False)
    assert profile.shared.keys() == shared.keys()
    assert profile.residual is not None
    for layer in view.layers:
        ((hidden, indices, _),) = calls[layer.index]
        outputs = slot_outputs(layer.experts, hidden, indices).abs()
        peaks = profile.routed[layer.index]
        for expert in range(layer.num_experts):
            mine = outputs[(indices == expert) & real[:, None]]
            assert float(peaks.value[expert]) == pytest.approx(float(mine.max()) if len(mine) else 0.0, rel=1e-4)
            if len(mine):
                assert peaks.channel[expert] == int(mine.amax(dim=0).argmax())
                doc, position = int(peaks.sample[expert]), int(peaks.position[expert])
                assert DOCS[doc][position] == peaks.token[expert]
            else:
                assert peaks.position[expert] == peaks.sample[expert] == -1
        stream = streams[layer.index].flatten(0, 1)[real].abs()
        torch.testing.assert_close(
            profile.residual[layer.index].value, stream[stream.amax(1).argmax()].topk(3).values, **FP32
        )
        assert profile.residual[layer.index].median == pytest.approx(float(stream.median()), rel=1e-4)
        if layer.index in shared:
            out = shared[layer.index].flatten(0, -2)[real].abs()
            assert float(profile.shared[layer.index].value) == pytest.approx(float(out.max()), rel=1e-4)


def test_parts_of_the_data_merge_to_the_whole() -> None:
    view = moestro.open(tiny.make("deepseek_v3").model)

    def batch(*docs: int) -> dict[str, Any]:
        return padded([DOCS[d] for d in docs], sample=torch.tensor(docs))

    def observed(*batches: Any) -> list[Any]:
        observers = [OutputPeaks(), ResidualPeaks(), SinkScoreMeans({1: "sigmoid", 2: "sigmoid"}, sink=(0, 2))]
        view.observe(batches, observers, progress=False)
        return observers

    a, b, c = observed(batch(3)), observed(batch(0, 2)), observed(batch(1))
    for x, y, z in zip(a, b, c):
        y.merge(z)
        x.merge(y)
    merged, whole = ([o.result() for o in group] for group in (a, observed(batch(0, 1), batch(2, 3))))
    for layer in (1, 2):
        same_peaks(merged[0][0][layer], whole[0][0][layer])
        mine, theirs = merged[1][layer], whole[1][layer]
        assert (mine.sample, mine.position, mine.token, mine.count) == (
            theirs.sample,
            theirs.position,
            theirs.token,
            theirs.count,
        )
        torch.testing.assert_close(mine.value, theirs.value, **FP32)
        for name in ("sink", "others"):
            torch.testing.assert_close(getattr(merged[2][layer], name), getattr(whole[2][layer], name))


def test_of_equal_outputs_the_first_text_counts() -> None:
    """The same text three times over: however it is split, sample 0 is named."""
    view = moestro.open(tiny.make("qwen3_moe").model)
    parts = []
    for sample in (2, 0, 1):
        part = OutputPeaks()
        view.observe([padded([DOCS[0]], sample=torch.tensor([sample]))], [part], progress=False)
        parts.append(part)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    for peaks in parts[0].result()[0].values():
        assert set(peaks.sample.tolist()) <= {0, -1}


def test_down_projection_input_is_what_the_down_projection_gets(planted: Any) -> None:
    profile = profile_outputs(planted, [texts(1)], progress=False)
    layer, expert = 2, 9
    experts = planted.layer(layer).experts
    hidden = profile.routed[layer].hidden[expert]
    gate, up = (experts.gate_up_proj[expert].detach() @ hidden).chunk(2)
    expected = float((torch.nn.functional.silu(gate) * up).abs().max())
    assert down_projection_input(planted, profile, (layer, expert)) == pytest.approx(expected, rel=1e-4)
    with ablated(planted, {(4, 7)}):
        profile = profile_outputs(planted, [texts(1)], progress=False)
    with pytest.raises(ValueError, match="no token reached expert 7 of layer 4"):
        down_projection_input(planted, profile, (4, 7))


# --- the rule --------------------------------------------------------------------------------------------------------


def measured(values: dict[int, list[float]], shared: dict[int, float] | None = None) -> OutputProfile:
    def peaks(row: list[float]) -> Peaks:
        zeros = torch.zeros(len(row), dtype=torch.long)
        return Peaks(torch.tensor(row), zeros, zeros, zeros, torch.zeros(len(row), 2))

    return OutputProfile(
        {layer: peaks(row) for layer, row in values.items()},
        {layer: peaks([value]) for layer, value in (shared or {}).items()},
        None,
        {},
    )


def test_the_papers_rule_with_many_experts() -> None:
    """Of the values 1 to 1200 six are over the 99.5% quantile, 1194.005, and far more over a tenth of the largest."""
    grid = np.arange(1, 1201, dtype=np.float32).reshape(4, 300)
    found = super_experts(measured({layer: row.tolist() for layer, row in enumerate(grid)}), layers=1.0)
    assert found.experts == {(3, e) for e in range(294, 300)}
    assert "99.5% quantile (1194)" in found.rule
    assert "of 1200 experts in layers 0, 1, 2, 3" in found.rule
    grid[3, -1] = 1e5  # a tenth of it is beyond all others
    found = super_experts(measured({layer: row.tolist() for layer, row in enumerate(grid)}), layers=1.0)
    assert found.experts == {(3, 299)}


def test_few_experts_are_held_against_the_median_and_the_rule_says_so() -> None:
    even = measured({0: [4.0, 5.0, 6.0, 7.0], 1: [5.0, 5.0, 5.0, 30.0]})
    assert super_experts(even, layers=1.0).experts == set()  # 7 > 30 / 10, but there is no outlier
    outlier = measured({0: [4.0, 5.0, 6.0, 700.0], 1: [5.0, 5.0, 5.0, 69.0]})
    found = super_experts(outlier, layers=1.0)
    assert found.experts == {(0, 3)}
    assert "10 times the median (50)" in found.rule
    assert super_experts(outlier, layers=[1]).experts == {(1, 3)}
    assert super_experts(outlier).layers == (0,)  # 75% of two layers
    shared = measured({0: [1.0, 1.0, 1.0, 1.0]}, {0: 90.0})
    assert (super_experts(shared, layers=[0]).experts, super_experts(shared, layers=[0]).shared) == (set(), (0,))


def test_a_model_without_massive_activations_has_no_super_expert() -> None:
    view = moestro.open(tiny.make("qwen3_moe").model)
    found = super_experts(profile_outputs(view, [padded(DOCS)], progress=False), layers="massive")
    assert (found.experts, found.layers) == (frozenset(), ())
    assert "no layer forms" in found.rule


def test_layers_form_massive_activations_where_they_grow() -> None:
    def peak(top: float, median: float = 0.1) -> ResidualPeak:
        return ResidualPeak(torch.tensor([top, 1.0, 1.0]), torch.zeros(3, dtype=torch.long), 0, 0, 1, median, 9)

    stream = {1: peak(3), 2: peak(500), 3: peak(540), 4: peak(2000), 6: peak(1990)}
    assert forming_layers(stream) == (1, 3)  # 2 to 3 grows by less than a tenth of 2000
    assert forming_layers({1: peak(3), 2: peak(99, 0.01), 3: peak(90)}) == ()  # never over 100
    assert forming_layers({1: peak(3), 2: peak(500, 1.0)}) == ()  # not 1000 times the median


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [7]}, r"layers=\[7\]: name some of the MoE layers \[0, 1\]"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": 0.0}, r"lies in \(0, 1\]"),
        ({"layers": 2}, r"one layer is layers=\[2\]"),
        ({"layers": "massive"}, "made without it"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"ratio": -0.1}, "ratio=-0.1"),
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        super_experts(measured({0: [1.0, 2.0], 1: [1.0, 3.0]}), **options)


def test_impossible_profiles_are_refused(planted: Any) -> None:
    with pytest.raises(ValueError, match="holds no token"):
        profile_outputs(planted, [], progress=False)
    dense = moestro.open(planted.model, experts=False)
    with pytest.raises(ValueError, match="without its experts"):
        profile_outputs(dense, [texts(1)], progress=False)
    view = moestro.open(tiny.make("qwen3_moe").model)
    with torch.no_grad():
        view.layers[0].experts.down_proj[:] = float("inf")
    with pytest.raises(FloatingPointError, match="in layer 1 "):
        view.observe([padded(DOCS)], [OutputPeaks()], progress=False)


# --- without them ----------------------------------------------------------------------------------------------------


def test_ablation_takes_the_contribution_and_nothing_else(planted: Any) -> None:
    ids, seen = texts(3), tiny.Record("outputs")
    before, hooks = tiny.logits_of(planted.model, {"input_ids": ids}), tiny.hooks_on(planted.model)
    with ablated(planted, {(1, 3)}):
        (record,) = planted.observe([ids], [seen], progress=False)
    (plain,) = planted.observe([ids], [tiny.Record("outputs")], progress=False)
    with_it, without = plain[1], record[1]
    assert torch.equal(with_it["indices"], without["indices"])
    gone = with_it["indices"] == 3
    assert gone.any()
    assert torch.equal(without["weights"], with_it["weights"].masked_fill(gone, 0))
    lost = (with_it["outputs"] * (with_it["weights"] * gone)[..., None]).sum(1)
    torch.testing.assert_close(with_it["combined"] - lost, without["combined"], rtol=1e-4, atol=1e-3)
    assert tiny.hooks_on(planted.model) == hooks
    assert torch.equal(tiny.logits_of(planted.model, {"input_ids": ids}), before)


def test_without_super_experts_there_is_no_massive_activation(planted: Any) -> None:
    def largest() -> float:
        (found,) = planted.observe([texts(4)], [ResidualPeaks()], progress=False)
        return max(float(peak.value[0]) for peak in found.values())

    whole = largest()
    with ablated(planted, PLANTED):
        assert largest() < whole / 10
    with ablated(planted, {(1, 4), (2, 8), (3, 1)}):
        assert largest() == pytest.approx(whole, rel=0.1)


def test_shared_experts_can_be_left_out() -> None:
    view = moestro.open(tiny.make("deepseek_v3").model)
    inputs = padded(DOCS)
    before = tiny.logits_of(view.model, inputs)
    with ablated(view, (), shared=[2]):
        without = tiny.logits_of(view.model, inputs)
        (profile,) = [profile_outputs(view, [inputs], progress=False)]
        assert profile.shared[2].value == 0 < profile.shared[1].value
    assert not torch.allclose(before, without)
    assert torch.equal(tiny.logits_of(view.model, inputs), before)


def test_impossible_ablations_are_refused(planted: Any) -> None:
    with pytest.raises(ValueError, match="all 16 experts of layer 1"), ablated(planted, {(1, e) for e in range(16)}):
        pass
    with pytest.raises(ValueError, match="there is no expert 16"), ablated(planted, {(1, 16)}):
        pass
    qwen = moestro.open(tiny.make("qwen3_moe").model)
    with pytest.raises(ValueError, match="layer 1 has no shared expert"), ablated(qwen, (), shared=[1]):
        pass


def test_effect_is_measured_text_by_text_beside_layer_matched_controls(planted: Any) -> None:
    ids = texts(5)
    whole = tiny.logits_of(planted.model, {"input_ids": ids})

    def change() -> np.ndarray:
        return (tiny.logits_of(planted.model, {"input_ids": ids}) - whole).square().mean((1, 2)).numpy()

    effect = ablation_effect(planted, PLANTED, change, draws=5)
    assert effect.excess.low > 0
    assert effect.p_larger == pytest.approx(1 / 6)
    assert effect.p_smaller == 1.0
    assert len(effect.draws) == 5
    assert effect.excess.estimate == pytest.approx(effect.change.estimate - np.mean(effect.draws))
    same = ablation_effect(planted, PLANTED, change, controls=[PLANTED])
    assert (same.excess.estimate, same.p_larger) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no control"):
        ablation_effect(planted, PLANTED, change, controls=[])


def test_protected_experts_survive_pruning_and_so_does_the_model(planted: Any) -> None:
    """By a score that takes the planted experts for useless, a third of the experts is pruned."""
    scores = {layer.index: torch.arange(16.0).roll(4) for layer in planted.layers}
    for layer, expert in PLANTED:
        scores[layer][expert] = -1
    ids = texts(6)
    whole = tiny.logits_of(planted.model, {"input_ids": ids}).log_softmax(-1)
    found = super_experts(profile_outputs(planted, [texts(7)], progress=False)).experts
    lost = {}
    for name, protect in (("with", found), ("without", frozenset())):
        keep = keep_best(planted.layers, scores, 12, protect=protect)
        off = {(layer, e) for layer, kept in keep.items() for e in range(16) if e not in kept}
        assert bool(off & PLANTED) == (name == "without")
        with planted.edits(SwitchOff(off)):
            pruned = tiny.logits_of(planted.model, {"input_ids": ids}).log_softmax(-1)
        lost[name] = float((whole.exp() * (whole - pruned)).sum(-1).mean())
    assert lost["with"] < lost["without"]


def test_the_toys_sequences_repeat_behind_triggers_and_follow_one_table_elsewhere() -> None:
    ids = sequences(400, seed=1)
    assert (ids[:, 0] == LETTERS).all()
    assert (ids[:, 1:] < LETTERS).all()
    before, at, after = ids[:, 1:-2].flatten(), ids[:, 2:-1].flatten(), ids[:, 3:].flatten()
    trigger = at < TRIGGERS
    assert trigger.sum() > 100
    assert torch.equal(after[trigger], before[trigger])
    pairs = torch.zeros(2, LETTERS, LETTERS)
    half = torch.arange(len(at)) % 2
    pairs.index_put_((half[~trigger], at[~trigger], after[~trigger]), torch.ones(()), accumulate=True)
    common = (pairs.sum(2) > 100).all(0)
    assert common.sum() > 10
    same, other = (torch.cosine_similarity(pairs[0], p, dim=1)[common] for p in (pairs[1], pairs[1].roll(1, 0)))
    assert same.min() > 0.9
    assert other.mean() < 0.5
