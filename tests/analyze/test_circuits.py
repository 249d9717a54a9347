"""Path patching on a model whose circuit is known, and its properties on models with MLPs and experts. fp32."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moestro
from copy_model import copy_model
from moestro.analyze.circuits import (
    Circuit,
    Stage,
    attention_from,
    circuit_overlap,
    circuit_table,
    effect_difference,
    overlap_curve,
    trace_circuit,
)
from moestro.analyze.path_patching import PathEffects, answers_of, path_patching
from moestro.data.minimal_pairs import MinimalPairs
from moestro.view.heads import HeadEvent, HeadId, HeadPatch
from tiny import make

NEAR = dict(rtol=0.0, atol=1e-4)


def copy_pairs(padded: bool = False) -> MinimalPairs:
    """... A B x C D y A -> B; the corrupted prompt has C before B and A before D, so D follows."""
    generator = torch.Generator().manual_seed(0)
    rows, others, answers, lengths = [], [], [], []
    for number in range(6):
        a, b, c, d, x, y = (torch.randperm(20, generator=generator)[:6] + 2).tolist()
        rows.append([1, a, b, x, c, d, y, a])
        others.append([1, c, b, x, a, d, y, a])
        answers.append([b, d])
        if padded and number % 2:  # one token less between, and padding in its place at the end
            rows[-1] = [1, a, b, c, d, y, a, 0]
            others[-1] = [1, c, b, a, d, y, a, 0]
        lengths.append(7 if padded and number % 2 else 8)
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    places = {"B": torch.full((6,), 2), "D": torch.tensor(lengths) - 3}
    return MinimalPairs(
        torch.tensor(rows), torch.tensor(others), mask, torch.tensor(answers), places, {("last", "B"): "mover"}
    )


def as_table(effects: dict[int, Tensor]) -> Tensor:
    return torch.stack([effects[i] for i in sorted(effects)])


@pytest.fixture(scope="module")
def copier():
    return moestro.open(copy_model(), experts=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_known_circuit_has_its_known_effects(copier, padded: bool, attention: str) -> None:
    copier.model.set_attn_implementation(attention)
    pairs = copy_pairs(padded)
    # LD is 1.25 = 1 + 1/4 of the two copying heads, and -1.25 where the prompt is corrupted
    assert torch.allclose(answers_of(copier, pairs).difference, torch.full((6,), 1.25), **NEAR)
    direct = path_patching(copier, pairs, progress=False)
    torch.testing.assert_close(as_table(direct.effect), torch.tensor([[0.0, 0, 0], [0.8, 0.2, 0]]), **NEAR)
    # without its key at B head (1, 0) attends to all alike, to B as much as to D: its 1 is lost of 2.5
    for place, receivers, expected in (
        ("B", [(1, 0, "k")], 0.4),
        ("D", [(1, 0, "k")], 0.4),  # B and D match alike
        ("B", [(1, 0, "k"), (1, 1, "k")], 0.5),
        ("B", [(1, 1, "k")], 0.1),
        ("B", [(1, 0, "v")], 0.0),  # values carry the token itself
        ("last", [(1, 0, "q")], 0.0),  # and queries too
        ("last", [(1, 0, "k")], 0.0),
        ("B", [(1, 0, "z")], 0.4),  # z as it becomes with the sender's change in its own keys
    ):
        found = path_patching(copier, pairs, receivers, at=place, progress=False)
        table = torch.zeros(2, 3)
        table[0, 0] = expected
        torch.testing.assert_close(as_table(found.effect), table, **NEAR)


def by_hand(model: LlamaForCausalLM, pairs: MinimalPairs, sender: HeadId, receiver: HeadId | None) -> float:
    """The effect of one path by hooks on the output projections and on the query projection."""
    width, rows = model.config.head_dim, torch.arange(len(pairs))
    attentions = [layer.self_attn for layer in model.model.layers]

    def run(ids: Tensor, change: dict[int, Tensor] | None = None, queries: Tensor | None = None):
        seen: dict[int, Tensor] = {}
        asked: list[Tensor] = []

        def project(index: int, args: tuple[Tensor, ...]):
            seen[index] = args[0].clone()
            return None if change is None else (change[index],)

        def ask(module, args, out: Tensor) -> Tensor:
            asked.append(out.clone())
            if queries is None:
                return out
            new = out.clone()
            part = slice(receiver[1] * width, (receiver[1] + 1) * width)
            new[..., part] = queries[..., part]
            return new

        hooks = [
            a.o_proj.register_forward_pre_hook(lambda _, args, i=i: project(i, args)) for i, a in enumerate(attentions)
        ]
        if receiver is not None:
            hooks.append(attentions[receiver[0]].q_proj.register_forward_hook(ask))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        for hook in hooks:
            hook.remove()
        ld = logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.answers[:, 1]]
        return ld, seen, asked[0] if asked else None

    clean, z, _ = run(pairs.clean)
    corrupted, other, _ = run(pairs.corrupted)
    change = {i: t.clone() for i, t in z.items()}
    part = slice(sender[1] * width, (sender[1] + 1) * width)
    change[sender[0]][:, -1, part] = other[sender[0]][:, -1, part]
    patched, _, queries = run(pairs.clean, change)
    if receiver is not None:
        patched, _, _ = run(pairs.clean, queries=queries)
    return float((patched - clean).mean() / (corrupted - clean).mean())


def random_pairs(count: int = 5, length: int = 7) -> MinimalPairs:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(2, 60, (count, length), generator=generator)
    other = clean.clone()
    other[:, 2] = (other[:, 2] + 1) % 60
    answers = torch.stack([torch.arange(count), torch.arange(count) + 20], dim=1)
    return MinimalPairs(
        clean, other, torch.ones_like(clean, dtype=torch.bool), answers, {"changed": torch.full((count,), 2)}
    )


def separating(view, pairs: MinimalPairs) -> MinimalPairs:
    """The pairs with the token that the corruption favours most as the foil, so that random models separate them."""
    with torch.no_grad():
        change = view.model(pairs.corrupted).logits[:, -1] - view.model(pairs.clean).logits[:, -1]
    answers = torch.stack([change.argmin(dim=1), change.argmax(dim=1)], dim=1)
    return MinimalPairs(pairs.clean, pairs.corrupted, pairs.mask, answers, dict(pairs.positions))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, initializer_range=0.3,
    )  # fmt: skip
    return moestro.open(LlamaForCausalLM(config).eval(), experts=False)


def test_effects_are_those_of_plain_hooks(llama) -> None:
    pairs = separating(llama, random_pairs())
    direct = path_patching(llama, pairs, progress=False).effect
    through = path_patching(llama, pairs, [(2, 1, "q")], progress=False).effect
    for layer, head in itertools.product(range(3), range(4)):
        assert abs(float(direct[layer][head]) - by_hand(llama.model, pairs, (layer, head), None)) < 1e-4
        expected = by_hand(llama.model, pairs, (layer, head), (2, 1)) if layer < 2 else 0.0
        assert abs(float(through[layer][head]) - expected) < 1e-4
    assert as_table(through).abs().max() > 1e-3


def test_small_batches_and_pairs_make_no_difference(llama) -> None:
    pairs = separating(llama, random_pairs())
    for receivers in ("logits", [(2, 0, "k"), (1, 3, "v")]):
        whole = path_patching(llama, pairs, receivers, at="changed", progress=False)
        parts = path_patching(llama, pairs, receivers, at="changed", batch_tokens=16, progress=False)
        torch.testing.assert_close(as_table(whole.effect), as_table(parts.effect), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_all_heads_at_once_do_what_the_corruption_does(family: str, llama) -> None:
    """Clean and corrupted prompts share their last token, and what differs before reaches it through heads alone."""
    view = llama if family == "llama" else moestro.open(make(family).model)
    pairs = separating(view, random_pairs())
    kept: dict[int, Tensor] = {}

    class Keep:
        needs = frozenset({"heads"})

        def update_heads(self, event: HeadEvent) -> None:
            kept[event.layer] = event.z_grid[:, -1].clone()

        def merge(self, other) -> None: ...

        def result(self) -> None: ...

    with view.observing(Keep()), torch.no_grad():
        corrupted = view.model(pairs.corrupted).logits[:, -1]
    patch = HeadPatch({(i, h): z[:, h] for i, z in kept.items() for h in range(z.shape[1])})
    rows = torch.arange(len(pairs))
    expected = corrupted[rows, pairs.answers[:, 0]] - corrupted[rows, pairs.answers[:, 1]]
    torch.testing.assert_close(answers_of(view, pairs, patch).difference, expected, rtol=1e-3, atol=1e-4)
    direct = path_patching(view, pairs, progress=False)
    torch.testing.assert_close(direct.corrupted, expected, rtol=1e-3, atol=1e-4)


def test_frozen_mlps_leave_the_residual_stream_alone(llama) -> None:
    """With heads and MLPs frozen, a sender's change reaches the final norm as it is."""
    pairs = separating(llama, random_pairs())
    model = llama.model
    streams: list[Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda m, args, out: streams.append(args[0][:, -1]))
    inputs: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, i=i: inputs[i].append(args[0][:, -1]))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in (pairs.clean, pairs.corrupted):
            model(ids)
    for h in (hook, *hooks):
        h.remove()
    found = path_patching(llama, pairs, freeze_mlp=True, progress=False)
    free = path_patching(llama, pairs, progress=False)
    rows = torch.arange(len(pairs))
    for layer, head in itertools.product(range(3), range(4)):
        part = slice(head * 6, head * 6 + 6)
        step = (inputs[layer][1] - inputs[layer][0])[:, part] @ model.model.layers[layer].self_attn.o_proj.weight[
            :, part
        ].T
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(streams[0] + step))
        expected = logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.answers[:, 1]]
        torch.testing.assert_close(found.patched[layer][head], expected, rtol=1e-3, atol=1e-4)
    assert (as_table(found.effect) - as_table(free.effect)).abs().max() > 1e-3
    assert not any(m._forward_hooks for m in model.modules())


def test_experts_can_be_frozen() -> None:
    view = moestro.open(make("qwen3_moe").model)
    pairs = separating(view, random_pairs())
    frozen = as_table(path_patching(view, pairs, freeze_mlp=True, progress=False).effect)
    free = as_table(path_patching(view, pairs, progress=False).effect)
    assert not torch.allclose(frozen[0], free[0], atol=1e-5)
    with pytest.raises(ValueError, match="0 blocks with weights beside its attention"):
        path_patching(moestro.open(copy_model(), experts=False), copy_pairs(), freeze_mlp=True, progress=False)


def test_a_trace_finds_the_circuit_and_names_its_heads(copier) -> None:
    pairs = copy_pairs()
    circuit = trace_circuit(copier, pairs, [Stage(), Stage("k", at="B")], share=2 / 6, progress=False)
    assert circuit.heads() == {(1, 0), (1, 1), (0, 0)}
    assert circuit.heads(1 / 6) == {(1, 0), (0, 0)}
    assert circuit.stages[0][1].top(1.0) == [(1, 0), (1, 1)]
    table = circuit_table(copier, pairs, circuit)
    first = table.row(0, named=True)
    assert (first["layer"], first["head"], first["looks_at"], first["role"]) == (1, 0, "B", "mover")
    assert first["attention"] > 0.99
    assert first["low"] <= first["effect"] <= first["high"]
    attention = attention_from(copier, pairs, "B", progress=False)
    assert attention["last"][0].max() < 1e-6


def effects(*rows: Sequence[float]) -> PathEffects:
    patched = {i: torch.tensor(row)[:, None].expand(-1, 4) for i, row in enumerate(rows)}
    return PathEffects(patched, torch.zeros(4), torch.ones(4))


def test_overlap_and_its_chance_are_those_of_counting() -> None:
    sizes = {0: 4, 1: 3, 2: 5}
    first = {(0, 0), (0, 1), (1, 0), (2, 4)}
    second = {(0, 1), (0, 2), (1, 0), (1, 2)}
    found = circuit_overlap(first, second, sizes)
    assert found.shared == {(0, 1), (1, 0)}
    assert found.value == 2 / 6
    drawn = [
        len(first & {(0, a), (0, b), (1, c), (1, d)})
        for a, b in itertools.combinations(range(4), 2)
        for c, d in itertools.combinations(range(3), 2)
    ]
    values = np.array([n / (8 - n) for n in drawn])
    assert found.p == pytest.approx(np.mean(np.array(drawn) >= 2))
    assert found.null_mean == pytest.approx(values.mean())
    assert np.mean(values <= found.null_high) >= 0.95
    assert circuit_overlap(first, first, sizes).value == 1
    assert circuit_overlap((), first, sizes).p == 1
    with pytest.raises(ValueError, match="layer 1 has 3 heads; there is no head 3"):
        circuit_overlap({(1, 3)}, second, sizes)


def test_curves_and_differences_follow_from_the_maps() -> None:
    one = Circuit([(Stage(), effects([0.5, 0.1], [0.2, -0.4]))], 0.25)
    two = Circuit([(Stage(), effects([0.1, 0.2], [0.3, -1.0]))], 0.25)
    curve = overlap_curve(one, two, {0: 2, 1: 2}, [0.25, 0.5, 1.0])
    assert curve["overlap"].to_list() == [0.0, 1 / 3, 1.0]  # {00} {11}; {00, 11} {11, 10}; all
    difference = effect_difference(one.stages[0][1], two.stages[0][1])
    torch.testing.assert_close(difference[1], torch.tensor([0.4 - 0.3, -0.8 + 1.0]))


def test_intervals_are_of_the_ratio_of_means() -> None:
    found = PathEffects({0: torch.tensor([[1.0, 2.0, 3.0]])}, torch.zeros(3), torch.tensor([2.0, 2.0, 8.0]))
    interval = found.interval((0, 0))
    assert interval.estimate == pytest.approx(6 / 12)
    assert interval.low == pytest.approx(3 / 8)
    assert interval.high == pytest.approx(1.0)


def test_bad_requests_are_refused(copier) -> None:
    pairs = copy_pairs()
    for arguments, message in (
        (dict(at="S2"), "no place 'S2'; they have B, D, last"),
        (dict(receivers=[]), "there are no receivers"),
        (dict(receivers=[(1, 3, "q")]), "with 3 heads in layer 1"),
        (dict(receivers=[(2, 0, "q")]), "no heads in layer 2"),
    ):
        with pytest.raises(ValueError, match=message):
            path_patching(copier, pairs, progress=False, **arguments)
    same = MinimalPairs(pairs.clean, pairs.clean, pairs.mask, pairs.answers, {})
    with pytest.raises(ValueError, match="cannot be told from 0"):
        path_patching(copier, same, progress=False)
    with pytest.raises(ValueError, match="first stage has the logits"):
        trace_circuit(copier, pairs, [Stage("q")])
    with pytest.raises(ValueError, match="no place 'S2'"):
        trace_circuit(copier, pairs, [Stage(), Stage("q", at="S2")])
    with pytest.raises(ValueError, match="no place 'S2'"):
        attention_from(copier, pairs, "S2")
    with pytest.raises(ValueError, match=r"share=0: .*\(0, 1\]"):
        effects([1.0]).top(0)
