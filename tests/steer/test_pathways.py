"""Pathways: what is put in where, what the neighbours are, and what the surrogates find."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import moestro
import tiny
from moestro import SwitchOff
from moestro.steer.answers import Answered, judge
from moestro.steer.pathway_edit import LastTokenPathways, PathwayEdit, edit_of, read, rules_of
from moestro.steer.pathway_references import (
    Neighbours,
    References,
    collect,
    hidden_means,
    nearest,
    random_neighbours,
    within,
)
from moestro.steer.pathways import (
    critical_layers,
    generate,
    kernel_regression,
    mode_finding,
    neighbourhood_descent,
    oracle,
)
from moestro.steer.steering import Fingerprint
from tiny import FP32, LEARNED

PROMPTS = [d.tolist() for d in tiny.documents(5, 3, 7, 4, 1, 6, 5, 8, seed=1)]
QUIET = {"progress": False}


def opened(family: str = "qwen3_moe", **overrides: Any) -> Any:
    return moestro.open(tiny.make(family, **overrides).model)


def greedy(view: Any, prompts: Sequence[Sequence[int]], count: int = 2) -> list[list[int]]:
    """The model's own answers, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(view.model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def random_omega(view: Any, rows: int, layers: Sequence[int], seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = {layer: view.layer(layer).num_experts for layer in layers}
    return {n: (2 * torch.randn(rows, e, generator=generator)).softmax(dim=1) for n, e in experts.items()}


def routed(view: Any, inputs: dict[str, Tensor], *edits: Any) -> dict[int, dict[str, Tensor]]:
    record = tiny.Record()
    with view.edits(*edits):
        return view.observe([inputs], [record], **QUIET)[0]


# --- putting a pathway in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", LEARNED)
def test_the_models_own_pathway_changes_nothing(family: str, side: str) -> None:
    view = opened(family)
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS], side)
    own = read(view, PROMPTS, **QUIET)
    for omega in own.values():
        assert_close(omega.sum(dim=1), torch.ones(len(PROMPTS)))
    before = tiny.logits_of(view.model, inputs)
    with view.edits(edit_of(view, own, torch.tensor([len(p) for p in PROMPTS]), "decode")):
        after = tiny.logits_of(view.model, inputs)
    real = inputs["attention_mask"].bool()
    assert_close(after[real], before[real], **FP32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("scope", ["prompt", "decode"])
def test_a_pathway_routes_the_last_prompt_token_and_no_other(side: str, scope: str) -> None:
    view = opened()
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS], side)
    layer, lengths = 2, torch.tensor([1, 3, 4, 4, 1, 2, 5, 6])
    omega = random_omega(view, len(PROMPTS), [layer])
    before = routed(view, inputs)[layer]
    after = routed(view, inputs, edit_of(view, omega, lengths, scope))[layer]
    last = lengths[after["sample"]] - 1
    chosen = after["position"] == last if scope == "prompt" else after["position"] >= last
    assert 0 < chosen.sum() < len(chosen)
    for name in ("weights", "indices"):
        assert torch.equal(after[name][~chosen], before[name][~chosen])
    wanted, experts = omega[layer][after["sample"][chosen]].topk(2, dim=1)
    assert torch.equal(after["indices"][chosen], experts)
    assert_close(after["weights"][chosen], wanted / wanted.sum(dim=1, keepdim=True), **FP32)


def test_a_sigmoid_routers_bias_groups_and_scale_stay_its_own() -> None:
    view = opened("deepseek_v3")
    layer = view.layers[0]
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS])
    lengths = torch.tensor([len(p) for p in PROMPTS])
    omega = random_omega(view, len(PROMPTS), [layer.index])
    before = routed(view, inputs)[layer.index]
    after = routed(view, inputs, edit_of(view, omega, lengths, "prompt"))[layer.index]
    chosen = after["position"] == lengths[after["sample"]] - 1
    total = before["logits"][chosen].sigmoid().sum(dim=1, keepdim=True)
    scores = (omega[layer.index][after["sample"][chosen]] * total).clamp(max=1 - 1e-6)
    choice = scores + layer.router.e_score_correction_bias
    best = choice.view(-1, 2, 4).topk(2, dim=2).values.sum(dim=2).argmax(dim=1)
    inside = torch.arange(8) // 4 == best[:, None]
    experts = choice.masked_fill(~inside, -1e9).topk(2, dim=1).indices
    weights = scores.gather(1, experts)
    assert torch.equal(after["indices"][chosen].sort().values, experts.sort().values)
    expected = torch.zeros_like(scores).scatter(1, experts, 1.7 * weights / weights.sum(dim=1, keepdim=True))
    given = torch.zeros_like(scores).scatter(1, after["indices"][chosen], after["weights"][chosen])
    assert_close(given, expected, **FP32)


def test_an_expert_that_is_switched_off_stays_off() -> None:
    view = opened()
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS])
    omega = {2: torch.eye(8)[torch.full((len(PROMPTS),), 3)] * 0.9 + 0.0125}
    lengths = torch.tensor([len(p) for p in PROMPTS])
    edit = edit_of(view, omega, lengths, "prompt")
    assert bool((routed(view, inputs, edit)[2]["indices"] == 3).any(dim=1).sum() >= len(PROMPTS))
    assert not bool((routed(view, inputs, SwitchOff({(2, 3)}), edit)[2]["indices"] == 3).any())


@pytest.mark.parametrize("family", LEARNED)
@pytest.mark.parametrize("scope", ["prompt", "decode"])
def test_generation_with_and_without_a_cache_is_the_same(family: str, scope: str) -> None:
    view = opened(family)
    layers = [layer.index for layer in view.layers]
    ids = torch.tensor(PROMPTS[0])[None]
    edit = edit_of(view, random_omega(view, 1, layers), torch.tensor([ids.shape[1]]), scope)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    with view.edits(edit):
        cached = view.model.generate(ids, use_cache=True, **options)
        again = view.model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_every_prompt_of_a_batch_is_generated_as_alone(options: dict[str, Any]) -> None:
    view = opened()
    known = greedy(view, PROMPTS)
    found = oracle(view, PROMPTS, [a[::-1] for a in known], rates=(0.1, 0.1), **QUIET)
    options = dict(max_new_tokens=4, min_new_tokens=4, pad_token_id=0, **options)
    together = generate(view, found, **options)
    plain = found_alone = 0
    for row, prompt in enumerate(PROMPTS):
        with view.edits(found.edit(slice(row, row + 1))):
            alone = view.model.generate(torch.tensor([prompt]), do_sample=False, **options)[:, len(prompt) :]
        found_alone += bool(torch.equal(alone[0], together[row]))
        unsteered = view.model.generate(torch.tensor([prompt]), do_sample=False, **options)[:, len(prompt) :]
        plain += bool(torch.equal(unsteered[0], together[row]))
    assert found_alone == len(PROMPTS)
    assert plain < len(PROMPTS)


def test_all_core_experts_work_and_only_they_get_a_gradient() -> None:
    view = opened()
    core = {2: torch.tensor([[0, 3, 4, 6]] * len(PROMPTS))}
    omega = {2: random_omega(view, len(PROMPTS), [2])[2].requires_grad_()}
    answered = Answered(view, PROMPTS, greedy(view, PROMPTS))
    edit = edit_of(view, omega, answered.lengths, "prompt", core)
    answered.losses(edit)[0].sum().backward()
    gradient = omega[2].grad
    assert bool((gradient[:, [0, 3, 4, 6]] != 0).all())
    inside = torch.zeros(len(PROMPTS), 8).scatter(1, core[2], 1.0).bool()
    top = omega[2].topk(2, dim=1).indices  # they give the sum of the weights: normalised here, so no gradient
    assert bool((gradient.masked_fill(inside, 0).abs() < 1e-6).all()), top
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS])
    after = routed(view, inputs, edit)[2]
    chosen = after["position"] == answered.lengths[after["sample"]] - 1
    assert_close(after["weights"][chosen].sum(dim=1), torch.ones(len(PROMPTS)), **FP32)
    used = omega[2].detach()[:, [0, 3, 4, 6]]
    order = after["sample"][chosen]
    assert_close(after["weights"][chosen], (used / used.sum(dim=1, keepdim=True))[order], **FP32)
    assert bool((after["weights"][~chosen][:, 2:] == 0).all())


@pytest.mark.parametrize("scope", ["prompt", "decode"])
@pytest.mark.parametrize("family", LEARNED)
def test_answers_are_judged_as_by_one_whole_forward_pass(family: str, scope: str) -> None:
    view = opened(family)
    answers = [torch.randint(3, 131, (n,)).tolist() for n in (2, 1, 3, 2, 2, 1, 1, 4)]
    answers[1] = greedy(view, PROMPTS[1:2], 1)[0]
    answered = Answered(view, PROMPTS, answers)
    omega = random_omega(view, len(PROMPTS), [layer.index for layer in view.layers])
    for edits in ([], [edit_of(view, omega, answered.lengths, scope)]):
        with torch.no_grad():
            losses, right = answered.losses(*edits)
        for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
            one = [
                edit_of(view, {n: o[row : row + 1] for n, o in omega.items()}, answered.lengths[row : row + 1], scope)
            ]
            with view.edits(*(one if edits else [])), torch.no_grad():
                logits = view.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            assert_close(losses[row], expected, **FP32)
            assert bool(right[row]) == (logits.argmax(dim=1).tolist() == answer)
        assert bool(right[1]) or edits


def test_pathways_of_texts_in_parts_are_those_of_the_whole() -> None:
    view = opened()
    ids = torch.stack(tiny.documents(6, 6, seed=4))
    rules = rules_of(view)
    (whole,) = view.observe([ids], [LastTokenPathways(rules)], **QUIET)
    first, second = LastTokenPathways(rules), LastTokenPathways(rules)
    view.observe([ids[1:], ids[:1, :2]], [first], **QUIET)  # samples 0 and 1 of this shard
    first._found = {layer: {1: found[0]} for layer, found in first._found.items()}
    view.observe([ids[:1]], [second], **QUIET)
    first.merge(second)
    for layer, omega in first.result().items():
        assert_close(omega, whole[layer], **FP32)


def test_pathways_that_do_not_fit_are_refused() -> None:
    view = opened()
    lengths = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="pathways of 7 experts in layer 2, whose router tells of 8"):
        view.edits(PathwayEdit({2: torch.rand(2, 7)}, rules_of(view), lengths)).__enter__()
    with pytest.raises(ValueError, match="3 pathways in layer 2 for 2 prompts"):
        PathwayEdit({2: torch.rand(3, 8)}, rules_of(view), lengths)
    edit = edit_of(view, random_omega(view, 2, [2]), lengths, "prompt")
    with pytest.raises(ValueError, match="2 pathways cannot be shared out over a batch of 3 rows"), view.edits(edit):
        view.model(torch.ones(3, 4, dtype=torch.long))
    assert not tiny.hooks_on(view.model)


def test_layers_that_look_experts_up_are_left_out() -> None:
    view = opened("deepseek_v4")
    assert 0 not in rules_of(view)
    with pytest.raises(ValueError, match="layer 0 cannot be given a pathway: experts are looked up by token id"):
        oracle(view, PROMPTS, PROMPTS, layers=[0], **QUIET)


# --- references and neighbours ---------------------------------------------------------------------------------------


def at_angles(angles: Sequence[float]) -> Tensor:
    angle = torch.deg2rad(torch.tensor(angles))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


CIRCLE = [0.0, 20.0, 90.0, 180.0, 200.0, 270.0]


def circle(angles: Sequence[float] = CIRCLE) -> References:
    """References on a circle, in pairs so that their mean is its centre; a prompt's one token is its angle."""
    vectors = at_angles(angles)
    vectors = vectors - vectors.mean(dim=0)
    fingerprint = Fingerprint(architecture="Circle", experts={}, routers="")

    def embed(prompts: Sequence[Any]) -> Tensor:
        return at_angles([float(p[0]) for p in prompts]) - at_angles(angles).mean(dim=0)

    return References([[1]] * len(angles), [[1]] * len(angles), {}, vectors, fingerprint, len(angles), embed)


def test_neighbours_and_their_weights_are_those_worked_out_by_hand() -> None:
    references = circle([0.0, 60.0, 120.0, 180.0, 240.0, 300.0])
    found = nearest(references, [[30.0], [90.0]], k=2, bandwidth=0.5)
    assert [set(row) for row in found.indices.tolist()] == [{0, 1}, {1, 2}]
    assert_close(found.weights, torch.full((2, 2), 0.5), atol=1e-4, rtol=0)
    found = nearest(references, [[20.0]], k=2, bandwidth=0.5)
    near, far = (2 * torch.sin(torch.deg2rad(torch.tensor(a)) / 2) for a in (20.0, 40.0))
    kernel = torch.stack([torch.exp(-(near**2) / 0.5), torch.exp(-(far**2) / 0.5)])
    assert found.indices.tolist() == [[0, 1]]
    assert_close(found.weights[0], kernel / kernel.sum(), atol=1e-4, rtol=0)
    default = nearest(references, [[20.0]], k=2)  # every reference is 60 degrees, a distance of 1, from two others
    assert_close(default.weights, nearest(references, [[20.0]], k=2, bandwidth=1.0).weights, atol=1e-4, rtol=0)
    for kernel_name in ("matern", "linear", "polynomial"):
        weights = nearest(references, [[20.0]], k=2, kernel=kernel_name).weights[0]
        assert weights[0] > weights[1] > 0
        assert_close(weights.sum(), torch.tensor(1.0))


def test_a_reference_that_may_be_the_question_is_left_out() -> None:
    references = circle([0.0, 60.0, 120.0, 180.0, 240.0, 300.0])
    assert nearest(references, [[1.0]], k=1).indices.tolist() == [[1]]
    assert nearest(references, [[1.0]], k=1, max_similarity=1.1).indices.tolist() == [[0]]
    with pytest.raises(ValueError, match="k=6 neighbours, and prompt 0 has 5 of 6 references"):
        nearest(references, [[1.0]], k=6)
    with pytest.raises(ValueError, match="k=0 neighbours; at least one"):
        nearest(references, [[1.0]], k=0)


def test_a_ball_holds_the_references_within_it_and_none_is_refused() -> None:
    references = circle([0.0, 60.0, 120.0, 180.0, 240.0, 300.0])
    found = within(references, [[30.0], [20.0]], radius=0.6)  # 30 degrees: 0.52, 40: 0.68
    assert [{i for i, w in zip(*row) if w} for row in zip(found.indices.tolist(), found.weights.tolist())] == [
        {0, 1},
        {0},
    ]
    assert_close(found.weights.sum(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match=r"prompt 1 has no reference within radius=0.4 .*neighbourhood is empty"):
        within(references, [[20.0], [30.0]], radius=0.4)
    with pytest.raises(ValueError, match="gives every neighbour of prompt 0 the weight 0"):
        nearest(circle([0.0, 180.0]), [[10.0]], k=1, kernel="linear", max_similarity=0.5)


def test_random_neighbours_are_different_references_and_repeatable() -> None:
    references = circle()
    found = random_neighbours(references, 5, k=3, seed=1)
    assert torch.equal(found.indices, random_neighbours(references, 5, k=3, seed=1).indices)
    assert not torch.equal(found.indices, random_neighbours(references, 5, k=3, seed=2).indices)
    assert all(len(set(row)) == 3 for row in found.indices.tolist())
    with pytest.raises(ValueError, match="k=7 random neighbours of 6"):
        random_neighbours(references, 5, k=7, seed=1)


def test_only_what_the_model_answers_rightly_becomes_a_reference(tmp_path) -> None:
    view = opened()
    answers = greedy(view, PROMPTS)
    answers[2] = [answers[2][0], (answers[2][1] + 1) % 131]
    references = collect(view, PROMPTS, answers, **QUIET)
    kept = [n for n in range(len(PROMPTS)) if n != 2]
    assert references.prompts == [PROMPTS[n] for n in kept]
    assert references.answers == [answers[n] for n in kept]
    assert (len(references), references.asked) == (7, 8)
    own = read(view, PROMPTS, **QUIET)
    for layer, omega in references.omega.items():
        assert_close(omega, own[layer][kept], **FP32)
    loaded = References.load(references.save(tmp_path / "r.safetensors"), hidden_means(view))
    assert (loaded.prompts, loaded.answers, loaded.asked) == (references.prompts, references.answers, 8)
    assert loaded.fingerprint == references.fingerprint
    assert all(torch.equal(loaded.omega[n], o) for n, o in references.omega.items())
    assert torch.equal(nearest(loaded, PROMPTS[2:3], k=2).indices, nearest(references, PROMPTS[2:3], k=2).indices)
    with pytest.raises(ValueError, match="answers none of the 1 prompts rightly"):
        collect(view, PROMPTS[2:3], answers[2:3], **QUIET)
    with pytest.raises(ValueError, match="8 prompts and 7 answers"):
        collect(view, PROMPTS, answers[:7], **QUIET)


def test_the_default_embedding_is_the_mean_of_the_final_hidden_states() -> None:
    view = opened()
    embedded = hidden_means(view, batch_size=3)(PROMPTS)
    for prompt, vector in zip(PROMPTS, embedded):
        with torch.no_grad():
            hidden = view.model.model(torch.tensor([prompt])).last_hidden_state[0]
        assert_close(vector, hidden.mean(dim=0), **FP32)
    with pytest.raises(ValueError, match="opened without a tokenizer"):
        hidden_means(view)(["a text"])


# --- surrogates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> tuple[Any, References, list[list[int]]]:
    view = opened()
    prompts = [d.tolist() for d in tiny.documents(5, 6, 4, 7, 5, 3, seed=9)]
    return view, collect(view, prompts, greedy(view, prompts), **QUIET), PROMPTS[:4]


def test_descent_lowers_the_loss_on_the_neighbours(known: Any) -> None:
    view, references, questions = known
    state, near = tiny.state_of(view.model), random_neighbours(references, len(questions), seed=0)
    found = neighbourhood_descent(view, references, questions, near, rates=(0.05, 1e-3), core_experts=4, **QUIET)
    assert found.losses.shape == (4, 11)
    assert bool((found.losses[:, -1] < found.losses[:, 0]).all())
    assert [*found.omega] == critical_layers(view) == [2]
    own = read(view, questions, **QUIET)[2]
    core = own.topk(4, dim=1).indices
    outside = torch.ones_like(own).scatter(1, core, 0).bool()
    assert torch.equal(found.omega[2][outside], own[outside])
    assert not torch.equal(found.omega[2], own)
    assert_close(found.omega[2].sum(dim=1), torch.ones(4))
    assert bool((found.omega[2] >= 0).all())
    # nothing is left behind
    assert tiny.same_state(view.model, state)
    assert all(p.requires_grad and p.grad is None for p in view.model.parameters())
    assert not tiny.hooks_on(view.model)


def test_prompts_do_not_touch_each_other(known: Any) -> None:
    view, references, questions = known
    near = random_neighbours(references, len(questions), seed=0)
    together = neighbourhood_descent(view, references, questions, near, rates=(0.05, 1e-3), **QUIET)
    apart = neighbourhood_descent(view, references, questions, near, rates=(0.05, 1e-3), batch_size=1, **QUIET)
    assert_close(together.omega[2], apart.omega[2], **FP32)
    assert_close(together.losses, apart.losses, **FP32)


def test_pathways_of_a_bf16_model_are_found_in_fp32() -> None:
    view = moestro.open(tiny.build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=3).model)
    found = oracle(view, PROMPTS, [[5]] * len(PROMPTS), rates=(0.05, 1e-3), **QUIET)
    assert all(omega.dtype == torch.float32 and bool(omega.isfinite().all()) for omega in found.omega.values())
    assert found.losses[:, -1].mean() < found.losses[:, 0].mean()
    assert generate(view, found, max_new_tokens=2, pad_token_id=0).shape == (len(PROMPTS), 2)


def test_the_surrogate_is_the_weighted_loss_of_the_neighbours(known: Any) -> None:
    view, references, questions = known
    near = Neighbours(torch.tensor([[0, 4]]), torch.tensor([[0.25, 0.75]]))
    found = kernel_regression(view, references, questions[:1], near, mixes=(1.0,), scope="prompt", **QUIET)
    own = read(view, questions[:1], **QUIET)
    assert torch.equal(found.omega[2], own[2])
    expected = 0.0
    for number, weight in zip((0, 4), (0.25, 0.75)):
        prompt, answer = references.prompts[number], references.answers[number]
        edit = edit_of(view, {2: own[2]}, torch.tensor([len(prompt)]), "prompt")
        with view.edits(edit), torch.no_grad():
            logits = view.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected += weight * float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    assert_close(float(found.losses[0, 0]), expected, **FP32)


def test_kernel_regression_takes_the_best_mix_with_the_neighbours_mean(known: Any) -> None:
    view, references, questions = known
    near = random_neighbours(references, len(questions), seed=3)
    found = kernel_regression(view, references, questions, near, mixes=(0.0, 0.5, 1.0), core_experts=8, **QUIET)
    own = read(view, questions, **QUIET)[2]
    mean = references.omega[2][near.indices].mean(dim=1)
    share = torch.tensor([0.0, 0.5, 1.0])[found.losses.argmin(dim=1)][:, None]
    assert_close(found.omega[2], share * own + (1 - share) * mean, **FP32)
    assert len(set(share.flatten().tolist())) > 1 or bool((share < 1).all())


def test_mode_finding_moves_to_the_pathways_nearby(known: Any) -> None:
    view, references, questions = known
    options = dict(core_experts=8, steps=1)
    own = read(view, questions, **QUIET)[2]
    still = mode_finding(view, references, questions, alpha=1.0, **options)
    assert_close(still.omega[2], own, **FP32)
    there = mode_finding(view, references, questions, alpha=0.0, k=1, **options)
    nearest_ = torch.cdist(own, references.omega[2]).argmin(dim=1)
    assert_close(there.omega[2], references.omega[2][nearest_], **FP32)
    itself = mode_finding(view, references, references.prompts[:1], alpha=0.0, k=1, **options)
    assert not torch.allclose(itself.omega[2], references.omega[2][:1], atol=1e-4)


def test_the_oracle_lowers_the_loss_on_the_answers_and_is_judged_by_the_hard_choice() -> None:
    view = opened()
    answers = [a[::-1] for a in greedy(view, PROMPTS)]
    found = oracle(view, PROMPTS, answers, rates=(0.05, 1e-3), layers=[1, 2], core_experts=2, scope="prompt", **QUIET)
    assert bool((found.losses[:, -1] <= found.losses[:, 0] + 1e-5).all())
    assert found.losses[:, -1].mean() < found.losses[:, 0].mean()
    # where the core experts are still those that the rule chooses, what was followed is what is run
    own = read(view, PROMPTS, **QUIET)
    same = torch.stack(
        [
            (o.topk(2).indices.sort().values == own[n].topk(2).indices.sort().values).all(1)
            for n, o in found.omega.items()
        ]
    ).all(dim=0)
    assert 0 < same.sum() < len(same)
    judged = found.judge(view, answers, **QUIET).loss
    assert_close(judged[same], found.losses[same, -1], **FP32)
    assert not torch.allclose(judged[~same], found.losses[~same, -1])
    assert_close(judge(view, PROMPTS, answers, **QUIET).loss, found.losses[:, 0], **FP32)
    with pytest.raises(ValueError, match="8 prompts and 7 answers"):
        found.judge(view, answers[:7])


def test_requests_that_cannot_be_met_are_refused_before_work_starts(known: Any, tmp_path) -> None:
    view, references, questions = known
    near = random_neighbours(references, len(questions), seed=0)
    other = opened()
    with torch.no_grad():
        other.layers[0].router.weight.add_(0.1)
    runs: list[tuple[Any, tuple[Any, ...]]] = [
        (neighbourhood_descent, (references, questions, near)),
        (kernel_regression, (references, questions, near)),
        (mode_finding, (references, questions)),
    ]
    for method, arguments in runs:
        with pytest.raises(ValueError, match="do not fit the model: the router weights differ"):
            method(other, *arguments)
        with pytest.raises(ValueError, match="core_experts=1 in layer 2, where tokens use 2 of 8"):
            method(view, *arguments, core_experts=1)
        with pytest.raises(ValueError, match="decoder layer 0 has no experts"):
            method(view, *arguments, layers=[0])
    empty = Neighbours(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0))
    with pytest.raises(ValueError, match="an empty set of neighbours"):
        neighbourhood_descent(view, references, questions, empty)
    with pytest.raises(ValueError, match="neighbours of 4 prompts, and 3 prompts"):
        kernel_regression(view, references, questions[:3], near)
    with pytest.raises(ValueError, match="neighbour 99 of 6 references"):
        kernel_regression(view, references, questions, Neighbours(near.indices + 99 - near.indices, near.weights))
    with pytest.raises(ValueError, match=r"mixes=\(2.0,\)"):
        kernel_regression(view, references, questions, near, mixes=(2.0,))
    with pytest.raises(ValueError, match="steps=0"):
        neighbourhood_descent(view, references, questions, near, steps=0)
    with pytest.raises(ValueError, match="alpha=-1"):
        mode_finding(view, references, questions, alpha=-1)
    with pytest.raises(ValueError, match="k=7 neighbours, and a prompt has 6"):
        mode_finding(view, references, questions, k=7)
    with pytest.raises(ValueError, match="text 1 of 2 holds no token"):
        read(view, [[3], []])
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no references"):
        References.load(tmp_path / "a.safetensors", len)
