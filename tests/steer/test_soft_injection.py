"""Soft injection: where it acts, what is learned, what a file keeps of it."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import moestro
import tiny
from moestro.steer.answers import aligned
from moestro.steer.soft_injection import (
    LastTokenHeads,
    Selection,
    SoftInjection,
    Task,
    constant,
    few_shot,
    first_token_accuracy,
    generate,
    head_transfer,
    rank_heads,
    replaced,
    select_heads,
    task_embedding,
)
from moestro.steer.steering import Steering
from tiny import FP32

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]  # grouped queries; sinks, bias; latent attention
PROMPTS = [d.tolist() for d in tiny.documents(5, 3, 7, 4, 1, 6, seed=1)]
LENGTHS = torch.tensor([len(p) for p in PROMPTS])


def opened(family: str = "qwen3_moe") -> Any:
    return moestro.open(tiny.make(family).model)


def random_injection(view: Any, seed: int = 0) -> SoftInjection:
    generator = torch.Generator().manual_seed(seed)
    embedding = {h.index: torch.randn(h.num_heads, h.head_dim, generator=generator) for h in view.heads}
    return SoftInjection(embedding, {n: torch.rand(len(t), generator=generator) for n, t in embedding.items()})


class Inputs:
    """{layer: input of the output projection [B, T, ...] of the last forward pass}, changed at the last token."""

    def __init__(self, view: Any, injection: SoftInjection | None = None):
        self.view, self.injection, self.seen = view, injection, dict[int, Tensor]()

    def __enter__(self) -> "Inputs":
        self.hooks = [h.module.o_proj.register_forward_pre_hook(self._hook(h)) for h in self.view.heads]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, head: Any) -> Any:
        def run(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            self.seen[head.index] = args[0].detach().clone()
            if self.injection is None:
                return None
            new = args[0].clone()
            z = new[:, -1].view(-1, head.num_heads, head.head_dim)
            alpha = self.injection.alpha[head.index][:, None]
            new[:, -1] = ((1 - alpha) * z + alpha * self.injection.embedding[head.index]).flatten(1)
            return (new,)

        return run


# --- where it acts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_mixed_at_the_last_token_and_nowhere_else(family: str, side: str) -> None:
    view = opened(family)
    injection = random_injection(view)
    inputs = tiny.padded([torch.tensor(p) for p in PROMPTS], side)
    before = tiny.logits_of(view.model, inputs)
    with view.edits(injection):
        after = tiny.logits_of(view.model, inputs)
    for row, prompt in enumerate(PROMPTS):
        real = inputs["attention_mask"][row].nonzero().flatten()
        assert_close(after[row, real[:-1]], before[row, real[:-1]], **FP32)
        with Inputs(view, injection), torch.no_grad():  # by plain hooks, one prompt at a time
            expected = view.model(torch.tensor([prompt])).logits[0, -1]
        assert_close(after[row, real[-1]], expected, **FP32)
        assert not torch.allclose(after[row, real[-1]], before[row, real[-1]], atol=1e-2)


def test_alpha_of_zero_changes_nothing_and_of_one_leaves_nothing_of_the_prompt() -> None:
    view = opened()
    injection = random_injection(view)
    inputs = {"input_ids": torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])}
    with view.edits(constant(injection.embedding, 0.0)):
        assert_close(tiny.logits_of(view.model, inputs), view.model(**inputs).logits.detach(), **FP32)
    with view.edits(constant(injection.embedding, 1.0)), Inputs(view) as seen:
        tiny.logits_of(view.model, inputs)
    for layer, given in seen.seen.items():
        assert_close(given[:, -1], injection.embedding[layer].flatten().expand(2, -1), **FP32)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_injected_once_where_the_prompt_ends(family: str, options: dict[str, Any]) -> None:
    view = opened(family)
    injection = random_injection(view)
    wanted = dict(max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    together = generate(view, injection, PROMPTS, **wanted, **options)
    assert together.shape == (len(PROMPTS), 4)
    differ = 0
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        beams = {k: v for k, v in options.items() if k == "num_beams"}
        with view.edits(injection):  # with a cache, "last" is the prompt's last token alone; one token is a prompt too
            alone = view.model.generate(ids, do_sample=False, **wanted, **beams)[0, len(prompt) :]
        assert torch.equal(together[row], alone)
        differ += not torch.equal(alone, view.model.generate(ids, do_sample=False, **wanted, **beams)[0, len(prompt) :])
    assert differ > 0


def test_rows_that_are_not_named_stay_as_they_are() -> None:
    view = opened()
    injection = random_injection(view)
    ids = torch.tensor([PROMPTS[0]] * 3)
    some = SoftInjection(injection.embedding, injection.alpha, rows=[1])
    with view.edits(some), torch.no_grad():
        logits = view.model(ids).logits
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0, -1], logits[1, -1])


# --- the embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_the_mean_of_what_goes_into_the_output_projection(family: str) -> None:
    view = opened(family)
    embedding = task_embedding(view, PROMPTS, batch_size=4, progress=False)
    sums: dict[int, Tensor] = {}
    for prompt in PROMPTS:
        with Inputs(view) as inputs, torch.no_grad():
            view.model(torch.tensor([prompt]))
        for layer, given in inputs.seen.items():
            sums[layer] = sums.get(layer, 0) + given[0, -1]
    for layer, t in embedding.items():
        assert_close(t.flatten(), sums[layer] / len(PROMPTS), **FP32)
    first, second = LastTokenHeads(), LastTokenHeads()
    view.observe([tiny.padded([torch.tensor(p) for p in PROMPTS[:2]], "left")], [first], progress=False)
    view.observe([tiny.padded([torch.tensor(p) for p in PROMPTS[2:]], "left")], [second], progress=False)
    second.merge(first)
    for layer, t in second.result().items():
        assert_close(t, embedding[layer], **FP32)


def test_examples_are_others_than_the_question() -> None:
    shown = [([10 + n], [50 + n, 1]) for n in range(6)]
    prompts = few_shot(shown, shots=3, count=20, lead=[2], seed=0)
    for prompt in prompts:
        assert prompt[0] == 2
        questions = [*prompt[1::3]]
        assert len(questions) == len(set(questions)) == 4
        assert [*prompt[2::3]] == [q + 40 for q in questions[:-1]]
    assert len({tuple(p) for p in prompts}) > 10
    assert prompts == few_shot(shown, shots=3, count=20, lead=[2], seed=0)
    with pytest.raises(ValueError, match="shots=6 and a question from 6 pairs; give at least 7"):
        few_shot(shown, shots=6)


# --- what is learned -------------------------------------------------------------------------------------------------


def task(view: Any, seed: int = 0, target: int = 77) -> Task:
    """Prompts whose answer is one token. The embedding of one layer speaks for it, the others are noise."""
    docs = [d.tolist() for d in tiny.documents(*([5, 3, 6, 4] * 4), seed=seed)]
    generator = torch.Generator().manual_seed(seed)
    embedding = {h.index: 3 * torch.randn(h.num_heads, h.head_dim, generator=generator) for h in view.heads}
    last = view.heads[-1]
    wanted = view.model.lm_head.weight[target].detach() @ last.module.o_proj.weight.detach()
    embedding[last.index] = 20 * (wanted / wanted.norm()).view(last.num_heads, last.head_dim)
    return Task(embedding, docs[:8], [[target, 5]] * 8, docs[8:], [[target, 6]] * 8)


def test_training_finds_the_heads_that_speak_for_the_answer() -> None:
    view = opened()
    learned = task(view)
    state = tiny.state_of(view.model)
    selected = select_heads(view, learned, steps=60, every=20, progress=False)
    assert [*selected.losses] == [0, 20, 40, 60]
    assert selected.losses[selected.step] == min(selected.losses.values())
    assert selected.losses[selected.step] < selected.losses[0] - 0.3
    injection = selected.injection(learned.embedding)
    last = view.heads[-1].index
    assert {layer for layer, _ in injection.top_heads(3)} == {last}
    assert selected.alpha[last].mean() > 0.7
    questions = learned.validation_prompts
    assert first_token_accuracy(view, questions, learned.validation_answers, injection).mean() == 1
    assert first_token_accuracy(view, questions, learned.validation_answers).mean() < 0.5
    assert tiny.same_state(view.model, state)
    assert all(p.requires_grad and p.grad is None for p in view.model.parameters())
    assert not tiny.hooks_on(view.model)


def test_the_theta_of_the_least_validation_loss_is_kept() -> None:
    """Validation asks for another answer than is trained for, so that the last theta is not the best."""
    view = opened()
    one, other = task(view, target=77), task(view, target=78)
    wrong = Task(one.embedding, one.prompts, one.answers, one.validation_prompts, other.validation_answers)
    selected = select_heads(view, wrong, steps=30, every=10, progress=False)
    assert selected.step == min(selected.losses, key=lambda step: selected.losses[step]) < 30
    assert selected.losses[30] > selected.losses[selected.step]
    stopped = select_heads(view, wrong, steps=max(selected.step, 1), every=10, progress=False)
    if selected.step:
        assert stopped.step == selected.step
    assert all(torch.equal(alpha, stopped.alpha[layer]) for layer, alpha in selected.alpha.items())


def test_one_theta_serves_several_tasks_each_with_its_own_embedding() -> None:
    view = opened()
    one, other = task(view, seed=0, target=77), task(view, seed=1, target=78)
    selected = select_heads(view, one, other, steps=80, every=40, progress=False)
    assert selected.losses[selected.step] < selected.losses[0] - 1
    for learned in (one, other):
        questions, answers = learned.validation_prompts, learned.validation_answers
        injected = first_token_accuracy(view, questions, answers, selected.injection(learned.embedding)).mean()
        assert injected > first_token_accuracy(view, questions, answers).mean()
    tests = {"one": (one.embedding, one.validation_prompts, one.validation_answers)}
    tests["swapped"] = (other.embedding, one.validation_prompts, one.validation_answers)
    matrix = head_transfer(view, {"both": selected}, tests)
    assert matrix["both"]["one"].mean() > matrix["both"]["swapped"].mean()


def test_heads_are_ranked_by_what_each_does_alone() -> None:
    view = opened()
    learned = task(view)
    ranked = rank_heads(view, learned.embedding, learned.prompts, learned.answers)
    assert len({head for head, _ in ranked}) == len(ranked) == sum(h.num_heads for h in view.heads)
    assert [fall for _, fall in ranked] == sorted((fall for _, fall in ranked), reverse=True)
    (layer, head), fall = ranked[0]
    assert layer == view.heads[-1].index

    def loss(*edits: Any) -> float:
        with view.edits(*edits), torch.no_grad():
            logits = [view.model(torch.tensor([p])).logits[0, -1] for p in learned.prompts]
        return float(torch.stack([-z.log_softmax(0)[77] for z in logits]).mean())

    assert_close(loss() - loss(replaced(learned.embedding, [(layer, head)])), fall, **FP32)


# --- files and refusals ----------------------------------------------------------------------------------------------


def test_a_steering_file_brings_the_injection_back(tmp_path) -> None:
    view = opened()
    injection = random_injection(view)
    path = Steering.of(view, injection, learned_from="a test").save(tmp_path / "task.json")
    assert json.loads(path.read_text())["edits"][0]["kind"] == "soft_injection"
    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    with view.edits(injection):
        expected = tiny.logits_of(view.model, inputs)
    with Steering.load(path).on(view):
        assert torch.equal(tiny.logits_of(view.model, inputs), expected)
    with pytest.raises(ValueError, match="no file can name positions"):
        Steering.of(view, injection.ending_at(LENGTHS))


def test_a_dense_model_is_injected_into_and_told_from_another(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = dict(n_embd=48, n_layer=2, n_head=3, vocab_size=131, n_positions=64)
    models = [GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).eval() for _ in range(2)]
    view, other = (moestro.open(model, experts=False) for model in models)
    embedding = task_embedding(view, PROMPTS, progress=False)
    setup = Steering.of(view, constant(embedding, 0.5))
    plain = tiny.logits_of(view.model, {"input_ids": torch.tensor([PROMPTS[0]])})
    with setup.on(view):
        steered = tiny.logits_of(view.model, {"input_ids": torch.tensor([PROMPTS[0]])})
    assert not torch.allclose(plain, steered)
    with pytest.raises(ValueError, match="for another checkpoint"):
        setup.check(other)


def test_what_does_not_fit_is_refused_before_work_starts() -> None:
    view = opened()
    learned = task(view)
    narrow = {layer: t[:, :-1] for layer, t in learned.embedding.items()}
    with pytest.raises(ValueError, match=r"embedding of \(6, 15\) in layer 0, which has 6 heads of width 16"):
        view.edits(constant(narrow, 0.5)).__enter__()
    with pytest.raises(ValueError, match="it is of another model"):
        select_heads(view, Task(narrow, *[getattr(learned, n) for n in list(learned.__dict__)[1:]]))
    high = {layer: torch.full((6,), 1.5) for layer in learned.embedding}
    with pytest.raises(ValueError, match=r"alpha from 1.5 to 1.5; it lies between 0 and 1"):
        view.edits(SoftInjection(learned.embedding, high)).__enter__()
    with pytest.raises(ValueError, match="the embedding has no head 6 in layer 1"):
        replaced(learned.embedding, [(1, 6)])
    with pytest.raises(ValueError, match="0 tasks, steps=400"):
        select_heads(view)
    with pytest.raises(ValueError, match="steps=0"):
        select_heads(view, learned, steps=0)
    with pytest.raises(ValueError, match="differ in shape"):
        select_heads(view, learned, Task(narrow, *[getattr(learned, n) for n in list(learned.__dict__)[1:]]))
    with pytest.raises(ValueError, match="6 prompts and 2 answers"):
        first_token_accuracy(view, PROMPTS, [[1], [2]])
    with pytest.warns(UserWarning, match="6 different answers begin with 1 different tokens"):
        first_token_accuracy(view, PROMPTS, [[9, n] for n in range(6)])
    assert not tiny.hooks_on(view.model)


def test_a_space_that_is_a_token_goes_to_the_prompt() -> None:
    view = moestro.open("quartet")
    prompts, answers = aligned(view, ["2 + 2 =", "a = red ? a ="], [" 4\n", " red\n"])
    tokens = view.tokenizer.decode
    assert [tokens(p[-1:]) for p in prompts] == [" ", " ="]
    assert [tokens(a) for a in answers] == ["4\n", " red\n"]


def test_top_heads_are_those_of_the_largest_alpha() -> None:
    alpha = {0: torch.tensor([0.1, 0.9]), 3: torch.tensor([0.5, 0.2])}
    found = Selection(alpha, 0, {0: math.nan}).injection({0: torch.zeros(2, 4), 3: torch.zeros(2, 4)})
    assert found.top_heads(3) == [(0, 1), (3, 0), (3, 1)]
